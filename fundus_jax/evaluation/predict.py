"""Our sampler as an engine: items in, answers out, through slots that are refilled, in few static shapes.

Evaluation and training both measure a model this way. What an answer is worth is report.py's matter.
Neighbours: grpo/stream.py draws the tokens, engines.py says what an engine is, items.py what an item is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh
from PIL import Image

from fundus_jax.data import THREADS, ladder, round_up
from fundus_jax.evaluation.engines import Asking, in_order
from fundus_jax.evaluation.items import Item
from fundus_jax.evaluation.pictures import Images
from fundus_jax.evaluation.report import Prediction
from fundus_jax.grpo.stream import Said, Work, stream
from fundus_jax.models.batch import Batch
from fundus_jax.records import ConfigError, DataError

TEXT_STEP = 16  # padded lengths are multiples of this


class Sampler:
    """Answers with the module `model`, on `mesh` if it lies on one.

    Prompts are padded to the longest of their group; there are at most `groups` of like length, so at most as
    many programs are compiled. Images are read and cut into patches in `threads` while the model decodes. One
    that can not be read makes its question a failure; of several processes, which must all know that, it
    ends them.

    Args:
        slots: prompts that are decoded at a time, each with its samples.
        facts: see `Engine`.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        slots: int,
        mesh: Mesh | None = None,
        groups: int = 4,
        threads: int = THREADS,
        facts: dict[str, Any] | None = None,
    ) -> None:
        if min(slots, groups, threads) < 1:
            raise ConfigError(
                f"batch_size {slots}, groups {groups}, threads {threads}: all must be at least 1"
            )
        self.model, self.processor, self.mesh = model, processor, mesh
        self.slots = slots if mesh is None else round_up(slots, mesh.shape["data"] * mesh.shape["fsdp"])
        self.groups, self.threads, self.facts = groups, threads, {"engine": "sampler"} | (facts or {})
        self.failures: dict[int, str] = {}
        self._work = Work()

    def work(self) -> dict[str, float]:
        """See `Engine`; idle is the share of the time in which no program ran, as far as the host knows."""
        return self._work.metrics()

    def answer(
        self, items: Sequence[Item], wanted: Sequence[int], images: Images, asking: Asking
    ) -> Iterator[tuple[int, list[Prediction]]]:
        """See `Engine`. The longest prompts come first: where memory is short, that shows at once."""
        asking.validate()
        self.failures.clear()
        if not len(wanted):
            return
        sizes, asked = self._sizes(items, images), set(wanted)
        self.failures = {index: why for index, why in self.failures.items() if index in asked}
        asked -= self.failures.keys()
        for group in reversed(ladder([length for length, _ in sizes], self.groups, self.slots)):
            shape = max(sizes[index][0] for index in group), max(sizes[index][1] for index in group)
            said = stream(
                self.model,
                partial(self._row, items, images, shape),
                [index for index in group if index in asked],
                max_new_tokens=asking.max_new_tokens,
                temperature=asking.temperature,
                group_size=asking.samples,
                seed=asking.seed,
                slots=self.slots,
                threads=self.threads,
                mesh=self.mesh,
                work=self._work,
            )
            for one in said:
                if one.prompt not in self.failures:
                    yield one.prompt, self._predictions(items[one.prompt], one)

    def _sizes(self, items: Sequence[Item], images: Images) -> list[tuple[int, int]]:
        """(tokens, patch slots) of each prompt, by the size of each picture, asked for once and without its
        pixels; of a question whose pictures have no shape that can be used (0, 0), and it is a failure."""
        keys = list(dict.fromkeys(key for item in items for key in item.images))

        def size(index: int) -> tuple[int, int]:
            shown = [known[key] for key in items[index].images]
            try:
                tokens, patches = self.processor.row_size(self._text(items[index]), shown)
            except DataError as error:
                self._fail(index, items[index], error)
                return 0, 0
            return round_up(tokens, TEXT_STEP), patches

        with ThreadPoolExecutor(self.threads) as pool:
            known = dict(zip(keys, pool.map(images.image_size, keys), strict=True))
            return list(pool.map(size, range(len(items))))

    def _text(self, item: Item) -> str:
        return self.processor.chat(list(item.messages), add_generation_prompt=True)

    def _row(self, items: Sequence[Item], images: Images, shape: tuple[int, int], index: int) -> Batch:
        """The row of a prompt; where a picture can not be read, one of its shape, whose answer is dropped."""
        item, text = items[index], self._text(items[index])
        try:
            shown = [images.load_image(key) for key in item.images]
            return self.processor([text], [shown], length=shape[0], patches=shape[1])
        except DataError as error:
            if jax.process_count() > 1:
                raise
            self._fail(index, item, error)
        blank = [Image.new("RGB", images.image_size(key)) for key in item.images]
        return self.processor([text], [blank], length=shape[0], patches=shape[1])

    def _fail(self, index: int, item: Item, error: DataError) -> None:
        self.failures[index] = f"{', '.join(item.images)}: {error}"

    def _predictions(self, item: Item, said: Said) -> list[Prediction]:
        found = []
        for sample, (tokens, logprob) in enumerate(zip(said.tokens, said.logprobs, strict=True)):
            finished = len(tokens) > 0 and int(tokens[-1]) in self.processor.eos_ids
            text = self.processor.decode(tokens[:-1] if finished else tokens)
            text = text if finished else text.rstrip("\ufffd")  # half a character that was cut off
            found.append(
                Prediction(
                    item=item,
                    response=text,
                    sample=sample,
                    tokens=len(tokens),
                    finished=finished,
                    logprob=logprob,
                )
            )
        return found


def predict(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    *,
    images: Images,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    group_size: int = 1,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> list[Prediction]:
    """`group_size` responses to every item, item after item in the order of `items`, by `Sampler` with
    `batch_size` slots. Raises ConfigError, DataError and Stopped as that does."""
    engine = Sampler(model, processor, slots=batch_size, mesh=mesh)
    asking = Asking(max_new_tokens=max_new_tokens, temperature=temperature, samples=group_size, seed=seed)
    return in_order(engine, items, images, asking)


__all__ = ["TEXT_STEP", "Sampler", "predict"]
