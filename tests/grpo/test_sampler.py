"""The sampler's slots: the tokens of the plain loop whatever is decoded beside them, and what the counters
say."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fundus_jax import sharding, training
from fundus_jax.grpo import sampler
from fundus_jax.grpo.rollout import Rollout, Settings, generate
from fundus_jax.grpo.sampler import sample
from fundus_jax.models.batch import Batch
from fundus_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from fundus_jax.models.qwen2_5_vl.model import Prompt, Qwen2_5_VL
from fundus_jax.models.qwen2_5_vl.processor import Processor
from fundus_jax.records import ConfigError
from tests.models import small
from tests.small import Bigram

SIZES = [[(60, 70)], [], [(100, 50), (50, 60)], [(90, 30)], [], [(60, 60)]]  # images of each row
END = 1


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    processor: Processor = small.processor(tmp_path_factory.mktemp("processor"))
    return small.batch(processor, SIZES, length=64, patches=128)


def ending_often(model: Any) -> Any:
    """The model with so many end ids that its rollouts differ in length."""
    model.config = dataclasses.replace(model.config, eos_ids=tuple(range(0, 1000, 8)))
    return model


def equal(one: Rollout, other: Rollout) -> bool:
    """Equal tokens and masks, and log-probs up to rounding."""
    assert np.array_equal(one.mask, other.mask)
    assert np.array_equal(one.tokens, other.tokens)
    return np.abs(np.asarray(one.logprobs) - np.asarray(other.logprobs)).max() < 1e-4


@pytest.mark.parametrize(("group_size", "temperature"), [(1, 0.0), (3, 1.0)])
def test_slots_change_no_token(batch: Batch, group_size: int, temperature: float) -> None:
    model: Any = ending_often(Bigram(small.config(), rngs=nnx.Rngs(0)))
    settings: dict[str, Any] = {"max_new_tokens": 9, "group_size": group_size, "temperature": temperature}
    whole = generate(model, batch, seed=3, **settings)
    lengths = np.asarray(whole.mask).sum(axis=-1)
    if temperature:
        assert len(set(lengths.ravel().tolist())) > 3
    for slots, refill in ((1, 1), (2, 1), (2, 2), (3, 2), (6, 1), (0, 0)):
        got, counts = sample(model, batch, seed=3, slots=slots, refill=refill, **settings)
        assert equal(got, whole), (slots, refill)
        assert counts.busy == (lengths.max(axis=1) - 1).sum()
        assert counts.steps >= lengths.max() - 1


def test_the_real_model_in_slots(batch: Batch) -> None:
    """Images, prompts of unequal length, and a cache that goes round."""
    model = ending_often(small.model())
    settings: dict[str, Any] = {"max_new_tokens": 7, "group_size": 2, "temperature": 1.0, "seed": 5}
    whole = generate(model, batch, **settings)
    got, counts = sample(model, batch, slots=2, refill=1, **settings)
    assert counts.steps > Settings(7, 1.0, 2).columns
    assert counts.fills == 6
    assert equal(got, whole)
    other = dataclasses.replace(batch, patches=-np.asarray(batch.patches))
    changed, _ = sample(model, other, slots=2, refill=1, **settings)
    differs = np.abs(np.asarray(changed.logprobs) - np.asarray(got.logprobs)).max(axis=(1, 2)) > 1e-3
    assert differs.tolist() == [bool(ones) for ones in SIZES]  # each image in its own row's slot


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CountdownStepper:
    """What `Countdown` decodes with."""

    config: Qwen2_5_VLConfig = field(metadata={"static": True})
    layers: tuple = ()

    def remember(self, prefix: Any) -> Any:
        return prefix

    def empty_cache(self, memory: Any, group: int, columns: int) -> jax.Array:
        return jnp.zeros((len(memory), group, columns))

    def logits(self, hidden: jax.Array) -> jax.Array:
        return 100 * hidden

    def __call__(self, memory: Any, cache: Any, tokens: jax.Array, *places: Any) -> tuple[jax.Array, Any]:
        del memory, places
        return jax.nn.one_hot(tokens - 1, self.config.vocab_size), cache


class Countdown(nnx.Module):
    """Says the first token of the prompt, then that less one, and so on to the end id 1: its answers are as
    long as a test wants them."""

    def __init__(self) -> None:
        self.config = dataclasses.replace(small.config(), eos_ids=(END,))

    def prefill(self, batch: Batch) -> Prompt:
        length = jnp.asarray(batch.tokens)[:, 0]
        hot = jax.nn.one_hot(length, self.config.vocab_size)
        return Prompt(length[:, None], hot, length)  # type: ignore[arg-type]

    def stepper(self) -> CountdownStepper:
        return CountdownStepper(self.config)

    def stepper_of(self) -> CountdownStepper:
        return self.stepper()

    def decoding_layer(self, index: jax.Array) -> jax.Array:
        return index


def answers(lengths: list[int]) -> Batch:
    """Prompts that `Countdown` answers with `lengths` tokens."""
    rows = len(lengths)
    nothing = np.zeros((rows, 0, 2), np.int32)
    return Batch(
        tokens=np.asarray(lengths, np.int32)[:, None],
        mask=np.ones((rows, 1), bool),
        segments=np.ones((rows, 1), np.int32),
        positions=np.zeros((rows, 3, 1), np.int32),
        image_index=np.full((rows, 1), -1, np.int32),
        patches=nothing.astype(np.float32),
        patch_hw=nothing,
        patch_image=nothing[:, :, 0],
    )


@pytest.mark.parametrize(
    ("slots", "refill", "steps", "fills"),
    [
        (0, 0, 7, 1),  # the longest answer holds all others
        (2, 1, 7, 6),  # it is decoded in one slot, the five short ones pass through the other
        (2, 2, 9, 3),  # 7 for the first pair, 1 for each of the others
        (3, 2, 7, 3),
        (1, 1, 12, 6),
    ],
)
def test_one_long_answer_does_not_hold_the_others(slots: int, refill: int, steps: int, fills: int) -> None:
    lengths = [8, 2, 2, 2, 2, 2]
    model: Any = Countdown()
    got, counts = sample(model, answers(lengths), max_new_tokens=10, slots=slots, refill=refill)
    assert (counts.steps, counts.fills, counts.busy) == (steps, fills, 12)
    assert counts.occupancy == pytest.approx(12 / (steps * (slots or 6)))
    assert np.asarray(got.mask).sum(axis=-1)[:, 0].tolist() == lengths
    said = np.asarray(got.tokens)[:, 0]
    for row, length in enumerate(lengths):  # every answer in its prompt's place, the end token included
        assert said[row, :length].tolist() == list(range(length, 0, -1))
        assert (said[row, length:] == END).all()


def test_answers_that_are_cut_off_and_such_that_end_at_once() -> None:
    lengths = [9, 1, 20, 4, 1, 1, 3]
    model: Any = Countdown()
    got, counts = sample(model, answers(lengths), max_new_tokens=4, group_size=2, slots=2, refill=1)
    mask, tokens = np.asarray(got.mask), np.asarray(got.tokens)
    assert mask.sum(axis=-1).tolist() == [[min(length, 4)] * 2 for length in lengths]
    assert tokens[2, 1].tolist() == [20, 19, 18, 17]
    assert counts.busy == sum(min(length, 4) - 1 for length in lengths)
    once, nothing = sample(model, answers([3, 3, 3]), max_new_tokens=1, slots=2)
    assert np.asarray(once.tokens).ravel().tolist() == [3, 3, 3]
    assert (nothing.steps, nothing.occupancy) == (0, 1.0)


@pytest.mark.parametrize("slots", [0, 2])
def test_the_length_of_a_call_changes_neither_tokens_nor_work(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    """Decoding comes back to the host, so that the run can be stopped there, and goes on as if it had not."""
    model: Any = ending_often(Bigram(small.config(), rngs=nnx.Rngs(0)))
    settings: dict[str, Any] = {"max_new_tokens": 9, "group_size": 3, "seed": 3, "slots": slots}
    whole, counts = sample(model, batch, **settings)
    calls, settle = [], sampler.stop.settle
    monkeypatch.setattr(sampler, "STEPS", 2)
    monkeypatch.setattr(sampler.stop, "settle", lambda ended: settle(calls.append(ended) or ended))
    short, same = sample(model, batch, **settings)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, short, whole)))
    assert same == counts
    assert len(calls) >= counts.steps / 2 > 3, "the run could be stopped after each"


def test_programs_are_few_and_caches_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = Countdown()
    names = ("gather_layer", "gather_ends", "open_slots", "fill_slots", "decode_slots", "close_slots")
    programs: list[Any] = [getattr(sampler, name) for name in names]
    held: list[Any] = []
    decode = sampler.decode_slots

    def watched(stepper: Any, decoding: Any, *rest: Any) -> Any:
        held.append(decoding)
        return decode(stepper, decoding, *rest)

    monkeypatch.setattr(sampler, "decode_slots", watched)
    before = [program._cache_size() for program in programs]
    for seed in range(3):
        lengths = np.random.default_rng(seed).integers(1, 9, 11).tolist()
        sample(model, answers(lengths), max_new_tokens=8, group_size=5, slots=4, refill=2, seed=seed)
    made = [program._cache_size() - count for program, count in zip(programs, before, strict=True)]
    assert made[2:] == [1] * 4
    assert max(made) == 1, "the first two may have been there from other tests"
    assert len(held) > 3
    leaves = [leaf for decoding in held for leaf in (decoding.cache, *jax.tree.leaves(decoding.groups))]
    assert all(leaf.is_deleted() for leaf in leaves)


def test_a_mesh_changes_no_token(batch: Batch) -> None:
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: run the suite on the CPU")
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "group_size": 2, "seed": 11}
    model = ending_often(small.model())
    rows = jax.tree.map(lambda leaf: np.asarray(leaf)[[0, 1, 2, 3, 4, 5, 2, 3]], batch)
    alone = jax.tree.map(np.asarray, generate(model, rows, **settings))
    mesh = sharding.parse_mesh("data:2,fsdp:2,tensor:2", jax.devices()[:8])
    skeleton, params = training.split(model)
    with jax.set_mesh(mesh):
        spread = skeleton.merge(jax.device_put(params, skeleton.shardings(mesh)))
        placed = training.place(rows, mesh)
        got, counts = sample(spread, placed, slots=4, refill=4, **settings)
        one_by_one, _ = sample(spread, placed, slots=4, refill=1, **settings)  # divides no mesh: one queue
        assert sampler.sizes(8, 4, 0) == (4, 4), "every shard refills its own slots, unless told otherwise"
        assert sampler.sizes(128, 32, 0) == (32, 8)
        assert sampler.sizes(128, 30, 0) == (30, 7), "slots that no mesh divides have one queue"
        stepper = sampler.make_stepper(nnx.split(spread))
        opened = (nnx.split(spread), stepper, placed, jax.random.key(0), Settings(6, 1.0, 2), 4)
        decoding, _ = sampler.open_slots(*opened)
    assert counts.fills in (2, 3, 4), (
        "each of the four shards has one slot, and two prompts to pass through it"
    )
    assert equal(jax.tree.map(np.asarray, got), alone)
    assert equal(jax.tree.map(np.asarray, one_by_one), alone)
    for leaf in (*decoding.cache.keys, *decoding.groups.memory.values):
        assert leaf.sharding.spec[:2] == (("data", "fsdp"), "tensor")
    layer: Any = stepper.layers[1]  # split over tensor, whole over fsdp
    assert tuple(layer.gate.weight.sharding.spec) == tuple(layer.qkv.weight.sharding.spec) == (None, "tensor")


def test_caches_have_the_dtype_of_the_weights(batch: Batch) -> None:
    model = Qwen2_5_VL(small.config(), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    split = nnx.split(model)
    settings = (jax.random.key(0), Settings(6, 1.0, 2), 3)
    decoding, _ = sampler.open_slots(split, sampler.make_stepper(split), batch, *settings)
    shapes = {(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(decoding.cache)}
    assert shapes == {((3, 2 * 2, 16, 16), "bfloat16")}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"slots": 2, "refill": 3}, "slots 2 and refill 3"),
        ({"slots": -1}, "slots -1"),
        ({"temperature": -1.0}, "temperature -1.0 >= 0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], complaint: str) -> None:
    model: Any = Countdown()
    with pytest.raises(ConfigError, match=complaint):
        sample(model, answers([2, 2, 2]), max_new_tokens=4, **settings)
