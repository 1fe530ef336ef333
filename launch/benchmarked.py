"""What the published benchmarks say of the runs of a comparison, in the paper's columns.

The evaluation command is told to write beside a run's own measurements, under the benchmark's name in it:

    python -m fundus_jax.evaluation.run --model=RUN/hf --benchmark=funbench ... --out=RUN/evaluation/funbench

and so for omnimedvqa and gmai. Neighbours: `comparison` puts these columns beside those of the runs' own
held-out questions; evaluation/paper.py puts them beside the paper's numbers.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fundus_jax.evaluation import paper, scores
from fundus_jax.records import ConfigError

FOLDERS = {"FunBench": "funbench", "Omni-Fundus": "omnimedvqa", "GMAI-Fundus": "gmai"}
# Flags that make it another benchmark; prompts differ, as some set-ups are asked for a trace and some not.
_ALIKE = ("extraction", "emode", "side", "modalities", "tasks", "limit")

Reports = Mapping[str, dict[str, Any]]  # the paper's name of a benchmark -> what the command reported


def read(workdir: Path) -> Reports:
    """The reports that stand in a run's directory. Raises ConfigError for one of another benchmark."""
    found = {}
    for name, folder in FOLDERS.items():
        path = workdir / "evaluation" / folder / "report.json"
        if path.is_file():
            found[name] = json.loads(path.read_text(encoding="utf-8"))
            if (found[name].get("published") or {}).get("benchmark") != name:
                raise ConfigError(f"{path} is no report of {name}: ask it with --benchmark={folder}")
    return found


def figures(reports: Reports, columns: Iterable[tuple[str, str]]) -> dict[str, dict[str, Any] | None]:
    """ "BENCHMARK COLUMN" -> the figure of each column; None where there is none.

    The average of the three has no interval, and is only given where all three have a score.
    """
    found = {}
    for benchmark, column in columns:
        name = column if benchmark == "Overall" else benchmark
        published = reports[name]["published"] if name in reports else {"score": None, "groups": {}}
        figure = published["score"] if benchmark == "Overall" else published["groups"].get(column)
        if (benchmark, column) == ("Overall", "Avg"):
            figure = _average(reports)
        found[f"{benchmark} {column}"] = figure if figure and figure["value"] is not None else None
    return found


def _average(reports: Reports) -> dict[str, Any] | None:
    known = {name: report["published"]["score"] for name, report in reports.items()}
    if known.keys() != FOLDERS.keys() or any(score["value"] is None for score in known.values()):
        return None
    value = scores.paper_average("overall", {name: score["value"] for name, score in known.items()})
    return {"value": value, "n": sum(score["n"] for score in known.values()), "low": None, "high": None}


def check(rows: Mapping[str, Reports]) -> None:
    """Raises ConfigError where rows, by their letters, were asked a benchmark in different ways."""
    first: dict[str, tuple[str, dict[str, Any]]] = {}
    for letter, reports in rows.items():
        for name, report in reports.items():
            flags = report["benchmark"]["flags"]
            asked = {flag: flags[flag] for flag in _ALIKE}
            asked |= {"preprocess": bool(flags["preprocess"]), "questions": report["items"]}
            other, theirs = first.setdefault(name, (letter, asked))
            differ = [f"{key} {theirs[key]} and {asked[key]}" for key in asked if theirs[key] != asked[key]]
            if differ:
                raise ConfigError(
                    f"{other} and {letter} were asked {name} in different ways ({', '.join(differ)}); ask "
                    "both alike"
                )


def notes(rows: Mapping[str, Reports]) -> list[str]:
    """What has to be known of each score: the rules it is by, and why it is not of the whole benchmark."""
    found = []
    for letter, reports in rows.items():
        for name, report in reports.items():
            published = report["published"]
            told = [f"extraction {published['extraction']}, {published['unparsed']} answers named no option"]
            told += [f"no question of {group}" for group in published["lacking"]]
            told += paper.notes_of(report)
            found.append(f"* {letter}, {name}: {'; '.join(told)}")
    return found
