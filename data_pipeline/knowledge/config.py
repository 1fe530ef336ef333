"""What the knowledge is made from, and by whom: fields of a run's configuration, and flags of the job."""

from dataclasses import dataclass, field

from data_pipeline.knowledge.eyewiki import require_permission
from fundus_jax.chat import ChatConfig
from fundus_jax.records import ConfigError

EXTRACTORS = ("notes", "server")
SOURCES = ("notes", "pmc", "folder", "eyewiki")
FETCHED = ("pmc", "eyewiki")


@dataclass(kw_only=True, slots=True)
class KnowledgeConfig:
    """Where passages come from, how they are found, and what makes a record of them.

    extractor: "notes", the heads of our own notes, or "server", a language model at `server` whose claims
    have to be quotations. sources: of the passages, comma-separated: notes, pmc, folder, eyewiki (only
    notes for the extractor of that name). notes: a folder of notes in the place of the shipped ones.
    folder, folder_licence: the user's own PDFs and web pages, and what is known of their licence. cache:
    a folder that keeps what is fetched; a search is kept too. offline: nothing is fetched, what the cache
    lacks is an error. email: NCBI asks for one. ncbi_key: the environment variable with a key of NCBI's.
    articles: PMC articles a label and modality. licences: of PMC articles that are used.
    eyewiki_permission: states that you have the publisher's permission (`eyewiki.py`). embeddings: ""
    ranks passages by BM25 alone; "minilm", by the packaged model too; "server", by `embedding_model` at
    `embedding_address`; or a directory with a BERT. embedding_key: as ChatConfig's key. passages: how
    many of them the extractor sees. answer_tokens: its longest answer. overrides: a file of corrections,
    which are applied to the records (`corrections.py`). limit: the share of labels that may be without a
    record.
    """

    extractor: str = "notes"
    sources: str = "notes"
    notes: str = ""
    folder: str = ""
    folder_licence: str = "the user's own copy, not to be passed on"
    cache: str = ""
    offline: bool = False
    email: str = ""
    ncbi_key: str = ""
    articles: int = 10
    licences: str = "CC0,public domain,CC BY,CC BY-SA"
    eyewiki_permission: str = ""
    embeddings: str = ""
    embedding_address: str = ""
    embedding_model: str = ""
    embedding_key: str = ""
    passages: int = 4
    server: ChatConfig = field(default_factory=ChatConfig)
    answer_tokens: int = 2048
    overrides: str = ""
    limit: float = 0.02

    def validate(self, where: str = "knowledge") -> None:
        """Raises ConfigError that names the field, its value and what is allowed."""
        wanted = self.wanted()
        if self.extractor not in EXTRACTORS:
            raise ConfigError(
                f"{where}.extractor is {self.extractor!r}; it must be one of {', '.join(EXTRACTORS)}"
            )
        if not wanted or not set(wanted) <= set(SOURCES):
            raise ConfigError(f"{where}.sources is {self.sources!r}; name some of {', '.join(SOURCES)}")
        if self.extractor == "notes" and wanted != ("notes",):
            raise ConfigError(
                f"{where}.sources is {self.sources!r}, but the extractor notes reads notes only; set "
                f"{where}.extractor to server"
            )
        for name in ("passages", "articles", "answer_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{where}.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.limit <= 1:
            raise ConfigError(f"{where}.limit is {self.limit}; it must be between 0 and 1")
        needs = [("cache", set(FETCHED)), ("email", {"pmc"}), ("folder", {"folder"}), ("licences", {"pmc"})]
        for name, sources in needs:
            if sources & set(wanted) and not getattr(self, name):
                raise ConfigError(
                    f"{where}.{name} is empty; the source {', '.join(sources & set(wanted))} needs it"
                )
        if "eyewiki" in wanted:
            require_permission(self.eyewiki_permission)
        if self.extractor == "server":
            self.server.validate(f"{where}.server")
        if self.embeddings == "server" and not (self.embedding_address and self.embedding_model):
            raise ConfigError(f"{where}.embeddings is server; it needs embedding_address and embedding_model")

    def wanted(self) -> tuple[str, ...]:
        """The sources, without blanks."""
        return tuple(filter(None, (one.strip() for one in self.sources.split(","))))

    def reusable(self) -> tuple[str, ...]:
        """The licences, without blanks."""
        return tuple(filter(None, (one.strip() for one in self.licences.split(","))))
