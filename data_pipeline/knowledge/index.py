"""Retrieval: BM25 over passages, as a LangChain retriever.

LangChain's interface is the seam to the online back end (paper, section 3.2.1): a retriever over PMC articles
replaces this one without a change downstream. Passages are data: their metadata says where each is from, and
nothing in them is followed. Neighbours: `note.py` gives the texts, `knowledge_base.py` asks.
"""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_text_splitters import RecursiveCharacterTextSplitter
from pydantic import Field, PrivateAttr

from data_pipeline.knowledge.note import Note
from fundus_jax.records import text_sha256

QUERY = "What are the key {modality} findings for diagnosing {label}?"  # the paper's, section 3.2.1
CHUNK = 280  # characters; two or three sentences

_WORD = re.compile(r"[a-z0-9]+")
# The words of every query, and small words. "no" is not one of them: it tells No DR from the others.
_NOISE = frozenset(
    re.findall("[a-z]+", "what are the key findings for diagnosing of on in a an and is to with by or")
)


def words(text: str) -> list[str]:
    """The terms that BM25 counts."""
    return [word for word in _WORD.findall(text.lower()) if word not in _NOISE]


def _terms(document: Document) -> list[str]:
    """Title and text; the title counts once more, for a passage rarely repeats what the whole is about."""
    return words(document.metadata.get("title", "")) + words(document.page_content)


class Bm25Retriever(BaseRetriever):
    """Ranks documents by BM25 (bm25s, variant of Lucene); ties keep the order of the documents.

    Attributes:
        documents: what is searched; not empty.
        k: how many are returned at most. Documents that share no term with the query never are.
    """

    documents: list[Document] = Field(min_length=1)
    k: int = Field(default=4, gt=0)
    _scorer: Any = PrivateAttr(default=None)

    def model_post_init(self, context: Any, /) -> None:
        import bm25s  # here, because importing it takes hold of jax's devices, which a run shares out first

        super().model_post_init(context)
        scorer = bm25s.BM25(method="lucene")
        scorer.index([_terms(document) for document in self.documents], show_progress=False)
        self._scorer = scorer

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        terms = [word for word in words(query) if word in self._scorer.vocab_dict]
        if not terms:
            return []
        scores = self._scorer.get_scores(terms)
        ranking = np.argsort(-scores, kind="stable")[: self.k]
        return [self.documents[i] for i in ranking if scores[i] > 0]


def split_notes(notes: Iterable[Note]) -> list[Document]:
    """The notes as passages: pieces of their text, each below the title, with provenance as metadata."""
    splitter = RecursiveCharacterTextSplitter(
        chunk_size=CHUNK, chunk_overlap=0, separators=[". ", " "], keep_separator="end"
    )
    return [
        _document(note, f"{note.title}\n{piece.strip()}")
        for note in notes
        for piece in splitter.split_text(note.text)
    ]


def _document(note: Note, text: str) -> Document:
    metadata = {
        "title": note.title,
        "source": f"notes: {note.title}",
        "address": note.address,
        "licence": note.licence,
        "sha256": text_sha256(text),
        "label": note.label,
        "modality": note.modality,
        "references": list(note.references),
    }
    return Document(page_content=text, metadata=metadata)
