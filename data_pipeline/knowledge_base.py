"""Builds the Knowledge records: for each label and modality in play, retrieve passages and extract findings.

Paper, section 3.2.1. Two back ends: `notes`, which is no language model and does not pretend to be one, takes
the findings from the heads of our own notes, found by BM25; `server` shows the passages of any source to a
model behind a server, and keeps of its claims what a passage says. A label without knowledge is quarantined;
labels that no finding of the table is characteristic of (`notes/without.toml`) are outside of the notes.
Neighbours: `knowledge/` has sources, index, extraction and corrections; `traces.py` uses the records.

    python -m data_pipeline.knowledge_base --examples=DIR --out=DIR [--pairs="CFP:PDR,OCT:DME"]
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from data_pipeline import asking, files, jobs, parts
from data_pipeline.knowledge import corrections, embed, extract, sources
from data_pipeline.knowledge.config import KnowledgeConfig
from data_pipeline.knowledge.corrections import Correction
from data_pipeline.knowledge.extract import Extracted
from data_pipeline.knowledge.index import QUERY, Bm25Retriever, HybridRetriever
from data_pipeline.knowledge.model import ServerModel
from data_pipeline.knowledge.note import Note, undescribed
from data_pipeline.knowledge.sources import Pair
from data_pipeline.stages import LABEL_TASKS
from fundus_jax.chat import Chat, ChatConfig, LostError
from fundus_jax.records import MODALITIES, ConfigError, DataError, Example, Knowledge

SHARD = 8  # labels that a server is asked about in one shard
VERSION = 2  # of the records that the same notes give
SUMMARY = "sources.json"


@dataclasses.dataclass(frozen=True)
class Item:
    """One label and modality with the passages that were retrieved, and its correction where there is one."""

    label: str
    modality: str
    documents: tuple[Document, ...]
    correction: Correction | None

    @property
    def id(self) -> str:
        """What a quarantine calls it."""
        return f"{self.label}/{self.modality}"

    def content(self) -> list:
        """Everything that is read of it, as JSON."""
        texts = [[one.page_content, one.metadata] for one in self.documents]
        return [self.label, self.modality, texts, self.correction.config() if self.correction else None]


def run(
    out: Path,
    *,
    examples: Path | None = None,
    pairs: Sequence[Pair] = (),
    config: KnowledgeConfig | None = None,
    shard: str = "0/1",
    make: Any = sources.fetcher,
) -> jobs.Summary:
    """Writes the Knowledge of all pairs in play to `out`.

    Args:
        out: directory of the stage.
        examples: finished directory of Examples, whose pairs are taken.
        pairs: further (label, modality) pairs.
        config: sources, retrieval, extraction and corrections; by default our own notes.
        shard: as in `jobs.run`.
        make: gives the guarded fetcher; tests put their own in its place.

    Raises ConfigError and DataError; those of `jobs.run` too.
    """
    config = config or KnowledgeConfig()
    config.validate()
    wanted = set(pairs) | set(pairs_in_play(jobs.read(examples, Example)) if examples else ())
    if not wanted:
        raise ConfigError("no label is in play: give examples with a question about a label, or pairs")
    corrected = corrections.read(Path(config.overrides)) if config.overrides else {}
    if config.extractor == "notes" and not config.notes:
        wanted = _described(wanted, set(corrected))
    gathered = sources.gather(config, sorted(wanted), make)
    retriever = retrieval(config, gathered.documents)
    items = [_item(pair, retriever, corrected) for pair in sorted(wanted)]
    if config.extractor == "notes":
        summary = _by_notes(out, items, config, shard)
    else:
        summary = _by_server(out, items, config, shard)
    files.write_atomic(out / SUMMARY, json.dumps(dict(sorted(gathered.counts.items())), indent=1) + "\n")
    logging.info(
        "knowledge (%s): %d records, %d quarantined", config.extractor, summary.answers, summary.quarantined
    )
    return summary


def _described(wanted: set[Pair], corrected: set[Pair]) -> set[Pair]:
    """The pairs without those that the notes leave out on purpose."""
    without = {pair for pair in wanted if pair in undescribed()} - corrected
    if without:
        names = ", ".join(f"{label}/{modality}" for label, modality in sorted(without))
        logging.info("knowledge (notes): no finding of the table is characteristic of %s", names)
    if without == wanted:
        raise ConfigError(
            "no finding of the table is characteristic of any label in play: see docs/knowledge.md"
        )
    return wanted - without


def retrieval(config: KnowledgeConfig, documents: list[Document]) -> Bm25Retriever:
    """The retriever that the configuration names: BM25 alone, or with embeddings."""
    if not config.embeddings:
        return Bm25Retriever(documents=documents, k=config.passages)
    if config.embeddings == "server":
        key = ChatConfig(key=config.embedding_key).secret("knowledge.embedding_key")
        model = embed.ServerEmbeddings(config.embedding_address, config.embedding_model, key)
    else:
        own = embed.packaged() if config.embeddings == "minilm" else Path(config.embeddings)
        model = embed.LocalEmbeddings(own)
    vectors = embed.document_vectors(documents, model, Path(config.cache) if config.cache else None)
    return HybridRetriever(documents=documents, k=config.passages, embeddings=model, vectors=vectors)


def _item(pair: Pair, retriever: BaseRetriever, corrected: dict[Pair, Correction]) -> Item:
    label, modality = pair
    documents = retriever.invoke(QUERY.format(modality=modality, label=label))
    return Item(label, modality, tuple(documents), corrected.get(pair))


def _by_notes(out: Path, items: Sequence[Item], config: KnowledgeConfig, shard: str) -> jobs.Summary:
    notes = sources.notes_of(config)
    heads = [dataclasses.asdict(note) for note in notes]
    key = files.digest([VERSION, [item.content() for item in items], heads])
    job = jobs.Job("knowledge_base", {"source": "notes", "passages": config.passages})
    process = functools.partial(_noted, notes=notes, overrides=Path(config.overrides).name)
    return jobs.run(
        job, [jobs.ShardInput("knowledge", key, items)], process, out, limit=config.limit, shard=shard
    )


def _noted(
    shard: jobs.ShardInput, folder: Path, *, notes: Sequence[Note], overrides: str
) -> Iterator[Knowledge | jobs.Quarantine]:
    del folder  # no side files
    for item in shard.items:  # type: ignore[union-attr]
        try:
            record = extract.from_notes(item.label, item.modality, item.documents, notes)
        except DataError as error:
            record = error
        yield _settled(item, record, overrides)


def _settled(item: Item, record: Knowledge | DataError, overrides: str) -> Knowledge | jobs.Quarantine:
    """The record with its correction, or the quarantine of what has neither."""
    if item.correction is not None:
        return corrections.corrected(
            None if isinstance(record, DataError) else record, item.correction, overrides
        )
    return jobs.Quarantine(item.id, str(record)) if isinstance(record, DataError) else record


def _by_server(out: Path, items: Sequence[Item], config: KnowledgeConfig, shard: str) -> jobs.Summary:
    overrides = Path(config.overrides).name
    told = {
        "extractor": "server",
        "model": config.server.model,
        "prompts": extract.version(),
        "answer_tokens": config.answer_tokens,
        "sources": config.wanted(),
        "retriever": f"bm25+{config.embeddings}" if config.embeddings else "bm25",
        "passages": config.passages,
    }
    if config.eyewiki_permission:
        told["eyewiki_permission"] = config.eyewiki_permission
    parts = [items[start : start + SHARD] for start in range(0, len(items), SHARD)]
    shards = [
        jobs.ShardInput(f"knowledge-{n:04d}", files.digest([one.content() for one in part]), part)
        for n, part in enumerate(parts)
    ]

    async def ask(chat: Chat, item: Item) -> Extracted | jobs.Quarantine:
        model = ServerModel(chat=chat, answer_tokens=config.answer_tokens)
        try:
            found = await extract.by_model(model, item.label, item.modality, item.documents)
        except DataError as error:
            settled = _settled(item, error, overrides)
            return settled if isinstance(settled, jobs.Quarantine) else Extracted(settled, ())
        settled = _settled(item, found.record, overrides)
        return dataclasses.replace(found, record=settled)

    through = asking.through(ask, config.server, "knowledge.server")
    return jobs.run(
        jobs.Job("knowledge_base", told),
        shards,
        _asked,
        out,
        limit=config.limit,
        shard=shard,
        through=through,
    )


def _asked(shard: jobs.ShardInput, folder: Path) -> Iterable[Knowledge]:
    """Yields the records, and leaves the claims that did not hold beside them."""
    lines = []
    for one in shard.items:  # type: ignore[union-attr]
        for lost in one.dropped:
            told = {"label": one.record.label, "modality": one.record.modality, "reason": lost.reason}
            lines.append(json.dumps(told | dataclasses.asdict(lost.said), ensure_ascii=False) + "\n")
        yield one.record
    (folder / f"{shard.name}.dropped.jsonl").write_text("".join(lines), encoding="utf-8")


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


def parse_pairs(text: str) -> tuple[Pair, ...]:
    """ "CFP:PDR,OCT:DME" as (label, modality) pairs; a comma within a label is written as two."""
    pairs = []
    for item in filter(None, text.replace(",,", "\0").split(",")):
        modality, colon, label = item.strip().replace("\0", ",").partition(":")
        if not colon or not label or modality not in MODALITIES:
            raise ConfigError(f"pair {item!r}: write MODALITY:LABEL with one of {', '.join(MODALITIES)}")
        pairs.append((label, modality))
    return tuple(pairs)


_FIELDS = {  # of KnowledgeConfig, which says more of each; its `server` has flags of its own
    "extractor": "notes, or server: a language model that quotes.",
    "sources": "Of the passages: notes, pmc, folder, eyewiki, comma-separated.",
    "notes": "Folder of notes to use in place of the shipped ones.",
    "folder": "Your own PDFs and web pages.",
    "folder_licence": "What is known of their licence.",
    "cache": "Folder that keeps what is fetched.",
    "offline": "Fetch nothing; what the cache lacks is an error.",
    "email": "NCBI asks for one.",
    "ncbi_key": "Environment variable that holds a key of NCBI's.",
    "articles": "PMC articles a label and modality.",
    "licences": "Of PMC articles that are used, comma-separated.",
    "eyewiki_permission": "States that you have the publisher's permission for EyeWiki.",
    "embeddings": "Rank by embeddings too: minilm, server, or a directory with a BERT.",
    "embedding_address": "Server of embeddings, up to and with the /v1.",
    "embedding_model": "Its model.",
    "embedding_key": "Environment variable that holds its key.",
    "passages": "How many passages the extractor sees.",
    "answer_tokens": "Longest answer of the model.",
    "overrides": "File of corrections.",
    "limit": "Share of labels that may be without knowledge.",
}


def _define_flags() -> None:
    flags.DEFINE_string("examples", None, "Finished directory of Examples, whose labels are taken.")
    flags.DEFINE_string("out", None, "Directory for the Knowledge records.", required=True)
    flags.DEFINE_string("pairs", "", "Further labels, as MODALITY:LABEL,MODALITY:LABEL.")
    flags.DEFINE_string("shard", "", parts.HELP)
    default = KnowledgeConfig()
    for name, told in _FIELDS.items():
        _define(name, getattr(default, name), told)
    for one in dataclasses.fields(ChatConfig):
        _define(f"server.{one.name}", getattr(default.server, one.name), "As in fundus_jax/chat.py.")


def _define(name: str, value: object, told: str) -> None:
    kinds = {str: flags.DEFINE_string, int: flags.DEFINE_integer, bool: flags.DEFINE_bool}
    kinds |= {float: flags.DEFINE_float}
    kinds[type(value)](name, value, told)


def config_of(values: flags.FlagValues) -> KnowledgeConfig:
    """The configuration that the flags give."""
    own: dict[str, Any] = {name: values[name].value for name in _FIELDS}
    names = [one.name for one in dataclasses.fields(ChatConfig)]
    server: dict[str, Any] = {name: values[f"server.{name}"].value for name in names}
    return KnowledgeConfig(**own, server=ChatConfig(**server))


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    values = flags.FLAGS
    try:
        run(
            Path(values.out),
            examples=Path(values.examples) if values.examples else None,
            pairs=parse_pairs(values.pairs),
            config=config_of(values),
            shard=parts.chosen(values.shard),
        )
    except (ConfigError, DataError, LostError) as error:
        raise SystemExit(f"knowledge_base: {error}") from error


if __name__ == "__main__":
    _define_flags()
    app.run(main)
