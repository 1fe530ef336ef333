"""Numbers of the paper beside ours: a table in the layout of its Table 5, and of its Table 7.

    python -m fundus_jax.evaluation.paper FUNBENCH_OUT OMNI_OUT GMAI_OUT --name="3B, this run" --out=paper.md

Each folder is what the evaluation command wrote for one benchmark. Two numbers may only be compared where the
questions and the rules are the same; the page says what ours are. Neighbours: published.py (our scores),
scores.py (the averages).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from fundus_jax.evaluation import scores
from fundus_jax.files import write_atomic
from fundus_jax.records import ConfigError

# Table 5, per cent: Avg, FunBench, Omni-Fundus, GMAI-Fundus; L1 to L4; MR AI LG DD; AR NT BVR DD SG. All 3B.
TABLE_5 = """
A: Qwen2.5-VL-3B | 48.3 41.0 66.4 37.4 88.1 40.8 21.7 13.6 96.4 87.4 44.6 37.3 31.3 25.3 74.7 37.1 18.6
B: SFT, no traces | 53.8 58.9 71.1 31.4 69.3 95.8 20.4 50.0 94.2 91.9 51.7 46.4 24.7 16.0 65.3 33.4 17.6
C: GRPO | 55.5 53.9 68.1 44.6 76.8 71.5 27.2 40.2 92.4 92.8 36.2 50.9 38.7 27.3 85.3 32.0 39.7
D: B + GRPO | 52.5 53.1 71.3 33.0 88.4 57.7 30.5 35.7 95.4 93.8 43.4 52.7 28.0 19.3 37.3 43.3 37.1
E: SFT, traces | 56.5 61.9 67.7 39.8 90.4 83.8 18.1 55.4 97.6 89.3 26.2 57.7 38.0 10.0 81.3 41.2 28.5
F: E + GRPO | 59.0 64.7 71.4 41.0 92.1 94.3 29.8 42.7 92.7 87.2 53.7 51.8 22.0 24.7 72.0 51.0 35.2
G: Fundus-R1 | 65.6 67.1 79.8 50.1 90.5 90.9 33.9 52.9 93.8 92.1 63.4 69.7 38.0 16.7 92.0 57.0 46.9
H: findings only | 60.3 63.2 75.6 42.1 91.0 89.7 30.7 41.6 93.2 91.7 54.5 63.0 31.3 14.0 69.3 51.5 44.2
I: knowledge only | 63.8 66.6 77.4 47.5 92.8 94.5 31.4 47.9 97.0 93.8 58.4 60.3 40.7 11.3 90.7 52.9 41.7
J: the sum | 61.8 61.7 76.7 47.0 93.4 82.6 31.7 39.1 94.3 96.0 57.1 59.5 35.3 12.0 88.0 52.6 47.1
"""
# Table 7, per cent: FunBench, Omni-Fundus, GMAI-Fundus, Avg.
TABLE_7 = """
Qwen2.5-VL-3B | 41.0 66.4 37.4 48.3
InternVL2.5-8B | 51.0 55.6 48.2 51.6
Qwen2.5-VL-7B | 46.1 68.1 42.1 52.1
HealthGPT-M3-7B | 52.4 64.0 46.3 54.2
HuatuoGPT-Vision-7B | 59.0 69.6 47.3 58.6
Lingshu-7B | 55.1 97.7 58.7 70.5
MedVLM-R1 | 46.2 56.3 37.1 46.6
QoQ-Med-7B | 62.5 57.9 32.8 51.1
FundusExpert-8B | 48.3 78.4 71.1 65.9
OphthaReason-Intern | 44.9 57.7 44.1 48.9
OphthaReason-Qwen | 48.8 62.4 49.7 53.6
Med-R1-fundus | 48.2 79.2 36.5 54.7
Fundus-R1-3B | 67.1 79.8 50.1 65.6
Fundus-R1-7B | 69.2 91.1 61.1 73.8
"""
BENCHMARKS = tuple(scores.PAPER_GROUPS)
_PARTS = tuple((name, part) for name, parts in scores.PAPER_GROUPS.items() for part in parts)
_NOTES = """
Per cent. The rows of the paper are copied from its tables (Fundus-R1, arXiv); it prints neither intervals nor
the number of questions. Ours have 95 % bootstrap intervals over patients or images, and n answers. A
benchmark counts where all of its parts do, and Avg where all three benchmarks do. Whether the paper asked the
same questions of Omni-Fundus and GMAI-Fundus, its text does not say (docs/evaluation.md).
"""

Published = Mapping[str, Any]  # a report's `published`


def render(measured: Mapping[str, Published], name: str, notes: Sequence[str] = ()) -> str:
    """Both tables as Markdown: the paper's rows, and below them, apart, ours.

    measured: benchmark -> the published score of a report, for those that were measured. name: of our row.
    """
    whole = _averages(measured)
    parts = [_value(measured.get(bench), part) for bench, part in _PARTS]
    five = ["Avg", *BENCHMARKS, *(part for _, part in _PARTS)]
    above = ["", "Overall", "", "", "", *_spans()]
    ours_5 = [name, *whole, *parts]
    ours_7 = [name, *whole[1:], whole[0]]
    table_5 = _table(["set-up", *five], _rows(TABLE_5), ours_5, above)
    table_7 = _table(["model", *BENCHMARKS, "Avg"], _rows(TABLE_7), ours_7)
    lines = [f"- {bench}, {line}" for bench, one in measured.items() for line in _told(one)]
    lines += [f"- {note}" for note in notes]
    told = ["Our row:", "", *lines, ""] if lines else []
    sections = ["## Layout of Table 5", "", table_5, "", "## Layout of Table 7", "", table_7, "", *told]
    return "\n".join([f"# Beside the paper\n{_NOTES}", *sections])


def _rows(table: str) -> dict[str, list[str]]:
    """Name -> cells of a table of the paper."""
    split = (line.split(" | ") for line in table.strip().splitlines())
    return {name: cells.split() for name, cells in split}


def _spans() -> list[str]:
    """The line of benchmarks above their parts."""
    return [
        bench if k == 0 else "" for bench, parts in scores.PAPER_GROUPS.items() for k in range(len(parts))
    ]


def _averages(measured: Mapping[str, Published]) -> list[str]:
    """Avg and the three benchmarks of our row."""
    values = {bench: measured[bench]["score"]["value"] for bench in BENCHMARKS if bench in measured}
    known = {bench: 100 * value for bench, value in values.items() if value is not None}
    average = f"{scores.paper_average('overall', known):.1f}" if len(known) == len(BENCHMARKS) else "–"
    return [average, *(_value(measured.get(bench), "") for bench in BENCHMARKS)]


def _value(published: Published | None, part: str) -> str:
    if published is None:
        return "–"
    figure = published["groups"].get(part) if part else published["score"]
    if figure is None or figure["value"] is None:
        return "–"
    value, low, high = (100 * figure[key] for key in ("value", "low", "high"))
    return f"**{value:.1f}** [{low:.1f}, {high:.1f}] n {figure['n']}"


def notes_of(report: Mapping[str, Any]) -> list[str]:
    """What has to be known of a report's scores beside others: why they are not of the whole benchmark, and
    how its questions were asked."""
    benchmark = report.get("benchmark", {})
    unlike = benchmark.get("unlike", [])
    asked = [f"asked with {' '.join(unlike)}"] if unlike else []
    return [*(f"PARTIAL: {reason}" for reason in report["partial"]), *benchmark.get("notes", []), *asked]


def _told(published: Published) -> list[str]:
    lines = [f"extraction {published['extraction']}: {published['unparsed']} answers named no option"]
    return lines + [f"no question of {part}" for part in published["lacking"]]


def _table(
    head: Sequence[str], paper: Mapping[str, Sequence[str]], ours: Sequence[str], above: Sequence[str] = ()
) -> str:
    width = len(head)
    rows = [above, ["---"] * width, head] if above else [head, ["---"] * width]
    rows = [*rows, ["*the paper*", *[""] * (width - 1)], *([key, *row] for key, row in paper.items())]
    rows = [*rows, ["*measured here*", *[""] * (width - 1)], ours]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def of_folders(folders: Sequence[Path], name: str) -> str:
    """The page of evaluations on disk.

    Raises ConfigError for a folder without a report of a benchmark of the paper, or two of one.
    """
    measured: dict[str, Published] = {}
    notes = []
    for folder in folders:
        path = folder / "report.json"
        if not path.is_file():
            raise ConfigError(f"{path} is missing: give folders that the evaluation command has written")
        report = json.loads(path.read_text(encoding="utf-8"))
        published = report.get("published")
        if published is None or published["benchmark"] in measured:
            what = (
                "of no benchmark of the paper" if published is None else f"one more {published['benchmark']}"
            )
            raise ConfigError(f"{folder} is {what}; give at most one of each of {', '.join(BENCHMARKS)}")
        measured[published["benchmark"]] = published
        notes += [f"{published['benchmark']}: {note}" for note in notes_of(report)]
    return render(measured, name, notes)


def main(argv: Sequence[str]) -> None:
    """The command."""
    try:
        page = of_folders([Path(one) for one in argv[1:]], flags.FLAGS.name)
    except ConfigError as error:
        sys.exit(f"ConfigError: {error}")
    if flags.FLAGS.out:
        write_atomic(flags.FLAGS.out, page)
    print(page)


if __name__ == "__main__":
    flags.DEFINE_string("name", "this run", "What our row is called.")
    flags.DEFINE_string("out", "", "Write the page here too.")
    app.run(main)
