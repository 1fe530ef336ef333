"""The forward pass beside transformers': all logits, and the log-probabilities of the row's own next tokens.

    python -m benchmarks.forward --out=forward.json

Rows with an image of 32 x 32 patches (256 tokens) and text, and rows of text alone. Log-probabilities are
what the losses are made of: here they come without [B,T,V], in torch by `log_softmax` of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from benchmarks import common
from fundus_jax import training
from fundus_jax.models.logprobs import token_logprobs
from fundus_jax.models.qwen2_5_vl.model import Qwen2_5_VL

SETTINGS = (*common.SIZES, "prompts", "text_tokens", "image_side", "text_length", "repeats")
BOUND = {"float32": 1e-4, "bfloat16": 5e-2}  # of the largest logit
Passes = dict[str, Callable[[], Any]]


def ours(model: Qwen2_5_VL, inputs: common.Inputs) -> Passes:
    """This project's passes."""
    skeleton, params = training.split(model)
    batch = jax.device_put(inputs.batch)

    @jax.jit
    def logits(params: Any, batch: Any) -> Any:
        return skeleton.merge(params)(batch)

    @jax.jit
    def logprobs(params: Any, batch: Any) -> Any:
        model = skeleton.merge(params)
        return token_logprobs(model.hidden(batch)[:, :-1], model.head, batch.tokens[:, 1:])[0]

    return {
        "logits": lambda: jax.block_until_ready(logits(params, batch)),
        "logprobs": lambda: jax.block_until_ready(logprobs(params, batch)),
    }


def theirs(model: Any, inputs: common.Inputs) -> Passes:
    """Those of transformers."""
    import torch

    named = inputs.torch(model.device)

    def logits() -> Any:
        with torch.inference_mode():
            return waited(model(**named, use_cache=False).logits.float())

    def logprobs() -> Any:
        with torch.inference_mode():
            logits = model(**named, use_cache=False).logits.float()
            return waited(next_logprobs(logits, named["input_ids"]))

    return {"logits": logits, "logprobs": logprobs}


def waited(x: Any) -> Any:
    """A tensor, when it is there."""
    import torch

    if x.is_cuda:
        torch.cuda.synchronize()
    return x


def next_logprobs(logits: Any, tokens: Any) -> Any:
    """Log-probabilities [B,T-1] of the tokens [B,T] that follow, from torch's logits [B,T,V]."""
    return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]


def run(args: Any) -> dict[str, Any]:
    """The whole measurement, as it is written to --out."""
    model = common.make_model(args)
    report = common.new_report(args, model, SETTINGS)
    reference = common.in_torch(model) if args.hf else None
    print(f"{'rows':>10} {'result':>9} {'seconds':>8} {'HF':>8} {'ratio':>6}")
    for kind, image, text in (("image", args.image_side, args.text_tokens), ("text", 0, args.text_length)):
        inputs = common.make_inputs(args, args.prompts, text, image)
        sides = {"ours": ours(model, inputs)}
        if reference is not None:
            sides["hf"] = theirs(reference, inputs)
        for name in ("logits", "logprobs"):
            row: dict[str, Any] = {"rows": kind, "result": name, "shape": list(inputs.batch.tokens.shape)}
            if reference is not None:
                found, expected = sides["ours"][name](), sides["hf"][name]().cpu()
                row["difference"] = common.agree(f"{kind}: {name}", found, expected, BOUND[args.dtype])
            row |= common.in_turns(
                {key: common.silent(side[name]) for key, side in sides.items()}, args.repeats
            )
            if reference is not None:
                row["ratio"] = row["hf"]["median"] / row["ours"]["median"]
            report["rows"].append(row)
            print(f"{kind:>10} {name:>9} {common.cells(row)}", flush=True)
    return report


def define_flags() -> None:
    """Declares the command's flags."""
    common.define_model_flags()
    common.define_row_flags(prompts=2)
    common.define_report_flags()


if __name__ == "__main__":
    common.command(define_flags, run)
