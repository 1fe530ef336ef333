"""Both engines of the evaluation say the same in float32: our sampler, and a real vLLM with our export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fundus_jax.chat import ChatConfig
from fundus_jax.data import Size
from fundus_jax.evaluation.benchmarks import PhantomBenchmark
from fundus_jax.evaluation.engines import Asking
from fundus_jax.evaluation.items import Item, Selection
from fundus_jax.evaluation.journal import Journal
from fundus_jax.evaluation.predict import Sampler
from fundus_jax.evaluation.report import Prediction
from fundus_jax.evaluation.served import Served
from fundus_jax.grpo.stream import Said
from fundus_jax.models import load_pretrained
from launch.stages import Trainer
from tests.vllm.conftest import NAME, Vllm
from tests.vllm.test_same_tokens import ask, assert_tie

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

ASKING = Asking(max_new_tokens=16)
CLOSE = 1e-3  # of the sum of log-probabilities of up to 16 tokens


@pytest.fixture(scope="module")
def engines(vllm: Vllm, exported: Path) -> list[Any]:
    model, processor = load_pretrained(exported, "float32")
    server = ChatConfig(address=vllm.address, model=NAME, concurrency=4, timeout=120, deadline=240)
    return [Sampler(model, processor, slots=4), Served(server, processor, banned=model.config.banned_ids)]


def asked(trainer: Trainer, folder: Path) -> PhantomBenchmark:
    """Phantoms whose sides are no multiples of 28 pixels, so that both engines depend on one resizing."""
    benchmark = PhantomBenchmark(
        trainer.work.path / "data" / "examples", Selection(split="train", limit=16, style="options")
    )
    plain = benchmark.load_image

    def stretched(image: str) -> Image.Image:
        return plain(image).resize((75, 61), Image.Resampling.BICUBIC)

    benchmark.load_image = stretched  # type: ignore[method-assign]
    benchmark.image_size = lambda image: Size(75, 61)  # type: ignore[method-assign]
    return benchmark


def kept_tokens(engine: Sampler, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The tokens of each answer of our engine, by its item, as they come."""
    kept: dict[str, list[int]] = {}
    plain = engine._predictions

    def predictions(item: Item, said: Said) -> list[Prediction]:
        kept[item.id] = said.tokens[0].tolist()
        return plain(item, said)

    monkeypatch.setattr(engine, "_predictions", predictions)
    return kept


def assert_tie_or_same(
    mine: list[int], one: Prediction, vllm: Vllm, engine: Served, benchmark: PhantomBenchmark
) -> None:
    """Asked once more, alone, the server says what we say (it says both), or the first token that differs was
    a tie."""
    body = {"messages": engine._messages(one.item, benchmark), "logit_bias": engine.banned, **engine.fields}
    [choice] = ask(vllm, body)["choices"]
    if choice["token_ids"] != mine:
        assert_tie(mine, choice)


def test_both_engines_say_the_same(
    engines: list[Any], vllm: Vllm, trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = asked(trainer, tmp_path)
    tokens = kept_tokens(engines[0], monkeypatch)
    found: list[list[Prediction]] = []
    for engine in engines:
        journal = Journal(tmp_path / engine.facts["engine"], benchmark.items, engine.facts, ASKING)
        answers = journal.ask(engine, benchmark)
        assert not engine.failures
        found.append([one for index in range(len(benchmark.items)) for one in answers[index]])
    ours, theirs = found
    assert [one.item.id for one in ours] == [one.item.id for one in theirs]
    same = [one.response == other.response for one, other in zip(ours, theirs, strict=True)]
    gaps = [
        abs((one.logprob or 0) - (other.logprob or 0))
        for one, other, alike in zip(ours, theirs, same, strict=True)
        if alike
    ]
    print(f"{sum(same)} of {len(same)} the same; log-probabilities differ by at most {max(gaps):.1e}")
    assert sum(same) >= len(same) - 1, "ties are rare"
    for one, alike in zip(ours, same, strict=True):
        if not alike:
            assert_tie_or_same(tokens[one.item.id], one, vllm, engines[1], benchmark)
    assert max(gaps) < CLOSE
    assert [one.tokens for one in ours if one.finished] == [one.tokens for one in theirs if one.finished]
    assert len({one.response for one in ours}) > len(ours) / 2, "or this would prove little"


def test_samples_of_a_seed_are_the_same_again(engines: list[Any], trainer: Trainer, tmp_path: Path) -> None:
    benchmark = asked(trainer, tmp_path)
    how = Asking(max_new_tokens=8, temperature=1.0, samples=3, seed=2)
    for engine in engines:
        once, again = (
            dict(engine.answer(benchmark.items, wanted, benchmark, how)) for wanted in (range(6), (4, 2))
        )
        for index in (2, 4):  # log-probabilities depend on the batch in their last digits
            assert [one.response for one in once[index]] == [one.response for one in again[index]]
        assert all(len(said) == 3 for said in once.values())
