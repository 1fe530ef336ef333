"""Corrections by a clinician: a file that overrides records, with who, when and why.

    [[correction]]
    label = "Moderate NPDR"
    modality = "CFP"
    required = ["microaneurysm", "haemorrhage"]   # any of text and the three sets; the rest stays
    by = "A. Example, retina service"
    when = 2026-11-28
    why = "Haemorrhages without microaneurysms are hardly ever graded as moderate here."

A correction becomes a passage of the record, and the claim behind each finding that it moves; so a corrected
entry shows that it is one. It may also make a record where there was none, and then gives text and findings.
"""

import datetime
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fundus_jax import findings
from fundus_jax.records import MODALITIES, ROLES, Claim, DataError, Knowledge, Passage, text_sha256

SOURCE = "correction by "
LICENCE = "the correction's author's"
_TEXTS = ("label", "modality", "by", "why")


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """One entry of the file; None leaves a field as it is."""

    label: str
    modality: str
    by: str
    when: str
    why: str
    text: str | None = None
    required: tuple[str, ...] | None = None
    supportive: tuple[str, ...] | None = None
    excluded: tuple[str, ...] | None = None

    def config(self) -> dict:
        """The correction as JSON, for a job's key."""
        return asdict(self)


def read(path: Path) -> dict[tuple[str, str], Correction]:
    """The corrections of a file by (label, modality). Raises DataError that names the entry and the fault."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{path}: not a file of corrections in TOML: {error}") from error
    entries = content.get("correction")
    if content.keys() != {"correction"} or not isinstance(entries, list):
        raise DataError(f"{path}: holds {sorted(content)}; a file of corrections holds [[correction]]s only")
    found: dict[tuple[str, str], Correction] = {}
    for number, entry in enumerate(entries, start=1):
        one = _correction(entry, f"{path}: correction {number}")
        if (one.label, one.modality) in found:
            raise DataError(f"{path}: correction {number}: {one.label} on {one.modality} is corrected twice")
        found[one.label, one.modality] = one
    return found


def _correction(entry: object, where: str) -> Correction:
    fields = set(Correction.__dataclass_fields__)
    if not isinstance(entry, dict) or not entry.keys() <= fields:
        unknown = sorted(set(entry) - fields) if isinstance(entry, dict) else entry
        raise DataError(f"{where}: {unknown} are no fields; known are {', '.join(sorted(fields))}")
    for name in (*_TEXTS, *({"text"} & entry.keys())):
        if not isinstance(entry.get(name), str) or not entry[name].strip():
            raise DataError(f"{where}: {name} is {entry.get(name)!r}, expected a text")
    if type(entry.get("when")) is not datetime.date:
        raise DataError(f"{where}: when is {entry.get('when')!r}, expected a date such as 2026-11-28")
    if entry["modality"] not in MODALITIES:
        raise DataError(f"{where}: modality is {entry['modality']!r}; it is one of {', '.join(MODALITIES)}")
    known = findings.vocabulary(entry["modality"], extended=True)
    for role in set(ROLES) & entry.keys():
        names = entry[role]
        if (
            not isinstance(names, list)
            or not all(name in known for name in names)
            or len(set(names)) < len(names)
        ):
            raise DataError(
                f"{where}: {role} is {names!r}; it lists findings of {entry['modality']}, each once: "
                f"{', '.join(known)}"
            )
    if not {"text", *ROLES} & entry.keys():
        raise DataError(f"{where}: corrects nothing; give text, required, supportive or excluded")
    sets = {role: tuple(entry[role]) for role in ROLES if role in entry}
    return Correction(**{**entry, **sets, "when": entry["when"].isoformat()})


def corrected(record: Knowledge | None, correction: Correction, name: str) -> Knowledge:
    """The record with its correction.

    Args:
      record: None where the sources gave none.
      correction: of the same label and modality.
      name: of the file that it stands in, which becomes the passage's address.

    Raises DataError where the sets would overlap, or where nothing is left to stand for a missing record.
    """
    where = f"{name}: the correction of {correction.label} on {correction.modality}"
    text = " ".join(correction.why.split())
    note = Passage(
        text=text,
        source=f"{SOURCE}{correction.by}, {correction.when}",
        address=name,
        licence=LICENCE,
        sha256=text_sha256(text),
    )
    if record is None:
        if correction.text is None or not (
            correction.required or correction.supportive or correction.excluded
        ):
            raise DataError(f"{where}: there is no record to correct, so it has to give a text and findings")
        record = Knowledge(
            label=correction.label, modality=correction.modality, text=correction.text,
            required=(), supportive=(), excluded=(), passages=(),
        )  # fmt: skip
    sets = {
        role: getattr(record, role) if getattr(correction, role) is None else getattr(correction, role)
        for role in ROLES
    }
    before = {name: role for role in ROLES for name in getattr(record, role)}
    moved = [(name, role) for role in ROLES for name in sets[role] if before.get(name) != role]
    stay = tuple(one for one in record.claims if one.role == "other" or one.finding in sets[one.role])
    new = tuple(Claim(finding=name, role=role, quote=text, passage=note.sha256) for name, role in moved)
    try:
        return replace(
            record,
            text=record.text if correction.text is None else correction.text,
            **sets,
            passages=(*record.passages, note),
            claims=(*stay, *new),
        )
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def apply(
    records: Iterable[Knowledge], corrections: Mapping[tuple[str, str], Correction], name: str
) -> list[Knowledge]:
    """The records, those that a correction is about corrected."""
    return [
        corrected(one, corrections[one.label, one.modality], name)
        if (one.label, one.modality) in corrections
        else one
        for one in records
    ]
