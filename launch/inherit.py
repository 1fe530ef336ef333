"""Takes finished stages over from the workdir of another run: --parent=DIR.

Runs that differ in their last stage need not repeat the first ones: GRPO in ten ways starts from one SFT. A
stage is taken when no field that it depends on differs between the two configurations, and the data are the
same. What then lies in the workdir is what the run would have made itself: data, the bundle (its sha256
checked, sealed under this run's config hash), the lines of metrics.jsonl, and the evaluation after SFT. Large
files are hard links. Neighbour: `run` asks before each stage; where nothing is taken, the stage runs.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from fundus_jax import hosts
from fundus_jax.files import copy_tree, read_manifest
from fundus_jax.metrics import RESERVED
from fundus_jax.records import ConfigError
from fundus_jax.workdir import Workdir, best_step, differences

# Stage -> what its result does not depend on: names, and what comes later. A field that does not stand here
# has to agree, so that a new one is on the safe side until somebody has thought about it.
_ASKS = ("data.grpo_tasks", "data.probe_tasks")
_SFT = ("name", "stages", "evaluate", "grpo", "judge", "max_prompt", "data.workers", *_ASKS)
_BASE = (*_SFT, "sft", "prompt", "lora", "freeze", "compute", "remat", "data.sft_part")
# The jobs of the data stage look again at what was taken, and do what new decisions change.
_REVIEW = ("data.decisions", "decided")
_DATA = (
    *_BASE,
    "base",
    "exam",
    "policy",
    "model",
    "unroll",
    "attention",
    "min_pixels",
    "max_pixels",
    *_REVIEW,
)
INDEPENDENT = {"data": _DATA, "base": _BASE, "sft": _SFT}
# Of these, what a stage's result depends on all the same: boxes are written into traces, and an exam in SFT
# asks as GRPO does.
BUT = {"data": ("prompt.boxes",), "base": (), "sft": ()}
EXAMINED = ("grpo.max_new_tokens", "data.probe_tasks")
# What the answers after a stage depend on besides.
ASKED = ("evaluate", "prompt", "grpo.max_new_tokens", *_ASKS)
JOBS = ("examples", "knowledge", "findings", "traces", "reviewed", "clean")  # of the data, in their order
RECORDS = ("*.array_record",)  # of the data only these are links: the pipeline's manifests are appended to


class Heir:
    """The workdir `work` of a run with the configuration `config` (JSON), and `parent`, the other run's."""

    def __init__(self, work: Workdir, config: Mapping[str, Any], parent: Path) -> None:
        if not (parent / "config.json").is_file():
            raise ConfigError(f"--parent={parent} is no workdir: it has no config.json")
        self.work, self.parent, self.reviewed = work, parent, "decided" in config
        self.but = BUT | ({"sft": EXAMINED} if config["exam"]["every"] else {})
        there = json.loads((parent / "config.json").read_text(encoding="utf-8"))["config"]
        lines = differences(there, json.loads(json.dumps(config)))
        self.differing = {line.partition(":")[0] for line in lines}

    def take_data(self) -> dict[str, str]:
        """Take data/ where it is the same, but for what reviewers decided in this run. Returns what the
        timeline says of it."""
        there, here = self.parent / "data", self.work.path / "data"
        foreign = (there / "reviewed").is_dir() and not self.reviewed
        if self._agree("data") and (there / JOBS[-1] / "summary.json").is_file() and not foreign:
            hosts.on_first(lambda: copy_tree(there, here, linked=RECORDS))
            return self._told("data")
        return {}

    def take(self, stage: str) -> dict[str, str]:
        """Take a training stage where it is the same and finished there, and not begun here. Returns what the
        timeline says of it."""
        if stage not in INDEPENDENT or not self._agree(stage):
            return {}
        first = self.work.offset(stage)
        last = first + self.work.stages[stage]
        begun = any(first < step <= last for step in self.work.checkpoints.steps())
        if hosts.of_first(begun or not (self._has(stage, last) and self._same_data())):
            return {}
        hosts.on_first(lambda: self._take(stage, last))
        return self._told(stage)

    def _take(self, stage: str, last: int) -> None:
        """The bundles come last, the best before the stage's own: where this is interrupted before the first,
        it is done again, and between the two the stage goes on here from the best."""
        self.work.metrics.rewind({stage: -1})
        for line in (self.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if entry["stage"] == stage:
                values = {name: one for name, one in entry.items() if name not in RESERVED}
                known = {name: math.nan if one is None else one for name, one in values.items()}
                self.work.metrics.log(stage, entry["step"], known)
        if stage != "base" and self._agree(stage, ASKED):  # the base is asked more where nothing else is
            (self.work.path / "evaluation").mkdir(exist_ok=True)
            for kind in (f"{stage}-greedy", f"{stage}-sampled"):
                there = self.parent / "evaluation" / kind
                if (there / "report.json").is_file():  # written last
                    copy_tree(there, self.work.path / "evaluation" / kind)
        best = best_step(self.work.metrics.here(stage))
        for step in sorted({self.work.offset(stage) + best, last} if best else {last}):
            self.work.checkpoints.adopt(step, self.parent / "checkpoints")

    def _agree(self, stage: str, besides: tuple[str, ...] = ()) -> bool:
        needed = (*self.but[stage], *besides)
        return not any(
            _within(field, needed) or not _within(field, INDEPENDENT[stage]) for field in self.differing
        )

    def _has(self, stage: str, last: int) -> bool:
        """Whether the other run's bundle `last` ends this stage there too."""
        folder = self.parent / "checkpoints" / str(last)
        if not (folder / "manifest.json").is_file() or not read_manifest(folder)["facts"].get("final"):
            return False
        counters = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))["counters"]
        return counters == {"stage": stage, "step": self.work.stages[stage]}

    def _same_data(self) -> bool:
        """Whether both runs read the same records and images: the shards' sha256 stand in the manifests."""
        ours, theirs = (
            [_lines(path / "data" / job / "manifest.jsonl") for job in JOBS]
            for path in (self.work.path, self.parent)
        )
        return ours == theirs

    def _told(self, stage: str) -> dict[str, str]:
        logging.info("%s: taken over from %s", stage, self.parent)
        return {"from": str(self.parent)}


def _lines(path: Path) -> list[str] | None:
    """The lines of a manifest in order; None where the job was not asked for."""
    return sorted(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else None


def _within(field: str, names: tuple[str, ...]) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in names)
