"""Every number of the GRPO stage, with its default and the check that it makes sense.

`loss.py`, `advantages.py`, `rewards.py` and the loop (`update.py`, `train.py`) read these fields; a field
that nobody reads does not stand here. Annotations are the plain types str, int and float, not strings and not
`Literal`: ml_collections parses `--config.grpo.kl_coef=0.1` by them.

From the paper (sections 3.3 and 4.1): group_size 4, temperature 1.0, 8 epochs, AdamW, reward = answer +
format + process, and which ratings exist. The paper's text as we have it lost the values of the ratings and
the learning rate; where a field says "ours", so it is.
"""

import dataclasses
import math
from dataclasses import dataclass, field

from fundus_jax.grpo import own_rewards
from fundus_jax.grpo.alarms import AlarmConfig
from fundus_jax.optim import OptimConfig
from fundus_jax.records import ConfigError

CHOICES = {
    "ratio": ("token", "sequence"),
    "kl": ("k1", "k2", "k3"),
    "kl_in": ("loss", "reward"),
    "aggregate": ("token-mean", "sequence-mean", "constant"),
    "sampler_ratio": ("token", "sequence"),
    "baseline": ("mean", "leave-one-out"),
    "scale": ("std", "none"),
    "flat_groups": ("keep", "drop"),
    "process": ("selective", "findings", "knowledge", "sum"),
}


@dataclass(kw_only=True, slots=True)
class GrpoConfig:
    """The configuration of the GRPO stage; call `validate` before use.

    The loop. One step samples `prompts_per_step` prompts x `group_size` rollouts of at most `max_new_tokens`
    tokens at `temperature` (at which the log-probabilities of the update are taken too), then makes `mu`
    passes over them, each one optimizer update whose gradient is summed over micro-batches of `micro_batch`
    rollouts (whole groups, which share the work on their prompt). `slots` prompts are decoded at a time, and
    the next take the places of those that have ended (0: all prompts of the step at once); this bounds the
    memory of the caches and changes no token. `steps` of these make the stage, or `epochs` over the prompts
    where steps is 0 (what `extra_draws` take besides is not counted). Every `save_every` steps a bundle is
    saved (0: only at the end). `seed` fixes prompts and sampling. `buckets`: prompts are sorted by length
    into at most so many shapes, and those of a step are of one shape, so that short prompts are not padded to
    the longest; each shape that occurs compiles the programs of a step once more.

    Published objectives are values of the fields below; a field that could not act is refused.

    * GRPO: aggregate "sequence-mean". Dr. GRPO: scale "none", aggregate "constant".
    * RLOO: baseline "leave-one-out", scale "none", kl "k1", kl_in "reward", aggregate "constant" (norm 1).
    * DAPO: clip_high 0.28 with mu > 1, extra_draws, overlong_cache and overlong_weight 1, kl_coef 0. The
      authors make 16 updates from a step's rollouts, each from a sixteenth of them; here each is from all.
    * GSPO: ratio "sequence", clip_low 3e-4, clip_high 4e-4, aggregate "sequence-mean", mu > 1.
    """

    group_size: int = 4
    temperature: float = 1.0
    prompts_per_step: int = 16
    steps: int = 0
    epochs: float = 8.0
    max_new_tokens: int = 512
    slots: int = 0
    mu: int = 1
    micro_batch: int = 8
    optim: OptimConfig = field(default_factory=OptimConfig)
    save_every: int = 0
    seed: int = 0
    buckets: int = 1

    # The loss (loss.py says what each choice computes). Clips act with mu > 1 only: in the first pass every
    # ratio is 1. kl_coef is ours: 0 needs no reference policy at all.
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0  # bounds the ratio where the advantage is negative (3 in the paper); 0: off
    ratio: str = "token"
    kl: str = "k3"
    kl_coef: float = 0.02
    kl_in: str = "loss"
    kl_clamp: float = 0.0  # bounds the estimate of a token, in nats; 0: off
    aggregate: str = "token-mean"
    constant_norm: int = 0  # with aggregate "constant", and only then: the most tokens a rollout can have
    # Rollouts are weighted by how much likelier the trainer finds them than the sampler did, at most so much;
    # 0: off, for where both compute the same, as the metric sampler_gap tells.
    sampler_correction: float = 0.0
    sampler_ratio: str = "token"

    # The advantages: a rollout is compared with the mean of its group, or of the others in it; "std" divides
    # by the deviation of the group, "none" does not.
    baseline: str = "mean"
    scale: str = "std"
    uncertainty: float = 0.0  # how far the model's doubt shapes them, at most 1 (uncertainty.py); 0: off

    # Groups whose rewards are all equal have no advantage: "keep" still pulls them to the reference by the KL
    # and counts their tokens, "drop" leaves them out of the update (as DAPO does) and saves their computing.
    flat_groups: str = "keep"
    # So many more batches of prompts may be drawn in a step to put others in the place of such groups.
    extra_draws: int = 0
    # A rollout loses up to overlong_weight over its last overlong_cache tokens before max_new_tokens; 0: off.
    overlong_cache: int = 0
    overlong_weight: float = 0.0

    # The reward: weights of its parts (1 each in the paper).
    answer_weight: float = 1.0
    format_weight: float = 1.0
    process_weight: float = 1.0  # 0 asks no judge at all (the paper's set-up F)
    localisation_weight: float = 0.0  # of the trace's boxes against the masks'; needs prompt.boxes
    # What a trace is judged against: "selective" is the paper's equation 4 (set-up G), the image's findings
    # where the answer is right and the knowledge of the given answer where it is wrong; "findings" (H) and
    # "knowledge" (I) always that one, right or wrong; "sum" (J) both, and their values are added. The paper
    # says no more of H to J; that the worths below hold for them too is ours.
    process: str = "selective"
    # What each rating is worth (ours). Against the image's findings:
    flawed: float = 0.0
    tenuous: float = 0.5
    plausible: float = 1.0
    # Against the knowledge of the predicted label:
    knowledge_implausible: float = 0.0
    knowledge_plausible: float = 0.5
    # The run stops when the judge has no verdict on a larger share of what it is asked in so many steps.
    max_abstain: float = 0.2
    abstain_window: int = 50
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
        for name in (*_BY_FINDINGS, *_BY_KNOWLEDGE):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must lie between 0 and 1")
        _require(
            self.temperature > 0,
            "temperature",
            self.temperature,
            "must be above 0 (greedy ones are alike)",
        )
        _require(self.epochs > 0, "epochs", self.epochs, "must be above 0")
        _require(0 < self.clip_low < 1, "clip_low", self.clip_low, "must lie between 0 and 1")
        _require(self.clip_high > 0, "clip_high", self.clip_high, "must be above 0")
        _require(0 <= self.max_abstain < 1, "max_abstain", self.max_abstain, "must be at least 0 and below 1")
        self._validate_together()
        self.optim.validate()
        self.alarms.validate()
        own_rewards.load(self.rewards)

    def total_steps(self, prompts: int) -> int:
        """Steps of the stage for a pool of so many prompts."""
        return self.steps or max(1, int(prompts * self.epochs / self.prompts_per_step))

    def _validate_together(self) -> None:
        weights = (self.answer_weight, self.format_weight, self.process_weight, self.localisation_weight)
        _require(
            any(weights) or bool(self.rewards),
            "answer_weight",
            self.answer_weight,
            "and the other weights are 0, and rewards names none, so nothing is rewarded: raise one",
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
        self._validate_objective()

    def _validate_objective(self) -> None:
        """Refuses choices that beside the others would change nothing, or would not be what they say."""
        for idle, names, why in (
            (self.mu == 1, _CLIPPING, "mu 1, where every ratio is 1: raise mu, or leave it"),
            (not self.kl_coef, ("kl", "kl_in", "kl_clamp"), "kl_coef 0: there is no penalty"),
            (not self.sampler_correction, ("sampler_ratio",), "sampler_correction 0: nothing is corrected"),
            (not self.process_weight, ("process", *_JUDGING), "process_weight 0: no judge is asked"),
            (self.process == "findings", _BY_KNOWLEDGE, 'process "findings": nothing else is asked about'),
            (self.process == "knowledge", _BY_FINDINGS, 'process "knowledge": nothing else is asked about'),
        ):
            for name in names if idle else ():
                value, untouched = getattr(self, name), _DEFAULTS[name]
                _require(value == untouched, name, value, f"must be {untouched!r} with {why}")
        bound, corrects = 1 + self.clip_high, self.sampler_correction
        overlong = "above 0" if self.overlong_cache else "0"
        biased = (
            "divided by a deviation that it is part of itself, a rollout's estimate is no longer unbiased"
        )
        # field, whether it makes sense, what it must be otherwise
        rules = (
            (
                "dual_clip",
                not self.dual_clip or self.dual_clip > bound,
                f"must be 0 or above 1 + clip_high = {bound}",
            ),
            (
                "flat_groups",
                self.flat_groups == "keep" or self.kl_in == "loss",
                'must be "keep" with kl_in "reward", which leaves no group without variance',
            ),
            (
                "kl",
                self.kl != "k1" or self.kl_in == "reward" or not self.kl_coef,
                'must be "k2" or "k3" with kl_in "loss": there the gradient of k1 is 0 on average',
            ),
            ("sampler_correction", not corrects or corrects >= 1, "must be 0 or at least 1"),
            (
                "scale",
                self.baseline == "mean" or self.scale == "none",
                f'must be "none" with baseline "{self.baseline}": {biased}',
            ),
            ("uncertainty", self.uncertainty <= 1, "must be at most 1: beyond, advantages change their sign"),
            (
                "overlong_cache",
                self.overlong_cache <= self.max_new_tokens,
                f"must be at most max_new_tokens = {self.max_new_tokens}",
            ),
            (
                "overlong_weight",
                (self.overlong_weight > 0) == (self.overlong_cache > 0),
                f"must be {overlong} with overlong_cache {self.overlong_cache}",
            ),
        )
        for name, sensible, remedy in rules:
            _require(sensible, name, getattr(self, name), remedy)


_DEFAULTS = {item.name: item.default for item in dataclasses.fields(GrpoConfig)}
_CLIPPING = ("clip_low", "clip_high", "dual_clip", "ratio")
_BY_FINDINGS = ("flawed", "tenuous", "plausible")
_BY_KNOWLEDGE = ("knowledge_implausible", "knowledge_plausible")
_JUDGING = (*_BY_FINDINGS, *_BY_KNOWLEDGE, "max_abstain", "abstain_window")
_AT_LEAST = {
    "group_size": 2,  # alone in its group, a rollout has nothing to be better than
    "prompts_per_step": 1,
    "steps": 0,
    "max_new_tokens": 1,
    "slots": 0,
    "mu": 1,
    "micro_batch": 1,
    "save_every": 0,
    "show_every": 0,
    "seed": 0,
    "buckets": 1,
    "dual_clip": 0,
    "kl_clamp": 0,
    "sampler_correction": 0,
    "uncertainty": 0,
    "extra_draws": 0,
    "overlong_cache": 0,
    "overlong_weight": 0,
    "kl_coef": 0,
    "constant_norm": 0,
    "abstain_window": 1,
    "answer_weight": 0,
    "format_weight": 0,
    "process_weight": 0,
    "localisation_weight": 0,
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
