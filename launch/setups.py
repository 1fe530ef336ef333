"""The ten set-ups of the paper's Table 5, one after another, on phantoms and a CPU, and their table.

    python launch/setups.py --workdir=runs/setups

Each is an ordinary run of launch/run.py with its file of configs/setups, in runs/setups/a to j. It begins
with the finished stages of its neighbour where these are the same (--parent, launch/inherit.py): data and
base are made once, SFT twice, GRPO seven times. The same command again goes on where it stopped. It ends
with setups.md and setups.json in the workdir, and prints the page; --only_table makes these from what is
there. About half an hour and 3 GiB on two CPU cores. Runs of real size are started one by one, with the
commands that their files give, and are tabulated here where their workdirs are called a to j. What the
published benchmarks say of them is read from a/evaluation/funbench/report.json, and so for omnimedvqa and
gmai, where the evaluation command has written it (launch/benchmarked.py); each run's own held-out questions
stand in a table apart.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging

from fundus_jax import stop
from launch import run
from launch.comparison import SETUPS, tabulate

flags.DEFINE_enum("size", "phantom", ("phantom", "quick"), "quick: every stage in seconds, learning nothing.")
flags.DEFINE_bool("only_table", False, "Run nothing; make the table from the runs that are there.")
flags.FLAGS.set_default("workdir", "runs/setups")


def run_all(root: Path, size: str, mesh: str) -> None:
    """Run the set-ups in their order, each to its end. Raises ConfigError or DataError as `launch.run.run`
    does."""
    for letter, setup in SETUPS.items():
        logging.info("=== set-up %s: %s", letter, setup.title)
        config = importlib.import_module(f"configs.setups.{setup.recipe}").get_config(size)
        workdir = root / letter.lower()
        words = ["python launch/run.py", f"--config=configs/setups/{setup.recipe}.py:{size}"]
        parent = root / setup.parent.lower() if setup.parent else ""
        words += [f"--workdir={workdir}", *([f"--parent={parent}"] if parent else [])]
        run.run(config, workdir, mesh, command=" ".join(words), parent=parent)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    args = flags.FLAGS
    root = Path(args.workdir)
    logging.get_absl_handler().addFilter(run.quiet)
    with run.ending():
        if not args.only_table:
            stop.install(args.grace)
            run_all(root, args.size, args.mesh)
        page = tabulate(root)
    print(page)


if __name__ == "__main__":
    app.run(main)
