"""A whole optimizer step of SFT beside torch's: forward, backward, clipping, AdamW.

    python -m benchmarks.sft_step --out=sft_step.json

The rows, the tokens that are learned, the loss and the optimizer's numbers are the same; torch has the fused
AdamW that transformers' Trainer takes. Before anything is timed the losses of three steps must agree. FLOPs
are those that the model asks for (`benchmarks.flops`); MFU is their share of the chip's published peak in
bfloat16, where `launch.chips` knows it. At real size nothing is recomputed but what `--remat` names:

    python -m benchmarks.sft_step --dtype=bfloat16 --width=2048 --layers=36 --heads=16 --kv_heads=2 \
        --mlp=11008 --vocab=151936 --vision_width=1280 --vision_layers=32 --vision_heads=16 \
        --vision_mlp=3420 --text_tokens=1790 --text_length=2048 --remat=block --nohf
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks import common, flops
from fundus_jax import sft, sharding, training
from fundus_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from fundus_jax.optim import OptimConfig

ROWS = ("prompts", "text_tokens", "answer_tokens", "image_side", "text_length")
SETTINGS = (*common.SIZES, *ROWS, "remat", "repeats")
OPTIM = OptimConfig(lr=1e-5, decay="constant", weight_decay=0.01)
BOUND = {"float32": 1e-5, "bfloat16": 2e-2}  # of the loss
Step = Callable[[], float]  # takes one step and returns its loss


def ours(model: Qwen2_5_VL, inputs: common.Inputs, remat: str) -> Step:
    """The step of `sft.make_update`, with `remat` of models.layers.REMAT."""
    mesh = sharding.parse_mesh("data:1", jax.devices()[:1])
    skeleton, params = training.split(model)
    params, frozen = skeleton.divide(params)
    optimizer = training.make_optimizer(OPTIM, 100)
    config, options = sft.SftConfig(batch=inputs.batch.rows), dataclasses.replace(model.options, remat=remat)

    def merge(params: Any) -> Any:
        return skeleton.merge(params, options)

    update = sft.make_update(merge, optimizer, config, model.config.dtype)
    with jax.set_mesh(mesh):
        # the step donates its state, and the other side and the next rows start from the same weights
        copies = jax.tree.map(np.array, training.cast(params, "float32"))
        state = training.start(skeleton, copies, optimizer, mesh)
        batch = training.place((inputs.batch, inputs.learned), mesh)
    held = [state]

    def step() -> float:
        with jax.set_mesh(mesh):
            held[0], metrics = update(held[0], batch, frozen)
            jax.block_until_ready(held[0])
        return float(metrics["loss"])

    return step


def theirs(model: Any, inputs: common.Inputs) -> Step:
    """The step of a plain loop in torch."""
    import torch

    model.train()
    optimizer = torch_optimizer(model)
    named = inputs.torch(model.device)
    labels = np.where(inputs.learned, inputs.batch.tokens, -100).astype(np.int64)
    labels = torch.from_numpy(labels).to(model.device)

    def step() -> float:
        loss = model(**named, labels=labels, use_cache=False).loss
        loss.backward()
        apply(model, optimizer)
        return loss.item()

    return step


def torch_optimizer(model: Any) -> Any:
    """AdamW with the numbers of OPTIM; decay on matrices alone, as `optim.decay_mask` has it."""
    import torch

    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": OPTIM.weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (OPTIM.b1, OPTIM.b2)
    return torch.optim.AdamW(groups, lr=OPTIM.lr, betas=betas, eps=OPTIM.eps, fused=True)


def apply(model: Any, optimizer: Any) -> float:
    """Clip the gradients of `model`, update its parameters and forget the gradients; returns their norm."""
    import torch

    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return float(norm)


def run(args: Any) -> dict[str, Any]:
    """The whole measurement, as it is written to --out."""
    model = common.make_model(args)
    report = common.new_report(args, model, SETTINGS)
    heads = (f"{name:>8}" for name in ("ViT TF", "LM TF", "TFLOP/s", "MFU"))
    print(f"{'rows':>10} {'tokens':>7} {'seconds':>8} {'HF':>8} {'ratio':>6} {' '.join(heads)}")
    for kind, image, text in (("image", args.image_side, args.text_tokens), ("text", 0, args.text_length)):
        inputs = common.make_inputs(args, args.prompts, text, image, args.answer_tokens)
        sides = {"ours": ours(model, inputs, args.remat)}
        if args.hf:
            sides["hf"] = theirs(common.in_torch(model), inputs)
        row: dict[str, Any] = {"rows": kind, "shape": list(inputs.batch.tokens.shape)}
        if args.hf:
            found, expected = ([sides[side]() for _ in range(3)] for side in ("ours", "hf"))
            row["difference"] = common.agree(f"{kind}: losses of 3 steps", found, expected, BOUND[args.dtype])
            if not found[2] < found[0]:
                raise RuntimeError(f"the loss does not fall: {found}; nothing is learned")
        row |= common.in_turns({name: common.silent(step) for name, step in sides.items()}, args.repeats)
        if args.hf:
            row["ratio"] = row["hf"]["median"] / row["ours"]["median"]
        row |= rates(flops.step(model.config, inputs.batch), {side: row[side]["median"] for side in sides})
        report["rows"].append(row)
        print(f"{kind:>10} {inputs.batch.tokens.size:7d} {common.cells(row)} {work(row)}", flush=True)
    return report


def rates(needed: flops.Flops, seconds: dict[str, float]) -> dict[str, Any]:
    """FLOPs of a step by tower, and of each side how many a second and which share of the chip's peak."""
    per_second = {side: needed.total / spent for side, spent in seconds.items()}
    found: dict[str, Any] = {"flops": needed._asdict(), "flops_per_second": per_second}
    if chip := common.chip():
        found["mfu"] = {side: rate * chip.devices / chip.flops for side, rate in per_second.items()}
    return found


def work(row: dict[str, Any]) -> str:
    """TFLOP of both towers, ours a second and their share of the peak, for a printed table."""
    values = (row["flops"]["vision"], row["flops"]["text"], row["flops_per_second"]["ours"])
    share = f"{row['mfu']['ours']:8.1%}" if "mfu" in row else f"{'-':>8}"
    return " ".join([*(f"{value / 1e12:8.3f}" for value in values), share])


def define_flags() -> None:
    """Declares the command's flags."""
    common.define_model_flags()
    common.define_row_flags(prompts=2)
    flags.DEFINE_integer("answer_tokens", 96, "Tokens of a row that are learned.", lower_bound=1)
    common.define_remat_flag()
    common.define_report_flags()


if __name__ == "__main__":
    common.command(define_flags, run)
