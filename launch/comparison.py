"""The tables of set-ups A to J in the columns of the paper's Table 5, from the files of their workdirs alone.

One is of the published benchmarks, where a run was asked them (`benchmarked` says where these reports stand);
one of each run's own held-out questions, which no other work has numbers for. They are never mixed. A column
that the questions asked do not fill is "–": phantoms know no vessels, layers or attributes, and a benchmark's
mean is only given where all of its columns are. Neighbour: `setups` makes the runs.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fundus_jax.evaluation import scores
from fundus_jax.files import write_atomic
from fundus_jax.records import ConfigError
from launch import benchmarked
from launch.config import names


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A row: its file in configs/setups, its name in the paper, the row whose finished stages it may take
    over, and the heading above it."""

    recipe: str
    title: str
    parent: str = ""
    heading: str = ""


SETUPS = {
    "A": Setup(recipe="a_base", title="Base"),
    "B": Setup(recipe="b_sft", title="A + SFT", parent="A", heading="Training without reasoning trace:"),
    "C": Setup(recipe="c_grpo", title="A + GRPO", parent="A"),
    "D": Setup(recipe="d_sft_grpo", title="A + SFT + GRPO", parent="B"),
    "E": Setup(recipe="e_sft_traces", title="A + SFT", parent="A", heading="Training with reasoning traces:"),
    "F": Setup(recipe="f_sft_grpo_traces", title="A + SFT + GRPO", parent="E"),
    "G": Setup(recipe="g_fundus_r1", title="Fundus-R1", parent="E"),
    "H": Setup(
        recipe="h_findings_only",
        title="Using the VF item only",
        parent="E",
        heading="Ablation on the process reward:",
    ),
    "I": Setup(recipe="i_knowledge_only", title="Using the DK item only", parent="E"),
    "J": Setup(recipe="j_sum", title="Summing the VF and DK items", parent="E"),
}
# The paper's columns: benchmark, column, and where the number of our held-out questions stands in a report of
# `evaluation`; () where they have no equivalent. FunBench's is its own score, the other two's is accuracy.
COLUMNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Overall", "Avg", ()),
    ("Overall", "FunBench", ("funbench", "overall")),
    ("Overall", "Omni-Fundus", ()),
    ("Overall", "GMAI-Fundus", ()),
    *(("FunBench", level, ("by_level", level, "funbench")) for level in ("L1", "L2", "L3", "L4")),
    ("Omni-Fundus", "MR", ("by_task", "modality", "accuracy")),
    ("Omni-Fundus", "AI", ()),
    ("Omni-Fundus", "LG", ("by_task", "dr_grade", "accuracy")),
    ("Omni-Fundus", "DD", ("by_task", "disease", "accuracy")),
    *(("GMAI-Fundus", name, ()) for name in ("AR", "NT", "BVR")),
    ("GMAI-Fundus", "DD", ("by_task", "disease", "accuracy")),
    ("GMAI-Fundus", "SG", ("by_task", "dr_grade", "accuracy")),
)
# Beside the paper's: kind of answers, column, where.
MORE: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("greedy", "all questions", ("accuracy",)),
    ("sampled", "sampled", ("accuracy",)),
    ("greedy", "in the format", ("well_formed",)),
    ("greedy", "finding F1", ("findings", "f1")),
)
# Rows compared in pairs: first - second, and what the difference is made by.
PAIRS = (
    ("G", "F", "the process reward"),
    ("F", "E", "GRPO after SFT, with traces"),
    ("D", "B", "GRPO after SFT, without traces"),
    ("E", "B", "traces, in SFT"),
    ("F", "D", "traces, in SFT and GRPO"),
    ("G", "H", "equation 4 against findings only"),
    ("G", "I", "equation 4 against knowledge only"),
    ("G", "J", "equation 4 against the sum"),
)
# What is compared: heading, kind of answers, level or "" for all.
COMPARED = (
    ("greedy, all questions", "greedy", ""),
    ("greedy diagnosis", "greedy", "L4"),
    ("sampled answers", "sampled", ""),
)
NOT_ASKED = "No run has been asked them: evaluation/{funbench,omnimedvqa,gmai}/report.json is in no workdir."
NOTES = """
Per cent with 95 % bootstrap intervals; n is the number of answers, of findings for their F1, and of
questions in the differences. FunBench's columns are its score, the mean over labels of the harmonic mean of
sensitivity and specificity; the others are accuracy. Held-out questions are answered greedily, but "sampled"
(temperature 1).

* The intervals resample patients. They do not say what another seed of the training would have given: each
  row is one run, and the budgets are a few minutes of a CPU.
* "–": nothing that was asked is an equivalent. A benchmark's mean needs all of its columns, and Avg all three
  benchmarks. Of the held-out questions both columns DD are the same ones.
* Where the images are phantoms, they are drawn, and no number has a clinical meaning. The base policy is then
  a small one whose vision tower was warmed up and which has no language: A answers next to nothing, and C,
  whose rollouts are next to never rewarded, has nothing to learn from. In the paper these two start from
  Qwen2.5-VL.
"""


def tabulate(root: Path) -> str:
    """Write `root`/setups.json and setups.md from the workdirs root/a to root/j, as far as they have come,
    and return the page. Raises ConfigError where runs were asked different questions."""
    reports = {letter: benchmarked.read(root / letter.lower()) for letter in SETUPS}
    benchmarked.check(reports)
    rows = {letter: row_of(root / letter.lower(), setup, reports[letter]) for letter, setup in SETUPS.items()}
    differences = [
        {"first": first, "second": second, "by": by} | compared(root / first.lower(), root / second.lower())
        for first, second, by in PAIRS
        if all(row and row["more"]["all questions"] for row in (rows[first], rows[second]))
    ]
    facts = {"setups": {letter: row for letter, row in rows.items() if row}, "differences": differences}
    page = render(rows, differences, benchmarked.notes(reports))
    write_atomic(root / "setups.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    write_atomic(root / "setups.md", page)
    return page


def row_of(workdir: Path, setup: Setup, reports: benchmarked.Reports) -> dict[str, Any] | None:
    """What a run says, by the published benchmarks and by its held-out questions: every column's figure (None
    where nothing fills it). None: neither has been asked yet."""
    config, summary = workdir / "config.json", workdir / "evaluation" / "summary.json"
    if not config.is_file():
        return None
    stored = _read(config)
    stage = last_stage(stored["config"])
    entry = _read(summary)["stages"].get(stage, {}) if summary.is_file() else {}
    if not entry and not reports:
        return None
    held_out = {
        f"{benchmark} {name}": _figure(entry.get("greedy"), path) for benchmark, name, path in COLUMNS
    }
    if any(held_out[f"FunBench {level}"] is None for level in ("L1", "L2", "L3", "L4")):
        held_out["Overall FunBench"] = None  # a mean of other levels
    more = {name: _figure(entry.get(kind), path) for kind, name, path in MORE}
    columns = [(benchmark, name) for benchmark, name, _ in COLUMNS]
    return {
        "title": setup.title,
        "run": stored["config"]["name"],
        "config_hash": stored["hash"],
        "after": stage,
        "published": benchmarked.figures(reports, columns),
        "held_out": held_out,
        "more": more,
    }


def last_stage(config: dict[str, Any]) -> str:
    """The stage whose policy a run is for."""
    return (names(config["stages"]) or ("base",))[-1]


def compared(first: Path, second: Path) -> dict[str, Any]:
    """Accuracy of the run `first` minus that of `second`, paired over the same questions: name of COMPARED ->
    figure. Raises ConfigError for different questions."""
    found = {}
    for name, kind, level in COMPARED:
        ours, theirs = (_hits(workdir, kind, level) for workdir in (first, second))
        if ours.keys() != theirs.keys():
            raise ConfigError(
                f"{first} and {second} were asked other questions ({kind}); compare runs of one size"
            )
        gains = [ours[key] - theirs[key] for key in ours]
        units = [unit for _, unit in ours]
        found[name] = scores.mean(np.asarray(gains), units=units).as_dict()
    return {"differences": found}


def _hits(workdir: Path, kind: str, level: str) -> dict[tuple[str, str], float]:
    """(question, patient) -> share of its answers that are right."""
    stage = last_stage(_read(workdir / "config.json")["config"])
    path = workdir / "evaluation" / f"{stage}-{kind}" / "predictions.jsonl"
    right: dict[tuple[str, str], list[bool]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        if level in ("", one["level"]):
            right.setdefault((one["id"], one["unit"]), []).append(one["correct"])
    return {key: float(np.mean(values)) for key, values in right.items()}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _figure(report: Any, path: tuple[str, ...]) -> dict[str, Any] | None:
    """The figure at `path` of a report; None where there is none, or it is undefined."""
    for key in path:
        report = report.get(key) if isinstance(report, dict) else None
    return report if path and isinstance(report, dict) and report.get("value") is not None else None


def render(
    rows: dict[str, dict[str, Any] | None], differences: list[dict[str, Any]], notes: list[str]
) -> str:
    """The page: the paper's table of the benchmarks, with `notes` on their scores, and of held-out questions,
    what stands beside it, the differences."""
    marks = {"Omni-Fundus": "O·", "GMAI-Fundus": "G·"}
    heads = [f"{marks.get(benchmark, '')}{name}" for benchmark, name, _ in COLUMNS]
    page = ["# Set-ups A to J (the paper's Table 5)", "", "O·: Omni-Fundus, G·: GMAI-Fundus.", ""]
    page += ["## The published benchmarks", ""]
    page += [*_table(rows, "published", heads), "", *notes, ""] if notes else [NOT_ASKED, ""]
    page += ["## Held-out questions of the runs themselves, in the same columns", ""]
    page += [*_table(rows, "held_out", heads), "", "## Beside the paper's columns", ""]
    page += [*_table(rows, "more", [name for _, name, _ in MORE]), "", "## Differences, in pairs", ""]
    page += ["Accuracy of the first row minus that of the second, in points, over the same questions.", ""]
    headings = [name for name, _, _ in COMPARED]
    page += [f"| rows | made by | {' | '.join(headings)} |", f"|---|---|{'---|' * len(headings)}"]
    for one in differences:
        cells = [
            f"{_cell(one['differences'][name], '+')} (n {one['differences'][name]['n']})" for name in headings
        ]
        page.append(f"| {one['first']} − {one['second']} | {one['by']} | {' | '.join(cells)} |")
    return "\n".join([*page, NOTES])


def _table(rows: dict[str, dict[str, Any] | None], part: str, heads: list[str]) -> list[str]:
    lines = [f"| # | Training set-up | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
    known = [list(row[part].values()) for row in rows.values() if row]
    counts = [sorted({str(one["n"]) for one in column if one}) for column in zip(*known, strict=True)]
    for letter, row in rows.items():
        setup = SETUPS[letter]
        if setup.heading:
            lines.append(f"| | *{setup.heading}* |{' |' * len(heads)}")
        cells = ["not run", *[""] * (len(heads) - 1)]
        if row:
            cells = [
                _cell(figure) + (f" (n {figure['n']})" if figure and len(ns) > 1 else "")
                for figure, ns in zip(row[part].values(), counts, strict=True)
            ]
        lines.append(f"| {letter} | {setup.title} | {' | '.join(cells)} |")
    told = [ns[0] if len(ns) == 1 else "as given" if ns else "–" for ns in counts] or ["–"] * len(heads)
    return [*lines, f"| | n | {' | '.join(told)} |"]


def _cell(figure: dict[str, Any] | None, sign: str = "") -> str:
    if figure is None or figure["value"] is None:
        return "–"
    if figure["low"] is None:
        return f"{100 * figure['value']:{sign}.1f}"
    value, low, high = (100 * figure[key] for key in ("value", "low", "high"))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"
