"""Files for others: the paper's tables with our row, VLMEvalKit's TSV and XLSX, predictions.jsonl."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.datasets import workbook as reader
from fundus_jax.evaluation import paper, scores, vlmevalkit
from fundus_jax.evaluation.report import evaluate
from fundus_jax.evaluation.results import write
from fundus_jax.evaluation.workbook import CELL, CUT, workbook
from fundus_jax.records import ConfigError
from tests.evaluation.samples import answered, item

OMNI = [
    item(f"{task}{k}", task=task, level="", part=task) for task in ("MR", "AI", "LG", "DD") for k in range(4)
]


def omni(right: int = 2) -> list[Any]:
    """Answers to four questions of each task of Omni-Fundus, `right` of them right."""
    return [answered(one, "A" if int(one.id[-1]) >= right else "E") for one in OMNI]


def test_the_rows_of_the_paper_average_as_it_says() -> None:
    for name, row in paper._rows(paper.TABLE_5).items():
        overall, *benchmarks = map(float, row[:4])
        assert scores.paper_average("overall", dict(zip(paper.BENCHMARKS, benchmarks, strict=True))) == (
            pytest.approx(overall, abs=0.1001)
        ), name
        assert len(row) == 4 + 13
    for row in paper._rows(paper.TABLE_7).values():
        *benchmarks, overall = map(float, row)
        assert sum(benchmarks) / 3 == pytest.approx(overall, abs=0.1001)


def test_our_row_stands_apart_in_the_columns_of_the_paper(tmp_path: Path) -> None:
    report = evaluate(omni(), published="Omni-Fundus", partial=["4 questions of each task"])
    write(tmp_path / "omni", omni(), report)
    page = (tmp_path / "omni" / "paper.md").read_text()
    assert page == paper.of_folders([tmp_path / "omni"], "this run").replace(
        "Omni-Fundus: PARTIAL:", "PARTIAL:"
    )
    lines = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    head = next(line for line in lines if "L1" in line)
    ours = next(line for line in lines if line[0] == "| this run")
    cells = dict(zip(head[1:], ours[1:], strict=True))
    assert cells["MR"].startswith("**50.0** [")
    assert cells["MR"].endswith("n 4")
    assert cells["Omni-Fundus"].startswith("**50.0** [")
    assert [cells[name] for name in ("Avg", "FunBench", "L1", "BVR")] == ["–"] * 4
    fundus_r1 = next(line for line in lines if "G: Fundus-R1" in line[0])
    assert lines.index(fundus_r1) < lines.index(ours)
    between = [line[0] for line in lines[lines.index(fundus_r1) : lines.index(ours)]]
    assert "| *measured here*" in between
    assert "PARTIAL" in page
    with pytest.raises(ConfigError, match="one more Omni-Fundus"):
        paper.of_folders([tmp_path / "omni", tmp_path / "omni"], "x")
    with pytest.raises(ConfigError, match="report.json is missing"):
        paper.of_folders([tmp_path], "x")


def test_all_three_benchmarks_have_an_average() -> None:
    figure = {"value": 0.6, "low": 0.5, "high": 0.7, "n": 9}
    measured = {
        name: {
            "benchmark": name,
            "extraction": "tail",
            "unparsed": 1,
            "lacking": [],
            "score": figure,
            "groups": dict.fromkeys(groups, figure),
        }
        for name, groups in scores.PAPER_GROUPS.items()
    }
    page = paper.render(measured, "ours")
    row = next(line for line in page.splitlines() if line.startswith("| ours"))
    assert row.split(" | ")[1] == "60.0"
    assert "–" not in row


AWKWARD = 'a\ttab, a "quote"\nand a line; é 眼 & <b> \x07'


def test_others_read_the_answers_again(tmp_path: Path) -> None:
    open_one = item("open", options=(), answers=("PDR",), lettered=False)
    several = item("several", options=("x", "y"), answers=("x", "y"), multiple=True)
    two = item("two", "y", options=("x", "y"), task="t")
    answers = [
        answered(item("q1"), "PDR", AWKWARD),
        answered(two, "B"),
        answered(two, "A", sample=1),
        *(answered(one, "x") for one in (open_one, several)),
    ]
    write(tmp_path, answers, evaluate(answers))
    text = (tmp_path / "vlmevalkit.tsv").read_text(encoding="utf-8")
    table = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t"))
    assert [(row["index"], row["id"], row["answer"], row["prediction"]) for row in table] == [
        ("0", "q1", "E", "PDR"),
        ("1", "two", "B", "B"),
    ]
    assert table[0]["response"] == answers[0].response
    assert (table[0]["E"], table[1]["B"], table[1]["C"], table[1]["category"]) == ("PDR", "y", "", "t")
    cells = reader.rows(tmp_path / "vlmevalkit.xlsx")
    assert cells[0] == list(table[0])
    assert cells[2] == list(table[1].values())
    assert cells[1][-1] == answers[0].response.replace("\x07", "\ufffd")


def test_an_index_is_the_publishers_only_where_all_ids_are_numbers() -> None:
    def indices(*names: str) -> list[object]:
        return [row[0] for row in vlmevalkit.rows([answered(item(name), "PDR") for name in names])[1:]]

    assert indices("4001", "17", "0") == [4001, 17, 0]
    assert indices("4001", "OLIVES:17") == [0, 1]
    assert indices("7", "07") == [0, 1]


def test_pandas_reads_the_same(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    answers = [answered(item("q1"), "PDR", AWKWARD)]
    path = tmp_path / "a.tsv"
    path.write_text(vlmevalkit.as_tsv(vlmevalkit.rows(answers)), encoding="utf-8")
    assert pandas.read_csv(path, sep="\t")["response"][0] == answers[0].response


def test_a_workbook_cuts_what_no_cell_holds_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    path.write_bytes(workbook([["a", 7, ""], ["x" * (CELL + 1), "x" * CELL, "\r\n"]]))
    first, second = reader.rows(path)
    assert first == ["a", "7", ""]
    assert len(second[0]) == len(second[1]) == CELL
    assert second[0].endswith(CUT)
    assert second[2] == "\r\n"
    assert workbook([["a"]]) == workbook([["a"]])


def test_every_line_says_whose_it_is(tmp_path: Path) -> None:
    report = evaluate(omni()) | {"run": {"engine": "sampler", "config": "abc", "work": {}}}
    write(tmp_path, omni(), report)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert {(line["engine"], line["config"]) for line in lines} == {("sampler", "abc")}
    assert lines[0]["prompt"] == "Which disease?"
    assert not (tmp_path / "paper.md").exists()
