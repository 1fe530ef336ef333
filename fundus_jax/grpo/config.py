"""Every number of the GRPO stage, with its default and the check that it makes sense.

`loss.py`, `advantages.py`, `rewards.py` and the loop (`update.py`, `train.py`) read these fields; a field
that nobody reads does not stand here. Annotations are the plain types str, int and float, not strings and not
`Literal`: ml_collections parses `--config.grpo.kl_coef=0.1` by them.

From the paper (sections 3.3 and 4.1): group_size 4, temperature 1.0, AdamW, reward = answer + format +
process, and which ratings exist. The paper's text as we have it lost the values of the ratings and the
learning rate; where a field says "ours", so it is.
"""

import dataclasses
import math
from dataclasses import dataclass, field

from fundus_jax.grpo import own_rewards
from fundus_jax.grpo.alarms import AlarmConfig
from fundus_jax.optim import OptimConfig
from fundus_jax.records import ConfigError

CHOICES = {
    "kl": ("k1", "k2", "k3"),
    "aggregate": ("token-mean", "sequence-mean", "constant"),
    "scale": ("std", "none"),
    "flat_groups": ("keep", "drop"),
}


@dataclass(kw_only=True, slots=True)
class GrpoConfig:
    """The configuration of the GRPO stage; call `validate` before use.

    The loop. One step samples `prompts_per_step` prompts x `group_size` rollouts of at most `max_new_tokens`
    tokens at `temperature` (at which the log-probabilities of the update are taken too), then makes `mu`
    passes over them, each one optimizer update whose gradient is summed over micro-batches of `micro_batch`
    rollouts (whole groups, which share the work on their prompt). `slots` prompts are decoded at a time, and
    the next take the places of those that have ended (0: all prompts of the step at once); this bounds the
    memory of the caches and changes no token. `steps` of these make the stage. Every `save_every` steps a
    bundle is saved (0: only at the end). `seed` fixes prompts and
    sampling. `buckets`: prompts are sorted by length into at most so many shapes, and those of a step are of
    one shape, so that short prompts are not padded to the longest; each shape that occurs compiles the
    programs of a step once more.
    """

    group_size: int = 4
    temperature: float = 1.0
    prompts_per_step: int = 16
    steps: int = 100
    max_new_tokens: int = 512
    slots: int = 0
    mu: int = 1
    micro_batch: int = 8
    optim: OptimConfig = field(default_factory=OptimConfig)
    save_every: int = 0
    seed: int = 0
    buckets: int = 1

    # The loss (loss.py says what each choice computes). kl_coef is ours: 0 needs no reference policy at all.
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: str = "k3"
    kl_coef: float = 0.02
    aggregate: str = "token-mean"
    constant_norm: int = 0  # with aggregate "constant", and only then: the most tokens a rollout can have

    # The advantages: "std" divides by the deviation of the group, "none" does not.
    scale: str = "std"

    # Groups whose rewards are all equal have no advantage: "keep" still pulls them to the reference by the KL
    # and counts their tokens, "drop" leaves them out of the update (as DAPO does) and saves their computing.
    flat_groups: str = "keep"

    # The reward: weights of its parts (1 each in the paper), then what each rating is worth. The worths are
    # ours. Against the image's findings, when the answer is right:
    answer_weight: float = 1.0
    format_weight: float = 1.0
    process_weight: float = 1.0  # 0 asks no judge at all (the paper's set-up F)
    flawed: float = 0.0
    tenuous: float = 0.5
    plausible: float = 1.0
    # Against the knowledge of the predicted label, when the answer is wrong:
    knowledge_implausible: float = 0.0
    knowledge_plausible: float = 0.5
    # The run stops when a larger share of the judged rollouts of a step has no verdict.
    max_abstain: float = 0.5
    # Functions of the user's own: "FILE.py:FUNCTION*WEIGHT,..." (own_rewards.py).
    rewards: str = ""

    # What people see while it runs: a page of a few groups every `show_every` steps, with each bundle and at
    # each alarm (0: with bundles and alarms only), and when an alarm is raised (alarms.py).
    show_every: int = 0
    alarms: AlarmConfig = field(default_factory=AlarmConfig)

    def validate(self) -> None:
        """Raises ConfigError that names the field, its value, what is allowed and what to do."""
        for item in dataclasses.fields(self):
            _check_type(item.name, getattr(self, item.name), item.type)
        for name, known in CHOICES.items():
            _require(
                getattr(self, name) in known, name, getattr(self, name), f"must be one of {', '.join(known)}"
            )
        for name, low in _AT_LEAST.items():
            _require(getattr(self, name) >= low, name, getattr(self, name), f"must be at least {low}")
        for name in ("flawed", "tenuous", "plausible", "knowledge_implausible", "knowledge_plausible"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must lie between 0 and 1")
        _require(
            self.temperature > 0,
            "temperature",
            self.temperature,
            "must be above 0 (greedy ones are alike)",
        )
        _require(0 < self.clip_low < 1, "clip_low", self.clip_low, "must lie between 0 and 1")
        _require(self.clip_high > 0, "clip_high", self.clip_high, "must be above 0")
        _require(0 <= self.max_abstain < 1, "max_abstain", self.max_abstain, "must be at least 0 and below 1")
        self._validate_together()
        self.optim.validate()
        self.alarms.validate()
        own_rewards.load(self.rewards)

    def _validate_together(self) -> None:
        weights = (self.answer_weight, self.format_weight, self.process_weight)
        _require(
            any(weights) or bool(self.rewards),
            "answer_weight",
            self.answer_weight,
            "and the other two are 0, and rewards names none, so nothing is rewarded: raise one",
        )
        ordered = self.flawed <= self.tenuous <= self.plausible
        _require(ordered, "tenuous", self.tenuous, "must lie between flawed and plausible")
        ordered = self.knowledge_implausible <= self.knowledge_plausible
        _require(
            ordered,
            "knowledge_plausible",
            self.knowledge_plausible,
            "must not be below knowledge_implausible",
        )
        rollouts = self.prompts_per_step * self.group_size
        _require(
            rollouts % self.micro_batch == 0 and self.micro_batch % self.group_size == 0,
            "micro_batch",
            self.micro_batch,
            f"must divide the {rollouts} rollouts of a step ({self.prompts_per_step} prompts x "
            f"{self.group_size}) into whole groups: a multiple of {self.group_size}",
        )
        constant = self.aggregate == "constant"
        remedy = (
            f'must be {"above 0 (use max_new_tokens)" if constant else "0"} with aggregate "{self.aggregate}"'
        )
        _require((self.constant_norm > 0) == constant, "constant_norm", self.constant_norm, remedy)


_AT_LEAST = {
    "group_size": 2,  # alone in its group, a rollout has nothing to be better than
    "prompts_per_step": 1,
    "steps": 1,
    "max_new_tokens": 1,
    "slots": 0,
    "mu": 1,
    "micro_batch": 1,
    "save_every": 0,
    "show_every": 0,
    "seed": 0,
    "buckets": 1,
    "kl_coef": 0,
    "constant_norm": 0,
    "answer_weight": 0,
    "format_weight": 0,
    "process_weight": 0,
}


def _require(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"grpo.{name} is {value!r}; it {remedy}")


def _check_type(name: str, value: object, wanted: object) -> None:
    allowed = (int, float) if wanted is float else wanted
    fits = isinstance(value, allowed) and not isinstance(value, bool)  # type: ignore[arg-type]
    _require(fits, name, value, f"must be of type {getattr(wanted, '__name__', wanted)}")
    if isinstance(value, float):
        _require(math.isfinite(value), name, value, "must be a finite number")
