"""Asks a model: items in, responses out, in batches of few static shapes.

Evaluation and training both measure a model this way. What an answer is worth is report.py's matter.
Neighbours: grpo/rollout.py draws the tokens, items.py says what an item is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

from fundus_jax import hosts, stop, training
from fundus_jax.data import round_up
from fundus_jax.evaluation.items import Item
from fundus_jax.evaluation.report import Prediction
from fundus_jax.grpo.rollout import generate
from fundus_jax.records import ConfigError

_TEXT_STEP = 16  # padded lengths are multiples of this
_SORTED_BATCHES = 8  # batches among which items are sorted by size; bounds the images held


def predict(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    *,
    load_image: Callable[[str], Image.Image],
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    group_size: int = 1,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> list[Prediction]:
    """`group_size` responses to every item, item after item in the order of `items`.

    Items of like size go into one batch, and batches are padded to few lengths and patch counts, so that few
    programs are compiled; the last batch is filled up with repeated rows, whose responses are dropped. The
    next batch's images are prepared while the model decodes. Equal arguments give equal responses.

    Args:
        load_image: the benchmark's; gets one of an item's `images`.
        batch_size: rows of a batch; B * group_size responses are decoded at once.
        temperature: 0 is greedy.
        mesh: what the model lies on, if on more than one device; batches are split over it, and every process
            of a run gets all responses.

    Raises:
        ConfigError: a batch size below 1.
        DataError: an image that cannot be read.
        Stopped: the run is to stop (`fundus_jax.stop`).
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: it must be at least 1")
    if mesh is not None:
        batch_size = round_up(batch_size, mesh.shape["data"] * mesh.shape["fsdp"])
    responses: dict[int, list[Prediction]] = {}
    batches = _prefetched(_batches(processor, items, load_image, batch_size))
    total = -(-len(items) // batch_size)
    bar = tqdm(batches, total=total, unit="batch", desc="evaluate", disable=not sys.stderr.isatty())
    for number, (index, batch) in enumerate(bar):
        if mesh is not None:
            mine = training.rows_here(batch_size, mesh)
            batch = training.place(jax.tree.map(lambda rows, mine=mine: rows[mine], batch), mesh)
        drawn = generate(
            model,
            batch,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            group_size=group_size,
            seed=_stream(seed, number),
        )
        tokens, mask = map(hosts.fetch, stop.settle((drawn.tokens, drawn.mask)))
        for row, i in enumerate(index):
            responses[i] = [
                _prediction(processor, items[i], g, tokens[row, g][mask[row, g]]) for g in range(group_size)
            ]
    return [response for i in range(len(items)) for response in responses[i]]


def _prediction(processor: Any, item: Item, sample: int, tokens: np.ndarray) -> Prediction:
    finished = len(tokens) > 0 and int(tokens[-1]) in processor.eos_ids
    text = processor.decode(tokens[:-1] if finished else tokens)
    return Prediction(item=item, response=text, sample=sample, tokens=len(tokens), finished=finished)


def _batches(
    processor: Any, items: Sequence[Item], load_image: Callable[[str], Image.Image], batch_size: int
) -> Iterator[tuple[list[int], Any]]:
    """(indices of the items, batch of `batch_size` rows), sorted by size within a stretch of items."""
    stretch = batch_size * _SORTED_BATCHES
    for start in range(0, len(items), stretch):
        rows = []
        for i in range(start, min(start + stretch, len(items))):
            text = processor.chat(list(items[i].messages), add_generation_prompt=True)
            images = [load_image(image) for image in items[i].images]
            length, slots = processor.row_size(text, images)
            rows.append((slots, length, i, text, images))
        rows.sort(key=lambda row: row[:3])
        for first in range(0, len(rows), batch_size):
            chosen = rows[first : first + batch_size]
            filled = [chosen[k % len(chosen)] for k in range(batch_size)]
            batch = processor(
                [row[3] for row in filled],
                [row[4] for row in filled],
                length=bucket(max(row[1] for row in chosen), _TEXT_STEP),
                patches=bucket(max(row[0] for row in chosen), processor.image_config.window_slots),
            )
            yield [row[2] for row in chosen], batch


def _stream(seed: int, number: int) -> int:
    """A seed of its own for every batch."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0]) >> 1


def bucket(size: int, step: int) -> int:
    """`size` rounded up to a multiple of `step`; four an octave, so that at most a fifth is padding."""
    blocks = max(1, -(-size // step))
    grain = max(1, 2 ** (blocks.bit_length() - 3))
    return -(-blocks // grain) * grain * step


def _prefetched(source: Iterator[Any]) -> Iterator[Any]:
    """The elements of `source`, each made in a thread while the one before is used."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, source, end)
        while (element := coming.result()) is not end:
            coming = pool.submit(next, source, end)
            yield element
