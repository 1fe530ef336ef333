"""Supervised fine-tuning on reasoning traces: loss on what the assistant says, by position (paper, section
4.1: 2 epochs, AdamW).

Rows are whole conversations, image first; one that is too long is left out and counted, never cut. A row
holds one conversation, or is packed with several.
Neighbours: `training` (the step), `data` (the rows), `workdir` (bundles and metrics).
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from fundus_jax import dialog, training
from fundus_jax.data import Pool, ahead_of, batches, pack, round_up
from fundus_jax.models.batch import Batch
from fundus_jax.models.logprobs import token_logprobs
from fundus_jax.models.qwen2_5_vl.processor import Processor
from fundus_jax.optim import OptimConfig
from fundus_jax.records import ConfigError, Example
from fundus_jax.stopwatch import Stopwatch
from fundus_jax.workdir import Workdir

LENGTH_STEP = 8  # rows are padded to a multiple of this
# A packed row has room for so many times the patches that rows have on average: with less, rows are full of
# patches before they are full of tokens; with more, most slots stay empty (docs/log.md, 2026-11-28).
PATCH_ROOM = 1.1
WORTH = 0.75  # with so much of the rows filled, packing gains little


@dataclass(kw_only=True, slots=True)
class PromptConfig:
    """How an example becomes a prompt, the same in every stage: see `dialog.messages`.

    boxes: traces say where each finding lies, with at most so many boxes; 0: they do not. The data stage
    writes the traces so, and reward and evaluation compare with as many boxes.
    """

    style: str = "options"
    think: bool = True
    instruct: bool = True
    boxes: int = 0

    def validate(self) -> None:
        """Raises ConfigError for an unknown style, and for boxes that nothing could say."""
        if self.style not in dialog.STYLES:
            raise ConfigError(f"prompt.style is {self.style!r}; known styles are {', '.join(dialog.STYLES)}")
        if self.boxes < 0 or (self.boxes and not self.think):
            raise ConfigError(
                f"prompt.boxes is {self.boxes}; it must be at least 0, and 0 without a trace (prompt.think)"
            )

    @property
    def form(self) -> dict[str, Any]:
        """What it takes to read a reply: whether a trace was asked for, and in which style an answer."""
        return {"think": self.think, "style": self.style}

    def messages(self, example: Example) -> list[dict]:
        """The prompt of an example in Hugging Face's message format."""
        return dialog.messages(example, self.style, self.think, instruct=self.instruct, boxes=self.boxes)


@dataclass(kw_only=True, slots=True)
class SftConfig:
    """`steps` updates of `batch` rows (or `epochs` over the data where steps is 0), in `micro_batches`
    pieces.

    row_length: rows are packed with conversations up to so many tokens, so that next to nothing is padding
    and a step learns from more of them than `batch` (0: one conversation a row, padded to the longest).
    without_trace: what happens to an example whose trace was rejected: "skip" it, or train on the "answer"
    alone.
    max_length: longer conversations are left out (tokens, image tokens included).
    """

    steps: int = 0
    epochs: float = 2.0
    batch: int = 16
    micro_batches: int = 1
    max_length: int = 2048
    row_length: int = 0
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
        if self.row_length and self.row_length < self.max_length:
            raise ConfigError(
                f"sft.row_length {self.row_length} must hold the longest conversation, sft.max_length "
                f"{self.max_length}; 0 packs no rows"
            )
        if self.epochs <= 0:
            raise ConfigError(f"sft.epochs is {self.epochs}; it must be above 0")
        if self.batch % self.micro_batches:
            raise ConfigError(f"sft.micro_batches {self.micro_batches} must divide sft.batch {self.batch}")
        self.optim.validate()

    def total_steps(self, rows: int) -> int:
        """Steps of the stage for `rows` training rows, packed ones where rows are packed."""
        return self.steps or max(1, int(rows * self.epochs / self.batch))


@dataclass(frozen=True)
class Rows:
    """The conversations of a pool that fit, (example, reply) each; which of them share a row, by number
    (`packed`: more than one may); and the padded sizes that hold every row."""

    pool: Pool
    rows: tuple[tuple[Example, str], ...]
    packs: list[list[int]]
    packed: bool
    length: int
    patches: int
    prompt: PromptConfig

    def dialog(self, number: int) -> list[dict]:
        """A conversation in Hugging Face's message format."""
        example, reply = self.rows[number]
        return [*self.prompt.messages(example), dialog.reply(reply)]


def make_rows(pool: Pool, processor: Processor, prompt: PromptConfig, config: SftConfig) -> Rows:
    """Conversations from examples and their kept traces, without those longer than `max_length`, packed if
    `row_length` says so; the counts are logged."""
    counts: Counter[str] = Counter()
    usable, kept, sizes = [], [], []
    for example in pool.examples:
        trace = pool.traces.get(example.id)
        think = trace.think if trace is not None and trace.kept and prompt.think else None
        if think is None and prompt.think and config.without_trace == "skip":
            counts["without a trace"] += 1
            continue
        usable.append((example, dialog.render(think, dialog.right_reply(example, prompt.style))))
    images = pool.sizes(example for example, _ in usable)
    for (example, reply), image in zip(usable, images, strict=True):
        text = processor.chat([*prompt.messages(example), dialog.reply(reply)])
        tokens, slots = processor.row_size(text, [image])
        if tokens > config.max_length:
            counts["too long"] += 1
            continue
        counts["kept"] += 1
        kept.append((example, reply))
        sizes.append((tokens, slots))
    if not kept:
        raise ConfigError(
            f"no training row is left: {dict(counts)}; "
            f"raise sft.max_length ({config.max_length}) or look at the traces"
        )
    lengths, slots = (list(column) for column in zip(*sizes, strict=True))
    packs = [[number] for number in range(len(kept))]
    if config.row_length:
        room = int(PATCH_ROOM * config.row_length * sum(slots) / sum(lengths))
        packs = pack(sizes, (config.row_length, max(room, *slots)), seed=config.seed)
    length = round_up(max(sum(lengths[number] for number in row) for row in packs), LENGTH_STEP)
    patches = max(sum(slots[number] for number in row) for row in packs)
    real = sum(lengths) / (len(packs) * length)
    logging.info(
        "sft rows: %s; longest %d tokens; %d rows of %d tokens (%.0f%% real) and %d patch slots%s",
        *(dict(counts), max(lengths), len(packs), length, 100 * real, patches),
        "" if config.row_length or real > WORTH else "; sft.row_length packs several into a row",
    )
    return Rows(pool, tuple(kept), packs, config.row_length > 0, length, patches, prompt)


def encode(rows: Rows, processor: Processor, index: Iterable[int]) -> tuple[Batch, np.ndarray]:
    """The rows of `index`: a Batch and its loss mask [B,T]."""
    packs = [rows.packs[row] for row in index]
    chosen = [number for row in packs for number in row]
    return processor.encode_dialogs(
        [rows.dialog(number) for number in chosen],
        [[rows.pool.image(rows.rows[number][0])] for number in chosen],
        length=rows.length,
        patches=rows.patches,
        per_row=[len(row) for row in packs] if rows.packed else None,
    )


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


def make_update(
    merge: Callable[[Any], Any], optimizer: optax.GradientTransformation, config: SftConfig, compute: str
) -> Callable[..., tuple[training.State, training.Metrics]]:
    """Compile (state, (Batch, loss mask [B,T]), frozen parameters) -> (state, metrics): one update."""
    return training.make_step(
        merge, loss, count, optimizer, compute=compute, micro_batches=config.micro_batches
    )


def train(
    work: Workdir,
    model: Any,
    rows: Rows,
    processor: Processor,
    config: SftConfig,
    mesh: Mesh,
    *,
    compute: str = "float32",
    remat: str = "none",
    exam: training.Exam | None = None,
) -> training.Params:
    """Fine-tune what is not frozen and return all parameters. Resumes from, and ends with, a bundle of stage
    `sft`, which holds the trained ones.

    compute: dtype of the forward and backward pass; trained weights stay float32 masters. remat: a name of
    `models.layers.REMAT`. exam: measures the policy now and then; the bundle that does best in it is kept.
    """
    steps = work.stages["sft"]
    skeleton, params = training.split(model)
    params, frozen = skeleton.divide(params)
    optimizer = training.make_optimizer(config.optim, steps)
    options = dataclasses.replace(model.options, remat=remat)
    step_of = make_update(lambda params: skeleton.merge(params, options), optimizer, config, compute)
    mine = training.rows_here(config.batch, mesh)

    def build(index: np.ndarray) -> Any:
        return encode(rows, processor, index[mine])

    def policy(params: Any) -> Any:
        return skeleton.merge(training.join(training.cast(params, compute), frozen), model.options)

    with jax.set_mesh(mesh), work.stoppable("sft") as keep:
        state = training.start(skeleton, params, optimizer, mesh)
        frozen = training.hold(skeleton, frozen, mesh, compute)
        ahead = ahead_of(4 * len(mine) * rows.patches * processor.image_config.patch_features)  # float32
        iterator = batches(len(rows.packs), config.batch, build, seed=config.seed, ahead=ahead)
        state, done = work.resume("sft", state, iterator)
        if exam is not None and work.owes("sft"):
            work.make_up("sft", done, exam(policy(state.params)))
        progress, watch = work.progress("sft", done), Stopwatch("sft")
        for step in range(done + 1, steps + 1):
            keep(step - 1, state, iterator)
            with watch("data"):
                batch = training.place(next(iterator), mesh)
            with watch("update"):
                state, metrics = step_of(state, batch, frozen)
                values = {name: float(value) for name, value in metrics.items()}
            training.check_finite(values, config.optim, "sft", step)
            if exam is not None and exam.due(step, steps):
                with watch("exam"):
                    values |= exam(policy(state.params))
            work.metrics.log("sft", step, values | watch.lap(step))
            progress.update(note=f"loss {values['loss']:.3f}")
            best = work.leads("sft", step, values)
            if best or step == steps or (config.save_every and step % config.save_every == 0):
                work.save("sft", step, state, iterator)
    progress.close()
    return training.join(state.params, frozen)
