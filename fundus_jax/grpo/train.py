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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from fundus_jax import dialog, hosts, stop, training
from fundus_jax.chat import LostError
from fundus_jax.data import Pool, batches, ladder, round_up
from fundus_jax.grpo import own_rewards, signs
from fundus_jax.grpo.abstentions import Abstentions
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.credit import credit
from fundus_jax.grpo.judge import Judge, JudgeError
from fundus_jax.grpo.own_rewards import OwnReward
from fundus_jax.grpo.redraw import Draw, redraw
from fundus_jax.grpo.rewards import Score, assess, from_dict, reward_arrays, reward_metrics, score_rollouts
from fundus_jax.grpo.rollout import Rollout
from fundus_jax.grpo.sampler import Counts, sample
from fundus_jax.grpo.show import Diary
from fundus_jax.grpo.update import Samples, make_score, make_update
from fundus_jax.models.qwen2_5_vl.processor import Processor
from fundus_jax.records import ConfigError, Example
from fundus_jax.sft import LENGTH_STEP, PromptConfig
from fundus_jax.stopwatch import Stopwatch
from fundus_jax.workdir import Workdir


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
        self.pool, self.processor = pool, processor
        self.form = prompt.form
        kept, sizes, dropped = [], [], 0
        for example, image in zip(pool.examples, pool.sizes(pool.examples), strict=True):
            messages = prompt.messages(example)
            text = processor.chat(messages, add_generation_prompt=True)
            tokens, slots = processor.row_size(text, [image])
            if tokens > max_length:
                dropped += 1
                continue
            kept.append((dialog.positioned(example, prompt.boxes), text))
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

    def sizes(self, index: np.ndarray) -> tuple[int, int]:
        """(tokens, patch slots) of a row in a batch of these prompts."""
        length, patches = zip(*(self.shapes[i] for i in index.tolist()), strict=True)
        return max(length), max(patches)

    def build(self, index: np.ndarray, mine: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, Any]:
        """(rows chosen, the Batch of those at `mine`, which this process holds, padded to the sizes of the
        largest group among them all)."""
        length, patches = self.sizes(index)
        chosen = [self.rows[i] for i in index[mine]]
        images = [[self.pool.image(example)] for example, _ in chosen]
        return index, self.processor([text for _, text in chosen], images, length=length, patches=patches)


def score_all(
    prompts: Prompts, index: np.ndarray, rollout: Rollout, judge: Judge, config: GrpoConfig
) -> tuple[list[list[str]], list[list[Score]]]:
    """Texts and scores of every rollout, B groups of G; the judge gets all it has to rate in one call."""
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    texts, found = [], []
    for row, i in enumerate(index):
        example = prompts.rows[i][0]
        about = (example, prompts.pool.findings.get(example.id), prompts.pool.knowledge, config)
        group = [tokens[row, g][mask[row, g]] for g in range(tokens.shape[1])]
        ended = [len(one) > 0 and int(one[-1]) in prompts.processor.eos_ids for one in group]
        said = [one[:-1] if end else one for one, end in zip(group, ended, strict=True)]
        # with control tokens, which a decoder hides: a reply that has any is not in the format
        texts.append([prompts.processor.decode(one, skip_special_tokens=False) for one in said])
        found += [
            assess(text, *about, finished=end, **prompts.form)
            for text, end in zip(texts[-1], ended, strict=True)
        ]
    scores = iter(score_rollouts(found, judge, config))
    return texts, [[next(scores) for _ in group] for group in texts]


def score_together(
    prompts: Prompts, index: np.ndarray, rollout: Rollout, judge: Judge, config: GrpoConfig
) -> tuple[list[list[str]], list[list[Score]]]:
    """`score_all`, with the prompts dealt out to the processes: each is judged once, and all get all scores.

    rollout: whole on every process. Raises Stopped where the run is to stop (a judge that waits for a server
    is not waited for), and JudgeError or LostError on every process where the judge of one gives up.
    """
    count = jax.process_count()
    if count == 1:
        return stop.interruptible(lambda: score_all(prompts, index, rollout, judge, config))
    mine = slice(jax.process_index(), None, count)
    part = Rollout(*(array[mine] for array in rollout))

    def judged() -> tuple[Any, Any, Any]:
        try:
            texts, scores = score_all(prompts, index[mine], part, judge, config)
        except (JudgeError, LostError) as error:  # told to the others, which wait for this process
            return [], [], (isinstance(error, LostError), str(error))
        return texts, [[dataclasses.asdict(score) for score in group] for group in scores], None

    texts, told, given_up = zip(*hosts.gather(stop.interruptible(judged)), strict=True)
    if any(given_up):
        lost, why = min(filter(None, given_up))  # what has to be changed goes before what may pass
        raise (LostError if lost else JudgeError)(why)
    rows = [(row % count, row // count) for row in range(len(index))]
    return (
        [texts[process][row] for process, row in rows],
        [[from_dict(score) for score in told[process][row]] for process, row in rows],
    )


@dataclass(frozen=True, kw_only=True)
class Examiner:
    """Puts prompts to a policy and has its answers judged; all of it stays the same from step to step.

    policy: trained parameters -> the module that samples. score: of `make_score`. reference: its trained
    parameters, or None where none is needed; frozen: what both have in common.
    """

    prompts: Prompts
    iterator: Any
    judge: Judge
    own: Sequence[OwnReward]
    config: GrpoConfig
    mesh: Mesh
    policy: Callable[[training.Params], Any]
    score: Callable[..., Any]
    reference: training.Params | None
    frozen: training.Params
    watch: Stopwatch

    def ask(self, params: training.Params, number: int) -> Draw:
        """The next prompts, answered by the policy with `params` and judged; draws of equal `number` have
        equal random numbers."""
        config, watch = self.config, self.watch
        with watch("data"):
            index, batch = next(self.iterator)
            batch, sizes = training.place(batch, self.mesh), self.prompts.sizes(index)
        with watch("rollout", sizes):
            policy = self.policy(params)
            key = jax.random.fold_in(jax.random.key(config.seed), number)
            rollout, said, counts = draw(policy, batch, config, key)
            del policy  # the update needs its room
        with watch("score", sizes):  # dispatched before the host judges: accelerators compute meanwhile
            base = self.reference
            ref = None if base is None else self.score(base, batch, rollout.tokens, self.frozen)
            old = self.score(params, batch, rollout.tokens, self.frozen) if config.mu > 1 else None
        with watch("judge"):
            texts, scores = score_together(self.prompts, index, said, self.judge, config)
            scores = own_rewards.grade(self.own, self.prompts, index, texts, said, scores)
        return Draw(index, batch, rollout, said, ref, old, texts, scores, scores, counts)

    def draw(self, params: training.Params, step: int, steps: int) -> tuple[Draw, dict[str, float]]:
        """What the policy with `params` is trained on in a step, one of `steps`, and metrics: `redraw`."""
        ask = functools.partial(self.ask, params)
        return redraw(ask, self.put, self.config.extra_draws, step, steps)

    def put(self, index: np.ndarray, rows: Any) -> tuple[Any, Any]:
        """The batch of the prompts `index`, and the tree of arrays `rows` [B,...], on the mesh."""
        mine = training.rows_here(len(index), self.mesh)
        with self.watch("data"):
            held = jax.tree.map(lambda leaf: leaf[mine], rows)
            return training.place((self.prompts.build(index, mine)[1], held), self.mesh)


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
    exam: training.Exam | None = None,
) -> training.Params:
    """Improve what is not frozen of the policy and return all its parameters. `model` is what it starts from,
    and the reference. Resumes from, and ends with, a bundle of stage `grpo`; the best in `exam` is kept too.

    Raises JudgeError when the judge abstains too often or can not go on, LostError when its server is away,
    both after saving what is there; ConfigError at an alarm that is to stop the run; DataError when gradients
    stay non-finite.
    """
    skeleton, params = training.split(model)
    params, frozen = skeleton.divide(params)

    def merge(params: Any) -> Any:
        return skeleton.merge(params, dataclasses.replace(model.options, remat=remat))

    def policy(params: Any) -> Any:
        return skeleton.merge(training.join(training.cast(params, compute), frozen), model.options)

    steps, rows = work.stages["grpo"], config.prompts_per_step
    mine, optimizer = training.rows_here(rows, mesh), training.make_optimizer(config.optim, steps * config.mu)
    update, score = make_update(merge, optimizer, config, compute), make_score(merge, config, compute)
    with jax.set_mesh(mesh), work.stoppable("grpo", on=(JudgeError, LostError)) as keep:
        state = training.start(skeleton, params, optimizer, mesh)
        frozen = training.hold(skeleton, frozen, mesh, compute)
        reference = snapshot(state.params, compute) if config.kl_coef else None
        build, own = functools.partial(prompts.build, mine=mine), own_rewards.load(config.rewards)
        iterator = batches(len(prompts.rows), rows, build, seed=config.seed, groups=prompts.groups)
        state, done = work.resume("grpo", state, iterator)
        if exam is not None and work.owes("grpo"):
            work.make_up("grpo", done, exam(policy(state.params)))
        diary, watch = Diary(work, config, prompts, own, done), Stopwatch("grpo")
        abstentions = Abstentions(config, steps, work.metrics.path, done)
        examiner = Examiner(
            prompts=prompts, iterator=iterator, judge=judge, own=own, config=config, mesh=mesh, policy=policy,
            score=score, reference=reference, frozen=frozen, watch=watch)  # fmt: skip
        for step in range(done + 1, steps + 1):
            keep(step - 1, state, iterator)
            drawn, told = examiner.draw(state.params, step, steps)
            told |= abstentions.add(drawn.every) | judge.metrics()
            advantages, credited = credit_of(drawn, config)
            with watch("update", prompts.sizes(drawn.index)):
                advantages_here = training.place(advantages[mine], mesh)
                samples = Samples.of(drawn.batch, drawn.rollout, advantages_here, drawn.old, drawn.ref)
                for _ in range(config.mu):
                    state, metrics = update(state, samples, frozen)
                values = {name: float(value) for name, value in metrics.items()}
            training.check_finite(values, config.optim, "grpo", step)
            if exam is not None and exam.due(step, steps):
                with watch("exam"):
                    values |= exam(policy(state.params))
            values |= describe(drawn, think=prompts.form["think"]) | credited | told | watch.lap(step)
            due = diary.write(step, values, drawn.index, drawn.texts, drawn.scores, advantages)
            if work.leads("grpo", step, values) or due:
                work.save("grpo", step, state, iterator)
            diary.halt()
            del drawn, samples  # the next step's prompts need their room
    return training.join(state.params, frozen)


def draw(policy: Any, batch: Any, config: GrpoConfig, key: jax.Array) -> tuple[Rollout, Rollout, Counts]:
    """The rollouts of a step, when they are there: on the devices, and whole on this host (which later would
    wait for what the devices have been given by then)."""
    rollout, counts = sample(
        policy,
        batch,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        group_size=config.group_size,
        slots=config.slots,
        seed=key,
    )
    rollout = stop.settle(rollout)
    return rollout, jax.tree.map(hosts.fetch, rollout), counts


def snapshot(params: training.Params, dtype: str) -> training.Params:
    """A copy that stays when the original is donated to the first update."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype).copy(), params)


def credit_of(drawn: Draw, config: GrpoConfig) -> tuple[np.ndarray, dict[str, float]]:
    """The advantages of a draw's rollouts, and metrics: `credit` of what all processes hold together."""
    ref = hosts.fetch(drawn.ref) if config.kl_in == "reward" else None
    logprobs, mask = np.asarray(drawn.said.logprobs), np.asarray(drawn.said.mask)
    return credit(*reward_arrays(drawn.scores), logprobs, mask, ref, config)


def describe(drawn: Draw, *, think: bool) -> dict[str, float]:
    """What metrics.jsonl records of a draw: reward parts and ratings, lengths, signs of a gamed reward, the
    sampler's work."""
    lengths = drawn.said.mask.sum(axis=-1)
    return {
        **{f"reward/{name}": value for name, value in reward_metrics(drawn.scores).items()},
        "length": float(lengths.mean()),
        "length_max": float(lengths.max()),
        **signs.measure(drawn.texts, drawn.said, think=think),
        **drawn.counts.metrics(),
    }
