"""The one input of every model: a padded batch of conversations with their images, ready for static shapes.

A processor makes it in numpy at data time (tokens, image patches, window order, position ids), so that
nothing inside `jit` depends on an image's size. Model, rollout and losses only read it. One row is one
conversation, or several where a batch is packed for training.
"""

from dataclasses import dataclass, field

import jax
import numpy as np

Array = np.ndarray | jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Batch:
    """B rows of T text positions and P patch slots; every field is a numpy or a jax array.

    P is a multiple of W, the slots of one attention window ((window_size / patch_size)^2, 64 for Qwen2.5-VL),
    and 0 where no row has an image. Merged slot s of a row stands for patch slots 4s..4s+3 (merge_size^2 of
    them).

    Attributes:
        tokens: [B,T] int32 token ids, right-padded with the pad id. Right, because then a row's positions,
            cache slots and loss positions do not depend on its neighbours' lengths.
        mask: [B,T] bool, True at real tokens. Padding is known by this alone, never by a token's value: the
            pad id may also be a real end token.
        segments: [B,T] int32, the number of the token's conversation in its row, from 1; 0 at padding.
        positions: [B,3,T] int32 M-RoPE ids (time, height, width), 0 at padding. They start anew with each
            conversation. Computed once, as training, prefill and decode must agree on them; decode continues
            at the row's largest id + 1.
        image_index: [B,T] int32, the merged slot of the row whose feature replaces this token's embedding, -1
            for text. It undoes the window order, so that the vision tower needs no reverse permutation.
        patches: [B,P,F] float32 flattened pixels, F = channels * temporal_patch_size * patch_size^2 (1176),
            in window order: each window owns W consecutive slots, inside which the 2x2 merge blocks are
            consecutive. So window attention is a reshape to [B,P/W,W,F], and merging one to [B,P/4,4,F].
            Empty slots are zero.
        patch_hw: [B,P,2] int32, row and column of the patch in its image's grid, for the vision rotary; 0 if
            empty.
        patch_image: [B,P] int32, number of the image in the row, -1 for an empty slot. Full attention stays
            inside equal numbers; a slot's window is its index // W.
        packed: whether a row may hold several conversations. Known when compiling, since attention within
            segments costs more than causal attention, which alone keeps right-padded rows exact.
    """

    tokens: Array
    mask: Array
    segments: Array
    positions: Array
    image_index: Array
    patches: Array
    patch_hw: Array
    patch_image: Array
    packed: bool = field(default=False, metadata={"static": True})

    @property
    def rows(self) -> int:
        """B, the number of rows."""
        return self.tokens.shape[0]
