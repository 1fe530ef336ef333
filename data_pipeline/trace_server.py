"""Traces by a language model behind a server, checked by rules and by the model.

Paper, section 3.2.3: the model gets the findings of the image and the knowledge of the answer, and is guided
to (i) summarise the findings, (ii) connect them to the knowledge, (iii) derive the answer; the answer itself
is the example's, and no model touches it. `quality.py` then looks for faults that rules can see, and the
model, in a request of its own, for the paper's error kinds. A trace with a fault is written again from
another seed, up to a cap, and then rejected for good, with the reasons of the last.

Boxes are numbers that nobody has to guess: the sentences with the boxes of the masks are put before the text
by rule, as in the rule writer's traces, and the model is told in words where a finding lies. What the model
writes must hold no markup at all, or it is rejected, so that no control token reaches a tokenizer.

Not asked for, and written by rule, are traces that need no findings (which modality, which eye), and those
that could never pass: nobody looked at the image, or for what the answer depends on, nothing is known of the
label, or a finding that it requires was not found. Neighbours: `composing.py` is the other back end,
docs/data.md says what is recorded.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from data_pipeline import asking, files, instructions, jobs, quality, writer
from data_pipeline.composing import Case, compose
from data_pipeline.questions import MODALITIES
from data_pipeline.stages import LABEL_TASKS
from fundus_jax import dialog, findings
from fundus_jax.chat import Chat, ChatConfig, ChatError
from fundus_jax.dialog import harmless
from fundus_jax.records import ConfigError, Trace

WHERE = "writer.server"  # what errors call the server
TRIES = ".tries.jsonl"  # end of the name of the side file with all that was written
PROMPTS = ("writer", "check", "case", "trace")
_Step = Annotated[str, pydantic.Field(min_length=1, max_length=400)]


@dataclass(kw_only=True, slots=True)
class WriterConfig:
    """How a model writes traces.

    retries: how often a trace that is rejected, or comes to nothing, is written again. most_words: the
    longest trace. temperature, seed: how it is drawn; the check is greedy. answer_tokens: the longest answer.
    """

    retries: int = 2
    most_words: int = 120
    temperature: float = 0.7
    seed: int = 0
    answer_tokens: int = 1024
    server: ChatConfig = field(default_factory=ChatConfig)

    def validate(self) -> None:
        """Raises ConfigError that names the field, its value and what is allowed."""
        for name, least in (("retries", 0), ("most_words", 10), ("temperature", 0), ("answer_tokens", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"writer.{name} is {getattr(self, name)}; it must be at least {least}")
        self.server.validate(WHERE)


class Draft(pydantic.BaseModel):
    """What the model answers when it writes: the paper's three steps."""

    model_config = pydantic.ConfigDict(extra="forbid")
    summary: _Step
    connection: _Step
    conclusion: _Step


class Fault(pydantic.BaseModel):
    """One thing that is wrong with a trace, of the paper's error kinds."""

    model_config = pydantic.ConfigDict(extra="forbid")
    kind: Literal[
        "modality inconsistency",
        "required finding omitted",
        "redundant or incorrect finding",
        "knowledge omitted",
        "knowledge misapplied",
        "reasoning inconsistent",
    ]
    detail: Annotated[str, pydantic.Field(max_length=160)]


class Faults(pydantic.BaseModel):
    """What the model answers when it checks a trace."""

    model_config = pydantic.ConfigDict(extra="forbid")
    faults: Annotated[list[Fault], pydantic.Field(max_length=6)]


@dataclass(frozen=True, slots=True)
class Composed:
    """A trace, and a line for each time that it was written."""

    trace: Trace
    tries: tuple[dict[str, Any], ...] = ()


class ServerWriter:
    """Writes traces as the head of this file says; with `boxes`, they say where each finding lies, with at
    most so many boxes. Raises ConfigError for a setting that does not make sense."""

    name = "server"

    def __init__(self, config: WriterConfig, boxes: int = 0) -> None:
        config.validate()
        self.settings, self.boxes, self.most_words = config, boxes, config.most_words
        self.prompts = instructions.load(*PROMPTS)
        self.rules = writer.RuleWriter(boxes)

    @property
    def config(self) -> dict:
        """Model, prompts and settings; the rules write some traces too."""
        names = ("retries", "temperature", "seed", "answer_tokens")
        return {
            "model": self.settings.server.model,
            "prompts": instructions.version(self.prompts, (Draft, Faults)),
            "rules": self.rules.config,
            **{name: getattr(self.settings, name) for name in names},
        }

    @property
    def through(self) -> jobs.Through:
        return asking.through(self.ask, self.settings.server, WHERE)

    def traces(self, items: Iterable[Composed], side: Path) -> Iterator[Trace]:
        """The traces; what was written on the way to them goes to `side`.tries.jsonl."""
        with Path(f"{side}{TRIES}").open("w", encoding="utf-8") as log:
            for one in items:
                log.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in one.tries)
                yield one.trace

    async def ask(self, chat: Chat, case: Case) -> Composed:
        """The trace of a case, kept or rejected. Raises ChatError where no text came to a verdict."""
        example, trace, failure = case.example, None, None
        if not _possible(case):
            return Composed(
                compose(example, case.found, case.knowledge, self.rules, self.most_words, self.boxes)
            )
        tries: list[dict[str, Any]] = []
        for attempt in range(1 + self.settings.retries):
            seed = instructions.seed(self.settings.seed, example.id, attempt)
            tries.append(line := {"example": example.id, "seed": seed, "prompt": "", "think": ""})
            try:
                line["think"], line["prompt"] = await self._write(chat, case, seed)
                reasons = self._by_rules(case, line["think"])
                reasons = reasons or await self._by_model(chat, case, line["think"])
            except ChatError as error:
                if error.kind not in instructions.ANOTHER:
                    raise
                line["reasons"], failure = [f"no answer: {error}"], error
                continue
            line["reasons"] = list(reasons)
            trace = Trace(
                example=example.id,
                think=line["think"],
                answer=example.answer,
                kept=not reasons,
                reasons=reasons,
            )
            if trace.kept:
                break
        if trace is None:
            raise failure or AssertionError("a try ends with a text or an error")
        return Composed(trace, tuple(tries))

    async def _write(self, chat: Chat, case: Case, seed: int) -> tuple[str, str]:
        """A think text, and the hash of the conversation that asked for it."""
        rules = instructions.fill(self.prompts["writer"], words=str(self.most_words))
        messages = [_said("system", rules), _said("user", self._told(case))]
        [draft] = await self._asked(chat, messages, Draft, self.settings.temperature, seed)
        steps = (draft.summary, draft.connection, draft.conclusion)
        placed = writer.positions(dialog.positioned(case.example, self.boxes).boxes) if self.boxes else []
        return " ".join([*placed, *map(_sentence, steps)]), files.digest(messages)

    def _by_rules(self, case: Case, think: str) -> tuple[str, ...]:
        """The reasons against a trace that rules can see."""
        if "‹" in think or "›" in think:  # angle brackets, made harmless
            return (f"{quality.MALFORMED}: the text holds markup",)
        return quality.check(
            case.example,
            case.found,
            case.knowledge,
            think,
            case.example.answer,
            most_words=self.most_words,
            boxes=self.boxes,
        )

    async def _by_model(self, chat: Chat, case: Case, think: str) -> tuple[str, ...]:
        """The reasons against a trace that the model gives."""
        told = self._told(case, harmless(dialog.without_boxes(think)))
        messages = [_said("system", self.prompts["check"]), _said("user", told)]
        [answer] = await self._asked(chat, messages, Faults, 0.0, None)
        return tuple(
            f"{one.kind} (by the model): {' '.join(harmless(one.detail).split())}" for one in answer.faults
        )

    async def _asked(
        self, chat: Chat, messages: list[dict[str, Any]], schema: Any, temperature: float, seed: int | None
    ) -> list[Any]:
        """One answer. Raises ChatError for one that can not be read."""
        bound = self.settings.answer_tokens
        [answer] = await chat.ask(messages, schema, max_tokens=bound, temperature=temperature, seed=seed)
        if isinstance(answer, ChatError):
            raise answer
        return [answer]

    def _told(self, case: Case, trace: str = "") -> str:
        """The facts of a case, and where it is to be checked the trace: foreign text stands between lines
        with a number that it can not know."""
        example, found, known = case.example, case.found, case.knowledge
        assert found is not None  # noqa: S101 - else it is not asked for
        text = harmless(known.text) if known else "Nothing more than the findings."
        nonce = instructions.nonce(example.id, text, trace)
        facts = {
            "nonce": nonce,
            "modality": f"{MODALITIES[example.modality]} ({example.modality})",
            "question": _line(example.question),
            "answer": _line(example.answer),
            "findings": _listed(findings.ordered(found.present)),
            "unknown": _listed(findings.ordered(findings.unknown(example.modality, found.searched))),
            "words": writer.summary(example, found),
            "places": _places(case),
            "required": _listed(findings.required(known) if known else ()),
            "supportive": _listed(known.supportive if known else ()),
            "excluded": _listed(known.excluded if known else ()),
            "knowledge": text,
        }
        parts = [instructions.fill(self.prompts["case"], **facts)]
        if trace:
            parts += [instructions.fill(self.prompts["trace"], nonce=nonce, trace=trace)]
        return "\n\n".join(parts)


def _possible(case: Case) -> bool:
    """Whether a model can write a trace that passes: see the head of this file."""
    if case.example.task in dialog.WITHOUT_FINDINGS or case.found is None:
        return False
    if quality.unseen(case.example, case.found, case.knowledge):
        return False
    if case.example.task not in LABEL_TASKS:
        return case.example.task in quality.LESION_TASKS
    known, seen = case.knowledge, case.found.present
    if known is None or findings.missing(known, seen):
        return False
    severe = writer.everywhere(case.example.boxes) or not set(seen).isdisjoint(writer.BESIDE_SPREAD)
    if case.example.answer == writer.SEVERE and writer.spread_is_known(case.found) and not severe:
        return False  # nothing that the image is known to show makes it severe
    return bool(known.required) or not known.supportive or not set(seen).isdisjoint(known.supportive)


def _places(case: Case) -> str:
    """Where the findings lie, in words; only masks say so."""
    boxes = case.example.boxes
    names = findings.ordered(box.finding for box in boxes)
    where = {name: writer.regions(box for box in boxes if box.finding == name) for name in names}
    return "; ".join(f"{name}: {', '.join(reached)}" for name, reached in where.items()) or "not known"


def _sentence(text: str) -> str:
    """A step of the model on one line, without what is more than words, and with its full stop."""
    line = _line(text)
    return line if line.endswith((".", "!", "?")) else f"{line}."


def _line(text: str) -> str:
    return " ".join(harmless(text).split())


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}
