"""The processor on Qwen2.5-VL-7B's real files: tokens of 500 strings, the chat template, special ids."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from fundus_jax.models.qwen2_5_vl.processor import Processor
from tests.models.qwen2_5_vl.test_processor import DIALOGS, reference_processor
from tests.models.tiny import PIECES

SCRAPS = (
    "retina", " Drusen", "NPDR", "haemorrhage's", "眼底图像", "مرحبا", "Ünïcödé", "e\u0301", "🙂",
    "👩\u200d⚕️", "ﬁ", "½", " ", "  ", "\n", "\r\n", "\n\n\n", "\t", "\u00a0", "\u3000", "\u200b", "\x00", "?",
    "...", "!!\n", "'s", "'LL", "0", "123", "4.56", "-7", "x2", "<think>", "</answer>", "<|im_end|>",
    "<|box_start|>", "<tool_call>", "<|im_", "[[12, 34, 567]]", "<ref>disc</ref>", "{{ x }}",
    "http://a.b/c?d=e", "_under_score", "CamelCase", "\ufffd",
)  # fmt: skip


@pytest.fixture(scope="module")
def real_dir(shared_data: Path) -> Path:
    """The 7B checkpoint's files; they hold no tokenizer.json and no weights."""
    folder = shared_data / "qwen2.5-vl" / "7b"
    if not folder.is_dir():
        pytest.skip(f"Qwen2.5-VL's own files are not in {folder}")
    return folder


@pytest.fixture(scope="module")
def processor(real_dir: Path) -> Processor:
    """Our processor on them."""
    return Processor.from_pretrained(real_dir)


def independent(folder: Path) -> Tokenizer:
    """A tokenizer put together from vocab.json, merges.txt and the list of added tokens, without
    transformers.
    """
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    for number, token in sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0])):
        tokenizer.add_tokens([AddedToken(token["content"], special=token["special"], normalized=False)])
        assert tokenizer.token_to_id(token["content"]) == int(number)
    return tokenizer


def strings() -> list[str]:
    """500 strings that mix scripts, spaces, digits, markup and special tokens."""
    draw = random.Random(0)
    mixed = ["".join(draw.choices(SCRAPS, k=draw.randint(1, 12))) for _ in range(400)]
    planes = [(32, 0x250), (0x370, 0x1000), (0x3000, 0xA000), (0x1F300, 0x1FA00)]
    return mixed + [
        "".join(chr(draw.randrange(*draw.choice(planes))) for _ in range(draw.randint(1, 30)))
        for _ in range(100)
    ]


def test_tokens_of_500_strings(processor: Processor, real_dir: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(real_dir, local_files_only=True)
    other = independent(real_dir)
    for text in strings():
        tokens = processor([text]).tokens[0].tolist()
        assert tokens == other.encode(text, add_special_tokens=False).ids, repr(text)
        assert tokens == theirs(text)["input_ids"], repr(text)
        assert processor.decode(tokens, skip_special_tokens=False) == other.decode(
            tokens, skip_special_tokens=False
        )


def test_known_tokens(processor: Processor) -> None:
    assert processor(["Hello, world!"]).tokens[0].tolist() == [9707, 11, 1879, 0]
    assert processor.eos_ids == (151645, 151643)
    assert processor.pad_id == 151643
    assert processor.image_token_id == 151655
    assert processor.banned_ids == (151652, 151653, 151654, 151655, 151656)
    config = processor.image_config
    assert (config.min_pixels, config.max_pixels, config.window_slots) == (3136, 12845056, 64)


def test_training_tokens_continue_the_prompt(processor: Processor) -> None:
    prompt = processor([processor.chat(DIALOGS[0], add_generation_prompt=True)]).tokens[0]
    for answer in ("<think>Drusen.</think>", "\n\nDrusen."):
        dialog = [*DIALOGS[0], {"role": "assistant", "content": answer}]
        tokens, loss = processor.train_row(dialog)
        assert tokens[: len(prompt)].tolist() == prompt.tolist()
        assert np.flatnonzero(loss)[0] == len(prompt)
        assert processor.decode(tokens[loss], skip_special_tokens=False) == answer + "<|im_end|>"
        # In one piece, the first line break of an answer would melt into the prompt's last token.
        whole = processor([processor.chat(dialog)]).tokens[0]
        assert np.array_equal(tokens, whole) == (answer[0] != "\n")


@pytest.mark.parametrize("dialog", DIALOGS)
def test_the_real_chat_template(processor: Processor, real_dir: Path, dialog: list[dict[str, Any]]) -> None:
    pytest.importorskip("torch", reason="transformers' processor classes need it")
    reference = reference_processor(real_dir)
    for prompt in (False, True):
        ours = processor.chat(dialog, add_generation_prompt=prompt)
        assert ours == reference.apply_chat_template(dialog, add_generation_prompt=prompt, tokenize=False)


def test_the_template_in_words(processor: Processor) -> None:
    text = processor.chat(DIALOGS[1], add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        "<|image_pad|><|vision_end|>What disease is visible?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_is_saved_loads_with_the_same_ids(processor: Processor, real_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    processor.save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ours = Processor.from_pretrained(tmp_path)
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in strings()[::10]:
        expected = processor([text]).tokens[0].tolist()
        assert theirs(text)["input_ids"] == ours([text]).tokens[0].tolist() == expected
        assert raw.encode(text, add_special_tokens=False).ids == expected
    assert theirs.eos_token_id == 151645
    assert (tmp_path / "tokenizer_config.json").read_bytes() == (
        real_dir / "tokenizer_config.json"
    ).read_bytes()
