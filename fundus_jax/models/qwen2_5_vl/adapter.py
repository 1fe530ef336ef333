"""A model's adapters as files that PEFT loads onto the weights they were trained from.

Layout and names are PEFT's (its `utils/save_and_load.py`; loaded with peft 0.21.2, docs/log.md): one A and
one B for each layer, called as transformers' module with `base_model.model.` in front.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from fundus_jax.models import lora, weights
from fundus_jax.models.layers import Linear
from fundus_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from fundus_jax.models.qwen2_5_vl.params import Slot, table
from fundus_jax.records import ConfigError

PREFIX = "base_model.model."


def save(directory: Path, model: Qwen2_5_VL, base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors (float32) into an existing directory.

    base: what the adapters belong to, a hub name or directory. Raises ConfigError for a model without
    adapters.
    """
    found = list(_layers(model))
    if not found:
        raise ConfigError("the model has no adapters to save; attach some first, or use save_pretrained")
    tensors: dict[str, np.ndarray] = {}
    for name, linear, slot in found:
        a, b = (np.asarray(half, np.float32) for half in lora.halves(linear, slot.layer))
        # a convolution's A has its kernel, and its B a kernel of one
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.reshape(-1, *slot.shape[1:])
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.reshape(*b.shape, *(1 for _ in slot.shape[2:]))
    first = found[0][1]
    rank = lora.halves(first, found[0][2].layer)[0].shape[0]
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": first.lora_scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [name for name, _, _ in found],
        "inference_mode": True,
    }
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    weights.write_json(directory / "adapter_config.json", settings)


def _layers(model: Qwen2_5_VL) -> Iterator[tuple[str, Linear, Slot]]:
    """Each layer with an adapter: transformers' name of it, the layer (or its stack), its weight's slot."""
    adapted = lora.adapted(model)
    for name, slot in table(model.config).items():
        linear = adapted.get(".".join(map(str, slot.path[:-1])))
        if linear is not None and slot.path[-1] == "weight":
            module = name.removesuffix(".weight")
            inner = module.removeprefix("model.")
            yield f"model.{inner}" if module == inner else f"model.language_model.{inner}", linear, slot
