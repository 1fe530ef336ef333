"""From whole texts to the passages that are searched and quoted: split, made harmless, with their provenance.

Notes and articles take the same way. The text of a passage is what a model sees, what is quoted, and what its
sha256 is of: forms of characters are unified, and characters that show no glyph are gone (`dialog.harmless`).
Neighbours: `suspicion.py` says which articles never get here, `index.py` searches.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from langchain_core.documents import Document
from langchain_text_splitters import RecursiveCharacterTextSplitter

from data_pipeline.knowledge.note import Note
from fundus_jax.dialog import harmless
from fundus_jax.records import Passage, text_sha256

NOTE_CHUNK = 280  # characters; two or three sentences
CHUNK = 800  # of an article, which says less in a sentence
LEAST = 60  # characters; what is shorter is a heading or a remnant
MOST = 2000  # passages of one article; a longer one is cut


@dataclass(frozen=True, slots=True)
class Article:
    """A text from outside of the project. Its paragraphs are parted by empty lines."""

    title: str
    text: str
    source: str
    address: str
    licence: str


def split_notes(notes: Iterable[Note]) -> list[Document]:
    """The notes as passages: pieces of their text, each below the title."""
    splitter = RecursiveCharacterTextSplitter(
        chunk_size=NOTE_CHUNK, chunk_overlap=0, separators=[". ", " "], keep_separator="end"
    )
    found = []
    for note in notes:
        more = {"label": note.label, "modality": note.modality, "references": list(note.references)}
        about = Article(note.title, note.text, f"notes: {note.title}", note.address, note.licence)
        for piece in splitter.split_text(harmless(note.text)):
            found.append(_document(about, f"{note.title}\n{piece.strip()}", more))
    return found


def split_articles(articles: Iterable[Article]) -> list[Document]:
    """Articles as passages, each text once."""
    splitter = RecursiveCharacterTextSplitter(
        chunk_size=CHUNK, chunk_overlap=0, separators=["\n\n", ". ", " ", ""], keep_separator="end"
    )
    found: dict[str, Document] = {}
    for article in articles:
        text = re.sub(r"[^\S\n]+", " ", harmless(article.text))
        pieces = (" ".join(piece.split()) for piece in splitter.split_text(text)[:MOST])
        for piece in pieces:
            if len(piece) >= LEAST:
                document = _document(article, piece, {})
                found.setdefault(document.metadata["sha256"], document)
    return list(found.values())


def _document(article: Article, text: str, more: dict) -> Document:
    metadata = {
        "title": " ".join(harmless(article.title).split()),
        "source": article.source,
        "address": article.address,
        "licence": article.licence,
        "sha256": text_sha256(text),
        **more,
    }
    return Document(page_content=text, metadata=metadata)


def passage(document: Document) -> Passage:
    """A retrieved document as a record."""
    fields = ("source", "address", "licence", "sha256")
    return Passage(text=document.page_content, **{name: document.metadata[name] for name in fields})
