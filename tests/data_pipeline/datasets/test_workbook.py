"""Cells of .xlsx files, tables over them, and files that are none or mean harm."""

import zipfile

import pytest

from data_pipeline.datasets import tables, workbook
from fundus_jax.records import DataError
from tests.data_pipeline.mini_files import book, text

MAIN = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'


def changed(path, name, data):
    """The workbook with one part replaced."""
    with zipfile.ZipFile(path) as archive:
        parts = {one: archive.read(one) for one in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for one, content in {**parts, name: data}.items():
            archive.writestr(one, content)
    return path


def test_cells_come_as_text_in_their_places(tmp_path):
    rows = [["name", "", "grade"], ["a & <b>，ü", 3, ""], [""], ["", "", "x"]]
    path = book(tmp_path / "a.xlsx", {"First": rows, "Other": [["y"]]})
    assert workbook.rows(path) == [["name", "", "grade"], ["a & <b>，ü", "3"], [], ["", "", "x"]]
    assert workbook.rows(path, "other") == [["y"]]
    with pytest.raises(DataError, match="no sheet named 'third'; there are First, Other"):
        workbook.rows(path, "third")
    wide = book(tmp_path / "b.xlsx", {"S": [[str(n) for n in range(60)]]})
    assert workbook.rows(wide)[0][51:54] == ["51", "52", "53"]


def test_other_ways_to_write_a_cell(tmp_path):
    path = book(tmp_path / "a.xlsx", {"S": [["x"]]})
    cells = (
        '<c t="inlineStr"><is><t>in</t></is></c><c r="C2" t="str"><f>A1</f><v>4.0</v></c><c><v>7.0</v></c>'
        '<c r="F2"><v>0.25</v></c><c r="G2" t="s"><v>0</v></c>'
    )
    sheet = f'<worksheet {MAIN}><sheetData><row r="2">{cells}</row></sheetData></worksheet>'
    changed(path, "xl/worksheets/sheet1.xml", sheet)
    runs = f"<sst {MAIN}><si><r><t>rich </t></r><r><t>text</t></r><rPh><t>reading</t></rPh></si></sst>"
    changed(path, "xl/sharedStrings.xml", runs)
    assert workbook.rows(path) == [[], ["in", "", "4.0", "7", "", "0.25", "rich text"]]


@pytest.mark.parametrize(
    ("part", "data", "said"),
    [
        ("xl/worksheets/sheet1.xml", "<worksheet><sheetData>", "bad XML"),
        ("xl/worksheets/sheet1.xml", '<!DOCTYPE x [<!ENTITY a "b">]><x>&a;</x>', "declares a document type"),
        ("xl/worksheets/sheet1.xml", b"\xff\xfe<\x00!\x00", "UnicodeDecodeError"),
        (
            "xl/worksheets/sheet1.xml",
            f'<worksheet {MAIN}><row r="1"><c r="A1" t="s"><v>9</v></c></row></worksheet>',
            "cell A1 points to text '9' of 1",
        ),
        (
            "xl/worksheets/sheet1.xml",
            f'<worksheet {MAIN}><row r="99999999"/></worksheet>',
            "row 99999999 after row 0",
        ),
        (
            "xl/worksheets/sheet1.xml",
            f'<worksheet {MAIN}><row r="1"><c r="ZZZZ1"/></row></worksheet>',
            "cell ZZZZ1 is out of its place",
        ),
        ("xl/workbook.xml", f"<workbook {MAIN}/>", "no sheet named ''; there are none"),
    ],
)
def test_broken_and_hostile_workbooks(part, data, said, tmp_path):
    path = changed(book(tmp_path / "a.xlsx", {"S": [["x"]]}), part, data)
    with pytest.raises(DataError, match=said):
        workbook.rows(path)


def test_a_part_is_bounded(tmp_path, monkeypatch):
    path = book(tmp_path / "a.xlsx", {"S": [["x" * 5000]]})
    monkeypatch.setattr(workbook, "MOST_BYTES", 4000)
    with pytest.raises(DataError, match="xl/sharedStrings.xml has more than the 4000 bytes"):
        workbook.rows(path)
    with pytest.raises(DataError, match="not a readable .xlsx file: BadZipFile"):
        workbook.rows(text(tmp_path / "b.xlsx", "<html>404</html>"))


def test_headers_blank_rows_and_byte_order_mark(tmp_path):
    path = text(tmp_path / "a.csv", "ID, Grade ,,", "", "7,2,,surplus,more", "8", mark=True)
    assert tables.read(path, ("ID", "Grade")) == [
        (3, {"ID": "7", "Grade": "2"}),
        (4, {"ID": "8", "Grade": ""}),
    ]
    two = book(
        tmp_path / "b.xlsx",
        {"S": [["Subject", "Status", "", "Field", ""], ["", "MD", "PLR", "0", "0"], [5, 1, 0]]},
    )
    assert tables.read(two, ("Subject", "Status/PLR"), headers=2)[0][1]["Status/MD"] == "1"
    with pytest.raises(DataError, match=r"columns \['Field/0'\] are missing, or there twice"):
        tables.read(two, ("Field/0",), headers=2)
    latin = tmp_path / "c.csv"
    latin.write_bytes("Größe\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        tables.read(latin, ())
