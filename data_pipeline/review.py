"""A page on this machine where a clinician reads traces and decides: accept, correct, reject.

    python -m data_pipeline.review --port=8765 --data=WORKDIR/data --decisions=DIR --reviewer=NAME

It shows the image with its boxes, the findings with their votes, the knowledge with its sources, the trace
with its claims marked, and what the quality check said. Each decision is a line of DIR/NAME.jsonl, on the
disk before the page goes on; `data.decisions` of a run, and `data_pipeline.reviewed`, honour them.
docs/review.md is for the clinician. Neighbours: `reviewing/` has the page and its server.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging

from data_pipeline.reviewing.desk import open_desk
from data_pipeline.reviewing.index import build
from data_pipeline.reviewing.server import Server
from fundus_jax.records import ConfigError, DataError


def start(data: Path, decisions: Path, reviewer: str, port: int) -> Server:
    """The server, listening; call its `serve_forever`. Raises ConfigError or DataError with what to change.

    Args:
        data: folder of the finished directories examples, findings, traces and knowledge.
        decisions: folder of the decision files; it is made.
        reviewer: names the file that this session writes.
        port: of the loopback address; 0 takes any that is free.
    """
    begun = time.monotonic()
    index = build(data)
    desk = open_desk(index, decisions, reviewer)
    logging.info("%d traces are listed, in %.1f s", len(index), time.monotonic() - begun)
    if desk.unknown or desk.void:
        logging.warning(
            "%d earlier decisions are about traces that are not here, %d about texts that have changed since",
            desk.unknown, len(desk.void),
        )  # fmt: skip
    return Server(desk, port)


def _define_flags() -> None:
    flags.DEFINE_integer("port", 8765, "Port on the loopback address; 0 takes any that is free.", 0, 65535)
    flags.DEFINE_string("data", None, "Folder of examples, findings, traces and knowledge.", required=True)
    flags.DEFINE_string("decisions", None, "Folder of the decision files, outside of DATA.", required=True)
    flags.DEFINE_string("reviewer", None, "Your name, as a file name; each reviewer has one.", required=True)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every option begins with --")
    values = flags.FLAGS
    try:
        server = start(Path(values.data), Path(values.decisions), values.reviewer, values.port)
    except (ConfigError, DataError) as error:
        raise SystemExit(f"review: {error}") from error
    try:
        print(
            f"\nOpen {server.address}\nDecisions go to {server.desk.ledger.path}. Ctrl-C ends.\n", flush=True
        )
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        server.desk.ledger.close()


if __name__ == "__main__":
    _define_flags()
    app.run(main)
