"""A small Qwen2.5-VL with random weights, without torch: as a model, and as a Hugging Face directory.

The directory is written by safetensors alone, from random tensors by name, so that reading it and writing it
back is checked against something that `models.weights` did not make. Sizes are those of `tiny`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from fundus_jax.models.batch import Batch
from fundus_jax.models.qwen2_5_vl import params
from fundus_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from fundus_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from fundus_jax.models.qwen2_5_vl.processor import Processor
from tests.models import tiny

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def raw_config(*, tied: bool = False, dtype: str = "float32") -> dict[str, Any]:
    """config.json in the hub's flat layout."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **{"vocab_size": tiny.VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "hidden_act": "silu"},
        **{"max_position_embeddings": 2048, "bos_token_id": 1000, "eos_token_id": 1002, "rope_theta": 1e6},
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        **{"image_token_id": tiny.IMAGE_ID, "video_token_id": tiny.VIDEO_ID, "tie_word_embeddings": tied},
        **{"vision_start_token_id": tiny.VISION_START_ID, "vision_end_token_id": tiny.VISION_END_ID},
        **{"torch_dtype": dtype, "initializer_range": 0.2, "use_sliding_window": False},
        "vision_config": {
            **{"depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "in_chans": 3},
            **{"out_hidden_size": 64, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14},
            **{"window_size": 112, "fullatt_block_indexes": [1, 3], "temporal_patch_size": 2},
            **{"tokens_per_second": 2, "hidden_act": "silu"},
        },
    }


def config(*, tied: bool = False) -> Qwen2_5_VLConfig:
    """The same, parsed, with both of the end ids of `tiny`."""
    return Qwen2_5_VLConfig.from_hf(raw_config(tied=tied)).ending_with(tiny.EOS_IDS)


def model(seed: int = 0, *, tied: bool = False) -> Qwen2_5_VL:
    """A model in which every parameter is random: matrices and biases normal 0.2, norms 1 + 0.2 normal."""
    graph, state = nnx.split(params.abstract(config(tied=tied)))
    rng = np.random.default_rng(seed)
    for path, param in nnx.to_flat_state(state):
        mean = 1.0 if "norm" in str(path[-2]) or path[-2] == "ln_q" else 0.0
        drawn = rng.normal(mean, 0.2, param.get_value().shape)
        param.set_value(jnp.asarray(drawn, jnp.float32))
    return nnx.merge(graph, state)


def tensors(*, tied: bool = False, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint by its name on the hub."""
    rng, shapes = np.random.default_rng(seed), params.hf_shapes(config(tied=tied))
    kind = DTYPES[dtype]
    return {name: rng.normal(0, 0.2, shape).astype(kind) for name, shape in shapes.items()}


def hf_dir(
    path: Path, content: dict[str, np.ndarray], *, tied: bool = False, dtype: str = "float32", shards: int = 1
) -> Path:
    """Write config, tokenizer files and `content`, as one file or dealt to `shards` with an index."""
    tiny.write_processor_files(path)
    raw = raw_config(tied=tied, dtype=dtype)
    (path / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
    write_weights(path, [dict(list(content.items())[i::shards]) for i in range(shards)])
    return path


def write_weights(path: Path, shards: Iterable[dict[str, np.ndarray]]) -> None:
    """Write one file, or several with an index."""
    shards = list(shards)
    if len(shards) == 1:
        save_file(shards[0], path / "model.safetensors", metadata={"format": "pt"})
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, path / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def processor(path: Path) -> Processor:
    """The processor of `tiny`, its files written into `path`."""
    return Processor.from_pretrained(tiny.write_processor_files(path))


def batch(
    processor: Processor,
    sizes: Iterable[Iterable[tuple[int, int]]],
    *,
    length: int,
    patches: int,
    seed: int = 0,
) -> Batch:
    """One prompt a row, of different length, with random images of `sizes` (width, height)."""
    texts, images = [], []
    for row, ones in enumerate(sizes):
        images.append(
            [tiny.random_image(*size, seed=100 * seed + 10 * row + i) for i, size in enumerate(ones)]
        )
        asked = " ".join(["what does the retina show", "think step by step", "compare both"][: row % 3 + 1])
        texts.append(f"<|im_start|>user\n{IMAGE * len(images[-1])}{asked}<|im_end|>\n<|im_start|>assistant\n")
    return processor(texts, images, length=length, patches=patches)


def largest_difference(one: Any, other: Any) -> float:
    """max |a - b| over two pytrees of arrays of equal structure."""
    pairs = jax.tree.map(
        lambda a, b: float(np.max(np.abs(np.asarray(a) - np.asarray(b)), initial=0)), one, other
    )
    return max(jax.tree.leaves(pairs))
