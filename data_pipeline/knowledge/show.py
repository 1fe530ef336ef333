"""One entry of the knowledge base as text for a clinician: what is claimed, and the sentence behind it."""

import textwrap
from collections.abc import Iterable

from data_pipeline.knowledge.corrections import SOURCE
from fundus_jax.records import ROLES, Claim, ConfigError, Knowledge

WIDTH = 100
TITLES = {
    "required": "Required: the label is hardly right without",
    "supportive": "Supportive: makes it likelier",
    "excluded": "Excluded: speaks against it",
}
ALIASES = {
    "dr-none": "No DR",
    "dr-mild": "Mild NPDR",
    "dr-moderate": "Moderate NPDR",
    "dr-severe": "Severe NPDR",
    "dr-proliferative": "PDR",
}


def find(records: Iterable[Knowledge], label: str, modality: str) -> Knowledge:
    """The record on a label, in any case or as "DR-moderate". Raises ConfigError naming those there are."""
    there = {(one.label.lower(), one.modality): one for one in records}
    wanted = ALIASES.get(label.lower(), label).lower()
    if (wanted, modality.upper()) in there:
        return there[wanted, modality.upper()]
    known = sorted(one.label for one in there.values() if one.modality == modality.upper())
    raise ConfigError(
        f"no entry on {label!r} in {modality}; entries in it are on {', '.join(known) or 'nothing'}"
    )


def page(record: Knowledge) -> str:
    """The entry: text, findings by role with their quotations, passages with source, licence and hash."""
    numbers = {one.sha256: place for place, one in enumerate(record.passages, start=1)}
    lines = [f"{record.label} on {record.modality}", ""]
    fixed = [one for one in record.passages if one.source.startswith(SOURCE)]
    lines += [f"Corrected: {one.source.removeprefix(SOURCE)}, in {one.address}" for one in fixed]
    lines += [*_wrapped(record.text, "  "), ""]
    for role in ROLES:
        lines.append(f"{TITLES[role]}:")
        for name in getattr(record, role):
            lines.append(f"  {name}")
            mine = [one for one in record.claims if (one.finding, one.role) == (name, role)]
            lines += [line for one in mine for line in _quotation(one, numbers)]
            lines += [] if mine else ["      (no sentence is quoted for it)"]
        lines += [] if getattr(record, role) else ["  none"]
        lines.append("")
    others = [one for one in record.claims if one.role == "other"]
    if others:
        lines.append("Described too, and no finding of the table:")
        lines += [line for one in others for line in (f"  {one.finding}", *_quotation(one, numbers))]
        lines.append("")
    lines.append("Passages:")
    for place, one in enumerate(record.passages, start=1):
        lines += _wrapped(f"[{place}] {one.source}", "  ", "      ")
        lines.append(f"      {one.address or 'no address'} · {one.licence} · sha256 {one.sha256[:16]}")
    return "\n".join(lines) + "\n"


def _quotation(claim: Claim, numbers: dict[str, int]) -> list[str]:
    return _wrapped(f"“{claim.quote}” [{numbers[claim.passage]}]", "      ")


def _wrapped(text: str, first: str, rest: str | None = None) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()), WIDTH, initial_indent=first, subsequent_indent=first if rest is None else rest
    )
