"""A server as an engine: any that speaks OpenAI's chat protocol, such as vLLM with our export.

It gets the very picture that our sampler cuts into patches, as a PNG: resizing that again changes nothing, so
the server's own image path gives the same numbers. The checkpoint's chat template puts the same words around
the question, and ids of images are as impossible there as here. Neighbours: engines.py (the Protocol),
chat.py (the client), predict.py (our sampler).
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fundus_jax.chat import Chat, ChatConfig, ChatError, Choice, picture
from fundus_jax.evaluation.engines import Asking
from fundus_jax.evaluation.items import Item
from fundus_jax.evaluation.pictures import Images
from fundus_jax.evaluation.report import Prediction
from fundus_jax.grpo.stream import Work, clock
from fundus_jax.models.qwen2_5_vl.images import resized
from fundus_jax.models.qwen2_5_vl.processor import Processor
from fundus_jax.records import ConfigError, DataError

# Else vLLM samples as the checkpoint's generation_config.json says: Qwen2.5-VL's punishes repetition.
PLAIN = {"repetition_penalty": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0}
_LOST = ("down", "budget")  # what ends the evaluation; all else is about one question


class Served:
    """Answers by the server of `config`; `processor` is that of the checkpoint which it serves.

    Args:
        banned: ids that it must not say: the model's `banned_ids`, as for our sampler.
        fields: what else a request says; `PLAIN` unless the server knows no such fields.
        logprobs: whether to ask for log-probabilities, which not all servers give.
        facts: see `Engine`.

    Attributes:
        failures: index of an item -> why there is no answer to it: a picture that can not be read, or
            what the server said.
    """

    def __init__(
        self,
        config: ChatConfig,
        processor: Processor,
        *,
        banned: Sequence[int] = (),
        fields: dict[str, Any] | None = None,
        logprobs: bool = True,
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.chat, self.processor = Chat(config, "server"), processor
        self.banned = {str(token): -100 for token in banned}
        self.fields, self.logprobs = PLAIN if fields is None else fields, logprobs
        self.facts = {"engine": "server", "served_model": config.model, "fields": self.fields} | (facts or {})
        self.failures: dict[int, str] = {}
        self._work = Work()

    def work(self) -> dict[str, float]:
        """See `Engine`: seconds and questions a second; how busy a server is, it does not say."""
        done = self._work.metrics()
        return {name: done[name] for name in ("seconds", "questions_per_second")}

    def answer(
        self, items: Sequence[Item], wanted: Sequence[int], images: Images, asking: Asking
    ) -> Iterator[tuple[int, list[Prediction]]]:
        """See `Engine`.

        Raises ConfigError where it stays away, or the budget is spent."""
        asking.validate()
        self.failures.clear()
        todo, pending = iter(wanted), set()
        with asyncio.Runner() as runner, clock(self._work):
            runner.run(self.chat.__aenter__())
            try:
                while done := runner.run(self._go_on(todo, pending, items, images, asking)):
                    for index, answers in done:
                        self._work.prompts += 1
                        if answers:
                            yield index, answers
            finally:
                runner.run(self._leave(pending))

    async def _go_on(
        self,
        todo: Iterator[int],
        pending: set[asyncio.Task[Any]],
        items: Sequence[Item],
        images: Images,
        asking: Asking,
    ) -> list[tuple[int, list[Prediction]]]:
        """What has been answered by the time that something has; nothing where all has been."""
        while (
            len(pending) < 2 * self.chat.config.concurrency
        ):  # half of them on the way, half with an image ready
            index = next(todo, None)
            if index is None:
                break
            pending.add(asyncio.create_task(self._one(items[index], index, images, asking)))
        if not pending:
            return []
        done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        pending -= done
        return [task.result() for task in done]

    async def _leave(self, pending: set[asyncio.Task[Any]]) -> None:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        await self.chat.__aexit__()

    async def _one(
        self, item: Item, index: int, images: Images, asking: Asking
    ) -> tuple[int, list[Prediction]]:
        try:
            messages = await asyncio.to_thread(self._messages, item, images)
        except DataError as error:
            self.failures[index] = f"{', '.join(item.images)}: {error}"
            return index, []
        fields: dict[str, Any] = {
            "max_tokens": asking.max_new_tokens,
            "temperature": asking.temperature,
            **self.fields,
        }
        fields |= {"logit_bias": self.banned} if self.banned else {}
        fields |= {"logprobs": True} if self.logprobs else {}
        fields |= {"seed": _seed(asking.seed, index)} if asking.temperature else {}
        try:
            choices = await self.chat.say(messages, n=asking.samples, **fields)
            return index, [self._prediction(item, sample, one) for sample, one in enumerate(choices)]
        except ChatError as error:
            if error.kind in _LOST:
                raise ConfigError(f"{error}; what was answered is kept, the same command goes on") from None
            self.failures[index] = str(error)
            return index, []

    def _messages(self, item: Item, images: Images) -> list[dict[str, Any]]:
        """The item's turns with its images in them, as the server wants them."""
        keys = iter(item.images)

        def part(one: dict[str, Any]) -> dict[str, Any]:
            if one["type"] != "image":
                return one
            file = io.BytesIO()
            shown = resized(images.load_image(next(keys)), self.processor.image_config)
            shown.save(file, "PNG", compress_level=1)
            return picture(file.getvalue())

        return [{**turn, "content": [part(one) for one in turn["content"]]} for turn in item.messages]

    def _prediction(self, item: Item, sample: int, choice: Choice) -> Prediction:
        if choice.message.refusal or choice.finish_reason not in ("stop", "length"):
            kind = "refused" if choice.message.refusal else "malformed"
            raise ChatError(kind, f"the end is {choice.finish_reason!r}")
        text, finished = choice.message.content or "", choice.finish_reason == "stop"
        told = (choice.logprobs or {}).get("content")
        tokens = len(self.processor.tokenizer(text).input_ids) + finished if told is None else len(told)
        logprob = None if told is None else float(sum(one["logprob"] for one in told))
        return Prediction(
            item=item, response=text, sample=sample, tokens=tokens, finished=finished, logprob=logprob
        )


def _seed(seed: int, index: int) -> int:
    """A seed for each question, whichever are asked beside it."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0]) >> 1
