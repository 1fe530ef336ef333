"""Prints an entry of the knowledge base for a clinician to check.

    python -m data_pipeline.knowledge show "DR-moderate" CFP [--knowledge=DIR] [--overrides=FILE]

Without --knowledge it is the entry that our own notes give. With --overrides the corrections of that file are
shown as they will be applied, before the job is run again with it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import app, flags

from data_pipeline import jobs
from data_pipeline.knowledge import corrections, extract, show
from data_pipeline.knowledge.note import shipped_notes
from data_pipeline.knowledge.passages import split_notes
from fundus_jax.records import ConfigError, DataError, Knowledge

_USAGE = 'python -m data_pipeline.knowledge show "LABEL" CFP|OCT|UWF [--knowledge=DIR] [--overrides=FILE]'


def shipped() -> Iterator[Knowledge]:
    """The entries of all shipped notes, each of its own passages."""
    notes = shipped_notes()
    for note in notes:
        yield extract.from_notes(note.label, note.modality, split_notes([note]), notes)


def entries(knowledge: Path | None, overrides: Path | None) -> list[Knowledge]:
    """The entries of a finished directory, or of the shipped notes, as a file of corrections leaves them."""
    records = list(jobs.read(knowledge, Knowledge) if knowledge else shipped())
    if overrides is None:
        return records
    fixed = corrections.read(overrides)
    have = {(one.label, one.modality) for one in records}
    fresh = [
        corrections.corrected(None, one, overrides.name) for key, one in fixed.items() if key not in have
    ]
    return corrections.apply(records, fixed, overrides.name) + fresh


def main(argv: Sequence[str]) -> None:
    values = flags.FLAGS
    if len(argv) != 4 or argv[1] != "show":
        raise app.UsageError(f"usage: {_USAGE}")
    folder, file = (Path(given) if given else None for given in (values.knowledge, values.overrides))
    try:
        print(show.page(show.find(entries(folder, file), argv[2], argv[3])), end="")
    except (ConfigError, DataError) as error:
        raise SystemExit(f"knowledge: {error}") from error


if __name__ == "__main__":
    flags.DEFINE_string("knowledge", None, "Finished directory of Knowledge; by default our own notes.")
    flags.DEFINE_string("overrides", None, "File of corrections to apply.")
    app.run(main)
