"""A trace with its claims marked: what the image's findings bear out, what they do not, and what they deny.

The claims are those that the rules judge reads too: the label after "the answer is" is none. Neighbours:
`mentions` reads the text. The report of a run and the reviewers' page show traces with it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from fundus_jax.findings.mentions import Mention, find_mentions, observations, parse_mentions
from fundus_jax.findings.table import FINDINGS, contradictions, ordered, unknown

DIAGNOSES = ("disease", "dr_grade")  # tasks whose answer obliges the trace to name every finding
LONGEST = 1200  # characters of a response that are shown, where nobody says otherwise
# Control characters, halves of surrogate pairs, and marks that turn the direction of the text around them.
_UNSHOWABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a text. `kind`: "" for plain text, else what is known of the finding that it names, in words
    in `why`: "supported", "unsupported", "contradicted", or "unknown" where the image's findings are."""

    text: str
    kind: str = ""
    why: str = ""


def mark(
    trace: str,
    modality: str,
    there: Collection[str] | None,
    longest: int = LONGEST,
    *,
    searched: Collection[str] | None = None,
) -> tuple[Piece, ...]:
    """The first characters of a trace in pieces, fit to be shown; together they are `clean(trace, longest)`.

    modality: the image's, "" where it is unknown. there: its findings, None where they are. searched: what
    was looked for, None for all.
    """
    shown, position, pieces = trace[:longest], 0, []
    found = find_mentions(observations(trace))
    denied = {one.name for one in found if one.denied}
    both = frozenset(contradictions({one.name for one in found if not one.denied}, denied))
    unseen = unknown(modality, searched) if modality else frozenset()
    for one in found:
        if one.end > len(shown):
            break
        pieces += [Piece(clean(shown[position : one.start]))] if one.start > position else []
        pieces.append(Piece(clean(shown[one.start : one.end]), *_judge(one, both, modality, there, unseen)))
        position = one.end
    rest = clean(shown[position:] + trace[longest:], len(shown) - position)
    return (*pieces, Piece(rest)) if rest else tuple(pieces)


def missed(trace: str, task: str, there: Collection[str] | None) -> tuple[str, ...]:
    """The findings of the image that a trace does not name, though the task is to diagnose it."""
    if there is None or task not in DIAGNOSES:
        return ()
    said = parse_mentions(observations(trace))
    return ordered(set(there) - said.present - said.absent)


def clean(text: str, longest: int = LONGEST) -> str:
    """A text of anyone's, fit to be shown: at most `longest` characters, and none that controls or turns the
    text around it."""
    rest = len(text) - longest
    more = f" … ({rest:,} more characters)" if rest > 0 else ""
    return _UNSHOWABLE.sub("\ufffd", text[:longest]) + more


def _judge(
    one: Mention,
    both: frozenset[str],
    modality: str,
    there: Collection[str] | None,
    unseen: frozenset[str],
) -> tuple[str, str]:
    """(kind, why) of a mention."""
    if one.name in both:
        return "contradicted", f"{one.name}: claimed and denied in the same trace"
    if modality and modality not in FINDINGS[one.name].modalities:
        return "contradicted", f"{one.name}: {modality} does not show it"
    if there is None or one.name in unseen:
        return "unknown", f"{one.name}: nobody knows whether it is there"
    found = one.name in there
    if one.denied:
        why = "denied, but there" if found else "rightly denied"
        return "contradicted" if found else "supported", f"{one.name}: {why}"
    return "supported" if found else "unsupported", f"{one.name}: {'is' if found else 'is not'} in the image"
