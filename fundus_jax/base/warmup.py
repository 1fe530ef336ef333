"""Vision warm-up: the vision tower learns to see under a linear head that names findings and labels; the head
is then discarded.

A blind tower does not learn from a caption loss in the time a laptop has (docs/log.md), as the real model's
vision encoder did not
either: it was pre-trained on its own. Only the tower and the merger are trained here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fundus_jax import training
from fundus_jax.data import THREADS, Pool, batches
from fundus_jax.findings import unknown
from fundus_jax.models.freeze import freeze
from fundus_jax.models.qwen2_5_vl.processor import Processor
from fundus_jax.optim import OptimConfig
from fundus_jax.records import ConfigError, DataError, Example
from fundus_jax.stopwatch import Stopwatch
from fundus_jax.workdir import Workdir

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
FROZEN = ("text", "embedding", "head")


@dataclass(kw_only=True, slots=True)
class BaseConfig:
    """The warm-up: `steps` of `batch` images."""

    steps: int = 800
    batch: int = 16
    seed: int = 0
    save_every: int = 0
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(name="muon", lr=5e-3, warmup=30, final_fraction=0.15, b2=0.98)
    )

    def validate(self) -> None:
        """Raises ConfigError for the first field that makes no sense."""
        for name, low in {"steps": 1, "batch": 1, "save_every": 0}.items():
            if getattr(self, name) < low:
                raise ConfigError(f"base.{name} is {getattr(self, name)}; it must be at least {low}")
        self.optim.validate()


def targets_of(examples: Sequence[Example]) -> tuple[list[str], np.ndarray]:
    """Names and a table [examples, names] of 0/1: each finding, each label within its kind of image, and what
    tells the en-face images apart: the wide field and the right eye. NaN for the findings that an image may
    show or not, because nobody looked for them."""

    def facts(example: Example) -> set[str]:
        kind = "OCT" if example.modality == "OCT" else "en face"
        known = {*(example.findings or ()), *(f"{kind}: {label}" for label in example.labels)}
        seen = {"wide field": example.modality == "UWF", "right eye": example.eye == "OD"}
        return known | {name for name, there in seen.items() if there and known}

    names = sorted(set().union(*(facts(example) for example in examples)))
    table = np.asarray([[name in facts(example) for name in names] for example in examples], np.float32)
    for row, example in zip(table, examples, strict=True):
        unseen = unknown(example.modality, example.searched if example.findings is not None else ())
        row[[name in unseen for name in names]] = np.nan
    return names, table


def warm_up(
    work: Workdir, model: Any, processor: Processor, pool: Pool, config: BaseConfig, mesh: Mesh
) -> training.Params:
    """Train the vision tower and return all parameters of the model. Resumes from, and ends with, a bundle of
    stage `base`."""
    images = {example.image: example for example in pool.examples}  # one question an image is enough
    examples = list(images.values())
    names, table = targets_of(examples)
    if not names:
        raise DataError(f"no finding or label is known of any of {len(examples)} images: nothing to learn")
    freeze(model, FROZEN)
    skeleton, params = training.split(model)
    params, frozen = skeleton.divide(params)
    shape = (len(names), model.config.hidden_size)
    learned = params | {"head": {"weight": jnp.zeros(shape), "bias": jnp.zeros(shape[:1])}}

    def loss(learned: Any, batch: Any, total: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        rows, wanted = batch
        features = skeleton.merge(finished(learned)).encode(rows)
        merge = rows.patch_image.shape[1] // features.shape[1]
        real = (rows.patch_image[:, ::merge] >= 0)[..., None]
        pooled = jnp.sum(jnp.where(real, features, 0), axis=1) / jnp.maximum(real.sum(axis=1), 1)
        logits = pooled @ learned["head"]["weight"].T + learned["head"]["bias"]
        known = ~jnp.isnan(wanted)
        entropy = jnp.where(known, jnp.logaddexp(0, logits) - jnp.nan_to_num(wanted) * logits, 0)
        right = (((logits > 0) == (wanted > 0)) | ~known).all(axis=1)
        mean = entropy.sum(axis=1) / jnp.maximum(known.sum(axis=1), 1)
        return mean.sum() / total, {"exact": right.sum() / total}

    def build(index: np.ndarray) -> tuple[Any, np.ndarray]:
        rows = processor([IMAGE] * len(index), [[pool.image(examples[i])] for i in index])
        return rows, table[index]

    optimizer = training.make_optimizer(config.optim, config.steps)
    step_of = training.make_step(lambda learned: learned, loss, lambda batch: batch[1].shape[0], optimizer)
    whole = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), learned["head"])
    places = {"visual": skeleton.shardings(mesh)["visual"], "head": whole}
    mine = training.rows_here(config.batch, mesh)
    with jax.set_mesh(mesh), work.stoppable("base") as keep:
        state = training.begin(learned, places, optimizer, mesh)
        frozen = training.hold(skeleton, frozen, mesh, "float32")
        iterator = batches(len(examples), config.batch, build, seed=config.seed, ahead=THREADS)
        state, done = work.resume("base", state, iterator)
        progress, watch = work.progress("base", done), Stopwatch("base")
        for step in range(done + 1, config.steps + 1):
            keep(step - 1, state, iterator)
            with watch("data"):
                batch = training.place(jax.tree.map(lambda rows: rows[mine], next(iterator)), mesh)
            with watch("update"):
                state, metrics = step_of(state, batch, frozen)
                values = {name: float(value) for name, value in metrics.items()}
            training.check_finite(values, config.optim, "base", step)
            work.metrics.log("base", step, values | watch.lap(step))
            progress.update(note=f"loss {values['loss']:.3f}")
            if step == config.steps or (config.save_every and step % config.save_every == 0):
                work.save("base", step, state, iterator)
    progress.close()
    return training.join(finished(state.params), frozen)


def finished(learned: training.Params) -> training.Params:
    """What was learned, without the head."""
    return {name: part for name, part in learned.items() if name != "head"}
