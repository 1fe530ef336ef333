"""Writes the kinds of files that publishers give: tiny pictures, masks, tables, workbooks, volumes."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

SIZE = 48, 32  # width, height


def photo(path: Path, *, grey: bool = False, size: tuple[int, int] = SIZE) -> Path:
    """A smooth picture that depends on the name of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (4, 6) if grey else (4, 6, 3)
    seed = int.from_bytes(path.name.encode()[:8], "big")
    coarse = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(
        path, format="PNG" if path.suffix == ".png" else "JPEG"
    )
    return path


def spot(path: Path, value: int = 255, *, at: tuple[int, int] = (4, 4)) -> Path:
    """A grey mask with one square of 8 x 8 pixels, its upper left corner at x, y."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(SIZE[::-1], np.uint8)
    pixels[at[1] : at[1] + 8, at[0] : at[0] + 8] = value
    Image.fromarray(pixels).save(path)
    return path


def text(path: Path, *lines: str, mark: bool = False) -> Path:
    """A text file, with a byte order mark if wanted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig" if mark else "utf-8")
    return path


def book(path: Path, sheets: dict[str, Sequence[Sequence[str | int]]]) -> Path:
    """An .xlsx as Excel writes it: texts shared, numbers in the cells, empty cells left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shared: list[str] = []
    main = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    link = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    with zipfile.ZipFile(path, "w") as archive:
        listed, links = "", ""
        for number, (name, rows) in enumerate(sheets.items(), 1):
            body = ""
            for at, row in enumerate(rows, 1):
                body += f'<row r="{at}">'
                for column, cell in enumerate(row):
                    place = f"{chr(65 + column // 26 - 1) if column > 25 else ''}{chr(65 + column % 26)}{at}"
                    if isinstance(cell, int):
                        body += f'<c r="{place}"><v>{cell}</v></c>'
                    elif cell:
                        shared.append(cell)
                        body += f'<c r="{place}" t="s"><v>{len(shared) - 1}</v></c>'
                body += "</row>"
            sheet = f"<worksheet {main}><sheetData>{body}</sheetData></worksheet>"
            archive.writestr(f"xl/worksheets/sheet{number}.xml", f'<?xml version="1.0"?>\n{sheet}')
            listed += f'<sheet name="{name}" sheetId="{number}" r:id="rId{number}"/>'
            target = f"worksheets/sheet{number}.xml"
            links += f'<Relationship Id="rId{number}" Type="{link}/worksheet" Target="{target}"/>'
        archive.writestr(
            "xl/workbook.xml", f'<workbook {main} xmlns:r="{link}"><sheets>{listed}</sheets></workbook>'
        )
        relations = "http://schemas.openxmlformats.org/package/2006/relationships"
        archive.writestr(
            "xl/_rels/workbook.xml.rels", f'<Relationships xmlns="{relations}">{links}</Relationships>'
        )
        items = "".join(f"<si><t>{escape(one)}</t></si>" for one in shared)
        archive.writestr("xl/sharedStrings.xml", f"<sst {main}>{items}</sst>")
    return path


def volume(folder: Path, name: str, planes: np.ndarray) -> None:
    """A MetaImage volume of planes [depth, H, W] in uint8 or uint16."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = {"uint8": "MET_UCHAR", "uint16": "MET_USHORT"}[planes.dtype.name]
    depth, height, width = planes.shape
    text(
        folder / f"{name}.mhd",
        "ObjectType = Image",
        "NDims = 3",
        "BinaryData = True",
        "BinaryDataByteOrderMSB = False",
        "CompressedData = False",
        "TransformMatrix = 1 0 0 0 1 0 0 0 1",
        "ElementSpacing = 0.011 0.0019 0.047",
        f"DimSize = {width} {height} {depth}",
        f"ElementType = {kind}",
        f"ElementDataFile = {name}.raw",
    )
    (folder / f"{name}.raw").write_bytes(planes.astype(planes.dtype.newbyteorder("<")).tobytes())
