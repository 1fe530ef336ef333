"""Between Hugging Face directories and bundles: byte-equal both ways, verified, never overwriting."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from fundus_jax import bundle, checkpoints, convert, files, later, training
from fundus_jax.checkpoints import Checkpoints
from fundus_jax.models import load_pretrained, weights
from fundus_jax.models.freeze import freeze
from fundus_jax.models.lora import LoraConfig, attach
from fundus_jax.optim import OptimConfig, make_optimizer
from fundus_jax.records import ConfigError, DataError
from tests.models import small


def stored(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a directory: dtype, shape and bytes, read by safetensors alone."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="np") as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                tensor = handle.get_tensor(name)
                found[name] = (tensor.dtype.name, tensor.shape, tensor.tobytes())
    return found


def side_files(path: Path) -> dict[str, bytes]:
    """Everything but the weights and what belongs to them."""
    return {
        file.name: file.read_bytes()
        for file in path.iterdir()
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json")
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return small.hf_dir(tmp_path / "source", small.tensors(dtype="bfloat16"), dtype="bfloat16")


@pytest.mark.parametrize("piece", [3_000, files.PIECE])  # some rows; all of any tensor here
@pytest.mark.parametrize(
    ("dtype", "tied", "shards"), [("bfloat16", False, 3), ("float16", True, 1), ("float32", True, 2)]
)
def test_there_and_back(
    tmp_path: Path, dtype: str, tied: bool, shards: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIECE", piece)
    content = small.tensors(tied=tied, dtype=dtype)
    source = small.hf_dir(tmp_path / "in", content, tied=tied, dtype=dtype, shards=shards)
    (source / "LICENSE").write_text("terms", encoding="utf-8")
    (source / "pytorch_model.bin").write_bytes(b"no business of ours")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    made, back = tmp_path / "bundles" / "made", tmp_path / "back"
    assert convert.convert(source, made) == len(content)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert sorted(path.name for path in made.iterdir()) == ["bundle.json", "hf", "manifest.json", "state"]
    assert not list(made.rglob("*.safetensors"))
    source.rename(tmp_path / "gone")  # the bundle can go back alone
    shutil.move(made, tmp_path / "elsewhere")
    assert convert.convert(tmp_path / "elsewhere", back) == len(content)
    assert stored(back) == stored(tmp_path / "gone")
    want = side_files(tmp_path / "gone")
    del want["pytorch_model.bin"]
    assert side_files(back) == want


def test_a_converted_bundle_is_sealed_and_named_as_those_of_a_run(tmp_path: Path, source: Path) -> None:
    convert.convert(source, tmp_path / "7")
    manifest = files.verify(tmp_path / "7")
    assert manifest["facts"] == {"step": 0, "final": True}
    model, _ = load_pretrained(source, dtype=None)
    params = {"params": training.split(model)[1]}
    text = weights.read_json(tmp_path / "7" / "bundle.json")
    want = {name: [leaf.dtype.name, list(leaf.shape)] for name, leaf in bundle.named_leaves(params).items()}
    assert text["arrays"] == want
    shutil.move(tmp_path / "7", tmp_path / "0")  # and the class that restores those restores it
    kept = Checkpoints(tmp_path, config_hash=text["config_hash"]).restore(0, params)
    assert small.largest_difference(kept.state, params) == 0


@pytest.mark.parametrize("piece", [5_000, files.PIECE])
def test_mixed_dtypes_come_back_as_they_were(
    tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIECE", piece)
    content = small.tensors(dtype="bfloat16")
    for number, name in enumerate(sorted(content)):  # 12 tensors a layer: those of a parameter differ too
        content[name] = content[name].astype(list(small.DTYPES.values())[number % 5 % 3])
    source = small.hf_dir(tmp_path / "in", content)
    assert len({dtype for dtype, *_ in stored(source).values()}) == 3
    convert.convert(source, tmp_path / "made")
    convert.convert(tmp_path / "made", tmp_path / "back")
    assert stored(tmp_path / "back") == stored(source)


class Run(NamedTuple):
    """A workdir with the bundle of one step."""

    step: Path
    params: Any


@pytest.fixture
def run(tmp_path: Path) -> Run:
    model = small.model(3)
    _, params = training.split(model)
    optimizer = make_optimizer(OptimConfig(name="adamw", lr=1e-3), 10)
    state = training.State(params, jax.jit(optimizer.init)(params))
    saved = Checkpoints(tmp_path / "run" / "checkpoints", config_hash="abc")
    saved.save(12, state, data_state=b"here", counters={"stage": "sft", "step": 2}, final=True)
    saved.wait()
    policy = small.hf_dir(tmp_path / "run" / "policy", {"unused": np.zeros(1, np.float32)})
    (policy / "model.safetensors").unlink()
    return Run(saved.directory / "12", params)


def test_a_training_runs_bundle(tmp_path: Path, run: Run) -> None:
    count = convert.convert(run.step, tmp_path / "hf")
    model, _ = load_pretrained(tmp_path / "hf")
    assert count == len(stored(tmp_path / "hf"))
    assert small.largest_difference(nnx.to_pure_dict(nnx.state(model)), run.params) == 0
    assert side_files(tmp_path / "hf") == side_files(tmp_path / "run" / "policy")


def test_a_training_runs_bundle_in_the_form_of_another_directory(tmp_path: Path, run: Run) -> None:
    like = small.hf_dir(tmp_path / "like", small.tensors(dtype="bfloat16"), dtype="bfloat16")
    shutil.rmtree(tmp_path / "run" / "policy")
    with pytest.raises(ConfigError, match="give --like=DIR"):
        convert.convert(run.step, tmp_path / "hf")
    convert.convert(run.step, tmp_path / "hf", like=like)
    model, _ = load_pretrained(tmp_path / "hf", dtype=None)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), run.params)
    assert small.largest_difference(nnx.to_pure_dict(nnx.state(model)), rounded) == 0
    assert {dtype for dtype, *_ in stored(tmp_path / "hf").values()} == {"bfloat16"}


def test_a_bundle_of_another_model_is_refused_with_every_fault(tmp_path: Path, run: Run) -> None:
    like = small.hf_dir(tmp_path / "like", {"unused": np.zeros(1, np.float32)}, tied=True)
    config = weights.read_json(like / "config.json")
    config["vision_config"]["intermediate_size"] = 40
    weights.write_json(like / "config.json", config)
    with pytest.raises(DataError, match=r"--like") as caught:
        convert.convert(run.step, tmp_path / "hf", like=like)
    lines = [line.strip().split(" ")[:2] for line in str(caught.value).splitlines()[1:]]
    mlp = [f"{name}_proj.{kind}" for name in ("gate", "up", "down") for kind in ("weight", "bias")]
    wrong = [["misshapen:", f"params.visual.blocks.mlp.{name}"] for name in mlp if name != "down_proj.bias"]
    assert sorted(lines) == sorted([*wrong, ["unexpected:", "params.lm_head.weight"]])
    config["num_hidden_layers"], config["tie_word_embeddings"] = 3, False
    weights.write_json(like / "config.json", config)
    with pytest.raises(DataError, match=r"misshapen: params\.text\.layers\.mlp\.up_proj\.weight is \(2, 128"):
        convert.convert(run.step, tmp_path / "hf", like=like)
    assert not (tmp_path / "hf").exists()


def test_a_bundle_of_trained_parts_says_how_to_export_it(tmp_path: Path, run: Run) -> None:
    for what in ("freeze", "lora"):
        model = small.model(3)
        freeze(model, ["vision"]) if what == "freeze" else attach(model, LoraConfig(rank=2))
        skeleton, params = training.split(model)
        saved = Checkpoints(tmp_path / "run" / what, config_hash="abc")
        saved.save(1, {"params": skeleton.divide(params)[0]}, data_state=b"", counters={}, final=True)
        saved.wait()
        with pytest.raises(ConfigError, match=r"not the \d+ that .* launch/run\.py --stage=export"):
            convert.convert(saved.directory / "1", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_damaged_sources_are_refused(tmp_path: Path, source: Path) -> None:
    convert.convert(source, tmp_path / "made")
    largest = max((tmp_path / "made" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    for file in (largest, tmp_path / "made" / "hf" / "tokenizer.json"):
        intact = file.read_bytes()
        flip(file)
        with pytest.raises(DataError, match=f"{file.name} is damaged"):
            convert.convert(tmp_path / "made", tmp_path / "back")
        file.write_bytes(intact)
    (tmp_path / "made" / "manifest.json").unlink()
    with pytest.raises(DataError, match="never finished"):
        convert.convert(tmp_path / "made", tmp_path / "back")
    flip(source / "model.safetensors")
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(DataError, match="not a readable safetensors file"):
        convert.convert(source, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_nothing_is_overwritten_and_sources_are_told_apart(tmp_path: Path, source: Path, run: Run) -> None:
    convert.convert(source, tmp_path / "made")
    for one, other in ((source, tmp_path / "made"), (tmp_path / "made", source), (source, source)):
        with pytest.raises(ConfigError, match="already exists"):
            convert.convert(one, other)
    work = run.step.parent.parent
    (work / "config.json").write_text("{}", encoding="utf-8")
    for wrong, message in (
        (work, r"is a workdir; give one of its bundles, .*checkpoints/STEP"),
        (work / "checkpoints", "is neither a Hugging Face directory"),
        (tmp_path / "nowhere", "is neither a Hugging Face directory"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert.convert(wrong, tmp_path / "new")
    with pytest.raises(ConfigError, match="--like goes with a bundle"):
        convert.convert(source, tmp_path / "new", like=source)
    assert not (tmp_path / "new").exists()


def test_what_was_written_wrongly_is_not_kept(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert.convert(source, tmp_path / "made")
    write = weights.write_file

    def write_wrongly(path: Path, tensors: Any, fetch: Any) -> None:
        def double(name: str, piece: files.Piece) -> np.ndarray:
            return fetch(name, piece) * (2 if name == "model.norm.weight" else 1)

        write(path, tensors, double)

    monkeypatch.setattr(weights, "write_file", write_wrongly)
    with pytest.raises(DataError, match=r"1 tensors were not written as they were read.*model\.norm\.weight"):
        convert.convert(tmp_path / "made", tmp_path / "back")
    monkeypatch.undo()
    opened = later.open_array

    def open_wrongly(path: Path, name: str) -> Any:
        array = opened(path, name)
        return later.read(array) * 2 if name == "params.text.norm.weight" else array

    monkeypatch.setattr(later, "open_array", open_wrongly)
    with pytest.raises(DataError, match=r"1 tensors were not written as they were read.*model\.norm\.weight"):
        convert.convert(source, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "source"]


def test_a_full_disk_is_noticed_before(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match=rf"0\.1 MB free, {checkpoints.HEADROOM} x the size of the weights"):
        convert.convert(source, tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_command(tmp_path: Path, source: Path, repo_root: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fundus_jax.convert", *arguments]
        return subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=200)

    there = call(f"--source={source}", f"--target={tmp_path / 'made'}")
    assert there.returncode == 0, there.stderr
    count = len(stored(source))
    assert f"{count} tensors, each read back and equal" in there.stdout
    refused = call(f"--source={source}", f"--target={tmp_path / 'made'}")
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("ConfigError: ")
    assert "Traceback" not in refused.stderr
