"""The small policy: its tokenizer, its Hugging Face directory, its first weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from fundus_jax.base import policy
from fundus_jax.models import read_config
from fundus_jax.models.qwen2_5_vl.processor import Processor
from fundus_jax.records import ConfigError
from tests import small

TEXTS = [
    "The retina shows 12 microaneurysms.\nNo haemorrhage.",
    "<think>a b</think> <answer>Mild NPDR</answer>",
] * 3
SIZES = small.config().policy


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "hf"
    policy.write_policy(path, SIZES, TEXTS)
    return path


@pytest.mark.parametrize("text", [*TEXTS[:2], "naïve Ödem – 糖尿病 👁", "  two  spaces\r\n\n", "'S 2024"])
def test_every_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = policy.make_tokenizer(TEXTS, 400)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_special_tokens_are_the_last_ids_in_qwens_order() -> None:
    tokenizer = policy.make_tokenizer(TEXTS, 300)
    size = tokenizer.get_vocab_size()
    assert size <= 300
    assert [tokenizer.token_to_id(name) for name in policy.SPECIAL] == list(
        range(size - len(policy.SPECIAL), size)
    )
    assert tokenizer.encode("12<|im_end|>").tokens[-3:] == ["1", "2", "<|im_end|>"]


def test_more_room_gives_longer_pieces() -> None:
    few, many = (len(policy.make_tokenizer(TEXTS, size).encode(TEXTS[0]).ids) for size in (270, 400))
    assert many < few


def test_the_directory_is_one_that_the_processor_reads(directory: Path) -> None:
    processor, config = Processor.from_pretrained(directory), read_config(directory)
    assert processor.image_token_id == config.image_token_id
    assert processor.eos_ids == config.eos_ids
    assert set(processor.banned_ids) >= set(config.banned_ids)
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    text = processor.chat([question], add_generation_prompt=True)
    assert text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    batch = processor([text], [[Image.new("RGB", (300, 200))]])
    assert (batch.image_index >= 0).sum() <= 4, "at most 56 x 56 pixels"
    model = policy.fresh(config, 0)
    assert model(batch).shape == (1, batch.tokens.shape[1], config.vocab_size)


def test_the_same_texts_give_the_same_bytes(directory: Path, tmp_path: Path) -> None:
    policy.write_policy(tmp_path / "again", SIZES, TEXTS)
    names = sorted(path.name for path in directory.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes(), name
    with pytest.raises(ConfigError, match="already exists"):
        policy.write_policy(tmp_path / "again", SIZES, TEXTS)


def test_its_configuration_survives_the_file(directory: Path) -> None:
    written = policy.model_config(SIZES, policy.make_tokenizer(TEXTS, SIZES.vocab))
    read = read_config(directory)
    assert json.loads(read.extras) == json.loads(written.extras)
    assert replace(read, extras=written.extras) == written
    assert written.vocab_size % 64 == 0
    assert sum(written.mrope_section) == SIZES.width // SIZES.heads // 2
    assert policy.model_config(policy.PolicyConfig(), policy.make_tokenizer(TEXTS, 400)).mrope_section == (
        4,
        6,
        6,
    )


def test_first_weights_are_drawn_from_the_seed(directory: Path) -> None:
    config = read_config(directory)
    trees = [nnx.to_pure_dict(nnx.state(policy.fresh(config, seed))) for seed in (1, 1, 2)]
    leaves = (jax.tree_util.tree_leaves_with_path(tree) for tree in trees)
    for (path, a), (_, b), (_, c) in zip(*leaves, strict=True):
        names = [key.key for key in path]
        assert np.array_equal(a, b), names
        drawn = (
            names[0] != "lm_head"
            and names[-1] != "bias"
            and not any("norm" in n or n == "ln_q" for n in names)
        )
        assert np.array_equal(a, c) != drawn, names
        if names[-1] == "bias" or names[0] == "lm_head":
            assert not np.any(a), names
        elif not drawn:
            assert np.all(np.asarray(a) == 1), names


def test_first_predictions_are_uniform_and_residual_outputs_small(directory: Path) -> None:
    config = read_config(directory)
    model = policy.fresh(config, 0)
    processor = Processor.from_pretrained(directory)
    assert not np.any(model(processor(["The retina"])))
    layers = model.text.layers
    for inner, outer in (
        (layers.mlp.gate_proj, layers.mlp.down_proj),
        (layers.self_attn.q_proj, layers.self_attn.o_proj),
    ):
        fan_in = [np.sqrt(linear.weight.get_value().shape[-1]) for linear in (inner, outer)]
        scale = [float(np.std(linear.weight.get_value())) for linear in (inner, outer)]
        np.testing.assert_allclose(scale[0] * fan_in[0], 1, rtol=0.1)
        np.testing.assert_allclose(scale[1] * fan_in[1], 1 / np.sqrt(2 * config.num_hidden_layers), rtol=0.1)
    np.testing.assert_allclose(np.std(model.text.embed_tokens.get_value()), 0.3, rtol=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab": 269}, "policy.vocab 269 must hold 256 bytes and 14 special tokens"),
        ({"pixels": 100}, "policy.pixels 100 must be a multiple of 28"),
        ({"width": 33}, "policy.width 33 .* policy.heads"),
        ({"heads": 4, "kv_heads": 3}, "policy.kv_heads 3"),
        ({"vision_width": 36, "vision_heads": 2}, "policy.vision_width 36"),
        ({"layers": 0}, "policy.layers"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SIZES, **changes).validate()
