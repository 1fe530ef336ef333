"""GRPO, as a story: rollouts -> rewards -> advantages -> update -> log -> save (paper, section 3.3; DESIGN,
section 6).

Prompts are drawn in an order that the seed fixes; sampling keys are folded from the step, so a resumed run
draws what an uninterrupted one would have drawn. The reference is the policy the stage started from.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from fundus_jax import dialog, training
from fundus_jax.data import Pool, batches, round_up
from fundus_jax.files import write_atomic
from fundus_jax.grpo.advantages import group_advantages, group_stats
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.judge import Judge
from fundus_jax.grpo.rewards import Score, check_abstentions, reward_arrays, reward_metrics, score_rollout
from fundus_jax.grpo.rollout import Rollout
from fundus_jax.grpo.sampler import sample
from fundus_jax.grpo.update import Samples, make_score, make_update
from fundus_jax.models.layers import Options
from fundus_jax.models.qwen2_5_vl.processor import Processor
from fundus_jax.records import ConfigError, Example
from fundus_jax.sft import LENGTH_STEP, PromptConfig
from fundus_jax.workdir import Stopwatch, Workdir

SHOWN = 4  # groups of a step that are written to rollouts/ for people to read


class Prompts:
    """The prompts of a pool that fit `max_length` tokens, and the padded sizes that hold every one of
    them."""

    def __init__(self, pool: Pool, processor: Processor, prompt: PromptConfig, max_length: int) -> None:
        self.pool, self.processor = pool, processor
        kept, self.patches, longest, dropped = [], 0, 0, 0
        for example in pool.examples:
            messages = dialog.messages(example, prompt.style, prompt.think, instruct=prompt.instruct)
            text = processor.chat(messages, add_generation_prompt=True)
            tokens, slots = processor.row_size(text, [pool.image(example)])
            if tokens > max_length:
                dropped += 1
                continue
            kept.append((example, text))
            longest, self.patches = max(longest, tokens), max(self.patches, slots)
        if not kept:
            raise ConfigError(
                f"all {dropped} prompts are longer than {max_length} tokens; "
                "raise the bound or lower max_pixels"
            )
        self.rows: Sequence[tuple[Example, str]] = kept
        self.length = round_up(longest, LENGTH_STEP)
        logging.info("grpo prompts: %d kept, %d too long; longest %d tokens", len(kept), dropped, longest)

    def build(self, index: np.ndarray) -> tuple[np.ndarray, Any]:
        """(rows chosen, their Batch)."""
        images = [[self.pool.image(self.rows[i][0])] for i in index]
        return index, self.processor(
            [self.rows[i][1] for i in index], images, length=self.length, patches=self.patches
        )


def score_all(
    prompts: Prompts, index: np.ndarray, rollout: Rollout, judge: Judge, config: GrpoConfig
) -> tuple[list[list[str]], list[list[Score]]]:
    """Texts and scores of every rollout, B groups of G."""
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    texts, scores = [], []
    for row, i in enumerate(index):
        example = prompts.rows[i][0]
        findings = prompts.pool.findings.get(example.id)
        group = [tokens[row, g][mask[row, g]] for g in range(tokens.shape[1])]
        ended = [len(one) > 0 and int(one[-1]) in prompts.processor.eos_ids for one in group]
        texts.append([prompts.processor.decode(one) for one in group])
        scores.append(
            [
                score_rollout(text, example, findings, prompts.pool.knowledge, judge, config, finished=end)
                for text, end in zip(texts[-1], ended, strict=True)
            ]
        )
    return texts, scores


def train(
    work: Workdir,
    model: Any,
    prompts: Prompts,
    judge: Judge,
    config: GrpoConfig,
    mesh: Mesh,
    *,
    compute: str = "float32",
    remat: bool = False,
) -> training.Params:
    """Improve the policy and return its parameters. Resumes from, and ends with, a bundle of stage `grpo`.

    `model` is the policy to start from, and the reference. Raises ConfigError when the judge abstains too
    often, DataError when gradients stay non-finite.
    """
    skeleton, params = training.split(model)
    options = Options(remat=remat, unroll=model.options.unroll)

    def merge(params: Any) -> Any:
        return skeleton.merge(params, options)

    optimizer = training.make_optimizer(config.optim, config.steps * config.mu)
    update, score = make_update(merge, optimizer, config, compute), make_score(merge, config, compute)
    key = jax.random.key(config.seed)
    settings = ("max_new_tokens", "temperature", "group_size", "slots")
    draw = functools.partial(sample, **{name: getattr(config, name) for name in settings})
    with jax.set_mesh(mesh):
        state = training.start(skeleton, params, optimizer, mesh)
        reference = frozen(state.params, compute) if config.kl_coef else None
        iterator = batches(len(prompts.rows), config.prompts_per_step, prompts.build, seed=config.seed)
        state, done = work.resume("grpo", state, iterator)
        progress, watch = work.progress("grpo", done), Stopwatch()
        for step in range(done + 1, config.steps + 1):
            with watch("data"):
                index, batch = next(iterator)
                batch = training.place(batch, mesh)
            with watch("rollout"):
                policy = skeleton.merge(training.cast(state.params, compute), model.options)
                rollout, counts = draw(policy, batch, seed=jax.random.fold_in(key, step))
                jax.block_until_ready(rollout)
            with watch("score"):  # dispatched before the host judges, so that accelerators compute meanwhile
                ref = None if reference is None else score(reference, batch, rollout.tokens)
                old = score(state.params, batch, rollout.tokens) if config.mu > 1 else None
            with watch("judge"):
                texts, scores = score_all(prompts, index, rollout, judge, config)
                check_abstentions(scores, config)
                advantages = np.asarray(group_advantages(*totals(scores), scale=config.scale), np.float32)
            with watch("update"):
                samples = Samples.of(batch, rollout, training.place(advantages, mesh), old, ref)
                for _ in range(config.mu):
                    state, metrics = update(state, samples)
                values = {name: float(value) for name, value in metrics.items()}
            training.check_finite(values, config.optim, "grpo", step)
            values |= describe(scores, rollout) | counts.metrics()
            work.metrics.log("grpo", step, values | watch.lap())
            progress.update(note=f"reward {values['reward/total']:.3f}")
            if step == config.steps or (config.save_every and step % config.save_every == 0):
                show(work, step, prompts, index, texts, scores, advantages)
                work.save("grpo", step, state, iterator)
    progress.close()
    return state.params


def frozen(params: training.Params, dtype: str) -> training.Params:
    """A copy that stays when the original is donated to the first update."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype).copy(), params)


def totals(scores: Sequence[Sequence[Score]]) -> tuple[np.ndarray, np.ndarray]:
    """Rewards [B,G], 0 where the judge abstained, and which of them are valid [B,G]."""
    rewards, valid = reward_arrays(scores)
    return np.where(valid, rewards, 0), valid


def describe(scores: Sequence[Sequence[Score]], rollout: Rollout) -> dict[str, float]:
    """What metrics.jsonl records of a step: reward parts and ratings, group statistics, response lengths."""
    lengths = np.asarray(rollout.mask).sum(axis=-1)
    return {
        **{f"reward/{name}": value for name, value in reward_metrics(scores).items()},
        **{name: float(value) for name, value in group_stats(*totals(scores)).items()},
        "length": float(lengths.mean()),
        "length_max": float(lengths.max()),
    }


def show(
    work: Workdir,
    step: int,
    prompts: Prompts,
    index: np.ndarray,
    texts: Any,
    scores: Any,
    advantages: np.ndarray,
) -> None:
    """Write a few groups of a step to rollouts/<step>.jsonl: example, texts, reward parts, verdicts,
    advantages."""
    lines = []
    for row, i in list(enumerate(index))[:SHOWN]:
        example = prompts.rows[i][0]
        rollouts = [
            {
                "text": text,
                "answer": score.answer,
                "format": score.format,
                "process": score.process,
                "total": score.total,
                "rating": score.verdict.rating if score.verdict else None,
                "reasons": list(score.verdict.reasons) if score.verdict else [],
                "advantage": float(advantage),
            }
            for text, score, advantage in zip(texts[row], scores[row], advantages[row], strict=True)
        ]
        lines.append(
            json.dumps({"step": step, "example": example.id, "rollouts": rollouts}, ensure_ascii=False)
        )
    folder = work.path / "rollouts"
    folder.mkdir(exist_ok=True)
    write_atomic(folder / f"{step:06d}.jsonl", "\n".join(lines) + "\n")
