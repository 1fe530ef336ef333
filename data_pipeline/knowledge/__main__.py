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
from fundus_jax.records import Knowledge

_USAGE = 'python -m data_pipeline.knowledge show "LABEL" CFP|OCT|UWF [--knowledge=DIR] [--overrides=FILE]'


def shipped() -> Iterator[Knowledge]:
    """The entries of all shipped notes, each of its own passages."""
    notes = shipped_notes()
    for note in notes:
        yield extract.from_notes(note.label, note.modality, split_notes([note]), notes)


def main(argv: Sequence[str]) -> None:
    values = flags.FLAGS
    if len(argv) != 4 or argv[1] != "show":
        raise app.UsageError(f"usage: {_USAGE}")
    records = list(jobs.read(Path(values.knowledge), Knowledge) if values.knowledge else shipped())
    if values.overrides:
        path = Path(values.overrides)
        fixed = corrections.read(path)
        have = {(one.label, one.modality) for one in records}
        records = corrections.apply(records, fixed, path.name)
        records += [
            corrections.corrected(None, one, path.name) for key, one in fixed.items() if key not in have
        ]
    print(show.page(show.find(records, argv[2], argv[3])), end="")


if __name__ == "__main__":
    flags.DEFINE_string("knowledge", None, "Finished directory of Knowledge; by default our own notes.")
    flags.DEFINE_string("overrides", None, "File of corrections to apply.")
    app.run(main)
