"""Reads the notes: short texts of our own wording, one a (label, modality), with findings on top.

They stand in for the online references of the paper (section 3.2.1) on machines without network or
permission. The facts are those of the public sources that each note names; no sentence is taken from them. A
note is Markdown below TOML between two lines "+++". Neighbours: `index.py` searches them,
`knowledge_base.py` uses both.
"""

import functools
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from fundus_jax import findings
from fundus_jax.records import MODALITIES, DataError

FOLDER = "data_pipeline/knowledge/notes"  # the address that records give, the same on every machine
LICENCE = "Apache-2.0"
WITHOUT = "without.toml"  # labels that have no note, and why
_FENCE = "+++\n"
_TEXTS = ("label", "modality", "licence")
_LISTS = ("required", "supportive", "excluded", "references")


@dataclass(frozen=True, slots=True)
class Note:
    """One note. The three sets of findings are canonical, disjoint and visible in the modality."""

    label: str
    modality: str
    licence: str
    required: tuple[str, ...]
    supportive: tuple[str, ...]
    excluded: tuple[str, ...]
    references: tuple[str, ...]
    title: str
    text: str  # one line
    address: str


def read_note(text: str, address: str) -> Note:
    """Parses one note. Raises DataError naming the note and what is wrong with it."""
    parts = text.split(_FENCE, 2)
    if len(parts) != 3 or parts[0]:
        raise DataError(f"{address}: a note starts with TOML between two lines '+++'")
    try:
        head = tomllib.loads(parts[1])
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{address}: front matter is not TOML: {error}") from error
    _check_head(head, address)
    title, _, body = parts[2].strip().partition("\n")
    body = " ".join(body.split())
    if not title.startswith("# ") or not body:
        raise DataError(f"{address}: below the front matter a note has a title line '# ...' and a text")
    return Note(
        label=head["label"],
        modality=head["modality"],
        licence=head["licence"],
        required=tuple(head["required"]),
        supportive=tuple(head["supportive"]),
        excluded=tuple(head["excluded"]),
        references=tuple(head["references"]),
        title=title.removeprefix("# "),
        text=body,
        address=address,
    )


def _check_head(head: dict, address: str) -> None:
    if head.keys() != {*_TEXTS, *_LISTS}:
        raise DataError(f"{address}: front matter has {sorted(head)}, expected {sorted((*_TEXTS, *_LISTS))}")
    for name in _TEXTS:
        if not isinstance(head[name], str) or not head[name]:
            raise DataError(f"{address}: {name} is {head[name]!r}, expected a text")
    for name in _LISTS:
        if not isinstance(head[name], list) or not all(isinstance(item, str) for item in head[name]):
            raise DataError(f"{address}: {name} is {head[name]!r}, expected a list of texts")
    if head["modality"] not in MODALITIES or head["licence"] != LICENCE or not head["references"]:
        raise DataError(
            f"{address}: needs a modality of {MODALITIES}, the licence {LICENCE} and at least one reference"
        )
    known = findings.vocabulary(head["modality"], extended=True)
    names = [*head["required"], *head["supportive"], *head["excluded"]]
    wrong = sorted({name for name in names if name not in known or names.count(name) > 1})
    if wrong:
        raise DataError(f"{address}: {wrong} are no findings of {head['modality']}, or stand in two lists")


@functools.cache
def shipped_notes() -> tuple[Note, ...]:
    """The notes of this package in the order of their file names. Raises DataError for two on one subject."""
    folder = resources.files("data_pipeline.knowledge").joinpath("notes")
    files = sorted(
        (file for file in folder.iterdir() if file.name.endswith(".md")), key=lambda file: file.name
    )
    return _distinct([read_note(file.read_text("utf-8"), f"{FOLDER}/{file.name}") for file in files])


@functools.cache
def undescribed() -> dict[tuple[str, str], str]:
    """(label, modality) -> why there is no note: no finding of the table is characteristic."""
    text = resources.files("data_pipeline.knowledge").joinpath("notes", WITHOUT).read_text("utf-8")
    return {
        (label, modality): why
        for modality, reasons in tomllib.loads(text).items()
        for label, why in reasons.items()
    }


def read_notes(folder: Path) -> tuple[Note, ...]:
    """The notes in a folder of the user's own, read like the shipped ones."""
    files = sorted(folder.glob("*.md"))
    if not files:
        raise DataError(f"{folder}: no note (*.md) here")
    return _distinct([read_note(file.read_text("utf-8"), file.name) for file in files])


def _distinct(notes: list[Note]) -> tuple[Note, ...]:
    seen: dict[tuple[str, str], str] = {}
    for note in notes:
        other = seen.setdefault((note.label, note.modality), note.address)
        if other != note.address:
            raise DataError(f"{other} and {note.address} are both about {note.label} on {note.modality}")
    return tuple(notes)
