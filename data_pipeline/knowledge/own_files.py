"""The user's own PDFs and web pages, from a folder: what they may read themselves, and nobody here may ship.

A guideline such as the AAO's Preferred Practice Patterns is free to read and not free to pass on; a lab that
has it puts the file here. The files are the user's, but who made them is not known: sizes, pages, characters
and seconds are bounded, links and scripts are not followed, and a file that can not be read is named and
passed over.
"""

import time
from pathlib import Path

from absl import logging

from data_pipeline import files
from data_pipeline.knowledge.passages import Article
from fundus_jax.records import ConfigError, DataError

SUFFIXES = (".pdf", ".html", ".htm")
MOST_FILES = 2000
LARGEST = 64 << 20  # bytes of a file
MOST_PAGES = 2000  # of a PDF
MOST_CHARACTERS = 4_000_000  # of a file's text
SECONDS = 120.0  # for a PDF, looked at between pages
LEAST = 200  # characters; a file that says less is a scan, or a frame without content


def read(folder: Path, licence: str) -> tuple[list[Article], dict[str, str]]:
    """The articles in a folder and below it, in the order of their names, and file -> why it was left out.

    Args:
      folder: with PDFs and HTML files.
      licence: what the user states about them; it goes with each quotation.

    Raises ConfigError for a folder without such files.
    """
    folders = [folder, *sorted(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())]
    paths = [path for one in folders for path in files.listing(one, SUFFIXES, most=MOST_FILES)]
    if not paths or len(paths) > MOST_FILES:
        raise ConfigError(
            f"{folder}: {len(paths)} files ({', '.join(SUFFIXES)}); 1 to {MOST_FILES} are expected"
        )
    found, left_out = [], {}
    for path in paths:
        name = path.relative_to(folder).as_posix()
        try:
            text = _text(path)
        except DataError as error:
            left_out[name] = str(error)
            logging.warning("%s: left out: %s", name, error)
            continue
        found.append(Article(path.stem, text, f"own file: {name}", name, licence))
    return found, left_out


def _text(path: Path) -> str:
    size = path.stat().st_size
    if size > LARGEST:
        raise DataError(f"{size} bytes; at most {LARGEST} are read")
    text = _pdf(path) if path.suffix.lower() == ".pdf" else _html(path.read_bytes())
    if len(text.strip()) < LEAST:
        raise DataError(f"{len(text.strip())} characters of text: a scan, or a page without content")
    return text


def _pdf(path: Path) -> str:
    from pypdf import PdfReader  # here: a second that only those pay who have PDFs
    from pypdf.errors import PyPdfError

    until = time.monotonic() + SECONDS
    pages, size = [], 0
    try:
        reader = PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise DataError("encrypted")
        if len(reader.pages) > MOST_PAGES:
            raise DataError(f"{len(reader.pages)} pages; at most {MOST_PAGES} are read")
        for page in reader.pages:
            pages.append(page.extract_text())
            size += len(pages[-1])
            if size > MOST_CHARACTERS or time.monotonic() > until:
                raise DataError(f"more than {MOST_CHARACTERS} characters, or {SECONDS:g} s")
    except DataError:
        raise
    except (
        PyPdfError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RecursionError,
        OSError,
    ) as error:
        raise DataError(f"not a PDF that can be read ({type(error).__name__}: {error})"[:300]) from None
    return "\n\n".join(_joined(page) for page in pages)


def _joined(page: str) -> str:
    """A page's lines as running text: a hyphen at a line's end joins, and headers are not told apart."""
    return page.replace("-\n", "").replace("\n", " ")


def _html(body: bytes) -> str:
    import trafilatura  # here, for the same reason

    text = trafilatura.extract(body, include_comments=False, include_tables=False, deduplicate=False) or ""
    if len(text) > MOST_CHARACTERS:
        raise DataError(f"more than {MOST_CHARACTERS} characters")
    return text.replace("\n", "\n\n")
