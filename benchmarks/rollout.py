"""Tokens a second of `grpo.rollout.generate`, beside Hugging Face's `generate` with the same weights.

    python -m benchmarks.rollout --out=rollout.json
    python -m benchmarks.rollout --image_side=0 --text_tokens=128 --out=rollout_text.json     # text alone
    python -m benchmarks.rollout --dtype=bfloat16 --width=2048 --layers=36 --heads=16 --kv_heads=2 \
        --mlp=11008 --vocab=151936 --prompts=16 --text_tokens=256 --new_tokens=256

A prompt is an image of 32 x 32 patches (256 tokens) and a question, as in GRPO. Both sample as many tokens of
the same prompts, at temperature 1 and without an end token, in turns in one process; what counts is the
median. transformers' `num_return_sequences` encodes the image and reads the prompt once a rollout, ours once
a group. A decoding step is the time of all new tokens less that of one, divided. The bound is what memory
allows: a step must read every weight of the decoder and the head once, every prompt's keys and values once a
group, and every rollout's own (half of its tokens, on average). One device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from benchmarks import common
from fundus_jax.grpo.rollout import generate
from fundus_jax.models.batch import Batch
from fundus_jax.models.qwen2_5_vl.model import Qwen2_5_VL

SETTINGS = (*common.SIZES, "prompts", "text_tokens", "image_side", "new_tokens", "repeats")
BOUND = {"float32": 1e-4, "bfloat16": 5e-2}  # of the lowest log-probability
READS = 50  # of the memory, before and after everything else
Draw = Callable[[int, int], Any]  # (new tokens, rollouts of each prompt) -> tokens, when they are there


def ours(model: Qwen2_5_VL, batch: Batch) -> Draw:
    """This project's sampler."""
    batch = jax.device_put(batch)

    def draw(count: int, group: int) -> Any:
        return jax.block_until_ready(generate(model, batch, max_new_tokens=count, group_size=group))

    return draw


def theirs(reference: Any, inputs: common.Inputs) -> Draw:
    """transformers' `generate`."""
    import torch

    reference.generation_config.eos_token_id = None
    reference.generation_config.pad_token_id = common.PAD
    named = inputs.torch(reference.device)
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "use_cache": True}
    settings["suppress_tokens"] = list(range(common.PAD))  # as here: vision ids can not be sampled

    def draw(count: int, group: int) -> Any:
        length = {"max_new_tokens": count, "min_new_tokens": count, "num_return_sequences": group}
        with torch.inference_mode():
            out = reference.generate(**named, **length, **settings)
        rows, tokens = named["input_ids"].shape
        if out.cpu().shape != (rows * group, tokens + count):
            raise RuntimeError(f"transformers returned {tuple(out.shape)}: it stopped early")
        return out

    return draw


def check(draw: Draw, reference: Any, inputs: common.Inputs, group: int, args: Any) -> float:
    """That the log-probabilities of our sampler are those of transformers for the same tokens: the largest
    difference, relative."""
    import torch

    tokens, logprobs = (np.asarray(x[:, 0]) for x in draw(args.new_tokens, group)[:2])  # the first of a group
    with torch.inference_mode():
        found = response_logprobs(reference, inputs.torch(reference.device), tokens).cpu()
    return common.agree("log-probabilities of rollouts", logprobs, found, BOUND[args.dtype])


def response_logprobs(reference: Any, named: dict[str, Any], tokens: np.ndarray) -> Any:
    """transformers' log-probabilities [B,N] of responses tokens [B,N], with the ids banned that we ban."""
    import torch

    more = torch.from_numpy(tokens.astype(np.int64)).to(reference.device)
    named = extended(named, more)
    kept = tokens.shape[1] + 1
    logits = reference(**named, use_cache=False, logits_to_keep=kept).logits[:, :-1].float()
    banned = torch.arange(logits.shape[-1], device=logits.device) < common.PAD
    logits = logits.masked_fill(banned, torch.finfo(torch.float32).min)
    return logits.log_softmax(-1).gather(-1, more[..., None])[..., 0]


def extended(named: dict[str, Any], more: Any) -> dict[str, Any]:
    """transformers' inputs of prompts followed by responses, tokens [B,N]."""
    import torch

    said = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    said["mm_token_type_ids"] = torch.zeros_like(more)
    return named | {name: torch.cat([named[name], value], dim=1) for name, value in said.items()}


def bandwidth() -> tuple[float, str]:
    """(GB/s of memory, where the number is from): the maker's for a known accelerator, else measured here by
    reading and writing 256 MB in place, the best of READS."""
    if chip := common.chip():
        return chip.bandwidth / chip.devices / 1e9, f"published for {jax.devices()[0].device_kind}"
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(step(jnp.zeros(2**26, jnp.float32)))
    best = float("inf")
    for _ in range(READS):
        begun = common.now()
        x = jax.block_until_ready(step(x))
        best = min(best, common.since(begun).clock)
    return 2 * x.nbytes / best / 1e9, f"measured: x + 1 in place, 256 MB, the best of {2 * READS}"


def step_bytes(model: Qwen2_5_VL, args: Any, prompt: int, group: int) -> dict[str, int]:
    """What one decoding step must read, by kind; a prompt has `prompt` tokens."""
    config, text = model.config, nnx.state(model.text)
    item = jnp.dtype(args.dtype).itemsize
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * item
    return {
        "weights": item * sum(leaf.size for leaf in jax.tree.leaves(text)),  # the tied head is in it
        "prompts": args.prompts * prompt * token,
        "rollouts": args.prompts * group * args.new_tokens // 2 * token,
    }


def measure(draws: dict[str, Draw], args: Any, group: int) -> dict[str, dict[str, float]]:
    """Seconds, tokens a second and the time of a step of both sides."""

    def call(draw: Draw) -> Callable[[], dict[str, common.Spent]]:
        def both() -> dict[str, common.Spent]:
            spent = {}
            for name, count in (("all", args.new_tokens), ("first", 1)):
                begun = common.now()
                draw(count, group)
                spent[name] = common.since(begun)
            return spent

        return both

    times = common.in_turns({name: call(draw) for name, draw in draws.items()}, args.repeats)
    found = {}
    for name in draws:
        whole, first = (times[f"{name}/{part}"] for part in ("all", "first"))
        found[name] = {
            "seconds": whole,
            "first_seconds": first,
            "tokens_per_second": args.prompts * group * args.new_tokens / whole["median"],
            "step_ms": 1e3 * (whole["median"] - first["median"]) / (args.new_tokens - 1),
        }
    return found


def run(args: Any) -> dict[str, Any]:
    """The whole measurement, as it is written to --out."""
    groups = common.numbers("groups", args.groups)
    model = common.make_model(args)
    report = common.new_report(args, model, SETTINGS)
    inputs = common.make_inputs(args, args.prompts, args.text_tokens, args.image_side)
    draws = {"ours": ours(model, inputs.batch)}
    if args.hf:
        reference = common.in_torch(model)
        draws["hf"] = theirs(reference, inputs)
        report["difference"] = check(draws["ours"], reference, inputs, groups[0], args)
    before, source = bandwidth()
    report["rows"] = [{"group_size": group, **measure(draws, args, group)} for group in groups]
    speed = max(before, bandwidth()[0])  # too low a speed would flatter
    report["bandwidth"] = {"gb_per_second": speed, "source": source}
    print(f"{'G':>5} {'tokens/s':>10} {'ms/step':>9} {'HF tok/s':>10} {'HF ms':>9} {'ratio':>7} {'bound':>7}")
    for row in report["rows"]:
        needed = step_bytes(model, args, inputs.batch.tokens.shape[1], row["group_size"])
        ideal = sum(needed.values()) / speed / 1e6
        row |= {"step_bytes": needed, "bound_ms": ideal, "share": ideal / row["ours"]["step_ms"]}
        if args.hf:
            row["ratio"] = row["ours"]["tokens_per_second"] / row["hf"]["tokens_per_second"]
        print(line(row))
    print(f"bandwidth {speed:.1f} GB/s ({source})")
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
    common.define_model_flags()
    flags.DEFINE_integer("prompts", 2, "Prompts of a batch.", lower_bound=1)
    flags.DEFINE_integer(
        "image_side", 32, "Patches along a side of the image; even, 0: no image.", lower_bound=0
    )
    flags.DEFINE_integer("text_tokens", 64, "Tokens after the image.", lower_bound=1)
    flags.DEFINE_integer("new_tokens", 48, "Tokens of a rollout.", lower_bound=2)
    flags.DEFINE_list("groups", ["1", "4", "16"], "Rollouts of each prompt.")
    common.define_report_flags(repeats=3)


if __name__ == "__main__":
    common.command(define_flags, run)
