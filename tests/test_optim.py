"""The optimizer against torch, against an SVD and against NaN; its schedule; what Muon takes for a matrix."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fundus_jax.muon import is_matrix, orthogonalise
from fundus_jax.optim import (
    OptimConfig,
    decay_mask,
    like_params,
    make_optimizer,
    make_schedule,
    notfinite_count,
    skipped_steps,
)
from fundus_jax.records import ConfigError

# path -> shape, who updates it, whether it decays; the hub's names without the number of the layer
LEAVES: dict[str, tuple[tuple[int, ...], str, bool]] = {
    "text.layers.self_attn.q_proj.weight": ((2, 8, 6), "muon", True),
    "text.layers.self_attn.q_proj.bias": ((2, 8), "adam", False),
    "text.layers.input_layernorm.weight": ((2, 6), "adam", False),
    "text.layers.mlp.down_proj.weight": ((2, 6, 10), "muon", True),
    "text.norm.weight": ((6,), "adam", False),
    "text.embed_tokens.weight": ((16, 6), "adam", True),
    "lm_head.weight": ((16, 6), "adam", True),
    "head.weight": ((5, 6), "adam", True),
    "visual.patch_embed.proj.weight": ((6, 12), "muon", True),
    "visual.blocks.attn.qkv.weight": ((2, 18, 6), "muon", True),
    "visual.blocks.norm1.weight": ((2, 6), "adam", False),
    "visual.merger.ln_q.weight": ((6,), "adam", False),
    "visual.merger.mlp.0.weight": ((8, 8), "muon", True),
    "visual.merger.mlp.0.bias": ((8,), "adam", False),
}


def nest(leaves: dict[str, Any]) -> dict[str, Any]:
    """A nested dict from dotted paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split(".")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = leaf
    return tree


def make_tree(seed: int, scale: float = 1.0) -> dict[str, Any]:
    """Random values in every leaf of LEAVES."""
    rng = np.random.default_rng(seed)
    return nest({k: jnp.asarray(rng.normal(size=v[0]) * scale, jnp.float32) for k, v in LEAVES.items()})


def by_name(tree: Any) -> dict[str, np.ndarray]:
    """Leaves by dotted path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def bits(tree: Any) -> list[bytes]:
    """What may not change by one bit."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def plain(name: str, **fields: Any) -> OptimConfig:
    """A constant rate and no clipping, so that numbers can be worked out by hand."""
    return OptimConfig(**{"name": name, "lr": 0.01, "decay": "constant", "clip_norm": math.inf, **fields})


def stepper(tx: optax.GradientTransformation) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """(grads, state, params) -> (params, state), compiled."""

    @jax.jit
    def step(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torchs(weight_decay: float) -> None:
    torch = pytest.importorskip("torch", reason="the reference AdamW is torch's")
    params = make_tree(0, scale=0.3)  # below 1, where 1e-6 is several units in the last place
    config = plain("adamw", b2=0.95, weight_decay=weight_decay, clip_norm=20.0)
    tx = make_optimizer(config, 20)
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in by_name(params).items()}
    groups = [
        {"params": [theirs[k] for k, v in LEAVES.items() if v[2]], "weight_decay": weight_decay},
        {"params": [theirs[k] for k, v in LEAVES.items() if not v[2]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    state, step_once = tx.init(params), stepper(tx)
    clipped = 0
    for step in range(20):
        grads = make_tree(100 + step, scale=0.5 if step % 2 else 2.0)
        params, state = step_once(grads, state, params)
        for name, value in by_name(grads).items():
            theirs[name].grad = torch.tensor(value)
        clipped += bool(torch.nn.utils.clip_grad_norm_(list(theirs.values()), 20.0) > 20.0)
        reference.step()
    assert clipped == 10, "half of the steps are to test the clipping"
    for name, value in by_name(params).items():
        np.testing.assert_allclose(value, theirs[name].detach().numpy(), rtol=0, atol=1e-6, err_msg=name)


def test_a_warmup_may_be_a_share_of_the_updates() -> None:
    share = OptimConfig(warmup=0.03)
    assert [share.warmup_of(total) for total in (1, 2, 5, 57, 1000)] == [0, 1, 1, 2, 30]
    assert OptimConfig(warmup=10.0).warmup_of(5) == 10, "a number is not cut: it is refused"
    assert OptimConfig().warmup_of(100) == 0
    rates = make_schedule(dataclasses.replace(share, lr=1.0, decay="constant"), 100)(np.arange(4))
    np.testing.assert_allclose(rates, [1 / 3, 2 / 3, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_gradient_of_zero_changes_nothing(name: str) -> None:
    """Momentum would move the policy by what earlier steps had taught; with Muon by a whole step each."""
    params = {"w": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(4)}
    tx = make_optimizer(OptimConfig(name=name, lr=0.1, weight_decay=0.1), 10)
    state = tx.init(params)
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    params = optax.apply_updates(params, updates)
    updates, after = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    same = jax.tree.map(np.array_equal, (optax.apply_updates(params, updates), after), (params, state))
    assert all(jax.tree.leaves(same))
    assert int(skipped_steps(after)) == 0


@given(warmup=st.integers(0, 40), rest=st.integers(1, 100), last=st.sampled_from([0.0, 0.02, 0.5, 1.0]))
@settings(max_examples=40, deadline=None)
def test_schedule(warmup: int, rest: int, last: float) -> None:
    total = warmup + rest
    config = OptimConfig(lr=2.0, warmup=warmup, final_fraction=last)
    rates = np.asarray(make_schedule(config, total)(np.arange(160)))  # one shape, so that nothing recompiles
    assert np.all(rates[: total - 1] > 0), "no update is wasted on a rate of zero"
    np.testing.assert_allclose(rates[:warmup], 2.0 * np.arange(1, warmup + 1) / max(warmup, 1), rtol=1e-6)
    np.testing.assert_allclose(rates[total - 1 :], 2.0 * last, rtol=1e-5, atol=1e-6)
    assert np.all(np.diff(rates[max(warmup - 1, 0) :]) <= 1e-6), "after the warm-up it only falls"
    middle = 2.0 * (last + (1 - last) * 0.5 * (1 + np.cos(np.pi * np.arange(1, rest + 1) / rest)))
    np.testing.assert_allclose(rates[warmup:total], middle, rtol=1e-4, atol=1e-5)
    flat = dataclasses.replace(config, decay="constant")
    np.testing.assert_allclose(make_schedule(flat, total)(total), 2.0, rtol=1e-6)


def test_the_schedule_moves_the_updates() -> None:
    for name in ("adamw", "muon"):
        config = OptimConfig(name=name, lr=0.1, warmup=4, b1=0.0, b2=0.0, final_fraction=0.5)
        tx = make_optimizer(config, 8)
        params = {"bias": jnp.zeros(3)}
        state, update = tx.init(params), jax.jit(tx.update)
        ratio = 1.0 if name == "adamw" else config.adam_lr_ratio
        for step in range(8):  # without memory, Adam's update is the sign of the gradient times the rate
            updates, state = update({"bias": jnp.ones(3)}, state, params)
            np.testing.assert_allclose(updates["bias"], -ratio * make_schedule(config, 8)(step), rtol=1e-5)


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (3, 40, 16), (2, 48, 200), (64, 1176)])
def test_orthogonalise_against_svd(shape: tuple[int, ...]) -> None:
    for seed in range(5):
        matrix = np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 10.0 ** (seed * 4 - 10)
        result = np.asarray(orthogonalise(jnp.asarray(matrix)), np.float64)
        left, _, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
        values = np.linalg.svd(result, compute_uv=False)
        assert values.min() >= 0.6
        assert values.max() <= 1.3
        inner = np.einsum(
            "...mi,...mn,...in->...i", left, result, right
        )  # along the true singular directions
        np.testing.assert_allclose(np.sort(inner), np.sort(values), atol=2e-3)


def test_orthogonalise_of_square_and_zero_matrices() -> None:
    square = np.random.default_rng(0).normal(size=(4, 64, 64)).astype(np.float32)
    values = np.linalg.svd(np.asarray(orthogonalise(jnp.asarray(square))), compute_uv=False)
    assert values.max() <= 1.3
    assert np.mean(values >= 0.6) > 0.9, "only the few smallest directions of a square matrix lag"
    assert np.all(np.asarray(orthogonalise(jnp.zeros((3, 5)))) == 0)


def test_who_gets_muon_and_who_decays() -> None:
    params = make_tree(0)
    decays = by_name(decay_mask(params))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        _, who, decay = LEAVES[name]
        assert is_matrix(path, leaf) == (who == "muon"), name
        assert bool(decays[name]) == decay, name
    flat = {
        name: jnp.zeros(shape) for name, (shape, _, _) in LEAVES.items()
    }  # dotted keys count as paths too
    for path, leaf in jax.tree_util.tree_leaves_with_path(flat):
        assert is_matrix(path, leaf) == (LEAVES[path[0].key][1] == "muon"), path
    with pytest.raises(ConfigError, match=r"conv.weight has shape \(1, 2, 3, 4\)"):
        make_optimizer(plain("muon"), 3).init({"conv": {"weight": jnp.zeros((1, 2, 3, 4))}})


def test_muon_update_by_hand() -> None:
    params = make_tree(0)
    config = plain("muon", b2=0.98, adam_lr_ratio=0.25, weight_decay=0.1)
    tx = make_optimizer(config, 5)
    state, grads = tx.init(params), [make_tree(1), make_tree(2)]
    update_once = jax.jit(tx.update)
    _, state = update_once(grads[0], state, params)
    updates, state = update_once(grads[1], state, params)
    first, second, values = by_name(grads[0]), by_name(grads[1]), by_name(params)
    for name, update in by_name(updates).items():
        shape, who, decay = LEAVES[name]
        pull = 0.1 * values[name] if decay else 0.0
        g1, g2 = first[name], second[name]
        if who == "muon":
            momentum = 0.95 * g1 + g2
            direction = (
                np.asarray(orthogonalise(jnp.asarray(0.95 * momentum + g2))) * 0.2 * max(shape[-2:]) ** 0.5
            )
            expected = -0.01 * (direction + pull)
        else:
            mean = (0.09 * g1 + 0.1 * g2) / (1 - 0.9**2)
            square = (0.98 * 0.02 * g1**2 + 0.02 * g2**2) / (1 - 0.98**2)
            expected = -0.01 * 0.25 * (mean / (np.sqrt(square) + 1e-8) + pull)
        np.testing.assert_allclose(update, expected, rtol=2e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_nonfinite_gradient_changes_nothing_and_is_counted(name: str) -> None:
    tx = make_optimizer(plain(name, weight_decay=0.1, clip_norm=1.0), 20)
    params = make_tree(0)
    step = stepper(tx)
    params, state = step(make_tree(1), tx.init(params), params)
    params["text"]["norm"]["weight"] = params["text"]["norm"]["weight"].at[:2].set(jnp.array([-0.0, 0.0]))
    clean, clean_state = params, state
    before = bits((params, state.inner))
    counts = []
    for poison in (math.nan, math.inf, -math.inf, 1e30):  # the guard never gives in, the loop has to
        grads = make_tree(5)
        grads["lm_head"]["weight"] = grads["lm_head"]["weight"].at[3, 2].set(poison)
        params, state = step(grads, state, params)
        counts.append((int(notfinite_count(state)), int(skipped_steps(state))))
        assert bits((params, state.inner)) == before
    params, state = step(make_tree(2), state, params)
    counts.append((int(notfinite_count(state)), int(skipped_steps(state))))
    assert counts == [(1, 1), (2, 2), (3, 3), (4, 4), (0, 4)]
    assert bits(params) != before[: len(bits(params))]
    clean, clean_state = step(make_tree(2), clean_state, clean)  # as if the bad ones had never been
    assert bits((clean, clean_state.inner)) == bits((params, state.inner))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_zero_gradient_is_finite(name: str) -> None:
    tx = make_optimizer(plain(name, clip_norm=1.0), 3)
    params = make_tree(0)
    updates, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert int(notfinite_count(state)) == 0
    assert all(not np.any(leaf) for leaf in by_name(updates).values())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_is_sharded_like_the_parameters(name: str) -> None:
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: run the suite on the CPU")
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    params, whole = make_tree(0), NamedSharding(mesh, P())
    shardings = jax.tree.map(
        lambda leaf: NamedSharding(
            mesh, P(*[None] * (leaf.ndim - 1), "fsdp" if leaf.shape[-1] % 2 == 0 else None)
        ),
        params,
    )
    tx = make_optimizer(plain(name, clip_norm=1.0), 5)
    places = like_params(jax.eval_shape(tx.init, params), shardings, whole)

    def run(place: Callable[[Any, Any], Any], **options: Any) -> tuple[Any, Any]:
        values, state = place(params, shardings), place(tx.init(params), places)
        step = jax.jit(tx.update, **options)
        for seed in range(2):
            updates, state = step(place(make_tree(seed), shardings), state, values)
        return updates, state

    single, _ = run(lambda value, _: value)
    sharded, state = run(jax.device_put, out_shardings=(shardings, places), donate_argnums=1)
    for name_, value in by_name(single).items():
        np.testing.assert_allclose(by_name(sharded)[name_], value, rtol=0, atol=2e-5, err_msg=name_)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert len(moments) == (2 * len(LEAVES) if name == "adamw" else len(LEAVES) + 9)
    split = sum(not leaf.sharding.is_fully_replicated for leaf in moments)
    assert split == len(moments), "a replicated moment would cost the memory that FSDP saves"


def test_it_works_on_nnx_state() -> None:
    model = nnx.Dict({"mlp": nnx.Linear(6, 10, rngs=nnx.Rngs(0)), "norm": nnx.LayerNorm(6, rngs=nnx.Rngs(0))})
    params = nnx.state(model, nnx.Param)
    tx = make_optimizer(plain("muon"), 3)
    updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    kinds = {path[0].key: path for path, _ in jax.tree_util.tree_leaves_with_path(state.inner.square)}
    assert set(kinds) == {"mlp", "norm"}
    assert len(jax.tree.leaves(state.inner.square)) == 3, "all but the one matrix"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "sgd"),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("warmup", -1),
        ("warmup", 10),
        ("warmup", 2.5),
        ("decay", "linear"),
        ("final_fraction", 1.5),
        ("b1", 1.0),
        ("b2", -0.1),
        ("eps", 0.0),
        ("weight_decay", -1.0),
        ("clip_norm", 0.0),
        ("adam_lr_ratio", 0.0),
        ("skip_nonfinite", 0),
    ],
)
def test_bad_configs_name_the_field(field: str, value: Any) -> None:
    config = OptimConfig()
    setattr(config, field, value)  # as a command line does
    with pytest.raises(ConfigError, match=f"optim.{field} is {value}|optim.{field} is '{value}'"):
        make_optimizer(config, 10)


def test_muon_without_parameters_is_refused() -> None:
    tx = make_optimizer(plain("muon"), 3)
    params = make_tree(0)
    with pytest.raises(ConfigError, match="needs the parameters"):
        tx.update(params, tx.init(params))
