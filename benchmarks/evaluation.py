"""Image questions a second of `evaluation.predict.Sampler`, and how long it waits: beside batches that are
prepared and decoded in turns.

    python -m benchmarks.evaluation --out=docs/benchmarks/evaluation.json

A question is a JPEG photograph, decoded, resized and cut into patches for each question anew, and a prompt of
about 100 tokens besides the image; answers end at random, after `mean_tokens` on average. "Batches" read a
batch of the same size, sort nothing, and decode it to its last answer before the next is read: what a simple
loop does. "Slots" is the engine of the evaluation; its answers are the same each time. Idle is the share of
the time in which no program runs, as far as the host knows. On a CPU the threads that read images take their
time from the model's own cores.
"""

from __future__ import annotations

import dataclasses
import io
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from benchmarks import common
from fundus_jax.base import policy
from fundus_jax.base.policy import PolicyConfig
from fundus_jax.data import Size, decoded, image_size, open_image
from fundus_jax.evaluation.engines import Asking
from fundus_jax.evaluation.items import Item
from fundus_jax.evaluation.predict import Sampler
from fundus_jax.grpo.rollout import generate
from fundus_jax.models import read_config
from fundus_jax.models.qwen2_5_vl.processor import Processor

SETTINGS = ("questions", "side", "pixels", "mean_tokens", "new_tokens", "slots", "threads", "repeats")


@dataclass(frozen=True)
class Photographs:
    """The pictures of the questions: a few files, each of many questions."""

    files: list[bytes]

    def load_image(self, image: str) -> Image.Image:
        return decoded(open_image(self._file(image), image), image)

    def image_size(self, image: str) -> Size:
        return image_size(self._file(image), image)

    def _file(self, image: str) -> bytes:
        return self.files[int(image) % len(self.files)]


def make_policy(args: Any) -> tuple[Any, Processor]:
    """The demo's policy with random weights, whose answers end at random; and its processor."""
    sizes = PolicyConfig(pixels=args.pixels)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy"
        policy.write_policy(path, sizes, ["which disease does the image show?"])
        config, processor = read_config(path), Processor.from_pretrained(path)
    ends = tuple(range(0, config.vocab_size, args.mean_tokens))
    model = policy.fresh(dataclasses.replace(config, eos_ids=ends), sizes.seed)
    model.options = common.options()
    processor.eos_ids = ends
    return model, processor


def make_questions(args: Any) -> tuple[list[Item], Photographs]:
    """Questions about photographs of `side` pixels, and these."""
    random = np.random.default_rng(0)
    files = []
    for _ in range(16):  # decoded anew for each question, so few of them do
        rough = Image.fromarray(random.integers(0, 256, (24, 24, 3), np.uint8))
        stream = io.BytesIO()
        rough.resize((args.side, args.side), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=92)
        files.append(stream.getvalue())
    content = [{"type": "image"}, {"type": "text", "text": "which disease does the image show? " * 8}]
    items = [
        Item(
            id=str(number), images=(str(number),), messages=({"role": "user", "content": content},),
            options=(), answers=("x",), level="", task="", part="", modality="CFP", unit=str(number),
            lettered=False,
        )
        for number in range(args.questions)
    ]  # fmt: skip
    return items, Photographs(files)


def in_slots(
    model: Any, processor: Processor, items: list[Item], images: Photographs, args: Any
) -> dict[str, Any]:
    """The engine: what it did, and the answers."""
    engine = Sampler(model, processor, slots=args.slots, threads=args.threads)
    asking = Asking(max_new_tokens=args.new_tokens, temperature=1.0)
    began = time.perf_counter()
    answers = dict(engine.answer(items, range(len(items)), images, asking))
    seconds, work = time.perf_counter() - began, engine.work()  # its clock does not run while it sorts
    ran = work["seconds"] / seconds
    return {
        **{"seconds": seconds, "questions_per_second": len(items) / seconds},
        **{"idle": 1 - (1 - work["idle"]) * ran, "waiting": work["waiting"] * ran},
        "occupancy": work["occupancy"],
        "answers": [answers[index][0].response for index in range(len(items))],
    }


def in_batches(
    model: Any, processor: Processor, items: list[Item], images: Photographs, args: Any
) -> dict[str, Any]:
    """Batches in turns: read, then decode. Its answers are others, as each batch numbers its rows anew. The
    last batch is filled up, so that there is one shape, and counts whole."""
    began, waited = time.perf_counter(), 0.0
    firsts = range(0, len(items), args.slots)
    for first in firsts:
        chosen = [items[(first + k) % len(items)] for k in range(args.slots)]
        reading = time.perf_counter()
        texts = [processor.chat(list(one.messages), add_generation_prompt=True) for one in chosen]
        batch = processor(texts, [[images.load_image(name) for name in one.images] for one in chosen])
        waited += time.perf_counter() - reading
        np.asarray(generate(model, batch, max_new_tokens=args.new_tokens, temperature=1.0, seed=first).tokens)
    seconds = time.perf_counter() - began
    answered = len(firsts) * args.slots
    return {"seconds": seconds, "questions_per_second": answered / seconds, "idle": waited / seconds}


def run(args: Any) -> dict[str, Any]:
    """The whole measurement, as it is written to --out."""
    model, processor = make_policy(args)
    report = common.new_report(args, model, SETTINGS)
    items, images = make_questions(args)
    ways = {"slots": in_slots, "batches": in_batches}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for way in ways.values():
        way(model, processor, items[: 2 * args.slots], images, args)  # compiles
    for _ in range(args.repeats):
        for name, way in ways.items():
            found[name].append(way(model, processor, items, images, args))
    if any(one["answers"] != found["slots"][0]["answers"] for one in found["slots"]):
        raise RuntimeError("the same questions got other answers")
    print(f"{'way':>8} {'questions/s':>12} {'idle':>7} {'for images':>11} {'slots full':>11}")
    for name, runs in found.items():
        row: dict[str, Any] = {"way": name, "questions": len(items)}
        for key in ("seconds", "questions_per_second", "idle", "waiting", "occupancy"):
            if key in runs[0]:
                row[key] = common.spread([one[key] for one in runs])
        report["rows"].append(row)
        shares = [f"{row[k]['median']:.1%}" if k in row else "-" for k in ("idle", "waiting", "occupancy")]
        rate = row["questions_per_second"]["median"]
        print(f"{name:>8} {rate:12.1f} {shares[0]:>7} {shares[1]:>11} {shares[2]:>11}", flush=True)
    return report


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_integer("questions", 1200, "Questions, each with an image.", lower_bound=2)
    flags.DEFINE_integer("side", 512, "Sides of the photographs in pixels.", lower_bound=28)
    flags.DEFINE_integer("pixels", 112, "Sides that the model sees; a multiple of 28.", lower_bound=28)
    flags.DEFINE_integer("mean_tokens", 32, "Tokens of an answer, on average.", lower_bound=1)
    flags.DEFINE_integer("new_tokens", 128, "Tokens of the longest answer.", lower_bound=1)
    flags.DEFINE_integer("slots", 32, "Prompts decoded at a time.", lower_bound=1)
    flags.DEFINE_integer("threads", 2, "Threads that read images.", lower_bound=1)
    flags.DEFINE_integer("repeats", 3, "Runs of each way, in turns, after one that compiles.", lower_bound=1)
    flags.DEFINE_string("out", "", "JSON file to write.")


if __name__ == "__main__":
    common.command(define_flags, run)
