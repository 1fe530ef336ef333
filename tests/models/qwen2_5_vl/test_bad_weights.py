"""Checkpoints that are not what they should be: one error names every fault, no code in them is run."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fundus_jax.models import load_pretrained, save_pretrained, weights
from fundus_jax.records import ConfigError, DataError
from tests.models import small

NORM = "model.norm.weight"


def test_one_error_lists_every_fault(tmp_path: Path) -> None:
    content = small.tensors()
    first, second = dict(list(content.items())[::2]), dict(list(content.items())[1::2])
    for shard in (first, second):
        shard.pop(NORM, None)
        shard.pop("visual.blocks.3.attn.qkv.bias", None)
    first["model.layers.2.mlp.up_proj.weight"] = np.zeros((128, 64), np.float32)  # there is no third layer
    first["visual.merger.extra"] = np.zeros(3, np.float32)
    shape = (65, 64)
    first["model.layers.0.self_attn.q_proj.weight"] = np.zeros(shape, np.float32)
    second.pop("model.layers.0.self_attn.q_proj.weight", None)
    first["model.language_model.embed_tokens.weight"] = content["model.embed_tokens.weight"]
    first["lm_head.weight"] = second["lm_head.weight"] = content["lm_head.weight"]
    second["visual.merger.ln_q.weight"] = np.ones(32, np.float64)
    first.pop("visual.merger.ln_q.weight", None)
    path = small.hf_dir(tmp_path, {"unused": content[NORM]})
    (path / "model.safetensors").unlink()
    small.write_weights(path, [first, second])
    with pytest.raises(DataError) as caught:
        load_pretrained(path)
    lines = sorted(line.strip() for line in str(caught.value).splitlines()[1:])
    assert lines == [
        "misshapen: model.layers.0.self_attn.q_proj.weight is (65, 64), the configuration says (64, 64)",
        "missing: model.norm.weight (64,)",
        "missing: visual.blocks.3.attn.qkv.bias (96,)",
        "stored twice: lm_head.weight in model-00001-of-00002.safetensors and "
        "model-00002-of-00002.safetensors",
        "stored twice: model.embed_tokens.weight as model.embed_tokens.weight and "
        "model.language_model.embed_tokens.weight",
        "unexpected: model.layers.2.mlp.up_proj.weight (128, 64)",
        "unexpected: visual.merger.extra (3,)",
        "unreadable: visual.merger.ln_q.weight is F64; weights must be bf16, f16 or f32",
    ]
    assert f"{path} does not hold this model's weights (8 faults)" in str(caught.value)


def test_a_tied_checkpoint_with_a_head(tmp_path: Path) -> None:
    content = small.tensors(tied=True)
    head = content["model.embed_tokens.weight"].copy()
    model, _ = load_pretrained(small.hf_dir(tmp_path / "same", content | {"lm_head.weight": head}, tied=True))
    assert model.lm_head is None
    for name, other in (("value", head + np.eye(*head.shape, dtype=head.dtype)), ("shape", head[1:])):
        path = small.hf_dir(tmp_path / name, content | {"lm_head.weight": other}, tied=True)
        with pytest.raises(
            DataError, match=r"1 faults.*\n  unexpected: lm_head\.weight .*tie_word_embeddings"
        ):
            load_pretrained(path)


def test_an_untied_checkpoint_without_a_head(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing: lm_head\.weight \(1024, 64\)"):
        load_pretrained(small.hf_dir(tmp_path, small.tensors(tied=True)))


class Bomb:
    """What a hostile pickle does when it is opened: it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


OPENED: list[str] = []
sys.addaudithook(lambda event, details: OPENED.append(str(details[0])) if event == "open" else None)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    path, sign = small.hf_dir(tmp_path / "in", small.tensors()), tmp_path / "sign"
    bombs = ("pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00001.bin", "optimizer.pth")
    for name in bombs:
        (path / name).write_bytes(pickle.dumps(Bomb(sign)))
    (path / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}', encoding="utf-8")
    OPENED.clear()
    model, processor = load_pretrained(path)
    save_pretrained(model, processor, tmp_path / "out")
    assert any(name.endswith("config.json") for name in OPENED)  # the hook sees what is opened
    assert not [name for name in OPENED if Path(name).name in bombs]
    assert not sign.exists()
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor .*transformers.*save_pretrained"):
        load_pretrained(path)
    assert not sign.exists()


def test_an_export_never_overwrites(tmp_path: Path) -> None:
    model, processor = load_pretrained(small.hf_dir(tmp_path / "in", small.tensors()))
    target = save_pretrained(model, processor, tmp_path / "deep" / "out")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    for there in (target, tmp_path / "in" / "config.json"):
        with pytest.raises(ConfigError, match="already exists"):
            save_pretrained(model, processor, there)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        save_pretrained(model, processor, tmp_path / "empty")
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


@pytest.mark.parametrize("when", ["weights", "config.json", "tokenizer"])
def test_an_export_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    model, processor = load_pretrained(small.hf_dir(tmp_path / "in", small.tensors()))

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    owner, name = {
        "weights": (weights, "write_file"),
        "config.json": (weights, "write_json"),
        "tokenizer": (type(processor), "save_pretrained"),
    }[when]
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(model, processor, tmp_path / "out" / "hf")
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.undo()
    save_pretrained(model, processor, tmp_path / "out" / "hf")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["hf"]


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "garbage", "zip"])
@pytest.mark.parametrize("shards", [1, 2])
def test_damaged_files_are_named(tmp_path: Path, damage: str, shards: int) -> None:
    path = small.hf_dir(tmp_path, small.tensors(), shards=shards)
    file = sorted(path.glob("*.safetensors"))[-1]
    data = file.read_bytes()
    file.write_bytes(
        {
            "truncated": data[:-100],
            "header": data[:50],
            "empty": b"",
            "garbage": b"not a safetensors file" * 10,
            "zip": b"PK\x03\x04" + bytes(1000),
        }[damage]
    )
    with pytest.raises(DataError, match=f"{file.name} is not a readable safetensors file"):
        load_pretrained(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "no weight_map"),
        (lambda index: index.update(weight_map={}), "no weight_map"),
        (lambda index: index.update(weight_map={NORM: 3}), "no weight_map"),
        (lambda index: index["weight_map"].update({NORM: "model-3.safetensors"}), "lacks the shards model-3"),
        (
            lambda index: index["weight_map"].update({NORM: "../outside.safetensors"}),
            "lacks the shards .*out",
        ),
    ],
)
def test_damaged_indices_are_named(tmp_path: Path, change: Any, message: str) -> None:
    save_file({NORM: np.ones(64, np.float32)}, tmp_path / "outside.safetensors")
    path = small.hf_dir(tmp_path / "in", small.tensors(), shards=2)
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text(encoding="utf-8"))
    change(index)
    file.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_pretrained(path)
    file.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"index\.json is not valid JSON"):
        load_pretrained(path)


def test_an_index_that_names_the_wrong_shard(tmp_path: Path) -> None:
    path = small.hf_dir(tmp_path, small.tensors(), shards=2)
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text(encoding="utf-8"))
    one, other = sorted(set(index["weight_map"].values()))
    index["weight_map"][NORM] = other if index["weight_map"][NORM] == one else one
    file.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(DataError, match=rf"1 faults.*\n  misplaced: {NORM} is not in"):
        load_pretrained(path)
