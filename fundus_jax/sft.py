"""Supervised fine-tuning on reasoning traces: loss on what the assistant says, by position (paper, section
4.1: 2 epochs, AdamW).

Rows are whole conversations, image first; a row that is too long is left out and counted, never cut.
Neighbours: `training` (the step), `data` (the rows), `workdir` (bundles and metrics).
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from fundus_jax import dialog, training
from fundus_jax.data import Pool, batches, round_up
from fundus_jax.models.layers import Options
from fundus_jax.models.logprobs import token_logprobs
from fundus_jax.models.qwen2_5_vl.processor import Processor
from fundus_jax.optim import OptimConfig
from fundus_jax.records import ConfigError, Example
from fundus_jax.workdir import Stopwatch, Workdir

LENGTH_STEP = 8  # rows are padded to a multiple of this


@dataclass(kw_only=True, slots=True)
class PromptConfig:
    """How an example becomes a prompt, the same in every stage: see `dialog.messages`."""

    style: str = "options"
    think: bool = True
    instruct: bool = True


@dataclass(kw_only=True, slots=True)
class SftConfig:
    """`steps` updates of `batch` conversations (or `epochs` over the data where steps is 0), in
    `micro_batches` pieces.

    without_trace: what happens to an example whose trace was rejected: "skip" it, or train on the "answer"
    alone.
    max_length: longer conversations are left out (tokens, image tokens included).
    """

    steps: int = 0
    epochs: float = 2.0
    batch: int = 16
    micro_batches: int = 1
    max_length: int = 2048
    without_trace: str = "skip"
    seed: int = 0
    save_every: int = 0
    optim: OptimConfig = field(default_factory=OptimConfig)

    def validate(self) -> None:
        """Raises ConfigError for the first field that makes no sense."""
        if self.without_trace not in ("skip", "answer"):
            raise ConfigError(f"sft.without_trace is {self.without_trace!r}; it must be skip or answer")
        at_least = {"batch": 1, "micro_batches": 1, "max_length": 1, "steps": 0, "save_every": 0}
        for name, low in at_least.items():
            if getattr(self, name) < low:
                raise ConfigError(f"sft.{name} is {getattr(self, name)}; it must be at least {low}")
        if self.epochs <= 0:
            raise ConfigError(f"sft.epochs is {self.epochs}; it must be above 0")
        if self.batch % self.micro_batches:
            raise ConfigError(f"sft.micro_batches {self.micro_batches} must divide sft.batch {self.batch}")
        self.optim.validate()

    def total_steps(self, rows: int) -> int:
        """Steps of the stage for `rows` training rows."""
        return self.steps or max(1, int(rows * self.epochs / self.batch))


@dataclass(frozen=True)
class Rows:
    """The conversations of a pool that fit: (example, reply) each, and the padded sizes that hold every one
    of them."""

    pool: Pool
    rows: tuple[tuple[Example, str], ...]
    length: int
    patches: int
    prompt: PromptConfig

    def dialog(self, row: int) -> list[dict]:
        """The conversation in Hugging Face's message format."""
        example, reply = self.rows[row]
        prompt = dialog.messages(example, self.prompt.style, self.prompt.think, instruct=self.prompt.instruct)
        return [*prompt, dialog.reply(reply)]


def make_rows(pool: Pool, processor: Processor, prompt: PromptConfig, config: SftConfig) -> Rows:
    """Conversations from examples and their kept traces, without those longer than `max_length`; the counts
    are logged."""
    counts: Counter[str] = Counter()
    kept, length, patches = [], 0, 0
    for example in pool.examples:
        trace = pool.traces.get(example.id)
        usable = trace is not None and trace.kept and prompt.think
        if not usable and prompt.think and config.without_trace == "skip":
            counts["without a trace"] += 1
            continue
        reply = dialog.render(trace.think if usable and trace else None, example.answer)
        messages = dialog.messages(example, prompt.style, prompt.think, instruct=prompt.instruct)
        text = processor.chat([*messages, dialog.reply(reply)])
        tokens, slots = processor.row_size(text, [pool.image(example)])
        if tokens > config.max_length:
            counts["too long"] += 1
            continue
        counts["kept"] += 1
        kept.append((example, reply))
        length, patches = max(length, tokens), max(patches, slots)
    logging.info("sft rows: %s; longest %d tokens", dict(counts), length)
    if not kept:
        raise ConfigError(
            f"no training row is left: {dict(counts)}; "
            f"raise sft.max_length ({config.max_length}) or look at the traces"
        )
    return Rows(pool, tuple(kept), round_up(length, LENGTH_STEP), patches, prompt)


def loss(model: Any, batch: Any, total: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Share of the mean negative log-likelihood: the sum over learned tokens of these rows / `total` learned
    tokens of the step.

    batch: (Batch, loss mask [B,T]), True at tokens to be predicted.
    """
    rows, learned = batch
    logprobs, entropy = token_logprobs(model.hidden(rows)[:, :-1], model.head, rows.tokens[:, 1:])
    learned = learned[:, 1:]
    return -(logprobs * learned).sum() / total, {
        "entropy": (entropy * learned).sum() / total,
        "tokens": learned.sum(),
    }


def count(batch: Any) -> jax.Array:
    """Learned tokens of the whole batch."""
    return jax.numpy.maximum(batch[1][:, 1:].sum(), 1)


def train(
    work: Workdir,
    model: Any,
    rows: Rows,
    processor: Processor,
    config: SftConfig,
    mesh: Mesh,
    *,
    compute: str = "float32",
    remat: bool = False,
) -> training.Params:
    """Fine-tune and return the parameters. Resumes from, and ends with, a bundle of stage `sft`.

    compute: dtype of the forward and backward pass; the weights stay float32 masters. remat: recompute blocks
    in the backward pass.
    """
    steps = work.stages["sft"]
    skeleton, params = training.split(model)
    optimizer = training.make_optimizer(config.optim, steps)
    options = Options(remat=remat, unroll=model.options.unroll)
    step_of = training.make_step(
        lambda params: skeleton.merge(params, options),
        loss,
        count,
        optimizer,
        compute=compute,
        micro_batches=config.micro_batches,
    )

    mine = training.rows_here(config.batch, mesh)

    def build(index: np.ndarray) -> Any:
        index = index[mine]
        images = [[rows.pool.image(rows.rows[i][0])] for i in index]
        dialogs = [rows.dialog(i) for i in index]
        return processor.encode_dialogs(dialogs, images, length=rows.length, patches=rows.patches)

    with jax.set_mesh(mesh), work.stoppable("sft") as keep:
        state = training.start(skeleton, params, optimizer, mesh)
        iterator = batches(len(rows.rows), config.batch, build, seed=config.seed)
        state, done = work.resume("sft", state, iterator)
        progress, watch = work.progress("sft", done), Stopwatch()
        for step in range(done + 1, steps + 1):
            keep(step - 1, state, iterator)
            with watch("data"):
                batch = training.place(next(iterator), mesh)
            with watch("update"):
                state, metrics = step_of(state, batch)
                values = {name: float(value) for name, value in metrics.items()}
            training.check_finite(values, config.optim, "sft", step)
            work.metrics.log("sft", step, values | watch.lap())
            progress.update(note=f"loss {values['loss']:.3f}")
            if step == steps or (config.save_every and step % config.save_every == 0):
                work.save("sft", step, state, iterator)
    progress.close()
    return state.params
