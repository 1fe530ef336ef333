"""Gathers the passages of all sources for the labels in play, and says what was left out and why.

What comes from outside is screened as a whole (`suspicion.py`) before it is split. Everything that is fetched
goes through the cache, so that gathering twice gives the same passages, byte for byte, without network.
Neighbours: one module a source, `passages.py` splits, `knowledge_base.py` asks.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from absl import logging
from langchain_core.documents import Document

from data_pipeline.knowledge import eyewiki, own_files, pmc
from data_pipeline.knowledge.cache import Cache, MissingError
from data_pipeline.knowledge.config import FETCHED, KnowledgeConfig
from data_pipeline.knowledge.note import Note, read_notes, shipped_notes
from data_pipeline.knowledge.passages import Article, split_articles, split_notes
from data_pipeline.knowledge.suspicion import suspicion
from data_pipeline.net import Fetcher, FetchError
from fundus_jax.records import ConfigError

Pair = tuple[str, str]  # (label, modality)


@dataclass
class Gathered:
    """Passages, and how many articles each source gave or lost: {"pmc: used": 12, "pmc: licence": 3}."""

    documents: list[Document] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def notes_of(config: KnowledgeConfig) -> tuple[Note, ...]:
    """The notes that the configuration means."""
    return read_notes(Path(config.notes)) if config.notes else shipped_notes()


def fetcher(config: KnowledgeConfig) -> Fetcher | None:
    """What may be asked of the network: the hosts of the sources, none offline."""
    if config.offline or not set(FETCHED) & set(config.wanted()):
        return None
    pause = pmc.PAUSE_WITH_KEY if config.ncbi_key else pmc.PAUSE
    hosts = {"pmc": (pmc.HOST, pause), "eyewiki": (eyewiki.HOST, eyewiki.PAUSE)}
    return Fetcher(dict(hosts[name] for name in config.wanted() if name in hosts))


def gather(
    config: KnowledgeConfig,
    pairs: Sequence[Pair],
    make: Callable[[KnowledgeConfig], Fetcher | None] = fetcher,
) -> Gathered:
    """The passages of all sources that the configuration names.

    Args:
      config: validated.
      pairs: what the sources that are searched are asked for.
      make: gives the fetcher; tests put their own in its place.

    Raises ConfigError where no passage is left, and what the sources raise.
    """
    found, articles = Gathered(), []
    cache = Cache(Path(config.cache), make(config)) if config.cache else None
    for name in config.wanted():
        if name == "notes":
            found.documents += split_notes(notes_of(config))
        elif name == "folder":
            own, left_out = own_files.read(Path(config.folder), config.folder_licence)
            found.counts["folder: can not be read"] += len(left_out)
            articles += _sound(own, "folder", found.counts)
        elif cache is not None:
            read = _pmc if name == "pmc" else _eyewiki
            articles += _sound(read(config, cache, pairs, found.counts), name, found.counts)
    found.documents += split_articles(articles)
    for what, count in sorted(found.counts.items()):
        logging.info("knowledge: %s: %d", what, count)
    if not found.documents:
        raise ConfigError(f"the sources {config.sources} gave no passage: {dict(found.counts)}")
    return found


def _sound(articles: Iterable[Article], source: str, counts: Counter[str]) -> list[Article]:
    """The articles that do not speak to a machine."""
    kept = []
    for article in articles:
        why = suspicion(article.title) or suspicion(article.text)
        counts[f"{source}: {'suspicious' if why else 'used'}"] += 1
        if why:
            logging.warning("%s: left out as a whole: it holds %s", article.address, why)
        else:
            kept.append(article)
    return kept


def _pmc(config: KnowledgeConfig, cache: Cache, pairs: Sequence[Pair], counts: Counter[str]) -> list[Article]:
    private = {"email": config.email}
    if config.ncbi_key:
        if not os.environ.get(config.ncbi_key):
            raise ConfigError(f"ncbi_key is {config.ncbi_key!r}; it must name a variable that is set")
        private["api_key"] = os.environ[config.ncbi_key]
    numbers: dict[str, None] = {}
    for label, modality in pairs:
        numbers |= dict.fromkeys(pmc.search(cache, label, modality, config.articles, private))
    found = []
    for number in numbers:
        try:
            found.append(pmc.article(cache, number, config.reusable(), private))
        except pmc.SkippedError as error:
            counts[f"pmc: {error.kind}"] += 1
            logging.info("%s", error)
        except MissingError:
            counts["pmc: not in the cache"] += 1
        except FetchError as error:
            if error.kind not in ("status", "large"):
                raise  # the server, the network or the guard: what is missing now may be there later
            counts["pmc: not to be had"] += 1
            logging.warning("PMC%s: %s", number, error)
    return found


def _eyewiki(
    config: KnowledgeConfig, cache: Cache, pairs: Sequence[Pair], counts: Counter[str]
) -> list[Article]:
    del counts
    most = min(config.articles, 3)
    found = [article for label, modality in pairs for article in eyewiki.read(cache, label, modality, most)]
    return list(dict.fromkeys(found))
