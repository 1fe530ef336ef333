"""Two evaluations of the same questions, in pairs: what differs, how surely, and which answers flipped.

    python -m fundus_jax.evaluation.compare RUN_A RUN_B --out=DIR

A run is a folder that the evaluation command wrote, or a workdir, whose measurements after each stage are
compared by their names. Prints the differences B - A with intervals (a bootstrap of the units, patients or
images, each with both of its answers), and writes compare.json and compare.html, where the flipped questions
are shown with their images. Neighbours: results.py (the files), funbench_pair.py (its score),
report/versus.py (the page).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from PIL import Image

from fundus_jax.data import load_image
from fundus_jax.evaluation import funbench_pair, scores
from fundus_jax.evaluation.benchmarks import open_benchmark
from fundus_jax.evaluation.extract import Mode
from fundus_jax.evaluation.items import Selection
from fundus_jax.evaluation.slices import DIAGNOSIS, UNNAMED
from fundus_jax.evaluation.table import line
from fundus_jax.files import write_atomic
from fundus_jax.records import ConfigError, DataError
from fundus_jax.report.versus import Flip, render

Lines = list[dict[str, Any]]  # of predictions.jsonl
GROUPS = ("modality", "level", "task", "disease")
ROWS = ("first", "second", "difference")


def evaluations(run: Path) -> dict[str, Path]:
    """Name -> folder with predictions.jsonl: "" for what the evaluation command wrote, "grpo-greedy" and the
    like for a workdir. Raises ConfigError where there is neither."""
    if (run / "predictions.jsonl").is_file():
        return {"": run}
    found = {path.parent.name: path.parent for path in sorted(run.glob("evaluation/*/predictions.jsonl"))}
    if not found:
        raise ConfigError(f"{run} has no predictions.jsonl: give a folder of an evaluation, or a workdir")
    return found


def read(folder: Path) -> Lines:
    """The lines of an evaluation. Raises DataError for one that is none, naming file and line."""
    path, found = folder / "predictions.jsonl", []
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not text:
            continue
        try:
            one = json.loads(text)
            _ = one["id"], one["correct"], one["unit"], one["prompt"], one["answers"], one["images"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number} is no prediction: {error}; evaluate again") from error
        found.append(one)
    return found


def disease(one: Mapping[str, Any]) -> str:
    """The right answer to a question on the diagnosis; "" for others, those on its risk or presence too."""
    named = one["task"] not in UNNAMED and {one["level"], one["task"]} & set(DIAGNOSIS)
    return ", ".join(one["answers"]) if named else ""


def compare(
    first: Lines,
    second: Lines,
    *,
    rules: Mode | None = None,
    partial: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy of `second` minus that of `first`, question by question; several samples of one count with
    their mean. And FunBench's score, where questions have levels.

    Keys:
        all, and by_modality, by_level, by_task, by_disease (name -> the same): first, second, difference
        (figures; n counts questions), gained and lost (questions whose majority of samples is right on one
        side only), p (`flip_test` of the flips, by patient). In all, by_level and by_task also funbench:
        first, second, difference of the score, by the reading of answers that accuracy rests on.
        published: FunBench's score by the rules of the mode `rules` alone (`funbench_pair.published`); None
        without `rules`.
        partial: why these are not scores of the whole benchmark, as the reports say.
        flips: ids of the questions gained and lost.

    Raises ConfigError where the questions differ.
    """
    sides = [_means(lines) for lines in (first, second)]
    named = {one["id"]: one for one in first}
    others = {one["id"]: one for one in second}
    odd = sorted(named.keys() ^ others.keys())
    changed = sorted(
        name for name in named.keys() & others.keys() if named[name]["prompt"] != others[name]["prompt"]
    )
    if odd or changed or not named:
        what = f"such as {(odd or changed)[0]}" if odd or changed else "there are none"
        raise ConfigError(
            f"{len(odd)} questions were asked on one side only and {len(changed)} in other words, {what}; "
            "compare runs with the same benchmark and selection"
        )
    ids = list(named)
    values = np.array([[side[name] for name in ids] for side in sides])

    def entry(index: Sequence[int]) -> dict[str, Any]:
        units = [named[ids[i]]["unit"] for i in index]
        part = values[:, list(index)]
        rows = {"first": part[0], "second": part[1], "difference": part[1] - part[0]}
        found: dict[str, Any] = {
            name: scores.mean(row, units=units, seed=seed).as_dict() for name, row in rows.items()
        }
        right = part > 0.5
        gained, lost = int((right[1] & ~right[0]).sum()), int((right[0] & ~right[1]).sum())
        nets = dict.fromkeys(units, 0)
        for unit, before, after in zip(units, *right.tolist(), strict=True):
            nets[unit] += after - before
        return found | {"gained": gained, "lost": lost, "p": flip_test(list(nets.values()))}

    report: dict[str, Any] = {"partial": list(partial), "all": entry(range(len(ids)))}
    for group in GROUPS:
        members: dict[str, list[int]] = {}
        for i, name in enumerate(ids):
            key = disease(named[name]) if group == "disease" else named[name][group]
            if key:
                members.setdefault(key, []).append(i)
        report[f"by_{group}"] = {key: entry(members[key]) for key in sorted(members)}
    for place, pair in funbench_pair.pairs(first, second, funbench_pair.by_report, seed=seed).items():
        _entry_at(report, place)["funbench"] = pair
    report["published"] = funbench_pair.published(first, second, rules, seed=seed) if rules else None
    right = values > 0.5
    report["flips"] = {
        "gained": [ids[i] for i in np.flatnonzero(right[1] & ~right[0])],
        "lost": [ids[i] for i in np.flatnonzero(right[0] & ~right[1])],
    }
    return report


def _entry_at(report: dict[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
    """The entry of a place in FunBench's tree: (), (level,) or (level, task)."""
    return report[("all", "by_level", "by_task")[len(place)]][place[-1]] if place else report["all"]


def flip_test(nets: Sequence[int]) -> float:
    """The chance of a sum at least as far from 0, if each of `nets` had either sign as likely: exact.

    nets: of each unit, a patient, the questions gained less those lost: several of one patient are no
    independent evidence. Of units with one question each it is McNemar's exact test.

    >>> flip_test([1] * 5), flip_test([1, 1, 1, -1, -1, -1]), flip_test([5])
    (0.0625, 1.0, 1.0)
    """
    sizes = [abs(net) for net in nets if net]
    reach = sum(sizes)
    chance = np.zeros(2 * reach + 1)  # of the sums -reach, ..., reach
    chance[reach] = 1.0
    for size in sizes:
        chance = (np.roll(chance, size) + np.roll(chance, -size)) / 2  # nothing reaches the ends
    far = abs(sum(nets))
    return min(1.0, float(chance[np.abs(np.arange(-reach, reach + 1)) >= far].sum()))


def _means(lines: Lines) -> dict[str, float]:
    hits: dict[str, list[bool]] = {}
    for one in lines:
        hits.setdefault(one["id"], []).append(bool(one["correct"]))
    return {name: float(np.mean(found)) for name, found in hits.items()}


def text_of(name: str, report: Mapping[str, Any]) -> str:
    """The differences as lines of text; of a partial benchmark every line says so."""
    everything = report["all"]
    lines = [line(side, everything[side]) for side in ROWS]
    if "funbench" in everything:
        lines += [line(f"FunBench score, {side}", everything["funbench"][side]) for side in ROWS]
    for group in GROUPS:
        for key, entry in report[f"by_{group}"].items():
            lines.append(line(f"    {group} {key}", entry["difference"]))
            if "funbench" in entry:
                lines.append(line("        FunBench score", entry["funbench"]["difference"]))
    notes = [f"PARTIAL: {reason}" for reason in report["partial"]]
    published = report["published"]
    if published is not None:
        lines += [line(f"FunBench as published, {side}", published["score"][side]) for side in ROWS]
        lines += [line(f"    {key}", pair["difference"]) for key, pair in published["groups"].items()]
        notes += [f"no question of {key}: no FunBench score" for key in published["lacking"]]
        notes.append(f"as published: by the rules {published['extraction']} alone")
    flipped = f"{everything['gained']} gained, {everything['lost']} lost, p {everything['p']:.2g}"
    top = [f"{name or 'B - A'}: {flipped}", f"{'':<44}{'%':>7}  {'95% interval':>15}{'n':>9}"]
    mark = "  PARTIAL" if report["partial"] else ""
    return "\n".join([*top, *(one + mark for one in lines), *notes]) + "\n"


def _report(folder: Path) -> dict[str, Any]:
    """What report.json says of an evaluation; {} where there is none."""
    path = folder / "report.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _rules(first: Mapping[str, Any], second: Mapping[str, Any]) -> Mode | None:
    """By which rules FunBench's published score is computed: those of both reports; None where one of them is
    not of FunBench. Raises ConfigError where they differ."""
    both = [report.get("published") or {} for report in (first, second)]
    if any(one.get("benchmark") != "FunBench" for one in both):
        return None
    one, other = (published["extraction"] for published in both)
    if one != other:
        raise ConfigError(
            f"A was scored by the rules {one}, B by {other}: run one evaluation again with the other's "
            "--extraction; what was answered is not asked for again"
        )
    return one


def image_loader(folder: Path) -> Callable[[str], Image.Image]:
    """What opens the images of an evaluation: its benchmark, as the report's flags say, or the workdir's
    examples. Raises ConfigError or DataError where they are not there any more."""
    given = _report(folder).get("benchmark", {}).get("flags")
    if given is None:
        return lambda key: load_image(folder.parent.parent / "data" / "examples", key)
    known = {name for name in Selection.__slots__ if name in given}
    fields: dict[str, Any] = {name: given[name] for name in known}
    fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return open_benchmark(given["benchmark"], given["source"], Selection(**fields)).load_image


def flips(
    first: Lines, second: Lines, report: Mapping[str, Any], images: Callable[[str], Image.Image]
) -> list[Flip]:
    """The flipped questions with both answers, lost ones first."""
    sides = [{one["id"]: one for one in reversed(lines)} for lines in (first, second)]
    found = []
    for kind in ("lost", "gained"):
        for name in report["flips"][kind]:
            ours, theirs = (side[name] for side in sides)
            found.append(Flip.of(kind, ours, theirs, images))
    return found


def run(first: Path, second: Path, out: Path | None, seed: int = 0) -> str:
    """Compare two runs, write the files where `out` is given, and return the text."""
    ours, theirs = evaluations(first), evaluations(second)
    common = [name for name in ours if name in theirs]
    if not common:
        raise ConfigError(
            f"{first} has {', '.join(ours)}, {second} has {', '.join(theirs)}: nothing to compare"
        )
    texts, reports, pages = [], {}, []
    for name in common:
        lines = read(ours[name]), read(theirs[name])
        about = [_report(folder[name]) for folder in (ours, theirs)]
        partial = sorted({reason for one in about for reason in one.get("partial", ())})
        report = compare(*lines, rules=_rules(*about), partial=partial, seed=seed)
        texts.append(text_of(name, report))
        reports[name] = report
        if out is not None:
            pages.append((name, report, flips(*lines, report, image_loader(ours[name]))))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"first": str(first), "second": str(second), "runs": reports}, indent=1)
        write_atomic(out / "compare.json", text + "\n")
        page = render(str(first), str(second), pages)
        write_atomic(out / "compare.html", page.encode("utf-8", errors="replace"))
        texts.append(f"the flipped questions with their images: {out / 'compare.html'}\n")
    return "\n".join(texts)


def main(argv: Sequence[str]) -> None:
    """The command. What the user has to change ends it with one line."""
    if len(argv) != 3:
        raise app.UsageError("give two runs: RUN_A RUN_B")
    out = Path(flags.FLAGS.out) if flags.FLAGS.out else None
    try:
        print(run(Path(argv[1]), Path(argv[2]), out, flags.FLAGS.seed))
    except (ConfigError, DataError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    flags.DEFINE_string("out", "", "Folder for compare.html and compare.json; none writes nothing.")
    flags.DEFINE_integer("seed", 0, "Of the intervals.", lower_bound=0)
    app.run(main)
