"""The stream: the tokens of `generate` whatever is asked beside a prompt, rows made once, on a mesh too."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from fundus_jax import sharding, training
from fundus_jax.grpo.rollout import generate
from fundus_jax.grpo.stream import Work, stream
from fundus_jax.models.batch import Batch
from fundus_jax.models.qwen2_5_vl.processor import Processor
from fundus_jax.records import ConfigError, DataError
from tests.grpo.test_sampler import ending_often
from tests.models import small
from tests.small import Bigram

SIZES = [[(60, 70)], [], [(100, 50), (50, 60)], [(90, 30)], [], [(60, 60)], [(30, 60)], []]


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    processor: Processor = small.processor(tmp_path_factory.mktemp("processor"))
    return small.batch(processor, SIZES, length=64, patches=128)


def row_of(batch: Batch, number: int) -> Batch:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[number : number + 1], batch)


def heard(model: Any, batch: Batch, prompts: list[int], **settings: Any) -> dict[int, list[list[int]]]:
    found = stream(model, lambda number: row_of(batch, number), prompts, **settings)
    return {one.prompt: [tokens.tolist() for tokens in one.tokens] for one in found}


def plain(model: Any, batch: Batch, **settings: Any) -> dict[int, list[list[int]]]:
    out = generate(model, batch, **settings)
    tokens, mask = np.asarray(out.tokens), np.asarray(out.mask)
    return {
        row: [tokens[row, g][mask[row, g]].tolist() for g in range(tokens.shape[1])]
        for row in range(len(tokens))
    }


@pytest.mark.parametrize(("group_size", "temperature"), [(1, 0.0), (3, 1.0)])
def test_no_token_depends_on_slots_or_neighbours(batch: Batch, group_size: int, temperature: float) -> None:
    model: Any = ending_often(Bigram(small.config(), rngs=nnx.Rngs(0)))
    settings = {"max_new_tokens": 9, "group_size": group_size, "temperature": temperature, "seed": 3}
    whole = plain(model, batch, **settings)
    if temperature:
        assert len({len(tokens) for group in whole.values() for tokens in group}) > 2
    everything = list(range(len(SIZES)))
    for slots, refill, threads in ((1, 1, 1), (2, 1, 2), (3, 2, 1), (8, 8, 4), (0, 0, 2)):
        work = Work()
        more = {"slots": slots, "refill": refill, "threads": threads, "work": work}
        assert heard(model, batch, everything, **settings, **more) == whole
        assert work.prompts == len(SIZES)
        assert all(0 <= work.metrics()[name] <= 1 for name in ("idle", "waiting", "occupancy"))
    some = heard(model, batch, [6, 1, 3], slots=2, refill=1, **settings)
    assert some == {number: whole[number] for number in (6, 1, 3)}


def test_the_real_model(batch: Batch) -> None:
    """Images in their own slots, and a cache that goes round."""
    model = ending_often(small.model())
    settings: dict[str, Any] = {"max_new_tokens": 7, "group_size": 2, "temperature": 1.0, "seed": 5}
    assert heard(model, batch, list(range(8)), slots=2, refill=1, **settings) == plain(
        model, batch, **settings
    )


def test_on_a_mesh(batch: Batch) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 5, "temperature": 1.0, "seed": 5}
    whole = plain(ending_often(small.model()), batch, **settings)
    mesh = sharding.parse_mesh("data:2,fsdp:2,tensor:2")
    with jax.set_mesh(mesh):
        model = small.model()
        skeleton, params = training.split(model)
        model = ending_often(skeleton.merge(training.spread(params, skeleton.shardings(mesh))))
        found = heard(model, batch, [0, 1, 2, 3, 5, 6, 7], slots=4, mesh=mesh, **settings)
        assert found == {number: whole[number] for number in (0, 1, 2, 3, 5, 6, 7)}


def test_rows_are_made_once_in_other_threads_and_few_ahead(batch: Batch) -> None:
    model: Any = ending_often(Bigram(small.config(), rngs=nnx.Rngs(0)))
    made: Counter[int] = Counter()
    threads = set()

    def prepare(number: int) -> Batch:
        made[number] += 1
        threads.add(threading.current_thread())
        return row_of(batch, number % len(SIZES))

    ahead = []
    for heard_of, _ in enumerate(stream(model, prepare, range(40), max_new_tokens=5, slots=4, refill=1)):
        ahead.append(len(made) - heard_of)
    assert dict(made) == dict.fromkeys(range(40), 1)
    assert threading.main_thread() not in threads
    assert max(ahead) <= 4 + 4 + 2 + 1  # in slots, in threads, on the devices


def test_what_goes_wrong_arrives(batch: Batch) -> None:
    model: Any = Bigram(small.config(), rngs=nnx.Rngs(0))

    def broken(number: int) -> Batch:
        raise DataError(f"{number} is broken")

    with pytest.raises(DataError, match="7 is broken"):
        list(stream(model, broken, [7], max_new_tokens=3))
    with pytest.raises(ConfigError, match="max_new_tokens 0"):
        list(stream(model, broken, [7], max_new_tokens=0))
    assert list(stream(model, broken, [], max_new_tokens=3)) == []
