"""Reads what a workdir holds, as far as it has come, for the report; nothing here computes or draws.

A report is written after every run, also after one that did a single stage or was cut short, so what is
missing is empty and what is damaged becomes a sentence in `Run.problems`, never an error. Neighbours: `page`
asks for a `Run` and shows it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fundus_jax.models import read_config
from fundus_jax.models.qwen2_5_vl.params import hf_shapes
from fundus_jax.records import ConfigError, DataError, Example, Knowledge, Trace, from_json

R = TypeVar("R", Example, Trace)
JOBS = ("examples", "knowledge", "findings", "traces", "reviewed", "clean")
REASONS = 5  # quarantine reasons that are quoted


@dataclass(kw_only=True)
class Job:
    """One finished stage directory of the pipeline: its records, what was quarantined, first reasons."""

    records: int = 0
    quarantined: int = 0
    reasons: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Census:
    """What the examples are: questions by (task, split), pictures by (modality, split), patients by split."""

    questions: Counter[tuple[str, str]] = field(default_factory=Counter)
    images: Counter[tuple[str, str]] = field(default_factory=Counter)
    patients: Counter[str] = field(default_factory=Counter)


@dataclass(kw_only=True)
class Run:
    """Everything that was found in a workdir.

    Attributes:
        config, config_hash: config.json. timeline: its lines. metrics: stage -> lines in order of their step.
        jobs: stage directory of data/ -> counts. census: of the examples.
        knowledge: (label, modality) -> record. traces: data/traces/summary.json.
        summary: evaluation/summary.json. predictions: stage -> item id -> greedy prediction.
        rollouts: (step, groups) of the first and last file. pages: steps that have a page in rollouts/.
        alarms: lines of alarms.jsonl. parameters: of the policy.
        problems: what could not be read, and why.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_hash: str = ""
    timeline: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    census: Census = field(default_factory=Census)
    knowledge: dict[tuple[str, str], Knowledge] = field(default_factory=dict)
    traces: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    predictions: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    rollouts: list[tuple[int, list[dict[str, Any]]]] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    parameters: int | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def stages(self) -> dict[str, Any]:
        """Stage -> what the evaluation says of the policy after it."""
        return self.summary.get("stages", {})

    @property
    def planned(self) -> list[str]:
        """The training stages that the configuration has."""
        named = str(self.config.get("stages", "sft,grpo")).split(",")
        return [*([] if self.config.get("model") else ["base"]), *(name.strip() for name in named if name)]

    @property
    def shown(self) -> list[str]:
        """The measured stages that are shown side by side: `base` only where nothing else was measured."""
        return [stage for stage in self.stages if stage != "base"] or list(self.stages)


def collect(workdir: Path) -> Run:
    """The `Run` of a workdir. Does not raise for what is missing or damaged; see `Run.problems`."""
    run = Run(path=workdir)
    stored = _json(run, workdir / "config.json")
    run.config, run.config_hash = stored.get("config", {}), str(stored.get("hash", ""))
    run.timeline = list(_lines(run, workdir / "timeline.jsonl"))
    for line in _lines(run, workdir / "metrics.jsonl"):
        run.metrics.setdefault(str(line.get("stage")), []).append(line)
    _read_data(run, workdir / "data")
    run.summary = _json(run, workdir / "evaluation" / "summary.json")
    for stage in run.stages:
        path = workdir / "evaluation" / f"{stage}-greedy" / "predictions.jsonl"
        run.predictions[stage] = {str(line.get("id")): line for line in _lines(run, path)}
    files = sorted(path for path in (workdir / "rollouts").glob("*.jsonl") if path.stem.isdigit())
    for path in [*files[:1], *files[1:][-1:]]:
        run.rollouts.append((int(path.stem), list(_lines(run, path))))
    _read_signs(run)
    run.parameters = _parameters(run)
    return run


def collect_rollouts(workdir: Path, step: int) -> Run:
    """What the page of one step's rollouts needs, and no more: it is made while the run waits."""
    run = Run(path=workdir)
    run.config = _json(run, workdir / "config.json").get("config", {})
    run.rollouts = [(step, list(_lines(run, workdir / "rollouts" / f"{step:06d}.jsonl")))]
    _read_signs(run)
    return run


def find(run: Run, job: str, cls: type[R], wanted: set[str], key: str = "id") -> dict[str, R]:
    """The records of data/`job` whose `key` is in `wanted`; the others are not decoded."""
    found = {}
    for text, line in raw(run, job):
        if line.get(key) in wanted:
            try:
                found[line[key]] = from_json(cls, text)
            except DataError as error:
                run.problems.append(f"data/{job}: {error}")
    return found


def raw(run: Run, job: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(line, its JSON) of every record of data/`job`, in the order of the manifest."""
    folder = run.path / "data" / job
    for entry in _lines(run, folder / "manifest.jsonl"):
        name = str(entry.get("name"))
        if Path(name).name == name:
            yield from _texts(run, folder / f"{name}.jsonl")


def _read_signs(run: Run) -> None:
    pages = (run.path / "rollouts").glob("*.html")
    run.pages = sorted(int(path.stem) for path in pages if path.stem.isdigit())
    run.alarms = list(_lines(run, run.path / "alarms.jsonl"))


def _read_data(run: Run, folder: Path) -> None:
    for name in JOBS:
        if not (folder / name / "manifest.jsonl").is_file():
            continue
        job = run.jobs[name] = Job()
        for entry in _lines(run, folder / name / "manifest.jsonl"):
            job.records += int(entry.get("answers", 0))
            job.quarantined += int(entry.get("quarantined", 0))
            if entry.get("quarantined") and len(job.reasons) < REASONS:
                path = folder / name / f"{Path(str(entry.get('name'))).name}.quarantine.jsonl"
                job.reasons += [f"{line.get('key')}: {line.get('reason')}" for line in _lines(run, path)]
                del job.reasons[REASONS:]
    seen: set[tuple[str, str]] = set()
    for _, line in raw(run, "examples"):
        task, split, modality, image = (
            str(line.get(name)) for name in ("task", "split", "modality", "image")
        )
        patient = f"{line.get('dataset')}/{line.get('patient')}"
        run.census.questions[task, split] += 1
        run.census.images[modality, split] += (split, image) not in seen
        run.census.patients[split] += (split, patient) not in seen
        seen |= {(split, image), (split, patient)}
    for text, _ in raw(run, "knowledge"):
        try:
            record = from_json(Knowledge, text)
        except DataError as error:
            run.problems.append(f"data/knowledge: {error}")
            continue
        run.knowledge[record.label, record.modality] = record
    run.traces = _json(run, folder / "traces" / "summary.json")


def _parameters(run: Run) -> int | None:
    """Parameters of the policy, from the configuration of whatever directory describes it."""
    named = run.config.get("model")
    for directory in (run.path / "policy", run.path / "hf", Path(named) if named else None):
        if directory is not None and (directory / "config.json").is_file():
            try:
                return sum(math.prod(shape) for shape in hf_shapes(read_config(directory)).values())
            except (ConfigError, DataError) as error:
                run.problems.append(f"{directory.name}/config.json: {error}")
    return None


def _json(run: Run, path: Path) -> dict[str, Any]:
    """A file's JSON object; {} where it is missing, or damaged, which is noted."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        run.problems.append(f"{_name(run, path)} could not be read ({error})")
        return {}
    return value if isinstance(value, dict) else {}


def _lines(run: Run, path: Path) -> Iterator[dict[str, Any]]:
    for _, line in _texts(run, path):
        yield line


def _texts(run: Run, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(line, its JSON object) for each line of a file that may be missing; damaged lines are noted."""
    if not path.is_file():
        return
    bad = 0
    with path.open(encoding="utf-8", errors="replace") as stream:
        for text in stream:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                bad += 1
                continue
            if isinstance(line, dict):
                yield text, line
    if bad:
        run.problems.append(f"{_name(run, path)}: {bad} lines are damaged and left out")


def _name(run: Run, path: Path) -> str:
    return path.relative_to(run.path).as_posix()
