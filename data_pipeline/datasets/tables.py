"""Label tables of publishers, CSV or .xlsx, as rows of text; and checks that name every bad row at once.

Neighbours: `workbook` reads .xlsx; `layout.joined` brings rows and files together.
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from data_pipeline.datasets import workbook
from fundus_jax.records import DataError

T = TypeVar("T")
Row = dict[str, str]
MOST_BYTES = 64 << 20


def read(path: Path, columns: Sequence[str], *, sheet: str = "", headers: int = 1) -> list[tuple[int, Row]]:
    """The rows of a table with a header, each with its line number; blank rows are left out.

    Args:
      path: .csv in UTF-8 (with or without a byte order mark), or .xlsx.
      columns: those that have to be there, once each. All others that have a name are read too.
      sheet: of an .xlsx; the first by default.
      headers: 2 where a first row spans groups of columns: a column below "Status" is named "Status/MD".

    Raises DataError naming all columns that are missing or repeated.
    """
    lines = workbook.rows(path, sheet) if path.suffix.lower() == ".xlsx" else _csv(path)
    names = _names(lines[:headers])
    if bad := [name for name in columns if names.count(name) != 1]:
        raise DataError(f"{path}: columns {bad} are missing, or there twice; the header is {names}")
    found = []
    for number, line in enumerate(lines[headers:], headers + 1):
        cells = [cell.strip() for cell in line]
        if any(cells):
            cells += [""] * (len(names) - len(cells))
            found.append((number, {name: cell for name, cell in zip(names, cells, strict=False) if name}))
    return found


def distinct(rows: Sequence[tuple[int, Row]], columns: Sequence[str]) -> list[tuple[int, Row]]:
    """The rows without those that repeat an earlier one in all of `columns`, as some tables do."""
    first: dict[tuple[str, ...], tuple[int, Row]] = {}
    for number, row in rows:
        first.setdefault(tuple(row[column] for column in columns), (number, row))
    return list(first.values())


def headless(path: Path, columns: Sequence[str], *, delimiter: str | None = None) -> list[tuple[int, Row]]:
    """The rows of a text file without a header, as `read`; by default blanks part the columns.

    A row of another length has "" where cells are missing, and its surplus in the last column.
    """
    found = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if cells := [cell.strip() for cell in line.split(delimiter, len(columns) - 1)]:
            cells += [""] * (len(columns) - len(cells))
            found.append((number, dict(zip(columns, cells, strict=True))))
    return found


def _csv(path: Path) -> list[list[str]]:
    try:
        return list(csv.reader(io.StringIO(_text(path), newline="")))
    except csv.Error as error:
        raise DataError(f"{path}: not a CSV file: {error}") from error


def _text(path: Path) -> str:
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise DataError(f"{path}: no such file, or more than {MOST_BYTES} bytes")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error}; save it as UTF-8") from error


def _names(headers: Sequence[Sequence[str]]) -> list[str]:
    if not headers:
        return []
    first, *rest = ([cell.strip() for cell in row] for row in headers)
    if not rest:
        return first
    width, group, names = max(len(first), len(rest[0])), "", []
    first, second = (row + [""] * (width - len(row)) for row in (first, rest[0]))
    for top, below in zip(first, second, strict=True):
        group = top or group
        names.append(f"{group}/{below}" if below else top)
    return names


def keyed(
    path: Path, rows: Sequence[tuple[int, Row]], key: str | Callable[[Row], str], parse: Callable[[Row], T]
) -> dict[str, T]:
    """What `parse` makes of each row, by the text in column `key` (or that `key` makes of a row).

    `parse` raises DataError for a row that breaks the publisher's own code. Raises one DataError that names
    all bad rows: those, and rows whose key is empty or was there before.
    """
    found: dict[str, T] = {}
    bad: list[str] = []
    for number, row in rows:
        name = row[key] if isinstance(key, str) else key(row)
        if not name or name in found:
            bad.append(f"line {number} ({f'{name} again' if name else 'no name'})")
            continue
        try:
            found[name] = parse(row)
        except DataError as error:
            bad.append(f"line {number} ({name}: {error})")
    if bad:
        raise DataError(f"{path}: {len(bad)} bad rows: {', '.join(bad)}")
    return found


def code(row: Row, column: str, codes: Mapping[str, T]) -> T:
    """The meaning of the code in a column; DataError for one that `codes` does not know."""
    text = row[column]
    if text not in codes:
        raise DataError(f"{column} {text!r} is none of {', '.join(codes)}")
    return codes[text]


def flagged(row: Row, flags: Mapping[str, str]) -> tuple[str, ...]:
    """The meanings of the columns that hold 1, in the order of `flags`; DataError for other than 0 and 1."""
    if bad := [f"{column} {row[column]!r}" for column in flags if row[column] not in ("0", "1")]:
        raise DataError(f"{', '.join(bad)}: neither 0 nor 1")
    return tuple(meaning for column, meaning in flags.items() if row[column] == "1")
