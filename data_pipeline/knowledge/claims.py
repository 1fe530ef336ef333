"""From a model's claims to a record: only what a passage says in so many words, in names of the table.

The model points: to a passage, a quotation in it, a finding and its role. Everything else is decided here, by
rules. The quotation has to stand in the passage; it is widened to whole sentences, in which the parser of
mentions has to find the finding, claimed for a required or supportive one, denied for an excluded one. Label
and modality are the job's. So a passage that gives orders to the model can at most make it point to sentences
of passages, and to findings that these name. What no rule can tell is whether a sentence is true, or is about
the label: that is for the clinician who reads the entry (`show.py`).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from langchain_core.documents import Document

from data_pipeline.knowledge.passages import passage
from fundus_jax import findings
from fundus_jax.findings import Mention, find_mentions
from fundus_jax.records import ROLES, Claim, DataError, Knowledge

LONGEST = 600  # characters of a quotation after it was widened
OTHER = "other"
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z(])|\n+")  # a sentence ends here; not so at "Fig. 2"


@dataclass(frozen=True, slots=True)
class Said:
    """What a model claims: the number of a passage (from 1), words in it, a finding in any words, a role."""

    passage: int
    quote: str
    finding: str
    role: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A claim that was not taken over, and the kind of reason."""

    said: Said
    reason: str


REASONS = (
    "no such passage",
    "not in the passage",
    "too long",
    "not named in the quotation",
    "denied in the quotation",
    "claimed in the quotation",
    "another modality",
    "contradicted by another claim",
)


def checked(
    said: Iterable[Said], documents: Sequence[Document], modality: str
) -> tuple[tuple[Claim, ...], tuple[Dropped, ...]]:
    """The claims that hold, each once, and those that do not.

    A finding that is claimed as required and supportive is required. One that is claimed as excluded and as
    one of the two is neither: passages disagree, or one of them was misread.
    """
    kept: dict[tuple[str, str, str], Claim] = {}
    origin: dict[Claim, Said] = {}
    dropped = []
    for one in said:
        claim = _claim(one, documents, modality)
        if isinstance(claim, str):
            dropped.append(Dropped(one, claim))
        else:
            kept.setdefault((claim.finding, claim.role, claim.quote), claim)
            origin.setdefault(claim, one)
    roles: dict[str, set[str]] = {}
    for claim in kept.values():
        roles.setdefault(claim.finding, set()).add(claim.role)
    final = []
    for claim in kept.values():
        mine = roles[claim.finding]
        if claim.role != OTHER and "excluded" in mine and mine & {"required", "supportive"}:
            dropped.append(Dropped(origin[claim], "contradicted by another claim"))
        elif claim.role == "supportive" and "required" in mine:
            final.append(
                Claim(finding=claim.finding, role="required", quote=claim.quote, passage=claim.passage)
            )
        else:
            final.append(claim)
    return tuple(dict.fromkeys(final)), tuple(dropped)


def _claim(said: Said, documents: Sequence[Document], modality: str) -> Claim | str:
    """The claim in names of the table, or the reason against it."""
    if not 1 <= said.passage <= len(documents):
        return "no such passage"
    document = documents[said.passage - 1]
    text = document.page_content
    place = _located(said.quote, text)
    if place is None or place[0] < _body(document):
        return "not in the passage"
    quote = text[place[0] : place[1]]
    if len(quote) > LONGEST:
        return "too long"
    name = named(said.finding)
    if name is None:
        words = " ".join(said.finding.split()).casefold()
        if not words or words not in " ".join(quote.split()).casefold():
            return "not named in the quotation"
        return Claim(finding=words, role=OTHER, quote=quote, passage=document.metadata["sha256"])
    if name not in findings.vocabulary(modality, extended=True):
        return "another modality"
    here = _within(find_mentions(text), name, place)
    if not here:
        return "not named in the quotation"
    denied = [one.denied for one in here]
    if said.role == "excluded" and not all(denied):
        return "claimed in the quotation"
    if said.role != "excluded" and any(denied):
        return "denied in the quotation"
    return Claim(finding=name, role=said.role, quote=quote, passage=document.metadata["sha256"])


def named(words: str) -> str | None:
    """The canonical finding in some words ("multiple dot-blot hemorrhages"), if they name exactly one."""
    found = {mention.name for mention in find_mentions(words)}
    return found.pop() if len(found) == 1 else None


def _within(mentions: Iterable[Mention], name: str, place: tuple[int, int]) -> list[Mention]:
    return [one for one in mentions if one.name == name and place[0] <= one.start and one.end <= place[1]]


def _located(quote: str, text: str) -> tuple[int, int] | None:
    """Where a quotation stands in a text, up to white space and the marks around it, widened to sentences."""
    words = quote.strip().strip("\"'“”‘’«».…").split()
    if len(words) < 2:
        return None
    found = re.search(r"\s+".join(map(re.escape, words)), text, re.IGNORECASE)
    if found is None:
        return None
    return _widened(text, found.start(), found.end())


def _widened(text: str, start: int, end: int) -> tuple[int, int]:
    """The place of the sentences that hold text[start:end]."""
    borders = [0, *(match.end() for match in _END.finditer(text)), len(text)]
    start = max(border for border in borders if border <= start)
    stop = min(border for border in borders if border >= end)
    return start, start + len(text[start:stop].rstrip())


def quoted(documents: Sequence[Document], roles: Mapping[str, Sequence[str]]) -> tuple[Claim, ...]:
    """For findings whose roles are known: the first sentence that says so, where there is one."""
    found = []
    for role in ROLES:
        for name in roles[role]:
            for document in documents:
                text = document.page_content
                fits = [one for one in find_mentions(text) if one.name == name]
                fits = [one for one in fits if one.denied == (role == "excluded")]
                fits = [one for one in fits if one.start >= _body(document)]
                if fits:
                    start, end = _widened(text, fits[0].start, fits[0].end)
                    sha256 = document.metadata["sha256"]
                    found.append(Claim(finding=name, role=role, quote=text[start:end], passage=sha256))
                    break
    return tuple(found)


def _body(document: Document) -> int:
    """Where a passage begins to say something: the title above a note is no evidence."""
    title = f"{document.metadata.get('title', '')}\n"
    return len(title) if document.page_content.startswith(title) else 0


def compose(label: str, modality: str, claims: Sequence[Claim], documents: Sequence[Document]) -> Knowledge:
    """The record of some claims that hold: its text is their quotations, and nothing else.

    Raises DataError when no claim is about a finding of the table.
    """
    sets = {role: findings.ordered(one.finding for one in claims if one.role == role) for role in ROLES}
    if not any(sets.values()):
        raise DataError(f"no claim on {label} in {modality} holds that is about a finding of the table")
    order = {role: place for place, role in enumerate((*ROLES, OTHER))}
    ranked = sorted(claims, key=lambda one: order[one.role])
    text = " ".join(dict.fromkeys(one.quote for one in ranked))
    used = {one.passage for one in claims}
    return Knowledge(
        label=label,
        modality=modality,
        text=text,
        **sets,
        passages=tuple(passage(one) for one in documents if one.metadata["sha256"] in used),
        claims=tuple(ranked),
    )
