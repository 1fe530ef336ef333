"""A few fixed questions that a policy is asked while it is trained.

They are the same every time, greedy, and about patients that nothing is trained on, so the numbers of a stage
can be compared with each other, and the best bundle be kept by them; the test split is not touched. Few
questions say little: 100 have an interval of about 10 points to each side. Neighbours: predict.py (the
sampler), sft.py and grpo/train.py (which call it), workdir.py (what is kept).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from fundus_jax import stop
from fundus_jax.evaluation import scores
from fundus_jax.evaluation.engines import Asking, in_order
from fundus_jax.evaluation.items import Item
from fundus_jax.evaluation.pictures import Images
from fundus_jax.evaluation.predict import Sampler
from fundus_jax.evaluation.report import outcome_of
from fundus_jax.workdir import BEST_BY


class Exam:
    """Asks `items` after every `every` steps, and after a stage's last; see `training.Exam`."""

    def __init__(
        self,
        items: Sequence[Item],
        images: Images,
        processor: Any,
        mesh: Mesh,
        *,
        every: int,
        asking: Asking,
        slots: int,
    ) -> None:
        self.items, self.images, self.processor, self.mesh = items, images, processor, mesh
        self.every, self.asking, self.slots = every, asking, slots

    def due(self, step: int, last: int) -> bool:
        """Whether it is time to, after `step` of a stage of `last` steps."""
        return step % self.every == 0 or step == last

    def __call__(self, model: Any) -> dict[str, float]:
        """Accuracy with the ends of its interval (a bootstrap of the patients), share of well-formed answers,
        mean length, and n. Where the run is to stop it is left, and owed: see `training.Exam`."""
        slots = min(self.slots, len(self.items))
        engine = Sampler(model, self.processor, slots=slots, mesh=self.mesh)
        try:
            stop.check()  # before programs are compiled
            answers = in_order(engine, self.items, self.images, self.asking)
        except stop.Stopped:  # on every process; the loop saves what it has, and stops there
            return {BEST_BY: math.nan}
        outcomes = [outcome_of(one) for one in answers]
        right = [one.correct for one in outcomes]
        figure = scores.accuracy(right, units=[item.unit for item in self.items])
        ends = {"exam/low": figure.low, "exam/high": figure.high}
        return {
            BEST_BY: float(np.mean(right)),
            **{name: end for name, end in ends.items() if end is not None},
            "exam/well_formed": float(np.mean([one.well_formed for one in outcomes])),
            "exam/length": float(np.mean([one.tokens for one in answers])),
            "exam/n": float(len(answers)),
        }
