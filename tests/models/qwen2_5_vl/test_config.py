"""config.json in and out: flat and nested, what is carried along, what is refused; the real files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from fundus_jax.models import read_config
from fundus_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from fundus_jax.records import ConfigError, DataError
from tests.models import small

parse = Qwen2_5_VLConfig.from_hf


def real(shared_data: Path, size: str) -> dict[str, Any]:
    path = shared_data / "qwen2.5-vl" / size / "config.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return json.loads(path.read_text(encoding="utf-8"))


def nested(raw: dict[str, Any]) -> dict[str, Any]:
    """The nested form of a flat config.json, as transformers writes it."""
    outer = ("architectures", "model_type", "vision_config", "tie_word_embeddings")
    text = {key: value for key, value in raw.items() if key not in outer and not key.endswith("token_id")}
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta"), **text.pop("rope_scaling")}
    text |= {"rope_parameters": rope, "model_type": "qwen2_5_vl_text", "eos_token_id": raw["eos_token_id"]}
    text |= {"dtype": text.pop("torch_dtype"), "layer_types": ["full_attention"] * raw["num_hidden_layers"]}
    vision = {**raw["vision_config"], "in_channels": 3, "model_type": "qwen2_5_vl_vision"}
    vision["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "axial"}
    tokens = {key: value for key, value in raw.items() if key.endswith("token_id") and key != "eos_token_id"}
    outside = {key: raw[key] for key in ("architectures", "model_type", "tie_word_embeddings")} | tokens
    return {**outside, "dtype": text["dtype"], "text_config": text, "vision_config": vision}


def numbers(config: Qwen2_5_VLConfig) -> dict[str, Any]:
    """Everything that decides what is computed."""
    return vars(config) | {"vision": vars(config.vision) | {"extras": ""}, "extras": ""}


@pytest.mark.parametrize("tied", [False, True])
def test_flat_and_nested_are_the_same_model(tied: bool) -> None:
    flat = parse(small.raw_config(tied=tied))
    assert flat.tie_word_embeddings is tied
    assert flat.mrope_section == (2, 3, 3)
    assert flat.vision.full_attention_layers == (1, 3)
    assert numbers(parse(nested(small.raw_config(tied=tied)))) == numbers(flat)
    inside = nested(small.raw_config(tied=tied))
    inside["text_config"]["tie_word_embeddings"] = inside.pop("tie_word_embeddings")  # where 4.5x kept it
    assert numbers(parse(inside)) == numbers(flat)


@pytest.mark.parametrize("size", ["7b", "3b"])
def test_real_configs_and_what_transformers_makes_of_them(
    shared_data: Path, tmp_path: Path, size: str
) -> None:
    raw = real(shared_data, size)
    flat = parse(raw)
    assert (flat.head_dim, flat.vision.window_slots, flat.vision.patch_features) == (128, 64, 1176)
    assert flat.tie_word_embeddings is (size == "3b")
    from transformers import Qwen2_5_VLConfig as Theirs

    Theirs(**copy.deepcopy(raw)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "text_config" in saved
    assert numbers(parse(saved)) == numbers(flat)


@pytest.mark.parametrize("form", [lambda raw: raw, nested], ids=["flat", "nested"])
@pytest.mark.parametrize("eos", [1002, [1002, 1000], None])
def test_round_trip(form: Any, eos: Any) -> None:
    raw = small.raw_config() | {"eos_token_id": eos, "vision_token_id": 1011, "attention_dropout": 0.0}
    config = parse(form(raw))
    assert config.eos_ids == {"1002": (1002,), "None": ()}.get(str(eos), (1002, 1000))
    again = parse(config.to_hf())
    assert again == config
    assert json.loads(json.dumps(config.to_hf())) == config.to_hf()


def test_round_trip_writes_back_the_flat_file(shared_data: Path) -> None:
    for raw in (small.raw_config(), real(shared_data, "7b"), real(shared_data, "3b")):
        assert parse(raw).to_hf() == raw | {"vision_config": parse(raw).to_hf()["vision_config"]}
        assert raw["vision_config"].items() <= parse(raw).to_hf()["vision_config"].items()


def test_end_ids_of_the_generation_config(tmp_path: Path) -> None:
    path = small.hf_dir(tmp_path, {"unused": small.tensors()["model.norm.weight"]})
    config = read_config(path)
    assert config.eos_ids == (1002, 1000)  # generation_config.json's
    assert config.to_hf()["eos_token_id"] == 1002  # config.json's own, written back as it was
    (path / "generation_config.json").write_text("{}", encoding="utf-8")
    assert read_config(path).eos_ids == (1002,)


def test_values_that_are_not_named_are_those_of_transformers() -> None:
    from transformers import Qwen2_5_VLConfig as Theirs

    raw = small.raw_config()
    del raw["rms_norm_eps"], raw["rope_theta"]
    for name in ("depth", "num_heads", "window_size", "fullatt_block_indexes", "in_chans", "hidden_size"):
        del raw["vision_config"][name]
    theirs, ours = Theirs(**copy.deepcopy(raw)), parse(raw)
    assert ours.rms_norm_eps == theirs.text_config.rms_norm_eps
    assert ours.rope_theta == theirs.text_config.rope_parameters["rope_theta"]
    vision = theirs.vision_config
    assert ours.vision.depth == vision.depth
    assert ours.vision.hidden_size == vision.hidden_size
    assert ours.vision.num_heads == vision.num_heads
    assert ours.vision.window_size == vision.window_size
    assert ours.vision.in_channels == vision.in_channels
    assert ours.vision.full_attention_layers == tuple(vision.fullatt_block_indexes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2_vl"}, "qwen2_vl"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [2, 3, 3]}}, "rope type .*yarn"),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3], "mrope_interleaved": True}},
            "interl",
        ),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [4, 4, 4]}}, "mrope_section"),
        ({"head_dim": 32}, "head_dim 32"),
        ({"num_attention_heads": 3}, "multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"vision_config": None}, "vision_config"),
        ({"vision_config": {"hidden_act": "gelu"}}, "gelu"),
        ({"vision_config": {"patch_size": [14, 14]}}, r"patch_size \[14, 14\]"),
        ({"vision_config": {"rope_parameters": {"rope_type": "yarn"}}}, "yarn"),
        ({"vision_config": {"out_hidden_size": 32}}, "out_hidden_size 32"),
        ({"vision_config": {"num_heads": 7}}, "multiple of 4 x num_heads 7"),
        ({"vision_config": {"num_heads": 0}}, "vision num_heads 0: these must be whole numbers from 1"),
        ({"vision_config": {"fullatt_block_indexes": None}}, "another type than the hub's"),
        ({"num_attention_heads": 0}, "another type than the hub's"),
        ({"hidden_size": "2048"}, "another type than the hub's"),
        ({"num_hidden_layers": None}, "num_hidden_layers None: these must be whole numbers"),
        ({"num_hidden_layers": -1}, "num_hidden_layers -1: these must be whole numbers"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": None}}, "another type than the hub's"),
        ({"rope_theta": "x", "rope_scaling": {"mrope_section": [2, 3, 3]}}, "another type than the hub's"),
    ],
)
def test_what_is_not_computed_is_refused(change: dict[str, Any], message: str) -> None:
    raw = small.raw_config()
    vision = change.get("vision_config")
    merged = raw | change | ({"vision_config": raw["vision_config"] | vision} if vision else {})
    with pytest.raises(ConfigError, match=message):
        parse(merged)


def test_missing_fields_are_named_together() -> None:
    raw = small.raw_config()
    del raw["hidden_size"], raw["num_hidden_layers"], raw["vision_config"]
    with pytest.raises(ConfigError, match="hidden_size, num_hidden_layers, vision_config"):
        parse(raw)


@pytest.mark.parametrize(
    ("text", "error"), [(None, "does not exist"), ("{", "not valid JSON"), ("[]", "not a JSON object")]
)
def test_unreadable_files_are_named(tmp_path: Path, text: str | None, error: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises((ConfigError, DataError), match=rf"config\.json.*{error}"):
        read_config(tmp_path)
