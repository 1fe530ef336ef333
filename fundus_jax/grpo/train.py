"""GRPO, as a story: rollouts -> rewards -> advantages -> update -> log -> save (paper, section 3.3; DESIGN,
section 6).

Prompts are drawn in an order that the seed fixes; sampling keys are folded from the step, so a resumed run
draws what an uninterrupted one would have drawn. The reference is the policy the stage started from, and only
what is trained is kept twice for it: with adapters (`models.lora`) the weights are there once, and where the
stage's adapters are fresh, that is zero, the reference is the weights with the adapters off.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from fundus_jax import dialog, hosts, stop, training
from fundus_jax.data import Pool, batches, ladder, round_up
from fundus_jax.grpo import own_rewards, signs
from fundus_jax.grpo.advantages import group_advantages, group_stats
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.judge import Judge
from fundus_jax.grpo.rewards import (
    Score,
    check_abstentions,
    from_dict,
    reward_arrays,
    reward_metrics,
    score_rollout,
)
from fundus_jax.grpo.rollout import Rollout
from fundus_jax.grpo.sampler import Counts, sample
from fundus_jax.grpo.show import Diary
from fundus_jax.grpo.update import Samples, make_score, make_update
from fundus_jax.models.qwen2_5_vl.processor import Processor
from fundus_jax.records import ConfigError, Example
from fundus_jax.sft import LENGTH_STEP, PromptConfig
from fundus_jax.workdir import Stopwatch, Workdir


class Prompts:
    """The prompts of a pool that fit `max_length` tokens, in groups of like length (at most `buckets`, none
    smaller than a step's `batch`), and the padded sizes that hold each group."""

    def __init__(
        self,
        pool: Pool,
        processor: Processor,
        prompt: PromptConfig,
        max_length: int,
        *,
        buckets: int = 1,
        batch: int = 1,
    ) -> None:
        self.pool, self.processor, self.think = pool, processor, prompt.think
        kept, sizes, dropped = [], [], 0
        for example in pool.examples:
            messages = dialog.messages(example, prompt.style, prompt.think, instruct=prompt.instruct)
            text = processor.chat(messages, add_generation_prompt=True)
            tokens, slots = processor.row_size(text, [pool.image(example)])
            if tokens > max_length:
                dropped += 1
                continue
            kept.append((example, text))
            sizes.append((round_up(tokens, LENGTH_STEP), slots))
        if not kept:
            raise ConfigError(
                f"all {dropped} prompts are longer than {max_length} tokens; "
                "raise the bound or lower max_pixels"
            )
        self.rows: Sequence[tuple[Example, str]] = kept
        self.groups = ladder([tokens for tokens, _ in sizes], buckets, batch)
        self.shapes: dict[int, tuple[int, int]] = {}  # of each prompt's group: (tokens, patch slots)
        for group in self.groups:
            length, patches = (max(sizes[i][axis] for i in group) for axis in range(2))
            self.shapes |= dict.fromkeys(group, (length, patches))
            logging.info("grpo prompts: %d padded to %d tokens, %d patch slots", len(group), length, patches)
        count = len(set(self.shapes.values()))
        logging.info("grpo prompts: %d kept, %d too long; shapes to compile: %d", len(kept), dropped, count)

    def build(self, index: np.ndarray, mine: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, Any]:
        """(rows chosen, the Batch of those at `mine`, which this process holds, padded to the sizes of the
        largest group among them all)."""
        length, patches = (max(self.shapes[i][axis] for i in index.tolist()) for axis in range(2))
        chosen = [self.rows[i] for i in index[mine]]
        images = [[self.pool.image(example)] for example, _ in chosen]
        return index, self.processor([text for _, text in chosen], images, length=length, patches=patches)


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


def score_together(
    prompts: Prompts, index: np.ndarray, rollout: Rollout, judge: Judge, config: GrpoConfig
) -> tuple[list[list[str]], list[list[Score]]]:
    """`score_all`, with the prompts dealt out to the processes: each is judged once, and all get all scores.

    Raises Stopped where the run is to stop; a judge that waits for a server is not waited for.
    """
    count = jax.process_count()
    if count == 1:
        return stop.interruptible(lambda: score_all(prompts, index, rollout, judge, config))
    mine = slice(jax.process_index(), None, count)
    part = Rollout(*(jax.numpy.asarray(hosts.fetch(array)[mine]) for array in rollout))
    texts, scores = stop.interruptible(lambda: score_all(prompts, index[mine], part, judge, config))
    told = [[dataclasses.asdict(score) for score in group] for group in scores]
    shares = [list(zip(*share, strict=True)) for share in hosts.gather([texts, told])]
    dealt = [shares[row % count][row // count] for row in range(len(index))]
    return [group for group, _ in dealt], [[from_dict(score) for score in group] for _, group in dealt]


def train(
    work: Workdir,
    model: Any,
    prompts: Prompts,
    judge: Judge,
    config: GrpoConfig,
    mesh: Mesh,
    *,
    compute: str = "float32",
    remat: str = "none",
) -> training.Params:
    """Improve what is not frozen of the policy and return all its parameters. Resumes from, and ends with, a
    bundle of stage `grpo`, which holds the trained ones.

    `model` is the policy to start from, and the reference. Raises ConfigError when the judge abstains too
    often, or at an alarm that is to stop the run; DataError when gradients stay non-finite.
    """
    skeleton, params = training.split(model)
    params, frozen = skeleton.divide(params)

    def merge(params: Any) -> Any:
        return skeleton.merge(params, dataclasses.replace(model.options, remat=remat))

    optimizer = training.make_optimizer(config.optim, config.steps * config.mu)
    update, score = make_update(merge, optimizer, config, compute), make_score(merge, config, compute)
    key = jax.random.key(config.seed)
    mine = training.rows_here(config.prompts_per_step, mesh)
    own = own_rewards.load(config.rewards)
    with jax.set_mesh(mesh), work.stoppable("grpo") as keep:
        state = training.start(skeleton, params, optimizer, mesh)
        frozen = training.hold(skeleton, frozen, mesh, compute)
        reference = snapshot(state.params, compute) if config.kl_coef else None
        build, count = functools.partial(prompts.build, mine=mine), len(prompts.rows)
        iterator = batches(count, config.prompts_per_step, build, seed=config.seed, groups=prompts.groups)
        state, done = work.resume("grpo", state, iterator)
        diary, watch = Diary(work, config, prompts, own, done), Stopwatch()
        for step in range(done + 1, config.steps + 1):
            keep(step - 1, state, iterator)
            with watch("data"):
                index, batch = next(iterator)
                batch = training.place(batch, mesh)
            with watch("rollout"):
                weights = training.join(training.cast(state.params, compute), frozen)
                policy = skeleton.merge(weights, model.options)
                rollout, counts = draw(policy, batch, config, jax.random.fold_in(key, step))
                del weights, policy  # the update needs their room
            with watch("score"):  # dispatched before the host judges, so that accelerators compute meanwhile
                ref = None if reference is None else score(reference, batch, rollout.tokens, frozen)
                old = score(state.params, batch, rollout.tokens, frozen) if config.mu > 1 else None
            with watch("judge"):
                texts, scores = score_together(prompts, index, rollout, judge, config)
                check_abstentions(scores, config)
                scores = own_rewards.grade(own, prompts, index, texts, rollout, scores)
                advantages = np.asarray(group_advantages(*totals(scores), scale=config.scale), np.float32)
            with watch("update"):
                samples = Samples.of(batch, rollout, training.place(advantages[mine], mesh), old, ref)
                for _ in range(config.mu):
                    state, metrics = update(state, samples, frozen)
                values = {name: float(value) for name, value in metrics.items()}
            training.check_finite(values, config.optim, "grpo", step)
            values |= describe(scores, rollout) | counts.metrics()
            values |= signs.measure(texts, rollout, think=prompts.think) | watch.lap()
            if diary.write(step, values, index, texts, scores, advantages):
                work.save("grpo", step, state, iterator)
            diary.halt()
    return training.join(state.params, frozen)


def draw(policy: Any, batch: Any, config: GrpoConfig, key: jax.Array) -> tuple[Rollout, Counts]:
    """The rollouts of a step, when they are there."""
    rollout, counts = sample(
        policy,
        batch,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        group_size=config.group_size,
        slots=config.slots,
        seed=key,
    )
    return stop.settle(rollout), counts


def snapshot(params: training.Params, dtype: str) -> training.Params:
    """A copy that stays when the original is donated to the first update."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype).copy(), params)


def totals(scores: Sequence[Sequence[Score]]) -> tuple[np.ndarray, np.ndarray]:
    """Rewards [B,G], 0 where the judge abstained, and which of them are valid [B,G]."""
    rewards, valid = reward_arrays(scores)
    return np.where(valid, rewards, 0), valid


def describe(scores: Sequence[Sequence[Score]], rollout: Rollout) -> dict[str, float]:
    """What metrics.jsonl records of a step: reward parts and ratings, group statistics, response lengths."""
    lengths = hosts.fetch(rollout.mask).sum(axis=-1)
    return {
        **{f"reward/{name}": value for name, value in reward_metrics(scores).items()},
        **{name: float(value) for name, value in group_stats(*totals(scores)).items()},
        "length": float(lengths.mean()),
        "length_max": float(lengths.max()),
    }
