"""Adapters and frozen parts of a model: the formula, the marks, the export, and names that are not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from fundus_jax import training
from fundus_jax.models import load_pretrained, lora, save_adapter, save_pretrained
from fundus_jax.models.freeze import freeze, narrow
from fundus_jax.models.layers import Factory, Linear
from fundus_jax.models.lora import LoraConfig
from fundus_jax.models.qwen2_5_vl import params
from fundus_jax.records import ConfigError
from tests.models import small, tiny

RANK, ALPHA = 3, 12.0
DECODER = {
    *(f"text.layers.self_attn.{name}_proj" for name in "qkvo"),
    *(f"text.layers.mlp.{name}_proj" for name in ("gate", "up", "down")),
}


def adapted(model: Any, *, targets: str = "text.*", used: bool = True) -> Any:
    """The model with adapters; `used`: B is random too, as after training."""
    lora.attach(model, LoraConfig(rank=RANK, alpha=ALPHA, targets=targets))
    random = np.random.default_rng(1)
    for linear in lora.adapted(model).values() if used else ():
        assert linear.lora_b is not None
        drawn = 0.1 * random.standard_normal(linear.lora_b.get_value().shape)
        linear.lora_b.set_value(jnp.asarray(drawn, jnp.float32))
    return model


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Any:
    processor = small.processor(tmp_path_factory.mktemp("processor"))
    return small.batch(processor, [[(60, 70)], []], length=40, patches=64)


@jax.jit
def logits(model: Any, batch: Any) -> jax.Array:
    return model(batch)


class Alone(nnx.Module):
    """A linear layer, and a stack of two."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.one = Linear(Factory(rngs, jnp.float32), 6, 4, ("mlp", "embed"), bias=True, std=1.0)
        stacked = Factory(rngs, jnp.float32, (2,))
        self.stack = Linear(stacked, 6, 4, ("mlp", "embed"), bias=False, std=1.0)


def test_the_layer_computes_what_pefts_does() -> None:
    """peft's LoraLayer.forward: result + lora_B(lora_A(x)) * scaling, with torch.nn.Linear for each."""
    torch = pytest.importorskip("torch", reason="compares with torch's layers (Python 3.11 environment)")
    linear = adapted(Alone(), targets="one").one
    x = np.random.default_rng(2).standard_normal((5, 6)).astype(np.float32)

    def of(name: str) -> Any:
        return torch.from_numpy(np.array(getattr(linear, name).get_value()))

    functional = torch.nn.functional
    wanted = functional.linear(torch.from_numpy(x), of("weight"), of("bias"))
    low = functional.linear(torch.from_numpy(x), of("lora_a"))
    wanted = wanted + functional.linear(low, of("lora_b")) * (ALPHA / RANK)
    np.testing.assert_allclose(linear(jnp.asarray(x)), wanted.numpy(), rtol=1e-5, atol=1e-5)
    merged = lora.merged(linear.weight.get_value(), linear, None)
    np.testing.assert_allclose(x @ merged.T + np.asarray(linear.bias.get_value()), wanted, atol=1e-5)


def test_gradients_are_those_of_the_merged_weight() -> None:
    """With W' = W + s B A: dB = s dW' A^T and dA = s B^T dW'."""
    linear = adapted(Alone(), targets="one").one
    x = jnp.asarray(np.random.default_rng(2).standard_normal((5, 6)), jnp.float32)
    skeleton, params = training.split(linear)
    learned, frozen = skeleton.divide(params)
    assert set(learned) == {"lora_a", "lora_b"}

    def loss(learned: Any) -> jax.Array:
        return jnp.sin(skeleton.merge(training.join(learned, frozen))(x)).sum()

    def plain(weight: jax.Array) -> jax.Array:
        return jnp.sin(x @ weight.T + frozen["bias"]).sum()

    grads = jax.grad(loss)(learned)
    whole = jax.grad(plain)(jnp.asarray(lora.merged(frozen["weight"], linear, None)))
    scale = ALPHA / RANK
    np.testing.assert_allclose(grads["lora_b"], scale * whole @ learned["lora_a"].T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads["lora_a"], scale * learned["lora_b"].T @ whole, rtol=1e-4, atol=1e-5)


def test_a_stack_is_its_layers_side_by_side() -> None:
    stack = adapted(Alone(), targets="stack").stack
    assert stack.lora_a.get_value().shape == (2, RANK, 6)
    assert stack.lora_b.get_value().shape == (2, 4, RANK)
    assert stack.lora_a.get_metadata()["axes"] == ("layers", "rank", "embed")
    assert stack.lora_b.get_metadata()["axes"] == ("layers", "mlp", "rank")
    a, b = lora.halves(stack, 1)
    weight = stack.weight.get_value()[1]
    np.testing.assert_allclose(lora.merged(weight, stack, 1), weight + ALPHA / RANK * (b @ a), rtol=1e-5)


def test_adapters_start_as_in_peft_and_change_nothing(batch: Any) -> None:
    model = small.model()
    before = np.asarray(logits(model, batch))
    adapted(model, used=False)
    layers = lora.adapted(model)
    assert set(layers) == DECODER
    for name, linear in layers.items():
        a, b = (half.get_value() for half in (linear.lora_a, linear.lora_b))
        bound = linear.weight.get_value().shape[-1] ** -0.5  # Kaiming-uniform with a = sqrt(5)
        assert not b.any(), name
        assert 0.9 * bound < np.abs(a).max() <= bound, name
        assert np.abs(a.mean()) < 0.2 * bound, name
    assert len({float(linear.lora_a.get_value()[0, 0, 0]) for linear in layers.values()}) == len(layers)
    assert np.array_equal(logits(model, batch), before)


def test_the_table_of_names_knows_no_adapter() -> None:
    names = set(params.hf_names(small.config()))
    model = adapted(small.model())
    assert set(params.hf_names(model.config)) == names
    assert not [name for name in names if "lora" in name]


@pytest.mark.parametrize("targets", ["text.*", "visual.*qkv,q_proj", ".*"])
def test_merged_in_the_export_they_compute_the_same(tmp_path: Path, batch: Any, targets: str) -> None:
    directory = small.hf_dir(tmp_path / "base", small.tensors())
    model, processor = load_pretrained(directory)
    base = np.asarray(logits(model, batch))
    wanted = np.asarray(logits(adapted(model, targets=targets), batch))
    assert np.abs(wanted - base).max() > 0.01
    again, _ = load_pretrained(save_pretrained(model, processor, tmp_path / "merged"))
    assert not lora.adapted(again)
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(logits(again, batch), wanted, rtol=0, atol=1e-5 * scale)
    kept, moved = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    changed = {name for name in kept if not np.array_equal(kept[name], moved[name])}
    assert changed
    assert all(name.endswith(".weight") for name in changed)


def test_an_export_in_bfloat16_rounds_once(tmp_path: Path) -> None:
    directory = small.hf_dir(tmp_path / "base", small.tensors(dtype="bfloat16"), dtype="bfloat16")
    model, processor = load_pretrained(directory)
    linear = adapted(model).text.layers.mlp.up_proj
    save_pretrained(model, processor, tmp_path / "merged")
    stored = load_file(tmp_path / "merged" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    a, b = (np.asarray(half, np.float64) for half in lora.halves(linear, 1))
    exact = np.asarray(linear.weight.get_value()[1], np.float64) + ALPHA / RANK * (b @ a)
    assert stored.dtype.name == "bfloat16"
    error = np.abs(stored.astype(np.float64) - exact)
    assert (error <= 2.0**-8 * np.abs(exact) * 1.001).all(), "half of the last place"


def test_adapter_files_name_transformers_modules(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="compares with torch's model (Python 3.11 environment)")
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = adapted(small.model(), targets="text.*,visual.*qkv,visual.merger.*")
    directory = save_adapter(model, tmp_path / "adapter", "some/base")
    tensors = load_file(directory / "adapter_model.safetensors")
    settings = json.loads((directory / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (RANK, ALPHA, "LORA")
    assert settings["base_model_name_or_path"] == "some/base"
    modules = dict(Qwen2_5_VLForConditionalGeneration(tiny.tiny_config()).named_modules())
    assert len(settings["target_modules"]) == 2 * 7 + 4 + 2 == len(tensors) / 2
    for name in settings["target_modules"]:
        assert isinstance(modules[name], torch.nn.Linear)
        n_out, n_in = modules[name].weight.shape
        prefix = f"base_model.model.{name}"
        assert tensors[f"{prefix}.lora_A.weight"].shape == (RANK, n_in)
        assert tensors[f"{prefix}.lora_B.weight"].shape == (n_out, RANK)
    a, b = lora.halves(model.text.layers.self_attn.q_proj, 1)
    prefix = "base_model.model.model.language_model.layers.1.self_attn.q_proj"
    assert np.array_equal(tensors[f"{prefix}.lora_A.weight"], a)
    assert np.array_equal(tensors[f"{prefix}.lora_B.weight"], b)
    with pytest.raises(ConfigError, match="the model has no adapters to save"):
        save_adapter(small.model(), tmp_path / "none", "")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "q_proj,w_proj"}, r"called w_proj; there are text\.layers\.mlp\.down_proj"),
        ({"targets": "proj"}, None),  # the tower's output projection, and nothing that merely ends like it
        ({"targets": "lm_head"}, r"takes an adapter is called lm_head; .* projection \(lm_head\) takes none"),
        ({"targets": "visual.merger.mlp.0"}, r"mlp\.0; .*visual\.merger\.fc1.* our names, not transformers'"),
        ({"targets": "(q_proj"}, "'\\(q_proj', of which a part is no regular expression"),
        ({"targets": " , "}, "lora.targets is empty"),
        ({"rank": -1}, "lora.rank is -1"),
        ({"alpha": 0.0}, "lora.alpha is 0.0"),
    ],
)
def test_targets_are_there_or_refused(changes: dict[str, Any], message: str | None) -> None:
    model = small.model()
    config = LoraConfig(**{"rank": RANK, **changes})
    if message is None:
        lora.attach(model, config)
        assert set(lora.adapted(model)) == {"visual.blocks.attn.proj"}
        return
    with pytest.raises(ConfigError, match=message):
        lora.attach(model, config)
    assert not lora.adapted(model)


def paths(tree: Any) -> set[str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves}


@pytest.mark.parametrize(
    ("names", "trained"),
    [
        (["vision"], ("visual.merger", "text", "lm_head")),
        (["projector"], ("visual.patch_embed", "visual.blocks", "text", "lm_head")),
        (["vision", "projector", "embedding"], ("text.layers", "text.norm", "lm_head")),
        (["text", "head"], ("visual", "text.embed_tokens")),
        ([], ("visual", "text", "lm_head")),
    ],
)
def test_parts_are_frozen_by_name(names: list[str], trained: tuple[str, ...]) -> None:
    model = small.model()
    everything = paths(training.split(model)[1])
    freeze(model, names)
    skeleton, whole = training.split(model)
    learned, frozen = skeleton.divide(whole)
    assert paths(learned) == {path for path in everything if path.startswith(trained)}
    assert paths(frozen) == everything - paths(learned)
    assert jax.tree.structure(training.join(learned, frozen)) == jax.tree.structure(whole)
    narrow(model, "bfloat16")
    kinds = {path: leaf.dtype.name for path, leaf in _flat(training.split(model)[1]).items()}
    assert kinds == {path: "float32" if path in paths(learned) else "bfloat16" for path in everything}


def _flat(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def test_parts_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match="freeze names tower; this model has embedding, head, proj"):
        freeze(small.model(), ["tower", "vision"])
    with pytest.raises(ConfigError, match=r"freeze names head; .*a tied head is the embedding"):
        freeze(small.model(tied=True), ["head"])
    with pytest.raises(ConfigError, match="nothing is left to train"):
        freeze(small.model(), ["vision", "projector", "text", "embedding", "head"])
