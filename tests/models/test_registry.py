"""Whole directories in and out: where the end ids are from, what an export says of sampling, broken files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fundus_jax.base import policy
from fundus_jax.models import load_pretrained, read_config, save_pretrained
from fundus_jax.models.qwen2_5_vl.processor import Processor
from fundus_jax.records import ConfigError, DataError
from tests import small


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A small policy with random weights."""
    made = tmp_path / "made"
    policy.write_policy(made, small.config().policy, ["what does the eye show?"])
    model = policy.fresh(read_config(made), 0)
    return save_pretrained(model, Processor.from_pretrained(made), tmp_path / "hf")


def changed(path: Path, **fields: Any) -> None:
    """Other values in a JSON file; None takes a field away."""
    told = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in told.items() if value is not None}))


def test_without_end_ids_the_model_ends_as_the_processor_does(exported: Path, tmp_path: Path) -> None:
    """transformers has a default there; a model that never stops answers to the last token."""
    ends = read_config(exported).eos_ids
    (exported / "generation_config.json").unlink()
    changed(exported / "config.json", eos_token_id=None)
    assert read_config(exported).eos_ids == ()
    model, processor = load_pretrained(exported)
    assert model.config.eos_ids == processor.eos_ids == ends != ()
    again = save_pretrained(model, processor, tmp_path / "again")
    assert json.loads((again / "generation_config.json").read_text())["eos_token_id"] == list(ends)


def test_an_export_is_served_at_the_originals_temperature(exported: Path) -> None:
    """vLLM samples at 1 where none is named; Qwen's own names this one."""
    assert json.loads((exported / "generation_config.json").read_text())["temperature"] == 1e-6


def test_several_chat_templates_are_exported(exported: Path, tmp_path: Path) -> None:
    """transformers writes a folder for them; tokenizer_config.json holds them too."""
    template = (exported / "chat_template.jinja").read_text()
    (exported / "chat_template.jinja").unlink()
    both = [{"name": name, "template": template} for name in ("default", "tool_use")]
    changed(exported / "tokenizer_config.json", chat_template=both)
    model, processor = load_pretrained(exported)
    again = save_pretrained(model, processor, tmp_path / "again")
    assert json.loads((again / "tokenizer_config.json").read_text())["chat_template"] == both


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b'{"version": "1.0", "trunc', r"tokenizer\.json is not valid JSON"),
        ("tokenizer.json", b'{"version": "1.0"}', "has no tokenizer that can be read"),
        ("tokenizer_config.json", b"{", r"tokenizer_config\.json is not valid JSON"),
        ("chat_template.jinja", b"\xff\xfe", r"chat_template\.jinja is not UTF-8"),
        ("preprocessor_config.json", b'{"size": 448}', "image settings of another form"),
        ("preprocessor_config.json", b'{"image_mean": [0.5, 0.5]}', "image settings of another form"),
        ("preprocessor_config.json", b'{"min_pixels": "3136"}', "image settings of another form"),
    ],
)
def test_broken_processor_files_are_named(exported: Path, name: str, content: bytes, message: str) -> None:
    (exported / name).write_bytes(content)
    with pytest.raises((ConfigError, DataError), match=message):
        Processor.from_pretrained(exported)
