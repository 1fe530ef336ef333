"""What the replies of a step look like, whatever they are worth: repetition, empty traces, words outside of
the tags. Shares that a reward does not see and a policy under it may raise; `alarms.py` watches them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from fundus_jax import dialog, hosts

GRAM = 4  # tokens of a phrase; the lists of findings in a good trace repeat shorter ones
WORDS = 3  # a trace of fewer is empty
_WORD = re.compile(r"\w+")


def measure(texts: Sequence[Sequence[str]], rollout: Any, *, think: bool = True) -> dict[str, float]:
    """The signs of a step, means over its rollouts, for metrics.jsonl.

    `signs/repetition`: share of a reply's phrases of GRAM tokens that stand in it already.
    `signs/empty_think` (where the prompt asks for a trace): share of the replies that give an answer after a
    trace of fewer than WORDS words. `signs/outside`: share of the replies with a word outside of their
    blocks; one without a block is all outside. texts: B groups of G; rollout: tokens and mask [B,G,N].
    """
    tokens, lengths = hosts.fetch(rollout.tokens), hosts.fetch(rollout.mask).sum(axis=-1)
    replies = [text for group in texts for text in group]
    flat = tokens.reshape(-1, tokens.shape[-1])
    repeated = [repetition(row[:length]) for row, length in zip(flat, lengths.reshape(-1), strict=True)]
    found = {
        "signs/repetition": np.mean(repeated),
        "signs/outside": np.mean([bool(_WORD.search(dialog.outside(text))) for text in replies]),
    }
    if think:
        found["signs/empty_think"] = np.mean([empty_think(text) for text in replies])
    return {name: float(value) for name, value in found.items()}


def repetition(tokens: np.ndarray) -> float:
    """Share of the phrases of GRAM tokens that occur earlier in tokens [N]; 0 where N is at most GRAM."""
    if len(tokens) <= GRAM:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64), GRAM)
    powers = np.asarray([1_000_003**i for i in range(GRAM)], np.uint64)
    numbers = (grams * powers).sum(axis=1)  # modulo 2^64: two phrases share a number once in a blue moon
    return 1 - len(np.unique(numbers)) / len(numbers)


def empty_think(text: str) -> bool:
    """Whether a reply gives an answer, but before it no trace worth the name."""
    parsed = dialog.parse(text)
    return parsed.answer is not None and len(_WORD.findall(parsed.think or "")[:WORDS]) < WORDS
