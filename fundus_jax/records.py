"""The records that travel on disk: frozen dataclasses, one JSON object a line, strictly checked.

Every arrow of the data flow is a directory of these records, and programs of different age read them, so each
line names its schema and its kind, and reading refuses what it does not know instead of guessing. A record
checks itself when it is made; a bad one raises `DataError`, which the pipeline turns into a quarantine line.
Neighbours: `findings.py` has the names of the findings, `dialog.py` turns an `Example` into a conversation.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import types
import typing
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

SCHEMA = 1
GRID = 1000  # boxes are whole numbers from 0 to GRID - 1, whatever the size of the image
MODALITIES = ("CFP", "OCT", "UWF")
SPLITS = ("train", "val", "test")
EYES = ("OD", "OS", "")
ORIGINS = ("pixels", "votes", "both")
RATINGS = ("plausible", "tenuous", "flawed", "implausible", "abstain")
REFERENCES = ("findings", "knowledge")
ROLES = ("required", "supportive", "excluded")  # of a finding for a label

_IMAGE_KEY = re.compile(r"[^#/\\\s.][^#/\\\s]*#[0-9]{1,12}")  # a bare name: no folder, no "..", not hidden
_SHA256 = re.compile(r"[0-9a-f]{64}")


class DataError(ValueError):
    """A record or a file is bad. The caller quarantines it or stops."""


class ConfigError(ValueError):
    """The user has to change something; the message says what."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise DataError(message)


def _one_of(kind: str, field: str, value: str, known: tuple[str, ...]) -> None:
    _require(value in known, f"{kind}.{field} is {value!r}; known values are {', '.join(map(repr, known))}")


def _filled(kind: str, **values: str) -> None:
    for field, value in values.items():
        _require(bool(value.strip()), f"{kind}.{field} is empty")


def _sorted_set(kind: str, field: str, names: tuple[str, ...]) -> None:
    _require(
        names == tuple(sorted(set(names))),
        f"{kind}.{field} is {names!r}; it has to be sorted and without repetition",
    )


def _looked_for(kind: str, searched: tuple[str, ...] | None, **named: Collection[str]) -> None:
    """Checks that nothing is said of a finding that nobody looked for."""
    _sorted_set(kind, "searched", searched or ())
    for field, names in named.items():
        unknown = sorted(set(names) - set(names if searched is None else searched))
        _require(not unknown, f"{kind}.{field} names {unknown}, which {kind}.searched does not")


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """Where a finding lies: corners on the 0-999 grid of the image, x to the right, y down."""

    finding: str
    x1: int
    y1: int
    x2: int
    y2: int

    def __post_init__(self) -> None:
        _filled("Box", finding=self.finding)
        corners = (self.x1, self.y1, self.x2, self.y2)
        _require(
            0 <= self.x1 < self.x2 < GRID and 0 <= self.y1 < self.y2 < GRID,
            f"Box {corners} of {self.finding!r}: needs 0 <= x1 < x2 <= {GRID - 1}, and the same for y",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One question about one image, with its answer and what the publisher says about the pixels.

    `image` is "FILE#INDEX": FILE is an ArrayRecord file beside this record's shard, INDEX the image in it.
    `findings` is None where the publisher gives no masks; () means masks exist and nothing is there.
    `searched` are the findings that the masks are about, there or not; None means all that the modality can
    show (or that there are no masks). Of the others nobody knows.
    `options` may be empty for a question without choices; otherwise the answer is one of them.
    """

    id: str
    dataset: str
    split: str
    patient: str
    eye: str
    modality: str
    image: str
    labels: tuple[str, ...]
    task: str
    question: str
    options: tuple[str, ...]
    answer: str
    findings: tuple[str, ...] | None
    boxes: tuple[Box, ...]
    searched: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        texts = ("id", "dataset", "patient", "task", "question", "answer")
        _filled("Example", **{name: getattr(self, name) for name in texts})
        _one_of("Example", "split", self.split, SPLITS)
        _one_of("Example", "eye", self.eye, EYES)
        _one_of("Example", "modality", self.modality, MODALITIES)
        _require(
            _IMAGE_KEY.fullmatch(self.image) is not None,
            f"Example.image is {self.image!r}; it has to be FILE#INDEX with a bare file name",
        )
        _require(
            len(set(self.options)) == len(self.options), f"Example.options {self.options!r} repeats an option"
        )
        _require(
            not self.options or self.answer in self.options,
            f"Example.answer {self.answer!r} is not one of the options {self.options!r}",
        )
        if self.findings is not None:
            _sorted_set("Example", "findings", self.findings)
        _require(self.findings is not None or self.searched is None, "Example.searched: there are no masks")
        _looked_for("Example", self.searched, findings=self.findings or ())


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """A retrieved piece of text and where it is from. `sha256` is that of `text` in UTF-8."""

    text: str
    source: str
    address: str
    licence: str
    sha256: str

    def __post_init__(self) -> None:
        _filled("Passage", text=self.text, source=self.source, licence=self.licence)
        _require(
            _SHA256.fullmatch(self.sha256) is not None and self.sha256 == text_sha256(self.text),
            f"Passage.sha256 {self.sha256!r} is not the sha256 of the text from {self.source!r}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """Why a finding has its role: a quotation, word for word, of the passage with the sha256 `passage`.
    With the role "other", it describes what is no finding of the table, and `finding` says it in words."""

    finding: str
    role: str
    quote: str
    passage: str

    def __post_init__(self) -> None:
        _filled("Claim", finding=self.finding, quote=self.quote)
        _one_of("Claim", "role", self.role, (*ROLES, "other"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Knowledge:
    """What a label looks like in a modality: a text and three disjoint sets of findings (paper, 3.2.1), with
    claims, each of a finding of one set, that quote the passages."""

    label: str
    modality: str
    text: str
    required: tuple[str, ...]
    supportive: tuple[str, ...]
    excluded: tuple[str, ...]
    passages: tuple[Passage, ...]
    claims: tuple[Claim, ...] = ()

    def __post_init__(self) -> None:
        _filled("Knowledge", label=self.label, text=self.text)
        _one_of("Knowledge", "modality", self.modality, MODALITIES)
        for field in ROLES:
            names = getattr(self, field)
            _require(len(set(names)) == len(names), f"Knowledge.{field} {names!r} repeats a finding")
        names = self.required + self.supportive + self.excluded
        twice = sorted({name for name in names if names.count(name) > 1})
        _require(
            not twice, f"Knowledge of {self.label!r}: {twice} stand in two of required/supportive/excluded"
        )
        texts = {passage.sha256: passage.text for passage in self.passages}
        for one in self.claims:
            fits = one.role == "other" or one.finding in getattr(self, one.role)
            fits = fits and one.quote in texts.get(one.passage, "")
            _require(fits, f"Knowledge of {self.label!r}: {one} is not of its role, or quotes no passage")


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """The findings of one example's image, from masks ("pixels": no votes, n = 0), n answers of a model, or
    both. One is `present`, absent because it was `searched` for in vain (None: all were), or else unknown."""

    example: str
    present: tuple[str, ...]
    votes: dict[str, int]
    n: int
    origin: str
    searched: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _filled("Findings", example=self.example)
        _one_of("Findings", "origin", self.origin, ORIGINS)
        _sorted_set("Findings", "present", self.present)
        _require(self.n >= 0, f"Findings.n is {self.n}; it counts answers and can not be negative")
        for name, one in self.votes.items():
            _require(0 <= one <= self.n, f"Findings.votes: {one} of {name!r}, not between 0 and n = {self.n}")
        if self.origin == "votes":
            unknown = sorted(set(self.present) - set(self.votes))
            _require(not unknown, f"Findings.present names {unknown}, which nobody voted on")
        _looked_for("Findings", self.searched, present=self.present, votes=self.votes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """A reasoning trace and what the quality check says: kept, or not kept with at least one reason."""

    example: str
    think: str
    answer: str
    kept: bool
    reasons: tuple[str, ...]

    def __post_init__(self) -> None:
        _filled("Trace", example=self.example)
        _require(
            self.kept == (not self.reasons),
            f"Trace of {self.example!r}: kept is {self.kept} with reasons {self.reasons!r}",
        )
        if self.kept:
            _filled("Trace", think=self.think, answer=self.answer)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A judge's rating of a trace against the image's findings or against the knowledge of its answer."""

    rating: str
    reference: str
    reasons: tuple[str, ...]

    def __post_init__(self) -> None:
        _one_of("Verdict", "rating", self.rating, RATINGS)
        _one_of("Verdict", "reference", self.reference, REFERENCES)


Record = Box | Example | Passage | Claim | Knowledge | Findings | Trace | Verdict
R = TypeVar("R", Box, Example, Passage, Claim, Knowledge, Findings, Trace, Verdict)


def text_sha256(text: str) -> str:
    """The sha256 of a text in UTF-8, as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def to_json(record: Record) -> str:
    """One line of JSON without the line break: schema, kind, then the fields in the order of the class."""
    line = {"schema": SCHEMA, "kind": type(record).__name__, **dataclasses.asdict(record)}
    return json.dumps(line, ensure_ascii=False, allow_nan=False)


def from_json(cls: type[R], line: str, where: str = "record") -> R:
    """The record of class `cls` in one line of JSON.

    Args:
        cls: the class that the line has to hold.
        line: one JSON object; a field that is unknown, mistyped, or missing (unless () will do), is refused.
        where: the place for error messages, e.g. "findings/000.jsonl:12".

    Raises:
        DataError: naming the place and the field.
    """
    try:
        value = json.loads(line, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a line of JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: holds a {type(value).__name__}, not a JSON object")
    schema, kind = value.pop("schema", None), value.pop("kind", None)
    if type(schema) is not int or schema != SCHEMA:
        raise DataError(f"{where}: schema is {schema!r}; this program reads {SCHEMA}: make the file again")
    if kind != cls.__name__:
        raise DataError(f"{where}: kind is {kind!r}, expected {cls.__name__!r}")
    return _decode(cls, value, where)


def write_jsonl(path: str | os.PathLike[str], records: Iterable[Record]) -> int:
    """Writes records to a file, one a line, and returns how many.

    The file appears whole or not at all: a temporary name in the same directory, fsync, rename.
    """
    path, count = Path(path), 0
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for record in records:
                file.write(to_json(record) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name itself has to survive a crash too
    finally:
        os.close(directory)
    return count


def read_jsonl(path: str | os.PathLike[str], cls: type[R]) -> Iterator[R]:
    """Reads the records of a file one by one.

    Raises:
        DataError: naming file and line; also when the last line is cut off.
    """
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{os.fspath(path)}:{number}"
            if not raw.endswith(b"\n"):
                raise DataError(
                    f"{where}: the last line has no line break: the file is cut off, make it again"
                )
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8: {error}") from error
            yield from_json(cls, line, where)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object names a field twice")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_hints = functools.cache(typing.get_type_hints)


def _decode(hint: Any, value: Any, where: str) -> Any:
    """Checks a JSON value against a type and returns it with tuples and records for lists and objects."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, types.UnionType):  # only "something or None" occurs
        return None if value is None else _decode(arguments[0], value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {
            _decode(str, key, where): _decode(arguments[1], item, f"{where}[{key!r}]")
            for key, item in value.items()
        }
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints = _hints(hint)  # type: ignore[arg-type]
        later = {
            field.name for field in dataclasses.fields(hint) if field.default == ()
        }  # None is to be said
        unknown, missing = sorted(value.keys() - hints.keys()), sorted(hints.keys() - later - value.keys())
        if unknown or missing:
            raise DataError(f"{where}: unknown fields {unknown}, missing fields {missing}")
        fields = {name: _decode(hints[name], item, f"{where}.{name}") for name, item in value.items()}
        try:
            return hint(**fields)  # type: ignore[operator]
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
    if hint in (str, int, bool) and type(value) is hint:  # `type`, because a bool is an int to isinstance
        if isinstance(value, str):
            _no_surrogates(value, where)
        return value
    raise DataError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {type(value).__name__}")


def _no_surrogates(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half of a surrogate pair at character {error.start}") from error
