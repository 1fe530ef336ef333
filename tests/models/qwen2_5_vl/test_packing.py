"""Several conversations in one row compute what each computes in a row of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fundus_jax import sft, sharding, training
from fundus_jax.models.batch import Batch
from fundus_jax.models.layers import Options
from fundus_jax.models.qwen2_5_vl.processor import Processor
from fundus_jax.records import ConfigError
from tests.models import small, tiny

LESS_COMPILING = {"xla_backend_optimization_level": 0}
SIZES = [[(60, 70)], [], [(130, 50), (50, 60)], [(30, 30)], [(150, 120)]]  # images of each conversation
PER_ROW = [3, 2]


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return small.processor(tmp_path_factory.mktemp("processor"))


def dialogs() -> tuple[list[list[dict]], list[list]]:
    talks, images = [], []
    for number, sizes in enumerate(SIZES):
        asked = [{"type": "image"} for _ in sizes] + [{"type": "text", "text": "what is it " * (number + 1)}]
        answer = "the retina shows drusen " * (5 - number)
        talks.append([{"role": "user", "content": asked}, {"role": "assistant", "content": answer}])
        images.append([tiny.random_image(*size, seed=10 * number + i) for i, size in enumerate(sizes)])
    return talks, images


def both(processor: Processor) -> tuple[tuple[Batch, np.ndarray], tuple[Batch, np.ndarray]]:
    """(unpacked, packed)."""
    return processor.encode_dialogs(*dialogs()), processor.encode_dialogs(*dialogs(), per_row=PER_ROW)


def owner(packed: Batch) -> list[tuple[int, np.ndarray]]:
    """For each conversation its row, and the places of its tokens there."""
    numbers = [(row, number) for row, count in enumerate(PER_ROW) for number in range(1, count + 1)]
    return [(row, np.flatnonzero(packed.segments[row] == number)) for row, number in numbers]


def test_a_packed_row_holds_its_conversations(processor: Processor) -> None:
    (alone, learned), (packed, packed_learned) = both(processor)
    assert packed.packed
    assert packed.rows == len(PER_ROW)
    np.testing.assert_array_equal(packed.mask, packed.segments > 0)
    assert (np.diff(packed.mask.astype(int), axis=1) <= 0).all(), "padding is on the right"
    first = [0] * len(PER_ROW)  # images that earlier conversations brought into the row
    for number, (row, places) in enumerate(owner(packed)):
        real = slice(int(alone.mask[number].sum()))
        np.testing.assert_array_equal(places, np.arange(places[0], places[0] + real.stop))
        np.testing.assert_array_equal(packed.tokens[row, places], alone.tokens[number, real])
        np.testing.assert_array_equal(packed.positions[row][:, places], alone.positions[number][:, real])
        np.testing.assert_array_equal(packed_learned[row, places], learned[number, real])
        mine, theirs = packed.image_index[row, places], alone.image_index[number, real]
        np.testing.assert_array_equal(mine >= 0, theirs >= 0)
        for here, there in zip(mine[mine >= 0], theirs[theirs >= 0], strict=True):
            slots, other = slice(4 * here, 4 * here + 4), slice(4 * there, 4 * there + 4)
            np.testing.assert_array_equal(packed.patches[row, slots], alone.patches[number, other])
            np.testing.assert_array_equal(packed.patch_hw[row, slots], alone.patch_hw[number, other])
            expected = alone.patch_image[number, other] + first[row]
            np.testing.assert_array_equal(packed.patch_image[row, slots], expected)
        first[row] += len(SIZES[number])
    assert packed_learned.sum() == learned.sum()


def step_of(skeleton: training.Skeleton, attention: str = "xla") -> Any:
    """Compile (params, (batch, learned)) -> ((loss, tokens), gradient)."""
    options = Options(attention=attention)

    def value(params: Any, rows: Any) -> tuple[jax.Array, jax.Array]:
        loss, metrics = sft.loss(skeleton.merge(params, options), rows, sft.count(rows))
        return loss, metrics["tokens"]

    return jax.jit(jax.value_and_grad(value, has_aux=True), compiler_options=LESS_COMPILING)


def check_gradients(wanted: Any, got: Any, tolerance: float) -> None:
    scales = [(path, float(np.abs(leaf).max())) for path, leaf in jax.tree_util.tree_leaves_with_path(wanted)]
    for path, scale in scales:
        assert scale > 0, f"{path} has no gradient: the test would prove nothing"
    assert small.largest_difference(wanted, got) < tolerance * max(scale for _, scale in scales)


def test_loss_and_gradient_are_those_of_rows_apart(processor: Processor) -> None:
    """In float64, where only a difference in what is computed is left."""
    skeleton, params = training.split(small.model())
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params)
        step, results = step_of(skeleton), []
        for batch, learned in both(processor):
            wide = dataclasses.replace(batch, patches=batch.patches.astype(np.float64))
            results.append(jax.device_get(step(params, (wide, learned))))
    ((want, tokens), gradient), ((got, packed_tokens), other) = results
    assert tokens == packed_tokens
    assert got == pytest.approx(want, rel=1e-10)
    check_gradients(gradient, other, 1e-10)


def test_flash_kernels_on_a_mesh_train_a_packed_row_alike(processor: Processor) -> None:
    """Two rows on four data devices, two heads on two tensor devices: one replicated, one cut."""
    _, rows = both(processor)
    skeleton, params = training.split(small.model())
    (want, _), gradient = step_of(skeleton)(params, rows)
    mesh = sharding.parse_mesh("data:2,fsdp:2,tensor:2", jax.devices()[:8])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, skeleton.shardings(mesh))
        (got, _), other = step_of(skeleton, "splash_interpret")(placed, rows)
    assert got == pytest.approx(float(want), rel=2e-5)
    check_gradients(gradient, jax.device_get(other), 2e-5)


def test_counts_that_do_not_add_up(processor: Processor) -> None:
    for per_row in ([3, 1], [5, 0]):
        with pytest.raises(ConfigError, match="must be counts from 1 that add up to 5"):
            processor.encode_dialogs(*dialogs(), per_row=per_row)
