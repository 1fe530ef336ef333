"""A server as an engine: what it is sent, answers by item, failures apart, a lost server, and going on."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fundus_jax.chat import ChatConfig
from fundus_jax.evaluation.engines import Asking
from fundus_jax.evaluation.items import Item
from fundus_jax.evaluation.served import Served
from fundus_jax.models.qwen2_5_vl.images import image_patches
from fundus_jax.models.qwen2_5_vl.processor import Processor
from fundus_jax.records import ConfigError, DataError
from tests.chat_server import Body, Reply, Server
from tests.evaluation.samples import Pictures, item
from tests.models import tiny


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.tiny_config().save_pretrained(tiny.write_processor_files(folder))
    return Processor.from_pretrained(folder)


def load_image(name: str) -> Image.Image:
    random = np.random.default_rng(int(name))
    return Image.fromarray(random.integers(0, 256, (61, 45 + int(name), 4), np.uint8), "RGBA")


def asked(number: int) -> Item:
    content = [{"type": "image"}, {"type": "text", "text": f"question {number}"}]
    return item(f"q{number}", images=(str(number),), messages=({"role": "user", "content": content},))


ITEMS = [asked(number) for number in range(12)]
PICTURES = Pictures(load_image)


def text_of(body: Body) -> str:
    return body["messages"][0]["content"][1]["text"]


def config(server: Server, **changes: Any) -> ChatConfig:
    return ChatConfig(
        **{"address": server.address, "model": "m", "concurrency": 3, "patience": 0.3} | changes
    )


def answers(
    engine: Served, items: Sequence[Item] = ITEMS, images: Pictures = PICTURES, **asking: Any
) -> dict[int, Any]:
    how = Asking(**{"max_new_tokens": 9} | asking)
    return dict(engine.answer(items, range(len(items)), images, how))


def test_answers_and_what_was_sent(processor: Processor) -> None:
    def reply(body: Body, number: int) -> Reply:
        texts = [f"{text_of(body)}/{sample}" for sample in range(body["n"])]
        return Reply(texts=texts, finish="length" if number == 0 else "stop")

    with Server(reply) as server:
        engine = Served(config(server), processor, banned=[3, 9])
        found = answers(engine, samples=2, temperature=0.7, seed=4)
    assert {index: [one.response for one in said] for index, said in found.items()} == {
        number: [f"question {number}/0", f"question {number}/1"] for number in range(12)
    }
    assert [one.sample for one in found[3]] == [0, 1]
    assert sum(not one.finished for said in found.values() for one in said) == 2
    assert server.most <= 3
    assert engine.work()["questions_per_second"] > 0
    assert engine.failures == {}
    for body in server.bodies:
        number = int(text_of(body).split()[1])
        assert (body["temperature"], body["max_tokens"], body["n"]) == (0.7, 9, 2)
        assert (body["repetition_penalty"], body["top_k"]) == (1.0, -1)
        assert body["logit_bias"] == {"3": -100, "9": -100}
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        sent = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
        ours, theirs = (
            image_patches(one, processor.image_config)[0] for one in (load_image(str(number)), sent)
        )
        assert np.array_equal(ours, theirs), "the server cuts the very same patches"
    assert len({body["seed"] for body in server.bodies}) == 12


def test_log_probabilities_are_added_up(processor: Processor) -> None:
    content = [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -0.25}]
    choice = {"finish_reason": "stop", "message": {"content": "ab"}, "logprobs": {"content": content}}
    with Server(lambda body, number: Reply(raw=json.dumps({"choices": [choice]}))) as server:
        [one] = answers(Served(config(server), processor), ITEMS[:1])[0]
    assert (one.logprob, one.tokens, one.finished) == (-0.75, 2, True)
    with Server(lambda body, number: Reply(texts=["two words"])) as server:
        engine = Served(config(server), processor, fields={}, logprobs=False)
        [one] = answers(engine, ITEMS[:1])[0]
    assert one.logprob is None
    assert one.tokens == len(processor.tokenizer("two words").input_ids) + 1
    assert not {"logprobs", "seed", "top_k"} & set(server.bodies[0])


def test_a_question_without_an_answer_leaves_the_others(processor: Processor) -> None:
    def reply(body: Body, number: int) -> Reply:
        if text_of(body) == "question 2":
            return Reply(status=400)
        refused = "No." if text_of(body) == "question 5" else None
        return Reply(texts=["yes"], refusal=refused)

    with Server(reply) as server:
        engine = Served(config(server), processor)
        found = answers(engine)
    assert sorted(found) == [0, 1, 3, 4, 6, 7, 8, 9, 10, 11]
    assert sorted(engine.failures) == [2, 5]
    assert engine.failures[2].startswith("rejected")
    assert engine.failures[5].startswith("refused")


def test_a_server_that_is_lost_ends_it_and_what_was_said_is_not_lost(processor: Processor) -> None:
    with Server(lambda body, number: Reply(texts=["yes"], hang_up=number >= 6)) as server:
        engine = Served(config(server, tries=1, breaker=1, concurrency=1, deadline=60), processor)
        found: list[int] = []

        def collect() -> None:
            for index, _ in engine.answer(ITEMS, range(12), PICTURES, Asking(max_new_tokens=3)):
                found.append(index)
                if len(found) == 4:
                    server.stop()

        with pytest.raises(ConfigError, match="the same command goes on"):
            collect()
    assert len(found) >= 4


def test_a_picture_that_can_not_be_read_costs_its_question_alone(processor: Processor) -> None:
    def load(name: str) -> Image.Image:
        if name == "4":
            raise DataError("4.png: its pixels can not be read")
        return load_image(name)

    with Server(lambda body, number: Reply(texts=["yes"])) as server:
        engine = Served(config(server), processor)
        found = answers(engine, images=Pictures(load))
    assert sorted(found) == [number for number in range(12) if number != 4]
    assert engine.failures == {4: "4: 4.png: its pixels can not be read"}


def test_several_images_and_text_alone(processor: Processor, tmp_path: Path) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    two = item("two", images=("3", "4"), messages=({"role": "user", "content": content},))
    with Server(lambda body, number: Reply(texts=["yes"])) as server:
        answers(Served(config(server), processor), [two])
    kinds = [part["type"] for part in server.bodies[0]["messages"][0]["content"]]
    assert kinds == ["image_url", "text", "image_url"]
