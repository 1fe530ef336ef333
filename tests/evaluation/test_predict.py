"""Asking a model: order, filling up, static shapes, seeds, end tokens; and a real (tiny) model end to end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fundus_jax import training
from fundus_jax.evaluation import predict as predict_module
from fundus_jax.evaluation import run
from fundus_jax.evaluation.items import Item
from fundus_jax.evaluation.predict import bucket, predict
from fundus_jax.records import ConfigError, DataError
from fundus_jax.sharding import parse_mesh
from tests.evaluation.samples import example, item, stage

END = 0


class FakeProcessor:
    """Tokens are character codes; an image's width is the number of its patch slots."""

    eos_ids = (END,)
    image_config = SimpleNamespace(window_slots=4)

    def chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        assert add_generation_prompt
        return messages[0]["content"][1]["text"]

    def row_size(self, text: str, images: list[Image.Image]) -> tuple[int, int]:
        return len(text), images[0].width

    def __call__(
        self, texts: list[str], images: list[list[Image.Image]], *, length: int, patches: int
    ) -> Any:
        assert max(map(len, texts)) <= length
        assert max(row[0].width for row in images) <= patches
        assert [len(row) for row in images] == [1] * len(texts)
        return SimpleNamespace(texts=texts, shape=(len(texts), length, patches))

    def decode(self, tokens: np.ndarray) -> str:
        return "".join(map(chr, tokens))


class FakeModel:
    """Answers a prompt with its own text and the number of the sample; odd samples are cut off."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def generate(self, model: Any, batch: Any, **settings: Any) -> Any:
        assert model is self
        self.calls.append({"shape": batch.shape, **settings})
        rows, groups, width = len(batch.texts), settings["group_size"], settings["max_new_tokens"]
        tokens = np.zeros((rows, groups, width), np.int32)
        mask = np.zeros((rows, groups, width), bool)
        for b, text in enumerate(batch.texts):
            for g in range(groups):
                codes = [ord(letter) for letter in f"{text}/{g}"] + ([END] if g % 2 == 0 else [])
                tokens[b, g, : len(codes)], mask[b, g, : len(codes)] = codes, True
        return SimpleNamespace(tokens=tokens, mask=mask)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    fake = FakeModel()
    monkeypatch.setattr(predict_module, "generate", fake.generate)
    return fake


def asked(name: str, text: str) -> Item:
    """An item with a prompt of its own."""
    return item(name, messages=({"content": [{"type": "image"}, {"type": "text", "text": text}]},))


def load_image(name: str) -> Image.Image:
    """A picture whose width depends on its name."""
    return Image.new("RGB", (4 + 8 * (len(name) % 3), 4))


def test_answers_stand_in_the_order_of_the_items(model: FakeModel) -> None:
    items = [asked(f"q{k}", "x" * (37 * k % 23) + str(k)) for k in range(37)]
    found = predict(
        model, FakeProcessor(), items, load_image=load_image, max_new_tokens=40, batch_size=4, group_size=3
    )
    assert len(found) == 37 * 3
    for k, one in enumerate(found):
        assert one.item is items[k // 3]
        assert one.sample == k % 3
        assert one.response == f"{items[k // 3].prompt}/{k % 3}"
        assert one.finished == (k % 3 != 1)  # sample 1 has no end token
        assert one.tokens == len(one.response) + one.finished


def test_shapes_are_few_and_static(model: FakeModel) -> None:
    items = [asked(f"q{k}" + "z" * (k % 3), "x" * (1 + 91 * k % 200)) for k in range(61)]
    predict(model, FakeProcessor(), items, load_image=load_image, max_new_tokens=300, batch_size=8)
    shapes = {call["shape"] for call in model.calls}
    assert len(model.calls) == 8
    assert {rows for rows, _, _ in shapes} == {8}  # the last batch is filled up
    for _, length, patches in shapes:
        assert length % 16 == 0
        assert patches % 4 == 0


def test_settings_reach_the_sampler_and_every_batch_has_its_own_seed(model: FakeModel) -> None:
    items = [asked(f"q{k}", str(k)) for k in range(6)]
    settings: dict[str, Any] = {"max_new_tokens": 9, "temperature": 0.7, "group_size": 2}

    def seeds(seed: int) -> list[int]:
        model.calls.clear()
        predict(model, FakeProcessor(), items, load_image=load_image, batch_size=2, seed=seed, **settings)
        assert all({name: call[name] for name in settings} == settings for call in model.calls)
        return [call["seed"] for call in model.calls]

    assert len(set(seeds(0) + seeds(1))) == 6
    assert seeds(1) == seeds(1)
    assert all(0 <= seed < 2**31 for seed in seeds(2**40))


def test_errors_of_the_preparing_thread_arrive(model: FakeModel) -> None:
    def broken(name: str) -> Image.Image:
        raise DataError(f"{name} is broken")

    with pytest.raises(DataError, match="q0.png is broken"):
        predict(model, FakeProcessor(), [item("q0")], load_image=broken, max_new_tokens=4, batch_size=2)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        predict(model, FakeProcessor(), [item()], load_image=load_image, max_new_tokens=4, batch_size=0)


@given(st.integers(0, 10**6), st.integers(1, 256))
def test_buckets_hold_what_they_are_for(size: int, step: int) -> None:
    found = bucket(size, step)
    assert found >= max(size, 1)
    assert found % step == 0
    assert found < max(size, 1) * 1.25 + 2 * step
    assert bucket(found, step) == found
    assert len({bucket(k * step, step) for k in range(1, 257)}) <= 4 * 8


def tiny_model(folder: Path) -> tuple[Any, Any]:
    """A model of random weights, and its processor; no torch."""
    from flax import nnx

    from fundus_jax.models import read_config
    from fundus_jax.models.qwen2_5_vl.model import Qwen2_5_VL
    from fundus_jax.models.qwen2_5_vl.processor import Processor
    from tests.models import tiny

    tiny.tiny_config().save_pretrained(tiny.write_processor_files(folder))
    return Qwen2_5_VL(read_config(folder), rngs=nnx.Rngs(0)), Processor.from_pretrained(folder)


def test_questions_with_several_images(tmp_path: Path) -> None:
    """In one batch with a question that has one; every picture is loaded, in the order of the prompt."""
    model, processor = tiny_model(tmp_path / "tiny")
    loaded: list[str] = []

    def load(name: str) -> Image.Image:
        loaded.append(name)
        return Image.new("RGB", (56, 56), (len(loaded), 80, 10))

    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which disease?"}]
    two = item("two", images=("left.png", "right.png"), messages=({"role": "user", "content": content},))
    found = predict(model, processor, [two, item("one")], load_image=load, max_new_tokens=3, batch_size=2)
    assert [one.item.id for one in found] == ["two", "one"]
    assert all(1 <= one.tokens <= 3 for one in found)
    assert loaded == ["left.png", "right.png", "one.png"]


def test_the_command_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five questions, two samples each, through the flags, the model and the files. Its answers are noise."""
    from absl import flags

    loaded: list[tuple[Any, ...]] = []

    def load_pretrained(*arguments: Any, **named: Any) -> tuple[Any, Any]:
        loaded.append((*arguments, named))
        model, processor = tiny_model(tmp_path / "tiny")
        skeleton, params = training.split(model)
        return skeleton.merge(training.spread(params, skeleton.shardings(named["mesh"]))), processor

    monkeypatch.setattr(run, "load_pretrained", load_pretrained)
    source = stage(tmp_path / "examples", [example(k) for k in range(5)])
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    for kind in ("string", "enum", "bool", "list", "integer", "float"):
        original = getattr(flags, f"DEFINE_{kind}")
        monkeypatch.setattr(
            flags, f"DEFINE_{kind}", lambda *a, _define=original, **k: _define(*a, flag_values=values, **k)
        )
    run.define_flags()
    out = tmp_path / "out"
    given = {"model": "DIR", "benchmark": "phantom", "source": source, "out": out, "batch_size": 4}
    given |= {"max_new_tokens": 6, "temperature": 1.0, "group_size": 2}
    values(["run", *(f"--{name}={value}" for name, value in given.items())])
    run.main(["run"])
    mesh = parse_mesh("data:-1")
    assert loaded == [("DIR", {"dtype": "float32", "mesh": mesh})]

    report = json.loads((out / "report.json").read_text())
    assert (report["n"], report["items"], report["benchmark"]["flags"]["group_size"]) == (10, 5, 2)
    assert report["benchmark"]["missing_images"] == []
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [(line["id"], line["sample"]) for line in lines] == [
        (f"e{k}", s) for k in range(5) for s in (0, 1)
    ]
    assert "A. Normal" in lines[0]["prompt"]
    assert all(1 <= line["tokens"] <= 6 for line in lines)
    assert len({line["response"] for line in lines}) > 2  # noise, not one constant
    assert "accuracy" in capsys.readouterr().out
    assert (out / "report.txt").read_text().startswith("10 answers to 5 items of 5 patients or images")

    values.source = str(tmp_path)
    with pytest.raises(SystemExit, match="DataError: .*no finished stage directory"):
        run.main(["run"])
