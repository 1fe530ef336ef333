"""A step of GRPO beside a plain one in torch, phase by phase: rollout, score, judge, update.

    python -m benchmarks.grpo_step --out=grpo_step.json

Theirs is what one would write with transformers: `generate` with `num_return_sequences`, a pass of the
reference over all sequences that keeps the logits of the responses alone, the same loss written in torch,
fused AdamW; a reference of its own weights. Both decode and judge (by rules) with the same code. Before
anything is timed, the reference's log-probabilities, the loss and the norm of the gradient of the same
rollouts must agree. TRL's trainer is this step with a data loader and logging around it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel

from benchmarks import common, rollout, sft_step
from fundus_jax import sharding, training
from fundus_jax.findings import FINDINGS
from fundus_jax.grpo.advantages import group_advantages
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.judge import RulesJudge
from fundus_jax.grpo.rewards import assess, score_rollouts
from fundus_jax.grpo.rollout import Rollout
from fundus_jax.grpo.train import draw, snapshot
from fundus_jax.grpo.update import Samples, make_score, make_update
from fundus_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from fundus_jax.records import Example, Findings
from fundus_jax.stopwatch import Stopwatch

SETTINGS = (*common.SIZES, "prompts", "group", "text_tokens", "image_side", "new_tokens", "remat", "repeats")
PHASES = ("rollout", "score", "judge", "update")
BOUND = {"float32": 1e-4, "bfloat16": 5e-2}
Judged = Callable[[np.ndarray], np.ndarray]  # tokens [B,G,N] -> advantages [B,G]


def make_judge(vocab: int, config: GrpoConfig) -> Judged:
    """What both sides do on the host with a step's rollouts: text of the tokens, the rule judge, advantages.

    Random weights say random words; there is an answer at the end of each, or there were nothing to judge.
    """
    known = sorted(word for finding in FINDINGS for word in finding.split())
    words = [*known, *(f"w{number}" for number in range(vocab))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(dict.fromkeys(words[:vocab]))}, "w0"))
    tokenizer.decoder = decoders.WordPiece(prefix="", cleanup=False)
    example = Example(
        **{"id": "1", "dataset": "d", "split": "train", "patient": "1", "eye": "OD", "modality": "CFP"},
        **{"image": "images#0", "labels": ("Drusen",), "task": "disease", "question": "Which?"},
        **{"options": ("Drusen", "Normal"), "answer": "Drusen", "findings": ("drusen",), "boxes": ()},
    )
    findings = Findings(example="1", present=("drusen",), votes={}, n=0, origin="pixels")

    def judge(tokens: np.ndarray) -> np.ndarray:
        found = []
        for place in np.ndindex(*tokens.shape[:2]):
            said = tokenizer.decode(tokens[place].tolist())
            answer = "Drusen" if tokens[place][-1] % 2 else "Normal"
            text = f"<think>{said}</think><answer>{answer}</answer>"
            found.append(assess(text, example, findings, {}, config, finished=True))
        scores = score_rollouts(found, RulesJudge(), config)
        rewards = np.reshape([score.total or 0.0 for score in scores], tokens.shape[:2]).astype(np.float32)
        return np.asarray(group_advantages(rewards, np.ones(rewards.shape, bool), scale=config.scale))

    return judge


class Ours:
    """The programs of `grpo.train`, one process, one device; `remat` is of the update."""

    def __init__(
        self, model: Qwen2_5_VL, inputs: common.Inputs, config: GrpoConfig, judge: Judged, remat: str
    ) -> None:
        self.config, self.judge, self.options = config, judge, model.options
        self.mesh = sharding.parse_mesh("data:1", jax.devices()[:1])
        self.skeleton, params = training.split(model)
        self.compute = model.config.dtype
        optimizer = training.make_optimizer(config.optim, 100)
        learning = dataclasses.replace(self.options, remat=remat)

        def merge(params: Any) -> Any:
            return self.skeleton.merge(params, learning)

        self.update = make_update(merge, optimizer, config, self.compute)
        self.score = make_score(merge, config, self.compute)
        with jax.set_mesh(self.mesh):
            copies = jax.tree.map(np.array, training.cast(params, "float32"))
            self.state = training.start(self.skeleton, copies, optimizer, self.mesh)
            self.reference = snapshot(self.state.params, self.compute)
            self.batch = training.place(inputs.batch, self.mesh)
        self.steps = 0

    def sampled(self) -> Rollout:
        """A step's rollouts."""
        policy = self.skeleton.merge(training.cast(self.state.params, self.compute), self.options)
        self.steps += 1
        return draw(policy, self.batch, self.config, jax.random.fold_in(jax.random.key(0), self.steps))[0]

    def scored(self, tokens: Any) -> jax.Array:
        """The reference's log-probabilities [B,G,N]."""
        return jax.block_until_ready(self.score(self.reference, self.batch, tokens))

    def updated(self, rollout: Rollout, advantages: np.ndarray, ref: jax.Array) -> Mapping[str, float]:
        """Loss and norm of the gradient of one update."""
        placed = training.place(advantages, self.mesh)
        samples = Samples.of(self.batch, rollout, placed, None, ref)
        self.state, metrics = self.update(self.state, samples)
        return {name: float(metrics[name]) for name in ("loss", "grad_norm")}

    def step(self) -> dict[str, float]:
        """One step; seconds by phase."""
        watch = Stopwatch("grpo")
        with jax.set_mesh(self.mesh):
            with watch("rollout"):
                rollout = self.sampled()
            with watch("score"):
                ref = self.scored(rollout.tokens)
            with watch("judge"):
                advantages = self.judge(np.asarray(rollout.tokens))
            with watch("update"):
                self.updated(rollout, advantages, ref)
        return phases(watch)


class Theirs:
    """The same in torch."""

    def __init__(self, model: Any, inputs: common.Inputs, config: GrpoConfig, judge: Judged) -> None:
        self.model, self.config, self.judge = model, config, judge
        self.reference = copy.deepcopy(model)
        self.optimizer = sft_step.torch_optimizer(model)
        self.named = inputs.torch(model.device)
        self.prompt = inputs.batch.tokens.shape[1]
        self.draw = rollout.theirs(model, inputs)
        self.shape = (len(inputs.batch.tokens), config.group_size, config.max_new_tokens)
        repeats = {}
        for name, value in self.named.items():  # pixels lie image by image, one image a prompt
            parts = value.reshape(self.shape[0], -1, *value.shape[1:])
            repeats[name] = parts.repeat_interleave(config.group_size, 0).reshape(-1, *value.shape[1:])
        self.repeated = repeats

    def sampled(self) -> np.ndarray:
        """A step's rollouts, tokens [B,G,N]."""
        out = self.draw(self.config.max_new_tokens, self.config.group_size)
        return out[:, self.prompt :].cpu().numpy().reshape(self.shape)

    def scored(self, tokens: np.ndarray) -> Any:
        """The reference's log-probabilities [B*G,N]."""
        import torch

        with torch.inference_mode():
            rows = tokens.reshape(-1, self.shape[2])
            return rollout.response_logprobs(self.reference, self.repeated, rows)

    def updated(self, tokens: np.ndarray, advantages: np.ndarray, ref: Any) -> Mapping[str, float]:
        """Loss and norm of the gradient of one update: the clipped surrogate, on-policy, and k3."""
        import torch

        config, rows = self.config, tokens.reshape(-1, self.shape[2])
        new = rollout.response_logprobs(self.model, self.repeated, rows)
        ratio = (new - new.detach()).exp()
        weight = torch.from_numpy(np.array(advantages, np.float32)).to(new.device).reshape(-1, 1)
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        away = ref.clone() - new  # the reference's numbers were made in inference mode
        kl = away.exp() - 1 - away
        loss = (-torch.minimum(ratio * weight, clipped * weight) + config.kl_coef * kl).mean()
        loss.backward()
        norm = sft_step.apply(self.model, self.optimizer)
        return {"loss": loss.item(), "grad_norm": norm}

    def step(self) -> dict[str, float]:
        """One step; seconds by phase."""
        watch = Stopwatch("grpo")
        with watch("rollout"):
            tokens = self.sampled()
        with watch("score"):
            ref = self.scored(tokens)
        with watch("judge"):
            advantages = self.judge(tokens)
        with watch("update"):
            self.updated(tokens, advantages, ref)
        return phases(watch)


def phases(watch: Stopwatch) -> dict[str, float]:
    """Seconds by phase."""
    laps = watch.lap(0).items()
    return {name.removeprefix("time/"): value for name, value in laps if name.startswith("time/")}


def check(ours: Ours, theirs: Theirs, bound: float) -> dict[str, float]:
    """How far the two are apart, relative, on the rollouts that ours samples first."""
    with jax.set_mesh(ours.mesh):
        drawn = ours.sampled()
        tokens = np.asarray(drawn.tokens)
        advantages = ours.judge(tokens)
        ref = ours.scored(drawn.tokens)
        found = ours.updated(drawn, advantages, ref)
    other = theirs.scored(tokens)
    there = theirs.updated(tokens, advantages, other)
    # the loss itself is near 0 in an on-policy step: it is measured against the largest advantage
    largest = float(np.abs(advantages).max())
    if largest == 0:
        raise RuntimeError("all rewards are equal: there is nothing to learn from")
    gaps = [found["loss"] + largest, there["loss"] + largest]
    return {
        "reference": common.agree("reference", np.asarray(ref).reshape(other.shape), other.cpu(), bound),
        "loss": common.agree("losses", [gaps[0]], [gaps[1]], bound),
        "grad_norm": common.agree("gradients", [found["grad_norm"]], [there["grad_norm"]], 100 * bound),
    }


def run(args: Any) -> dict[str, Any]:
    """The whole measurement, as it is written to --out."""
    model = common.make_model(args)
    report = common.new_report(args, model, SETTINGS)
    inputs = common.make_inputs(args, args.prompts, args.text_tokens, args.image_side)
    config = GrpoConfig(
        **{"group_size": args.group, "prompts_per_step": args.prompts, "max_new_tokens": args.new_tokens},
        **{"micro_batch": args.prompts * args.group, "steps": 100, "optim": sft_step.OPTIM},
    )
    config.validate()
    judge = make_judge(args.vocab, config)
    sides: dict[str, Any] = {"ours": Ours(model, inputs, config, judge, args.remat)}
    if args.hf:
        sides["hf"] = Theirs(common.in_torch(model), inputs, config, judge)
        report["difference"] = check(sides["ours"], sides["hf"], BOUND[args.dtype])
    times = common.in_turns({name: side.step for name, side in sides.items()}, args.repeats)
    print(f"{'phase':>10} {'seconds':>8} {'HF':>8} {'ratio':>6}")
    for phase in (*PHASES, "step"):
        keys = {side: side if phase == "step" else f"{side}/{phase}" for side in sides}
        row: dict[str, Any] = {"phase": phase} | {side: times[key] for side, key in keys.items()}
        if args.hf:
            row["ratio"] = row["hf"]["median"] / row["ours"]["median"]
        report["rows"].append(row)
        print(f"{phase:>10} {common.cells(row)}", flush=True)
    return report


def define_flags() -> None:
    """Declares the command's flags."""
    common.define_model_flags()
    flags.DEFINE_integer("prompts", 2, "Prompts of a step.", lower_bound=1)
    flags.DEFINE_integer("group", 4, "Rollouts of each prompt.", lower_bound=2)
    flags.DEFINE_integer("image_side", 32, "Patches along a side of the image; even.", lower_bound=4)
    flags.DEFINE_integer("text_tokens", 64, "Tokens after the image.", lower_bound=1)
    flags.DEFINE_integer("new_tokens", 48, "Tokens of a rollout.", lower_bound=2)
    common.define_remat_flag()
    common.define_report_flags(repeats=3)


if __name__ == "__main__":
    common.command(define_flags, run)
