"""Builds the Knowledge records: for each label and modality in play, retrieve passages and extract findings.

Paper, section 3.2.1. Here runs the embedded back end, called `notes`: passages from our own short notes,
found by BM25, and the findings of the note's front matter. It is no language model and does not pretend to be
one; a label without a note is quarantined. The online back end brings another LangChain retriever and another
`Extractor`. Neighbours: `knowledge/` has notes and index, `traces.py` uses the records.

    python -m data_pipeline.knowledge_base --examples=DIR --out=DIR [--pairs="CFP:PDR,OCT:DME"]
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from absl import app, flags, logging
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from data_pipeline import files, jobs, parts
from data_pipeline.knowledge.index import QUERY, Bm25Retriever, split_notes
from data_pipeline.knowledge.note import Note, read_notes, shipped_notes
from data_pipeline.stages import LABEL_TASKS
from fundus_jax.records import MODALITIES, ConfigError, DataError, Example, Knowledge, Passage

PASSAGES = 4  # how many retrieved passages the extractor sees

Pair = tuple[str, str]  # (label, modality)


class Extractor(Protocol):
    """Makes a Knowledge record from the passages that were retrieved for one label and modality."""

    name: str

    def extract(self, label: str, modality: str, documents: Sequence[Document]) -> Knowledge:
        """Raises DataError when the passages are not about the label in the modality."""
        ...


@dataclasses.dataclass(frozen=True)
class NotesExtractor:
    """Takes the findings from the front matter of the note that ranks highest among those on the subject.

    Passages of other notes are dropped. Nothing is completed from a table behind the retriever's back: if the
    retrieved passages do not hold the note, there is no record.
    """

    notes: tuple[Note, ...]
    name: str = "notes"

    def extract(self, label: str, modality: str, documents: Sequence[Document]) -> Knowledge:
        subject = [
            document
            for document in documents
            if (document.metadata["label"], document.metadata["modality"]) == (label, modality)
        ]
        if not subject:
            found = [document.metadata["title"] for document in documents]
            raise DataError(
                f"no note on {label} in {modality}: the first passages are {found}; add one to "
                "data_pipeline/knowledge/notes, or leave the label out"
            )
        address = subject[0].metadata["address"]
        note = next(note for note in self.notes if note.address == address)
        return Knowledge(
            label=label,
            modality=modality,
            text=note.text,
            required=note.required,
            supportive=note.supportive,
            excluded=note.excluded,
            passages=tuple(_passage(document) for document in subject),
        )


def _passage(document: Document) -> Passage:
    fields = ("source", "address", "licence", "sha256")
    return Passage(text=document.page_content, **{name: document.metadata[name] for name in fields})


def build(
    pairs: Iterable[Pair], retriever: BaseRetriever, extractor: Extractor
) -> Iterator[Knowledge | jobs.Quarantine]:
    """One Knowledge record a pair, or a quarantine saying why there is none."""
    for label, modality in pairs:
        documents = retriever.invoke(QUERY.format(modality=modality, label=label))
        try:
            yield extractor.extract(label, modality, documents)
        except DataError as error:
            yield jobs.Quarantine(f"{label}/{modality}", str(error))


def pairs_in_play(examples: Iterable[Example]) -> tuple[Pair, ...]:
    """The (label, modality) pairs that questions about a label ask or answer with, sorted.

    Options count too: a rollout may answer with any of them, and is judged by the knowledge of its answer.
    """
    found = {
        (label, example.modality)
        for example in examples
        if example.task in LABEL_TASKS
        for label in (example.answer, *example.options)
    }
    return tuple(sorted(found))


def run(
    out: Path,
    *,
    examples: Path | None = None,
    pairs: Sequence[Pair] = (),
    notes: Path | None = None,
    passages: int = PASSAGES,
    limit: float = 0.02,
    shard: str = "0/1",
) -> jobs.Summary:
    """Writes the Knowledge of all pairs in play to `out`, by the embedded back end.

    Args:
        out: directory of the stage, one shard "knowledge".
        examples: finished directory of Examples, whose pairs are taken.
        pairs: further (label, modality) pairs.
        notes: folder of notes to use in place of the shipped ones.
        passages: how many passages are retrieved for a pair.
        limit: share of pairs that may be quarantined.
        shard: as in `jobs.run`.
    """
    wanted = set(pairs) | set(pairs_in_play(jobs.read(examples, Example)) if examples else ())
    if not wanted:
        raise ConfigError("no label is in play: give examples with a question about a label, or pairs")
    texts = shipped_notes() if notes is None else read_notes(notes)
    items = tuple(sorted(wanted))
    key = files.digest([items, [dataclasses.asdict(note) for note in texts]])
    job = jobs.Job("knowledge_base", {"source": "notes", "passages": passages})
    process = functools.partial(_process, notes=texts, passages=passages)
    inputs = [jobs.ShardInput("knowledge", key, items)]
    summary = jobs.run(job, inputs, process, out, limit=limit, shard=shard)
    logging.info("knowledge (notes): %d records, %d quarantined", summary.answers, summary.quarantined)
    return summary


def _process(
    shard: jobs.ShardInput, folder: Path, *, notes: tuple[Note, ...], passages: int
) -> Iterable[Knowledge | jobs.Quarantine]:
    del folder  # no side files
    retriever = Bm25Retriever(documents=split_notes(notes), k=passages)
    return build(shard.items, retriever, NotesExtractor(notes))  # type: ignore[arg-type]


def parse_pairs(text: str) -> tuple[Pair, ...]:
    """ "CFP:PDR,OCT:DME" as (label, modality) pairs."""
    pairs = []
    for item in filter(None, text.split(",")):
        modality, colon, label = item.strip().partition(":")
        if not colon or not label or modality not in MODALITIES:
            raise ConfigError(f"pair {item!r}: write MODALITY:LABEL with one of {', '.join(MODALITIES)}")
        pairs.append((label, modality))
    return tuple(pairs)


def _define_flags() -> None:
    flags.DEFINE_string("examples", None, "Finished directory of Examples, whose labels are taken.")
    flags.DEFINE_string("out", None, "Directory for the Knowledge records.", required=True)
    flags.DEFINE_string("pairs", "", "Further labels, as MODALITY:LABEL,MODALITY:LABEL.")
    flags.DEFINE_string("notes", None, "Folder of notes to use in place of the shipped ones.")
    flags.DEFINE_float("limit", 0.02, "Share of labels that may be without knowledge.")
    flags.DEFINE_string("shard", "", parts.HELP)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    values = flags.FLAGS
    run(
        Path(values.out),
        examples=Path(values.examples) if values.examples else None,
        pairs=parse_pairs(values.pairs),
        notes=Path(values.notes) if values.notes else None,
        limit=values.limit,
        shard=parts.chosen(values.shard),
    )


if __name__ == "__main__":
    _define_flags()
    app.run(main)
