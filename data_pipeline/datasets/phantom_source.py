"""Phantoms as a source for `ingest`: numbers are listed, and images drawn where their shard is written.

Training, validation and test phantoms are three series of their own, so that no picture is in two splits.
Neighbour: `phantom`, which draws.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

from data_pipeline import files
from data_pipeline.datasets import phantom
from data_pipeline.datasets.base import Sample
from data_pipeline.jobs import ShardInput
from fundus_jax.findings import vocabulary
from fundus_jax.records import SPLITS, ConfigError

DR_GRADES = {
    "Normal": "No DR",
    **{name: name for name in ("Mild NPDR", "Moderate NPDR", "Severe NPDR", "PDR")},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PhantomConfig:
    """How many phantoms, of which series and size (image side in pixels)."""

    seed: int = 0
    size: int = 112
    train: int = 15_000
    val: int = 500
    test: int = 500


def shards(config: PhantomConfig, *, shard_size: int) -> list[ShardInput]:
    """Shards of at most `shard_size` phantoms; each key hashes a drawn image, so a new renderer redoes them.

    Raises ConfigError for counts below zero or nothing asked for.
    """
    counts = {split: getattr(config, split) for split in SPLITS}
    if min(counts.values()) < 0 or not any(counts.values()):
        raise ConfigError(f"phantom counts {counts}: none may be negative, and not all zero")
    found = []
    for split, count in counts.items():
        seed = 3 * config.seed + SPLITS.index(split)
        for number, start in enumerate(range(0, count, shard_size)):
            drawn = hashlib.sha256(phantom.encode(phantom.render(seed, start, size=config.size))).hexdigest()
            indices = range(start, min(start + shard_size, count))
            found.append(
                ShardInput(
                    name=f"{split}-{number:05d}",
                    key=files.digest([asdict(config), split, start, len(indices), drawn]),
                    items=partial(_items, split, seed, indices, config.size),
                )
            )
    return found


def sample(split: str, seed: int, index: int, size: int) -> Sample:
    """Draw one phantom and tell it as a sample: every finding of its modality was looked for."""
    drawn = phantom.render(seed, index, size=size)
    fundus = drawn.modality != "OCT"
    grade = {"dr_grade": DR_GRADES[drawn.label]} if fundus and drawn.label in DR_GRADES else {}
    name = f"{seed}-{index:06d}"
    return Sample(
        key=name,
        image=phantom.encode(drawn),
        split=split,
        patient=name,
        modality=drawn.modality,
        eye=drawn.eye,
        labels={"disease": drawn.label, **grade},
        searched=vocabulary(drawn.modality, extended=True),
        findings=drawn.findings,
        boxes=drawn.boxes,
    )


def _items(split: str, seed: int, indices: Sequence[int], size: int) -> list[partial[Sample]]:
    return [partial(sample, split, seed, index, size) for index in indices]
