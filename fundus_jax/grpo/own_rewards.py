"""Rewards of the user's own: functions in the user's own files, named in `grpo.rewards` with their weights.

    --config.grpo.rewards='mine/brevity.py:brief*0.2,mine/anatomy.py:names_the_macula'

A function gets the `Facts` of one rollout and returns a number, which times its weight joins the rollout's
reward. What else it does (it raises, it returns None, NaN or no number) is an abstention, as a judge's: the
rollout leaves the statistics of its group, with the reason, and the run goes on. A function that fails all
the time is an alarm (`alarms.py`). It runs on the host, once a rollout, and should give the same number for
the same facts.

The file is code, so this is the one place that runs some which is not the project's; nothing but the command
or the config can name it. It may import whatever Python finds. What is run are the very bytes whose sha256
stands in config.json, under `reward_files`: a workdir refuses to go on with a file that has changed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import math
import numbers
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import jax
import numpy as np
from absl import logging

from fundus_jax import dialog, hosts, stop
from fundus_jax.records import ConfigError, Example, Findings, Knowledge

LONGEST = 300  # characters of a reason
_ENTRY = re.compile(r"(?P<path>.+\.py):(?P<name>[A-Za-z]\w*)(?:\*(?P<weight>[^*]+))?")
# Parts of metrics.jsonl's reward/ that are not a user's.
_TAKEN = re.compile(
    r"answer|format|process|localisation|total|agreement|not_applicable|rated_.*|.*_abstained"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a reward function is told of a rollout; nothing of it can be changed.

    Attributes:
        text: the reply as generated, without special tokens.
        think, answer: its two blocks; None where one is absent, empty, unclosed or there twice.
        well_formed: whether it is one think block (if a trace was asked for), then one answer block, and
            nothing else.
        right: whether the answer is the example's.
        finished: whether it ended by itself and was not cut off at `max_new_tokens`.
        tokens: its length.
        example: the question, with its answer, labels and modality.
        findings: what is known to be on the image; None where that is unknown.
        knowledge: (label, modality) -> what the label looks like there.
    """

    text: str
    think: str | None
    answer: str | None
    well_formed: bool
    right: bool
    finished: bool
    tokens: int
    example: Example
    findings: Findings | None
    knowledge: Mapping[tuple[str, str], Knowledge]


@dataclass(frozen=True, slots=True)
class Part:
    """What one function says of one rollout; `value` is None where it abstains, for the reason `why`."""

    name: str
    weight: float
    value: float | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class OwnReward:
    """A function of the user's and its weight."""

    name: str
    weight: float
    function: Callable[[Facts], Any]

    def __call__(self, facts: Facts) -> Part:
        """What it says of a rollout; never raises."""
        try:
            value = self.function(facts)
            if getattr(value, "shape", None) == ():  # a scalar of numpy or jax
                value = value.item()
            if not isinstance(value, numbers.Real):
                return self._abstain(f"returned {type(value).__name__}, which is no number")
            value = float(value)
        except stop.Stopped:  # the run is to stop: not the function's doing
            raise
        except (Exception, SystemExit) as error:  # whatever it is: the reason is kept and counted
            return self._abstain(f"{type(error).__name__}: {error}"[:LONGEST])
        if not math.isfinite(value):
            return self._abstain(f"returned {value}")
        return Part(self.name, self.weight, value)

    def _abstain(self, why: str) -> Part:
        return Part(self.name, self.weight, None, why)


def facts_of(
    text: str,
    example: Example,
    findings: Findings | None,
    knowledge: Mapping[tuple[str, str], Knowledge],
    *,
    finished: bool,
    tokens: int,
    think: bool = True,
    style: str = "options",
) -> Facts:
    """The facts of a rollout, its text parsed; `think`: whether the prompt asked for a trace; `style`: how it
    asked (`dialog.messages`)."""
    parsed = dialog.parse(text, think=think)
    answer = dialog.meant(parsed.answer, example, style)
    return Facts(
        text=text,
        think=parsed.think,
        answer=answer,
        well_formed=parsed.well_formed,
        right=answer is not None and dialog.same_answer(answer, example.answer),
        finished=finished,
        tokens=tokens,
        example=example,
        findings=findings,
        knowledge=MappingProxyType(knowledge),  # type: ignore[arg-type]
    )


def load(text: str) -> tuple[OwnReward, ...]:
    """The functions that `grpo.rewards` names; () for "".

    Raises ConfigError for an entry that can not be read, a file that is missing or can not be imported, and a
    function that is missing, is taken, or can not be called with one argument.
    """
    found = []
    for path, name, weight in _entries(text):
        module = _module(path, _digest(path))
        function = getattr(module, name, None)
        if not callable(function):
            there = sorted(key for key, value in vars(module).items() if inspect.isfunction(value))
            raise ConfigError(
                f"grpo.rewards names {name!r} of {path}, which has no such function (it has "
                f"{', '.join(there) or 'none'})"
            )
        _check_signature(function, f"{path}:{name}")
        found.append(OwnReward(name, weight, function))
    return tuple(found)


def digests(text: str) -> dict[str, str]:
    """The sha256 of each file that `grpo.rewards` names. Raises ConfigError as `load`."""
    return {path: _digest(path) for path, _, _ in _entries(text)}


def grade(
    own: Sequence[OwnReward],
    prompts: Any,
    index: np.ndarray,
    texts: Sequence[Sequence[str]],
    rollout: Any,
    scores: list[list[Any]],
) -> list[list[Any]]:
    """The scores, B groups of G, with what the functions say of every rollout.

    prompts: a `train.Prompts`, of which `index` [B] were asked; texts: the replies, B groups of G; rollout:
    their tokens and mask [B,G,N]; scores: `rewards.Score`s. The prompts are dealt out to the processes.
    Abstentions are logged. Raises Stopped where the run is to stop: a function that takes for ever is not
    waited for.
    """
    if not own:
        return scores
    tokens, lengths = hosts.fetch(rollout.tokens), hosts.fetch(rollout.mask).sum(axis=-1)
    count = jax.process_count()

    def group(row: int) -> list[list[Part]]:
        example = prompts.rows[index[row]][0]
        known = example, prompts.pool.findings.get(example.id), prompts.pool.knowledge
        parts = []
        for text, said, length in zip(texts[row], tokens[row].tolist(), lengths[row].tolist(), strict=True):
            finished = length > 0 and said[length - 1] in prompts.processor.eos_ids
            facts = facts_of(text, *known, finished=finished, tokens=length, **prompts.form)
            parts.append([function(facts) for function in own])
        return parts

    rows = range(jax.process_index(), len(index), count)
    parts = stop.interruptible(lambda: [group(row) for row in rows])
    told = hosts.gather([[[dataclasses.astuple(part) for part in one] for one in group] for group in parts])
    dealt = [told[row % count][row // count] for row in range(len(index))]
    found = [[[Part(*part) for part in one] for one in group] for group in dealt]
    _tell([part for group in found for one in group for part in one])
    return [
        [score.plus(one) for score, one in zip(*both, strict=True)]
        for both in zip(scores, found, strict=True)
    ]


def _tell(parts: Sequence[Part]) -> None:
    """Log the abstentions of a step: how many of each function's, and the commonest reason."""
    for name in dict.fromkeys(part.name for part in parts):
        mine = [part for part in parts if part.name == name]
        reasons = Counter(part.why for part in mine if part.value is None)
        for why, _ in reasons.most_common(1):
            lost = reasons.total()
            logging.warning("grpo: reward %s abstained on %d of %d rollouts: %s", name, lost, len(mine), why)


def _entries(text: str) -> list[tuple[str, str, float]]:
    """(path, function, weight) of "PATH:FUNCTION*WEIGHT, ..."; the weight is 1 where there is none."""
    found: list[tuple[str, str, float]] = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        match = _ENTRY.fullmatch(entry)
        try:
            weight = float(match["weight"] or 1) if match else math.nan
        except ValueError:
            weight = math.nan
        if match is None or not math.isfinite(weight) or not weight:
            raise ConfigError(
                f"grpo.rewards has {entry!r}; write FILE.py:FUNCTION*WEIGHT, e.g. mine.py:brief*0.2 "
                "(a weight is any number but 0, and 1 where it is left out)"
            )
        name = match["name"]
        if _TAKEN.fullmatch(name) or name in [one for _, one, _ in found]:
            raise ConfigError(
                f"grpo.rewards: another part of the reward is called {name!r} already; rename the function"
            )
        found.append((match["path"], name, weight))
    return found


def _digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(
            f"grpo.rewards names {path}, which can not be read ({error.strerror}); paths are taken from the "
            f"working directory, {Path.cwd()}"
        ) from error


class _Bytes(importlib.abc.SourceLoader):
    """Imports bytes that were read and hashed before, so that nothing else is run: no bytecode of old, and
    no file that was written meanwhile."""

    def __init__(self, path: str, data: bytes) -> None:
        self.path, self.data = path, data

    def get_filename(self, fullname: str) -> str:
        """Where tracebacks say that it comes from."""
        return self.path

    def get_data(self, path: str) -> bytes:
        """The source, whatever else is asked for."""
        return self.data


@functools.cache
def _module(path: str, digest: str) -> ModuleType:
    """The module of a file; each version of it is run once."""
    data = Path(path).read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise ConfigError(f"{path} was written to while it was read; start again")
    name = f"fundus_jax_own_{Path(path).stem}_{digest[:12]}"
    loader = _Bytes(str(Path(path).resolve()), data)
    spec = importlib.machinery.ModuleSpec(name, loader, origin=path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look for it
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(f"grpo.rewards: {path} can not be imported: {why}") from error
    return module


def _check_signature(function: Callable[..., Any], where: str) -> None:
    remedy = "it must be a plain function of one argument, the Facts of a rollout, that returns a number"
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise ConfigError(f"grpo.rewards: {where} is asynchronous or a generator; {remedy}")
    try:
        inspect.signature(function).bind(None)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"grpo.rewards: {where} can not be called so ({error}); {remedy}") from error
