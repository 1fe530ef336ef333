"""Qwen2.5-VL as one Flax NNX module: images into the token stream, decoder, head.

Besides the plain forward pass there are the three passes of reinforcement learning, all through the same
layers: `prefill` reads each prompt (and its image) once, `extend` scores the G responses of a prompt against
its keys and values, `stepper` gives what adds one token to each. Neighbours: `params` (weights in and out),
`processor` (makes the Batch), `decode` (one token at a time), `grpo.rollout` (the loop around it).
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fundus_jax.models.attention import Prefix
from fundus_jax.models.batch import Batch
from fundus_jax.models.layers import Factory, Options
from fundus_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from fundus_jax.models.qwen2_5_vl.decode import Layer, Stepper, layer_of
from fundus_jax.models.qwen2_5_vl.text import Decoder
from fundus_jax.models.qwen2_5_vl.vision import VisionTower
from fundus_jax.sharding import constrain

Array = jax.Array


class Prompt(NamedTuple):
    """What a prefilled prompt leaves behind: keys and values [L,B,T,K,C], the hidden state
    of its last real token [B,D] and the position of the token that would follow [B]."""

    prefix: Prefix
    last: Array
    position: Array


class Head(nnx.Module):
    """The output projection [V, D] of untied models."""

    def __init__(self, make: Factory, config: Qwen2_5_VLConfig) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self.weight = make(shape, ("vocab", "embed"), config.initializer_range)


class Qwen2_5_VL(nnx.Module):
    """The whole model. `options` (remat, unrolling, attention back end) may be
    replaced at any time; it changes no number."""

    # What can be frozen (`models.freeze`); an untied head only.
    PARTS: ClassVar[dict[str, tuple[str, ...]]] = {
        "vision": ("visual",),
        "projector": ("visual", "merger"),
        "text": ("text",),
        "embedding": ("text", "embed_tokens"),
        "head": ("lm_head",),
    }

    def __init__(self, config: Qwen2_5_VLConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32) -> None:
        self.config = config
        self.options = Options()
        self.visual = VisionTower(rngs, config.vision, dtype, config.initializer_range)
        self.text = Decoder(rngs, config, dtype)
        self.lm_head = None if config.tie_word_embeddings else Head(Factory(rngs, dtype), config)

    @property
    def head(self) -> Array:
        """The output projection [V, D], the embedding itself where the two are tied."""
        return (self.text.embed_tokens if self.lm_head is None else self.lm_head.weight).get_value()

    def logits(self, hidden: Array) -> Array:
        """Hidden states [..., D] -> logits [..., V], float32 at least."""
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        return jnp.einsum("...d,vd->...v", hidden, self.head, preferred_element_type=wide)

    def encode(self, batch: Batch) -> Array:
        """Image features of each row in slot order, [B, P/4, D]."""
        patches, patch_hw = jnp.asarray(batch.patches), jnp.asarray(batch.patch_hw)
        return self.visual(patches, patch_hw, jnp.asarray(batch.patch_image), self.options)

    def embed(self, batch: Batch) -> Array:
        """Embeddings [B, T, D] with the image features in the places that
        `image_index` names (by position, not by token id)."""
        x = self.text.embed(jnp.asarray(batch.tokens))
        if batch.patches.shape[1]:
            features = self.encode(batch).astype(x.dtype)
            index = batch.image_index[:, :, None]
            x = jnp.where(index >= 0, jnp.take_along_axis(features, jnp.maximum(index, 0), axis=1), x)
        return constrain(x, "batch", None, None)

    def hidden(self, batch: Batch) -> Array:
        """Final hidden states [B, T, D] of whole conversations, causal; padding is seen by nobody, nor is
        another conversation of a packed row."""
        return self._forward(batch, keep=False)[0]

    def __call__(self, batch: Batch) -> Array:
        """Logits [B, T, V], float32 at least. For long vocabularies use
        `hidden` and `models.logprobs`, which never build this."""
        return self.logits(self.hidden(batch))

    def prefill(self, batch: Batch) -> Prompt:
        """Read the prompts once."""
        hidden, made = self._forward(batch, keep=True)
        last = batch.mask.sum(axis=1) - 1
        position = jnp.max(jnp.where(batch.mask[:, None], batch.positions, -1), axis=(1, 2)) + 1
        keys, values = (leaf[:, :, 0] for leaf in made or ())
        return Prompt(
            Prefix(keys, values, jnp.asarray(batch.mask)),
            jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0],
            position,
        )

    def extend(self, prompt: Prompt, tokens: Array) -> Array:
        """Hidden states [B, G, N, D] of responses tokens [B, G, N] after their
        prompt; state n predicts token n + 1."""
        positions = (prompt.position[:, None] + jnp.arange(tokens.shape[2]))[:, None].repeat(3, axis=1)
        return self.text(self.text.embed(tokens), positions, self.options, prefix=prompt.prefix)[0]

    def stepper(self) -> Stepper:
        """The weights that decoding needs, laid out for it; make it once, outside the loop."""
        return self.stepper_of(*(self.decoding_layer(i) for i in range(self.config.num_hidden_layers)))

    def stepper_of(self, *layers: Layer) -> Stepper:
        """As `stepper`, with layers that are there already."""
        head = None if self.lm_head is None else self.head
        return Stepper.of(self.config, self.text, head, layers)

    def decoding_layer(self, index: Array | int) -> Layer:
        """What `stepper_of` takes: one layer's weights."""
        return layer_of(self.text, index)

    def _forward(self, batch: Batch, *, keep: bool) -> tuple[Array, tuple[Array, Array] | None]:
        x, positions = self.embed(batch)[:, None], jnp.asarray(batch.positions)
        segments = jnp.asarray(batch.segments) if batch.packed else None
        hidden, made = self.text(x, positions, self.options, segments=segments, keep=keep)
        return hidden[:, 0], made
