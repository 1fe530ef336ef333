"""How unsure the policy is of a question, and how that shapes its advantages: UADT, a reconstruction.

OphthaReason (Wu et al., arXiv 2508.16129) was trained with "Uncertainty-Aware Dynamic Thinking", of which
its abstract says that it "estimates sample-level uncertainty via entropy and dynamically modulates the
model's exploration depth using a shaped advantage mechanism". Its repository has no code for it, and of the
paper we had the abstract alone. What is computed here is ours and fits these words; results obtained with it
are not OphthaReason's. We assume:

* A sample is a question, not a token and not a rollout: all rollouts of a group share one uncertainty.
* Its entropy is that of the policy's distribution over replies, per token. The mean of -log p over the tokens
  that were sampled estimates it, and the sampler has recorded log p: nothing is computed twice.
  Whether the answers of a group disagree was the alternative; among 4 rollouts that takes a handful of
  values, and it is what the advantage itself already compares.
* Entropy H becomes u = 1 - exp(-H), one minus the reciprocal of the perplexity: 0 where every token was
  certain, below 1 always, whatever the vocabulary.
* A' = A + strength u |A|. On a question that the policy is unsure of, success is reinforced more and failure
  discouraged less, so it goes on exploring there; where it is sure, nothing changes. A bonus that did not
  depend on |A| would be no more than another baseline of the group, and of no effect on average.

So, with a strength of at most 1: no advantage changes its sign; none becomes more than 1 + strength times as
large; a certain question keeps its advantages; more uncertainty never lowers one. The advantages of a group
no longer sum to 0, which is the point. Pure functions of numpy arrays; `credit.py` calls them.
"""

import numpy as np


def uncertainty(logprobs: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns u [B], float32 in [0, 1], of the questions whose rollouts have the sampler's logprobs [B,G,N]
    at the tokens of mask [B,G,N].

    Every rollout counts alike, however long; one without a token counts as certain. Those that the judge
    abstained on count too: what they were worth does not matter here.
    """
    surprise = np.where(mask, -np.asarray(logprobs, np.float32), 0).sum(axis=2)
    entropy = (surprise / np.maximum(np.sum(mask, axis=2), 1)).mean(axis=1)
    return -np.expm1(-np.maximum(entropy, 0)).astype(np.float32)


def shape_advantages(advantages: np.ndarray, unsure: np.ndarray, strength: float) -> np.ndarray:
    """Returns A + strength u |A|, [B,G], of advantages A [B,G] and uncertainties u [B] in [0, 1]."""
    return advantages + np.float32(strength) * unsure[:, None] * np.abs(advantages)
