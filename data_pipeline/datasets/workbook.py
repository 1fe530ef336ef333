"""Reads the cells of an .xlsx file as text: publishers give labels in them, and need no more than that.

An .xlsx is a zip of XML: one part lists the sheets, one the texts that cells share, one a sheet holds its
cells. Formulas are not computed; what Excel stored as their value is taken. Format: ECMA-376, part 1.
Neighbour: `tables`, which gives CSV files and these the same shape.
"""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree  # noqa: S405  (`_part` refuses what would make it expand entities)

from fundus_jax.records import DataError

MOST_BYTES = 64 << 20  # of one unpacked part
MOST_COLUMNS = 16_384
_MAIN = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_LINK = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id"


def rows(path: Path, sheet: str = "") -> list[list[str]]:
    """The cells of a sheet (its name in any case; the first one by default), row by row.

    Empty cells are "", whole numbers have no ".0". Rows that are left out in the file come as [], so that the
    index of a row is Excel's number less one. DataError for what is no .xlsx, too large, or lacks the sheet.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            part = _sheet(archive, path, sheet)
            shared = _shared(archive, path)
            return list(_rows(_part(archive, path, part), shared, path))
    except (zipfile.BadZipFile, OSError, KeyError, RuntimeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a readable .xlsx file: {type(error).__name__}: {error}") from error
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: not a readable .xlsx file: bad XML: {error}") from error


def _part(archive: zipfile.ZipFile, path: Path, name: str) -> ElementTree.Element:
    with archive.open(name) as stream:
        data = stream.read(MOST_BYTES + 1)  # the size in the directory of the zip may be a lie
    if len(data) > MOST_BYTES:
        raise DataError(f"{path}: {name} has more than the {MOST_BYTES} bytes allowed")
    text = data.decode("utf-8-sig")
    if "<!" in re.sub(r"<!--.*?-->|<!\[CDATA\[", "", text, flags=re.S):
        raise DataError(f"{path}: {name} declares a document type; no spreadsheet does")
    return ElementTree.fromstring(text)  # noqa: S314


def _sheet(archive: zipfile.ZipFile, path: Path, wanted: str) -> str:
    book = _part(archive, path, "xl/workbook.xml")
    links = {
        link.get("Id"): str(link.get("Target")) for link in _part(archive, path, "xl/_rels/workbook.xml.rels")
    }
    sheets = {str(one.get("name")): links[one.get(_LINK)] for one in book.iter(f"{_MAIN}sheet")}
    found = [
        target for name, target in sheets.items() if name.strip().lower() == wanted.lower() or not wanted
    ]
    if not found:
        raise DataError(f"{path}: no sheet named {wanted!r}; there are {', '.join(sheets) or 'none'}")
    return found[0].lstrip("/") if found[0].startswith("/") else f"xl/{found[0]}"


def _shared(archive: zipfile.ZipFile, path: Path) -> list[str]:
    if "xl/sharedStrings.xml" not in archive.namelist():
        return []
    return [_text(item) for item in _part(archive, path, "xl/sharedStrings.xml").iter(f"{_MAIN}si")]


def _text(item: ElementTree.Element) -> str:
    """The text of a string item: its runs joined, without the readings that East Asian Excel adds."""
    runs = [item, *item.findall(f"{_MAIN}r")]
    return "".join(text.text or "" for run in runs for text in run.findall(f"{_MAIN}t"))


def _rows(sheet: ElementTree.Element, shared: list[str], path: Path) -> Iterator[list[str]]:
    place = 0
    for row in sheet.iter(f"{_MAIN}row"):
        number = int(row.get("r") or place + 1)
        if not place < number <= 1 << 20:
            raise DataError(f"{path}: row {number} after row {place}")
        yield from ([] for _ in range(place + 1, number))
        place, cells = number, []
        for cell in row.findall(f"{_MAIN}c"):
            at = _column(cell.get("r") or "") if cell.get("r") else len(cells)
            if not len(cells) <= at < MOST_COLUMNS:
                raise DataError(f"{path}: cell {cell.get('r')} is out of its place")
            cells += [""] * (at - len(cells)) + [_value(cell, shared)]
        yield cells


def _column(reference: str) -> int:
    """0 for "A1", 26 for "AA7"."""
    number = 0
    for letter in reference.rstrip("0123456789"):
        number = 26 * number + ord(letter) - ord("A") + 1
    return number - 1


def _value(cell: ElementTree.Element, shared: list[str]) -> str:
    kind, inline = cell.get("t", "n"), cell.find(f"{_MAIN}is")
    if inline is not None:
        return _text(inline)
    text = cell.findtext(f"{_MAIN}v") or ""
    if kind == "s":
        if not text.isdecimal() or int(text) >= len(shared):
            raise DataError(f"cell {cell.get('r')} points to text {text!r} of {len(shared)}")
        return shared[int(text)]
    return text.removesuffix(".0") if kind == "n" else text
