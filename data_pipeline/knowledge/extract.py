"""Makes Knowledge of passages: from the front matter of our own notes, or by a language model that quotes.

Paper, section 3.2.1. `notes` is the embedded back end: no model, the findings that a note's head lists.
`server` shows the passages to a model and takes its claims through `claims.py`. Passages are text of
strangers: they stand between lines with a number that depends on all of them and on the prompts, so that no
passage can hold it, and that is the same on every run, so that a killed job finds its answers again.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template
from typing import Annotated, Literal

import pydantic
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage

from data_pipeline.knowledge import claims
from data_pipeline.knowledge.claims import Dropped, Said
from data_pipeline.knowledge.index import QUERY
from data_pipeline.knowledge.note import Note
from data_pipeline.knowledge.passages import passage
from fundus_jax.dialog import harmless
from fundus_jax.records import DataError, Knowledge

_Text = Annotated[str, pydantic.Field(min_length=1, max_length=600)]


class ClaimAnswer(pydantic.BaseModel):
    """One claim of the model."""

    model_config = pydantic.ConfigDict(extra="forbid")
    passage: int
    quote: _Text
    finding: Annotated[str, pydantic.Field(min_length=1, max_length=80)]
    role: Literal["required", "supportive", "excluded"]


class Answer(pydantic.BaseModel):
    """What the model answers. It has no place for a label, a modality, or a text of its own."""

    model_config = pydantic.ConfigDict(extra="forbid")
    claims: Annotated[list[ClaimAnswer], pydantic.Field(max_length=24)]


@dataclass(frozen=True, slots=True)
class Extracted:
    """A record, and the model's claims that did not hold."""

    record: Knowledge
    dropped: tuple[Dropped, ...]


def from_notes(label: str, modality: str, documents: Sequence[Document], notes: Sequence[Note]) -> Knowledge:
    """The record of the note that ranks highest among those on the subject.

    Passages of other notes are dropped. Nothing is completed from a table behind the retriever's back: if the
    retrieved passages do not hold the note, there is no record, and DataError says so.
    """
    subject = [
        one for one in documents if (one.metadata["label"], one.metadata["modality"]) == (label, modality)
    ]
    if not subject:
        found = [one.metadata["title"] for one in documents]
        raise DataError(
            f"no note on {label} in {modality}: the first passages are {found}; add one to "
            "data_pipeline/knowledge/notes, or leave the label out"
        )
    address = subject[0].metadata["address"]
    note = next(note for note in notes if note.address == address)
    sets = {"required": note.required, "supportive": note.supportive, "excluded": note.excluded}
    return Knowledge(
        label=label,
        modality=modality,
        text=note.text,
        **sets,
        passages=tuple(passage(one) for one in subject),
        claims=claims.quoted(subject, sets),
    )


async def by_model(
    model: BaseChatModel, label: str, modality: str, documents: Sequence[Document]
) -> Extracted:
    """The record of the claims of a model that hold.

    Raises ChatError where there is no answer, DataError where no claim holds.
    """
    reader = model.with_structured_output(Answer)
    answer = await reader.ainvoke(messages(label, modality, documents))
    assert isinstance(answer, Answer)  # noqa: S101 - what LangChain types as dict or model
    said = [Said(one.passage, one.quote, one.finding, one.role) for one in answer.claims]
    kept, dropped = claims.checked(said, documents, modality)
    try:
        return Extracted(claims.compose(label, modality, kept, documents), dropped)
    except DataError as error:
        reasons = sorted({one.reason for one in dropped})
        raise DataError(
            f"{error}: {len(said)} claims, dropped because {', '.join(reasons) or 'there are none'}"
        ) from None


def messages(label: str, modality: str, documents: Sequence[Document]) -> list[BaseMessage]:
    """The conversation that asks for the claims of some passages."""
    told = _prompts()
    shown = "\n\n".join(
        f"[{number}] ({one.metadata.get('title', '')})\n{one.page_content}"
        for number, one in enumerate(documents, start=1)
    )
    shown = harmless(shown)
    text = Template(told["passages"]).substitute(
        nonce=_nonce([*told.values(), label, modality, shown]),
        label=harmless(label),
        modality=modality,
        question=QUERY.format(modality=modality, label=harmless(label)),
        passages=shown,
    )
    return [SystemMessage(told["extract"].strip()), HumanMessage(text.strip())]


def _nonce(texts: Sequence[str]) -> str:
    """Sixteen digits that none of the texts holds and whoever wrote one of them can not have known."""
    turn = 0
    while True:
        digits = hashlib.sha256(json.dumps([turn, *texts]).encode()).hexdigest()[:16]
        if not any(digits in text for text in texts):
            return digits
        turn += 1


def _prompts() -> dict[str, str]:
    folder = resources.files("data_pipeline.knowledge") / "prompts"
    return {name: (folder / f"{name}.txt").read_text(encoding="utf-8") for name in ("extract", "passages")}


def version() -> str:
    """The sha256 of prompts and schema, as hexadecimal digits: what a job's key says of them."""
    told = json.dumps([_prompts(), Answer.model_json_schema()], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()
