"""One optimizer step on a batch of rollouts, and the scoring pass of a frozen policy over them.

Both read each prompt and its image once a group: the prompt is prefilled, and the G responses are scored
against its keys and values, exactly as the sampler produced them. Gradients flow through the shared prefix.
Neighbours: `loss` and `advantages` (pure arithmetic), `rollout` (the sampler), `train` (the story).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fundus_jax import training
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.loss import combine_metrics, loss_denominator, policy_loss
from fundus_jax.grpo.rollout import Rollout
from fundus_jax.models.batch import Batch
from fundus_jax.models.logprobs import token_logprobs
from fundus_jax.sharding import parts

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Samples:
    """A step's rollouts of B prompts: tokens, mask, the sampler's log-probs [B,G,N], advantages [B,G]; `old`
    are the log-probs that the ratio is taken to (None: those of this very pass, the on-policy case), `ref`
    those of the reference (None: no KL)."""

    prompts: Batch
    tokens: Array
    mask: Array
    sampled: Array
    advantages: Array
    old: Array | None
    ref: Array | None

    @classmethod
    def of(
        cls, prompts: Batch, rollout: Rollout, advantages: Array, old: Array | None, ref: Array | None
    ) -> Samples:
        """A step's samples from what the sampler returned."""
        tokens, logprobs, mask = rollout
        return cls(
            prompts=prompts,
            tokens=tokens,
            mask=mask,
            sampled=logprobs,
            advantages=advantages,
            old=old,
            ref=ref,
        )


def pieces_of(config: GrpoConfig) -> int:
    """Into how many micro-batches of whole groups a step's prompts are cut."""
    return config.prompts_per_step * config.group_size // config.micro_batch


def flat_last(samples: Samples, micro_batches: int) -> Samples:
    """The samples with the groups that have no advantage masked out, and moved into the last micro-batches.

    Each device orders the rows it has: no row leaves its device. Micro-batch i is made of the rows i, i + M,
    ... (`training.make_step`), so that is where its groups are put.
    """
    rows = samples.advantages.shape[0]
    shards = parts("batch", rows // micro_batches)
    flat = (samples.advantages == 0).all(axis=1).reshape(shards, -1)
    order = jnp.argsort(flat, axis=1, stable=True)
    order = order.reshape(shards, micro_batches, -1).swapaxes(1, 2).reshape(shards, -1)

    def move(x: Array) -> Array:
        index = order.reshape(*order.shape, *(1 for _ in x.shape[1:]))
        return jnp.take_along_axis(x.reshape(shards, -1, *x.shape[1:]), index, axis=1).reshape(x.shape)

    moved = jax.tree.map(move, samples)
    return replace(moved, mask=moved.mask & ~move(flat.reshape(-1))[:, None, None])


def response_logprobs(model: Any, prompts: Batch, tokens: Array, temperature: float) -> tuple[Array, Array]:
    """log p and entropy [B,G,N] of responses tokens [B,G,N] to their prompts, at the sampler's temperature
    and with its banned ids."""
    prompt = model.prefill(prompts)
    hidden = model.extend(prompt, tokens[:, :, :-1])
    first = jnp.broadcast_to(prompt.last[:, None, None], (*tokens.shape[:2], 1, prompt.last.shape[-1]))
    states = jnp.concatenate([first, hidden], axis=2)
    return token_logprobs(states, model.head, tokens, banned=model.config.banned_ids, temperature=temperature)


def make_score(merge: Callable[[Any], Any], config: GrpoConfig, compute: str) -> Callable[..., Array]:
    """Compile (params, prompts, tokens, frozen parameters or nothing) -> log-probs [B,G,N] of a policy that
    is not trained here, in the micro-batches of the update."""

    def score(params: Any, prompts: Batch, tokens: Array, frozen: Any = None) -> Array:
        model = merge(training.cast(training.join(params, frozen or {}), compute))

        def one(batch: tuple[Batch, Array]) -> Array:
            return response_logprobs(model, *batch, config.temperature)[0]

        if pieces == 1:
            return one((prompts, tokens))
        return training.join_rows(jax.lax.map(one, training.cut_rows((prompts, tokens), pieces)))

    pieces = pieces_of(config)
    return jax.jit(score)


def make_update(
    merge: Callable[[Any], Any], optimizer: optax.GradientTransformation, config: GrpoConfig, compute: str
) -> Callable[..., tuple[training.State, dict[str, Array]]]:
    """Compile (state, samples, frozen parameters or nothing) -> (state, metrics): one update, its gradient
    summed over micro-batches of whole groups.

    Metrics gain `entropy` (nats a token) and `sampler_gap`, the mean |sampler's - trainer's| log-prob under
    the policy that sampled: rounding if both compute the same distribution, which from step 0 they must.
    """

    def loss(model: Any, samples: Samples, total: Array) -> tuple[Array, dict[str, Array]]:
        logprobs, entropy = response_logprobs(model, samples.prompts, samples.tokens, config.temperature)
        old = jax.lax.stop_gradient(logprobs) if samples.old is None else samples.old
        rows = (-1, logprobs.shape[-1])
        mask = samples.mask.reshape(rows)
        value, metrics = policy_loss(
            logprobs.reshape(rows),
            old.reshape(rows),
            None if samples.ref is None else samples.ref.reshape(rows),
            samples.advantages.reshape(-1),
            mask,
            config,
            sampled=samples.sampled.reshape(rows),
            denominator=total,
        )
        tokens = jnp.maximum(mask.sum(), 1)
        gap = jnp.abs(old - samples.sampled).reshape(rows)
        metrics["sampler_gap"] = jax.lax.stop_gradient(jnp.where(mask, gap, 0).sum() / tokens)
        metrics["entropy"] = jax.lax.stop_gradient(jnp.where(mask, entropy.reshape(rows), 0).sum() / tokens)
        return value, metrics

    def count(samples: Samples) -> Array:
        return loss_denominator(samples.mask.reshape(-1, samples.mask.shape[-1]), config)

    def combine(stacked: dict[str, Array]) -> dict[str, Array]:
        losses = stacked.pop("loss")
        return combine_metrics(stacked) | {"loss": losses.sum()}

    pieces = pieces_of(config)
    dropping: dict[str, Any] = {
        "prepare": lambda samples: flat_last(samples, pieces),
        "teaches": lambda samples: samples.mask.any(),
    }
    return training.make_step(
        merge,
        loss,
        count,
        optimizer,
        compute=compute,
        micro_batches=pieces,
        combine=combine,
        **(dropping if config.flat_groups == "drop" else {}),
    )
