"""The model families this project knows, by config.json's `model_type`: the only file that names them all.

A family is a module with `Config.from_hf`, `load`, `save` and a
Processor; a new one is a folder and a row here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from fundus_jax.models import weights
from fundus_jax.models.qwen2_5_vl import adapter
from fundus_jax.models.qwen2_5_vl import params as qwen2_5_vl
from fundus_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from fundus_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from fundus_jax.models.qwen2_5_vl.processor import Processor
from fundus_jax.records import ConfigError

FAMILIES = {"qwen2_5_vl": (Qwen2_5_VLConfig, qwen2_5_vl, Processor)}


def exact(dtype: str) -> None:
    """Let products of float32 be float32 where a program computes in `dtype` "float32": accelerators would
    take bfloat16 (TPU) or TF32 (GPU) for them. On a CPU nothing changes."""
    if dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")


def read_config(hf_dir: str | Path) -> Qwen2_5_VLConfig:
    """The configuration of a Hugging Face directory; end-of-text ids from
    generation_config.json where it has them.

    Raises ConfigError for a missing config.json and for families that are not in FAMILIES.
    """
    path = Path(hf_dir) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give a Hugging Face model directory")
    raw = weights.read_json(path)
    if raw.get("model_type") not in FAMILIES:
        raise ConfigError(f"{path}: model_type {raw.get('model_type')!r} is not one of {', '.join(FAMILIES)}")
    config = FAMILIES[raw["model_type"]][0].from_hf(raw)
    generation = Path(hf_dir) / "generation_config.json"
    if generation.is_file():
        eos: Any = weights.read_json(generation).get("eos_token_id")
        if eos is not None:
            config = config.ending_with(tuple(eos) if isinstance(eos, list) else (eos,))
    return config


def load_pretrained(
    hf_dir: str | Path, dtype: str | None = "float32", mesh: Mesh | None = None
) -> tuple[Qwen2_5_VL, Processor]:
    """Model and processor of a Hugging Face directory (config.json, safetensors, tokenizer files).

    dtype: of the parameters in memory; None keeps the files'. mesh: place every parameter by
    `sharding.RULES`. Raises ConfigError or DataError, naming every key that is missing, unexpected or
    misshapen.
    """
    config = read_config(hf_dir)
    _, params, processor_kind = FAMILIES["qwen2_5_vl"]
    processor = processor_kind.from_pretrained(hf_dir)
    if not config.eos_ids:  # then both know the end from the tokenizer
        config = config.ending_with(processor.eos_ids)
    return params.load(hf_dir, config, dtype, mesh), processor


def save_pretrained(model: Qwen2_5_VL, processor: Processor, out_dir: str | Path) -> Path:
    """Write a Hugging Face directory that transformers and vLLM load: weights in the hub's layout and the
    checkpoint's own dtype (`model.config.dtype`), adapters merged into them, configuration, tokenizer, image
    settings. Atomic; raises ConfigError if `out_dir` exists."""
    out_dir = Path(out_dir)
    with weights.new_directory(out_dir) as scratch:
        qwen2_5_vl.save(scratch, model)
        weights.write_json(scratch / "config.json", model.config.to_hf())
        generation = {
            "eos_token_id": list(model.config.eos_ids),
            "pad_token_id": processor.pad_id,
            "do_sample": False,
            "temperature": 1e-6,  # as in Qwen's own: vLLM reads this one, and samples at 1 without it
        }
        weights.write_json(scratch / "generation_config.json", generation)
        processor.save_pretrained(scratch)
    return out_dir


def save_adapter(model: Qwen2_5_VL, out_dir: str | Path, base: str) -> Path:
    """Write the adapters of `model` alone, as PEFT does, for the weights called `base` (a directory, or a
    name on the hub). Atomic; raises ConfigError if `out_dir` exists or the model has no adapters."""
    out_dir = Path(out_dir)
    with weights.new_directory(out_dir) as scratch:
        adapter.save(scratch, model, base)
    return out_dir
