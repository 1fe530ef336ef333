"""report.html: one self-contained file that shows what a run did, from images to answers.

People look at it first, so every number has its interval and the page says what they do not mean. It only
reads a workdir, and works for one that is not finished. Neighbours: the run's entry calls it at its end.

    from fundus_jax.report import write_report
    write_report(Path("runs/demo"))
"""

from collections.abc import Mapping
from pathlib import Path

from fundus_jax.files import write_atomic
from fundus_jax.records import ConfigError, Example
from fundus_jax.report.collect import collect, collect_rollouts
from fundus_jax.report.page import render, render_rollouts

__all__ = ["write_report", "write_rollouts"]


def write_rollouts(workdir: Path, step: int, examples: Mapping[str, Example]) -> Path:
    """Write `workdir`/rollouts/<step>.html, which shows the jsonl beside it, and return its path.

    examples: by their id, those of the groups.
    """
    target = Path(workdir) / "rollouts" / f"{step:06d}.html"
    page = render_rollouts(collect_rollouts(Path(workdir), step), step, examples)
    write_atomic(target, page.encode("utf-8", errors="replace"))
    return target


def write_report(workdir: Path) -> Path:
    """Write `workdir`/report.html and return its path. Raises ConfigError when there is no such directory."""
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise ConfigError(f"{workdir} is no directory; give the workdir of a run")
    target = workdir / "report.html"
    page = render(collect(workdir))
    # "replace": a damaged file may hold halves of surrogate pairs, which UTF-8 has no bytes for.
    write_atomic(target, page.encode("utf-8", errors="replace"))
    return target
