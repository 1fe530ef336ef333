"""Tokens a second of `grpo.rollout.generate`, beside Hugging Face's `generate` with the same weights.

    python -m benchmarks.rollout --out=rollout.json
    python -m benchmarks.rollout --dtype=bfloat16 --width=2048 --layers=36 --heads=16 --kv_heads=2 \
        --mlp=11008 --vocab=151936 --prompts=16 --prompt_tokens=512 --new_tokens=256

A model with random weights is made, saved in the hub's layout and loaded by transformers. Both sample as many
tokens of the same prompts (text only), at temperature 1 and without an end token, in turns in one process;
what counts is the median. A decoding step is the time of all new tokens less that of one, divided. The bound
is what memory allows: a step must read every weight of the decoder and the head once, every prompt's keys and
values once a group, and every rollout's own (half of its tokens, on average). One device; nothing else should
run on the machine.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory of the same accelerator

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from fundus_jax.files import write_atomic
from fundus_jax.grpo.rollout import generate
from fundus_jax.models import weights
from fundus_jax.models.batch import Batch
from fundus_jax.models.qwen2_5_vl import params
from fundus_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from fundus_jax.models.qwen2_5_vl.model import Qwen2_5_VL

# GB/s of memory by `device_kind`, as the makers publish them.
BANDWIDTH = {
    "NVIDIA H100 80GB HBM3": 3350,
    "NVIDIA H800": 3350,
    "NVIDIA H200": 4800,
    "TPU v5 lite": 819,
    "TPU v5p": 2765,
    "TPU v6 lite": 1640,
}


def make_config(args: Any) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL with the sizes of the flags, tied, a small vision tower, and no end token."""
    half = args.width // args.heads // 2
    side = round(half * 3 / 8)
    ids = dict(zip(("image", "video", "vision_start", "vision_end"), range(4), strict=True))
    raw = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **{"vocab_size": args.vocab, "hidden_size": args.width, "intermediate_size": args.mlp},
        **{"num_hidden_layers": args.layers, "num_attention_heads": args.heads},
        **{"num_key_value_heads": args.kv_heads, "rms_norm_eps": 1e-6, "hidden_act": "silu"},
        **{"max_position_embeddings": 32768, "bos_token_id": 4, "eos_token_id": 5, "rope_theta": 1e6},
        "rope_scaling": {"type": "mrope", "mrope_section": [half - 2 * side, side, side]},
        **{f"{name}_token_id": number for name, number in ids.items()},
        **{"tie_word_embeddings": True, "torch_dtype": args.dtype, "initializer_range": 0.02},
        "use_sliding_window": False,
        "vision_config": {
            **{"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "in_chans": 3},
            **{"out_hidden_size": args.width, "patch_size": 14, "spatial_merge_size": 2},
            **{"spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1]},
            **{"temporal_patch_size": 2, "tokens_per_second": 2, "hidden_act": "silu"},
        },
    }
    return Qwen2_5_VLConfig.from_hf(raw).ending_with(())


def make_prompts(args: Any) -> Batch:
    """Random text prompts of equal length."""
    rows, length = args.prompts, args.prompt_tokens
    tokens = np.random.default_rng(0).integers(6, args.vocab, (rows, length), np.int32)
    return Batch(
        tokens=tokens,
        mask=np.ones((rows, length), bool),
        segments=np.ones((rows, length), np.int32),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), (rows, 3, length)),
        image_index=np.full((rows, length), -1, np.int32),
        patches=np.zeros((rows, 0, 1176), np.float32),
        patch_hw=np.zeros((rows, 0, 2), np.int32),
        patch_image=np.zeros((rows, 0), np.int32),
    )


Draw = Callable[[int, int], None]  # (new tokens, rollouts of each prompt); returns when they are there


def ours(model: Qwen2_5_VL, batch: Batch) -> Draw:
    """This project's sampler."""

    def draw(count: int, group: int) -> None:
        jax.block_until_ready(generate(model, batch, max_new_tokens=count, group_size=group))

    return draw


def theirs(model: Qwen2_5_VL, batch: Batch, dtype: str) -> Draw:
    """transformers' `generate` on the same weights, which it reads from a directory that we wrote."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    with tempfile.TemporaryDirectory() as folder:
        with weights.new_directory(Path(folder) / "hf") as scratch:
            params.save(scratch, model)
            weights.write_json(scratch / "config.json", model.config.to_hf())
        loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            Path(folder) / "hf", dtype=getattr(torch, dtype), local_files_only=True
        ).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference: Any = loaded.to(torch.device(device))
    reference.generation_config.eos_token_id = None
    reference.generation_config.pad_token_id = 4
    tokens = torch.tensor(np.asarray(batch.tokens), dtype=torch.long, device=device)
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

    def draw(count: int, group: int) -> None:
        with torch.inference_mode():
            out = reference.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=count,
                min_new_tokens=count,
                num_return_sequences=group,
                **settings,
            )
        if out.cpu().shape != (tokens.shape[0] * group, tokens.shape[1] + count):
            raise RuntimeError(f"transformers returned {tuple(out.shape)}: it stopped early")

    return draw


def seconds(draw: Draw, count: int, group: int) -> float:
    """The time of one call."""
    begun = time.perf_counter()
    draw(count, group)
    return time.perf_counter() - begun


def bandwidth() -> tuple[float, str]:
    """(GB/s of memory, where the number is from): the maker's for a known accelerator, else measured here by
    reading and writing 256 MB in place."""
    kind = jax.devices()[0].device_kind
    if kind in BANDWIDTH:
        return BANDWIDTH[kind], f"published for {kind}"
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(step(jnp.zeros(2**26, jnp.float32)))
    best = float("inf")
    for _ in range(10):
        begun = time.perf_counter()
        x = jax.block_until_ready(step(x))
        best = min(best, time.perf_counter() - begun)
    return 2 * x.nbytes / best / 1e9, "measured: x + 1 in place, 256 MB, the best of 10"


def step_bytes(model: Qwen2_5_VL, args: Any, group: int) -> dict[str, int]:
    """What one decoding step must read, by kind."""
    config, text = model.config, nnx.state(model.text)
    item = jnp.dtype(args.dtype).itemsize
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * item
    return {
        "weights": item * sum(leaf.size for leaf in jax.tree.leaves(text)),  # the tied head is in it
        "prompts": args.prompts * args.prompt_tokens * token,
        "rollouts": args.prompts * group * args.new_tokens // 2 * token,
    }


def measure(draws: dict[str, Draw], args: Any, group: int) -> dict[str, dict[str, float]]:
    """Medians of `repeats` runs in turns, after one that compiles."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in draws}
    for repeat in range(args.repeats + 1):
        for name, draw in draws.items():
            pair = seconds(draw, args.new_tokens, group), seconds(draw, 1, group)
            if repeat:
                times[name].append(pair)
    found = {}
    for name, pairs in times.items():
        whole = statistics.median(pair[0] for pair in pairs)
        step = statistics.median(pair[0] - pair[1] for pair in pairs) / (args.new_tokens - 1)
        found[name] = {
            "seconds": whole,
            "tokens_per_second": args.prompts * group * args.new_tokens / whole,
            "step_ms": 1e3 * step,
        }
    return found


def run(args: Any) -> dict[str, Any]:
    """The whole measurement, as it is written to --out."""
    model = Qwen2_5_VL(make_config(args), rngs=nnx.Rngs(0), dtype=jnp.dtype(args.dtype))
    batch = make_prompts(args)
    draws = {"ours": ours(model, batch)} | ({"hf": theirs(model, batch, args.dtype)} if args.hf else {})
    speed, source = bandwidth()
    device = jax.devices()[0]
    shape = ("width", "layers", "heads", "kv_heads", "mlp", "vocab", "dtype")
    shape += ("prompts", "prompt_tokens", "new_tokens", "repeats")
    libraries = [name for name in ("jax", "torch", "transformers") if name in sys.modules]
    report: dict[str, Any] = {
        "device": f"{device.platform}: {device.device_kind}; {os.cpu_count()} CPU cores",
        "load": os.getloadavg()[0],  # processes that wanted a core, on average of the last minute
        "versions": {name: sys.modules[name].__version__ for name in libraries},
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))),
        "settings": {name: getattr(args, name) for name in shape},
        "bandwidth": {"gb_per_second": speed, "source": source},
        "rows": [],
    }
    for group in map(int, args.groups):
        found: dict[str, Any] = {"group_size": group, **measure(draws, args, group)}
        needed = step_bytes(model, args, group)
        ideal = sum(needed.values()) / speed / 1e6
        found |= {"step_bytes": needed, "bound_ms": ideal, "share": ideal / found["ours"]["step_ms"]}
        if args.hf:
            found["ratio"] = found["ours"]["tokens_per_second"] / found["hf"]["tokens_per_second"]
        report["rows"].append(found)
        print(line(found), flush=True)
    return report


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    text = f"{row['group_size']:5d}"
    for name in ("ours", "hf"):
        one = row.get(name)
        text += f" {one['tokens_per_second']:10.1f} {one['step_ms']:9.2f}" if one else f" {'-':>10} {'-':>9}"
    return text + (f" {row['ratio']:7.2f}" if "ratio" in row else f" {'-':>7}") + f" {row['share']:7.1%}"


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_integer("width", 768, "Model width.", lower_bound=8)
    flags.DEFINE_integer("layers", 12, "Layers.", lower_bound=1)
    flags.DEFINE_integer("heads", 12, "Query heads.", lower_bound=1)
    flags.DEFINE_integer("kv_heads", 4, "Key/value heads.", lower_bound=1)
    flags.DEFINE_integer("mlp", 2048, "Width of the MLP.", lower_bound=1)
    flags.DEFINE_integer("vocab", 16384, "Vocabulary.", lower_bound=64)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the weights and caches.")
    flags.DEFINE_integer("prompts", 4, "Prompts of a batch.", lower_bound=1)
    flags.DEFINE_integer("prompt_tokens", 128, "Tokens of a prompt.", lower_bound=1)
    flags.DEFINE_integer("new_tokens", 32, "Tokens of a rollout.", lower_bound=2)
    flags.DEFINE_list("groups", ["1", "4", "16"], "Rollouts of each prompt.")
    flags.DEFINE_integer("repeats", 3, "Runs of each, after one that compiles.", lower_bound=3)
    flags.DEFINE_bool("hf", True, "Measure transformers too; needs torch.")
    flags.DEFINE_string("out", "", "JSON file to write.")


def main(argv: list[str]) -> None:
    """The command."""
    if len(argv) > 1:
        raise app.UsageError(f"arguments without a name: {' '.join(argv[1:])}")
    print(f"{'G':>5} {'tokens/s':>10} {'ms/step':>9} {'HF tok/s':>10} {'HF ms':>9} {'ratio':>7} {'bound':>7}")
    report = run(flags.FLAGS)
    print(f"{report['device']}; {report['parameters'] / 1e6:.1f} M parameters; {report['settings']}")
    print(f"bandwidth {report['bandwidth']['gb_per_second']:.1f} GB/s ({report['bandwidth']['source']})")
    if flags.FLAGS.out:
        write_atomic(Path(flags.FLAGS.out), json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    define_flags()
    app.run(main)
