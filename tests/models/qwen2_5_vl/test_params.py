"""Weights in and out: names and shapes of the real checkpoints, byte-equal round trips, meshes, exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from fundus_jax import sharding
from fundus_jax.models import load_pretrained, read_config, save_pretrained
from fundus_jax.models.qwen2_5_vl import params
from fundus_jax.records import ConfigError
from tests.models import small, tiny

BYTES_OF_7B = 16_584_333_312  # bfloat16; metadata.total_size of the hub's index


def stored(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a directory: dtype, shape and bytes, read by safetensors alone."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="np") as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                tensor = handle.get_tensor(name)
                found[name] = (tensor.dtype.name, tensor.shape, tensor.tobytes())
    return found


def real_dir(shared_data: Path, size: str) -> Path:
    path = shared_data / "qwen2.5-vl" / size
    if not (path / "config.json").is_file():
        pytest.skip(f"{path} has no config.json")
    return path


def test_the_table_of_7b_is_the_hubs_index(shared_data: Path) -> None:
    path = real_dir(shared_data, "7b")
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        pytest.skip(f"{index} is not there")
    listed = json.loads(index.read_text(encoding="utf-8"))
    config = read_config(path)
    assert len(listed["weight_map"]) == 729
    assert params.hf_names(config) == sorted(listed["weight_map"])
    numbers = sum(int(np.prod(shape)) for shape in params.hf_shapes(config).values())
    assert 2 * numbers == BYTES_OF_7B == listed["metadata"]["total_size"]


@pytest.mark.parametrize(("size", "count"), [("7b", 729), ("3b", 824)])
def test_shapes_are_those_of_transformers(shared_data: Path, size: str, count: int) -> None:
    torch = pytest.importorskip("torch", reason="compares with torch's model (Python 3.11 environment)")
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    path = real_dir(shared_data, size)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(path))
    model.tie_weights()
    want = {params.hub_name(name): tuple(p.shape) for name, p in model.named_parameters()}
    config = read_config(path)
    assert params.hf_shapes(config) == want
    assert len(want) == count
    assert (params.HEAD in want) is not config.tie_word_embeddings


def test_the_real_7b_builds_abstractly(shared_data: Path) -> None:
    model = params.abstract(read_config(real_dir(shared_data, "7b")), "bfloat16")
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) == BYTES_OF_7B


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", list(small.DTYPES))
@pytest.mark.parametrize("shards", [1, 3])
def test_round_trip_is_byte_equal(tmp_path: Path, dtype: str, tied: bool, shards: int) -> None:
    content = small.tensors(tied=tied, dtype=dtype)
    source = small.hf_dir(tmp_path / "in", content, tied=tied, dtype=dtype, shards=shards)
    for wanted in ("float32", None):
        model, processor = load_pretrained(source, dtype=wanted)
        leaves = jax.tree.leaves(nnx.state(model))
        assert {leaf.dtype.name for leaf in leaves} == {wanted or dtype}
        target = tmp_path / f"out-{wanted}"
        assert save_pretrained(model, processor, target) == target
        assert stored(target) == stored(source)
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        assert (config["torch_dtype"], config["tie_word_embeddings"]) == (dtype, tied)
        assert read_config(target) == model.config


def test_forced_shards(tmp_path: Path) -> None:
    source = small.hf_dir(tmp_path / "in", small.tensors())
    model, _ = load_pretrained(source)
    target = small.hf_dir(tmp_path / "out", {"unused": np.zeros(1, np.float32)})
    (target / "model.safetensors").unlink()
    params.save(target, model, max_shard=100_000)
    files = sorted(path.name for path in target.glob("*.safetensors"))
    index = json.loads((target / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(files) > 5
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    assert sorted(index["weight_map"]) == params.hf_names(model.config)
    assert index["metadata"]["total_size"] == sum(len(data) for *_, data in stored(target).values())
    for file in files:  # a tensor larger than the bound has a file of its own
        with safe_open(target / file, framework="np") as handle:
            names = list(handle.keys())
        held = sum(len(stored(target)[name][2]) for name in names) if len(names) > 1 else 0
        assert held <= 100_000
    assert stored(target) == stored(source)
    again, _ = load_pretrained(target)
    assert small.largest_difference(nnx.state(again), nnx.state(model)) == 0


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_both_key_layouts(tmp_path: Path, tied: bool) -> None:
    content = small.tensors(tied=tied)
    other = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: tensor
        for name, tensor in content.items()
    }
    other = {f"model.{name}" if name.startswith("visual.") else name: x for name, x in other.items()}
    assert len(other.keys() & content.keys()) == (0 if tied else 1)  # lm_head.weight
    hub = small.hf_dir(tmp_path / "hub", content, tied=tied)
    source = small.hf_dir(tmp_path / "other", other, tied=tied, shards=2)
    model, processor = load_pretrained(source)
    assert small.largest_difference(nnx.state(model), nnx.state(load_pretrained(hub)[0])) == 0
    save_pretrained(model, processor, tmp_path / "out")
    assert stored(tmp_path / "out") == stored(hub)  # the hub's names are written


def test_every_number_lands_in_its_place(tmp_path: Path) -> None:
    content = small.tensors()
    model, _ = load_pretrained(small.hf_dir(tmp_path / "in", content))
    state = dict(nnx.to_flat_state(nnx.state(model)))
    layers = state[("text", "layers", "self_attn", "k_proj", "weight")].get_value()
    assert np.array_equal(layers[1], content["model.layers.1.self_attn.k_proj.weight"])
    kernel = content["visual.patch_embed.proj.weight"]
    assert kernel.shape == (32, 3, 2, 14, 14)
    assert np.array_equal(state[("visual", "patch_embed", "weight")].get_value(), kernel.reshape(32, -1))
    assert np.array_equal(
        state[("visual", "merger", "fc2", "bias")].get_value(), content["visual.merger.mlp.2.bias"]
    )
    assert sum(value.get_value().size for value in state.values()) == sum(x.size for x in content.values())


def test_loading_on_a_mesh(tmp_path: Path) -> None:
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: run the suite on the CPU")
    mesh = sharding.parse_mesh("data:2,fsdp:2,tensor:2", jax.devices()[:8])
    source = small.hf_dir(tmp_path / "in", small.tensors(dtype="bfloat16"), dtype="bfloat16", shards=2)
    alone, sharded = load_pretrained(source)[0], load_pretrained(source, mesh=mesh)[0]
    assert small.largest_difference(nnx.state(sharded), nnx.state(alone)) == 0
    cut = dict.fromkeys(("fsdp", "tensor"), 0)
    for path, param in nnx.to_flat_state(nnx.state(sharded)):
        value, axes = param.get_value(), sharding.param_axes(param)
        want = sharding.fit(sharding.spec(axes), value.shape, mesh)
        assert value.sharding.spec == want, path
        shard = value.addressable_shards[0].data.shape
        parts = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
        for size, part, axis in zip(value.shape, shard, axes, strict=True):
            assert part == (size // 2 if axis in parts else size), path
            if axis in parts:
                cut[parts[axis]] += 1
    assert cut["fsdp"] > 15
    assert cut["tensor"] > 15
    save_pretrained(sharded, load_pretrained(source)[1], tmp_path / "out")
    assert stored(tmp_path / "out") == stored(source)


@pytest.mark.parametrize("dtype", ["int8", "float64", "half"])
def test_dtypes_that_parameters_can_not_have(tmp_path: Path, dtype: str) -> None:
    source = small.hf_dir(tmp_path / "in", small.tensors())
    with pytest.raises(ConfigError, match=dtype):
        load_pretrained(source, dtype=dtype)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_export_loads_in_transformers(tmp_path: Path, tied: bool, dtype: str) -> None:
    torch = pytest.importorskip("torch", reason="loads the export with torch (Python 3.11 environment)")
    source = tiny.tiny_hf_dir(tmp_path / "in", tied=tied, dtype=dtype)
    model, processor = load_pretrained(source)
    target = save_pretrained(model, processor, tmp_path / "out")
    texts = [f"<|im_start|>user\n{small.IMAGE}what is it<|im_end|>\n", "<|im_start|>user\nno image"]
    images = [[tiny.random_image(100, 130)], []]
    outputs = []
    for path in (source, target):
        hf: Any = tiny.load_hf(path, dtype=dtype)
        with torch.no_grad():
            outputs.append(hf(**tiny.hf_inputs(texts, images, path, dtype=dtype)).logits)
        assert hf.config.tie_word_embeddings is tied
    assert torch.equal(*outputs)
