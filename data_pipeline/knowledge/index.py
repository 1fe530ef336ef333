"""Retrieval: BM25 over passages, alone or with the rank by embeddings, as LangChain retrievers.

LangChain's interface is the seam: whatever ranks passages, what comes after it does not change. Passages are
data: their metadata says where each is from, and nothing in them is followed. Neighbours: `passages.py` makes
them, `embed.py` turns texts into vectors, `knowledge_base.py` asks.
"""

import re
from typing import Any

import numpy as np
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, Field, PrivateAttr

QUERY = "What are the key {modality} findings for diagnosing {label}?"  # the paper's, section 3.2.1
DEPTH = 100  # ranks of either kind that are fused
FLAT = 60  # of reciprocal rank fusion, 1 / (FLAT + rank): Cormack et al. 2009

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

    def ranking(self, query: str) -> list[int]:
        """Indices of all documents that share a term with the query, the best first."""
        terms = [word for word in words(query) if word in self._scorer.vocab_dict]
        if not terms:
            return []
        scores = self._scorer.get_scores(terms)
        return [int(i) for i in np.argsort(-scores, kind="stable") if scores[i] > 0]

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        return [self.documents[i] for i in self.ranking(query)[: self.k]]


class HybridRetriever(Bm25Retriever):
    """Fuses the rank by BM25 with the rank by the cosine of embeddings (reciprocal rank fusion).

    Attributes:
        embeddings: what turns the query into a vector [width].
        vectors: [documents, width] float32, those of the documents by the same model, of length 1.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    embeddings: Embeddings
    vectors: np.ndarray

    def ranking(self, query: str) -> list[int]:
        """Indices of all documents that either rank places among its first, the best first."""
        asked = np.asarray(self.embeddings.embed_query(query), np.float32)
        near = np.argsort(-(self.vectors @ asked), kind="stable")
        ranks = (super().ranking(query)[:DEPTH], [int(i) for i in near[:DEPTH]])
        score: dict[int, float] = {}
        for ranked in ranks:
            for place, i in enumerate(ranked, start=1):
                score[i] = score.get(i, 0.0) + 1 / (FLAT + place)
        return sorted(score, key=lambda i: (-score[i], i))
