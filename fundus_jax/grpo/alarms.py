"""Early signs that a policy games its reward, as alarms on what metrics.jsonl records of each step.

A rule compares the medians of the last `window` steps with those of the first, or with a bound: one odd step
raises nothing. It says that
somebody should look at the rollouts, not that something is wrong: an answer that needs more words may get
them. All rules are in `RULES`; the bounds are ours, wide enough for the demo to raise none (docs/log.md), and
fields of the config. Nothing here knows a file or an array: a resumed run reads its steps in again.

Signs in the literature: length (Singhal et al. 2023, "A long way to go"; Dr. GRPO, 2025), KL as the price of
over-optimisation (Gao et al. 2023), entropy collapse (DAPO, 2025).
"""

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from fundus_jax.records import ConfigError

OF_TOKENS = ("kl", "entropy")  # means over the tokens of the update; 0 where all groups were dropped
Middle = Mapping[str, float]  # metric -> median over a window
Values = Mapping[str, float | None]  # what metrics.jsonl holds of one step


@dataclass(kw_only=True, slots=True)
class AlarmConfig:
    """When an alarm is raised; 0 takes a rule away. Annotations are plain types, as in `config.py`.

    window: steps that are looked at together, at the start and now; 0 for no alarm at all. length: so many
    times as long, or as short, as at the start. repetition, empty_think, outside: rise of a share since the
    start (`signs.py` says of what). malformed: fall of the share of replies in the format. answer: fall of
    the share of right answers while the reward rises by more than that. kl: nats a token from the reference.
    entropy: below this part of what it was at the start. failing: share of the rollouts on which a reward
    function of the user's gives no number. stop: whether the run saves a bundle and stops at an alarm; the
    same command goes on.
    """

    window: int = 10
    length: float = 2.0
    repetition: float = 0.2
    empty_think: float = 0.2
    outside: float = 0.2
    malformed: float = 0.2
    answer: float = 0.1
    kl: float = 0.5
    entropy: float = 0.2
    failing: float = 0.9
    stop: bool = False

    def validate(self) -> None:
        """Raises ConfigError that names the field, its value and what is allowed."""
        for item in dataclasses.fields(self):
            value, where = getattr(self, item.name), f"grpo.alarms.{item.name}"
            if item.name == "stop":
                if not isinstance(value, bool):
                    raise ConfigError(f"{where} is {value!r}; it must be true or false")
            elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(f"{where} is {value!r}; it must be a number, at least 0 (0: no such alarm)")
        if not isinstance(self.window, int):
            raise ConfigError(f"grpo.alarms.window is {self.window!r}; it must be a whole number of steps")
        if 0 < self.length <= 1:
            raise ConfigError(f"grpo.alarms.length is {self.length!r}; it must be above 1, or 0 for no alarm")
        for name in ("repetition", "empty_think", "outside", "malformed", "answer", "entropy", "failing"):
            if getattr(self, name) >= 1:
                value = getattr(self, name)
                raise ConfigError(f"grpo.alarms.{name} is {value!r}; it is a share and must be below 1")


@dataclass(frozen=True, slots=True)
class Alarm:
    """A rule that is met at a step, in words."""

    name: str
    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class Rule:
    """`name` is raised where `met` holds of the medians at the start, those of now, and the bound, the field
    `bound` of the config; where one of the `metrics` is not logged, never. `says` is filled in with "was" and
    "now" of the first metric, and the bound."""

    name: str
    bound: str
    metrics: tuple[str, ...]
    met: Callable[[Middle, Middle, float], bool]
    says: str


def _rise(metric: str) -> Callable[[Middle, Middle, float], bool]:
    return lambda was, now, bound: now[metric] - was[metric] > bound


RULES = (
    Rule(
        "length_growth", "length", ("length",),
        lambda was, now, bound: now["length"] > bound * was["length"],
        "replies have grown to {now:.0f} tokens, from {was:.0f} at the start",
    ),
    Rule(
        "length_collapse", "length", ("length",),
        lambda was, now, bound: now["length"] * bound < was["length"],
        "replies have shrunk to {now:.0f} tokens, from {was:.0f} at the start",
    ),
    Rule(
        "repetition", "repetition", ("signs/repetition",), _rise("signs/repetition"),
        "{now:.0%} of a reply repeats what it said before, {was:.0%} at the start",
    ),
    Rule(
        "empty_think", "empty_think", ("signs/empty_think",), _rise("signs/empty_think"),
        "{now:.0%} of the replies give an answer without a trace, {was:.0%} at the start",
    ),
    Rule(
        "outside", "outside", ("signs/outside",), _rise("signs/outside"),
        "{now:.0%} of the replies have words outside of their tags, {was:.0%} at the start",
    ),
    Rule(
        "malformed", "malformed", ("reward/format",),
        lambda was, now, bound: was["reward/format"] - now["reward/format"] > bound,
        "{now:.0%} of the replies keep the format, {was:.0%} at the start",
    ),
    Rule(
        "hollow_reward", "answer", ("reward/answer", "reward/total"),
        lambda was, now, bound: (
            was["reward/answer"] - now["reward/answer"] > bound
            and now["reward/total"] - was["reward/total"] > bound
        ),
        "{now:.0%} of the answers are right, {was:.0%} at the start, and yet the reward has risen",
    ),
    Rule(
        "kl", "kl", ("kl",), lambda was, now, bound: now["kl"] > bound,
        "the policy is {now:.2f} nats a token from the reference, beyond {bound:g}",
    ),
    Rule(
        "entropy", "entropy", ("entropy",), lambda was, now, bound: now["entropy"] < bound * was["entropy"],
        "entropy has fallen to {now:.4f} nats a token, from {was:.4f} at the start",
    ),
)  # fmt: skip


def failing(name: str, rollouts: int) -> Rule:
    """The rule for a function of the user's that abstains on nearly all the `rollouts` of a step."""
    metric = f"reward/{name}_abstained"
    return Rule(
        f"failing_{name}", "failing", (metric,), lambda was, now, bound: now[metric] > bound * rollouts,
        f"the reward {name} gives no number on {{now:.1f}} of {rollouts} rollouts; the log has the reasons",
    )  # fmt: skip


class Alarms:
    """The rules over the steps of a stage.

    Args:
        config: the bounds.
        rules: what is watched.
        past: the steps that a resumed run has behind it, as logged, in their order.
    """

    def __init__(
        self, config: AlarmConfig, rules: Iterable[Rule] = RULES, past: Iterable[Values] = ()
    ) -> None:
        self.config = config
        self.rules = tuple(rule for rule in rules if config.window and getattr(config, rule.bound))
        self._first: list[Middle] = []
        self._last: deque[Middle] = deque(maxlen=config.window or 1)
        self._quiet = {rule.name: config.window for rule in self.rules}  # steps since it was last met
        self.met: dict[str, str] = {}
        for values in past:
            self.check(int(values["step"] or 0), values)

    def check(self, step: int, values: Values) -> list[Alarm]:
        """Read a step in and return the alarms that begin with it. One that is met again within a window is
        still the old one. `self.met`: the rules that are met now, with the reasons."""
        wanted = {metric for rule in self.rules for metric in rule.metrics}
        wanted -= {*OF_TOKENS} if values.get("tokens") == 0 else set()
        numbers = {name: value for name in wanted if (value := values.get(name)) is not None}
        known = {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
        if len(self._first) < self.config.window:
            self._first.append(known)
        self._last.append(known)
        self.met, begun = {}, []
        if len(self._last) < self.config.window:
            return []
        was, now = _middle(self._first), _middle(self._last)
        for rule in self.rules:
            bound = getattr(self.config, rule.bound)
            shown = rule.metrics[0]
            if set(rule.metrics) <= was.keys() & now.keys() and rule.met(was, now, bound):
                reason = rule.says.format(was=was[shown], now=now[shown], bound=bound)
                self.met[rule.name] = reason
                if self._quiet[rule.name] >= self.config.window:
                    begun.append(Alarm(rule.name, step, reason))
                self._quiet[rule.name] = 0
            else:
                self._quiet[rule.name] += 1
        return begun

    def metrics(self) -> dict[str, float]:
        """`alarm/NAME` of every rule: 1 where it is met now, else 0."""
        return {f"alarm/{rule.name}": float(rule.name in self.met) for rule in self.rules}


def _middle(steps: Sequence[Middle]) -> Middle:
    """Of each metric that at least half of the steps have, the median over these."""
    names = {name for step in steps for name in step}
    columns = {name: [step[name] for step in steps if name in step] for name in names}
    return {name: median(values) for name, values in columns.items() if 2 * len(values) >= len(steps)}
