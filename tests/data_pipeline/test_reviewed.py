"""Decisions in the data: rejected traces are left out, corrected ones checked and put in their place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline import decisions, decontaminate, jobs, manifest, reviewed
from fundus_jax.records import Example, Trace
from tests.data_pipeline import reviews
from tests.data_pipeline.reviews import BAD, GOOD, MILD, Made, case, decide

TWO = "The image shows haemorrhages and microaneurysms. " + GOOD.partition(". ")[2]


@pytest.fixture
def made(tmp_path: Path) -> list[Made]:
    """Nine cases in tmp_path/data; the second was rejected by the check, the last is held out."""
    cases = [case(number) for number in range(8)] + [case(8, split="test")]
    cases[1] = case(1, BAD, ("absent finding claimed: drusen",))
    reviews.make(tmp_path / "data", cases)
    return cases


def run(root: Path, **options: object) -> dict[str, Trace]:
    """The traces that hold, by example."""
    data = root / "data"
    book = decisions.read(decisions.paths(str(root / "decisions")))
    folders = (data / name for name in ("examples", "findings", "knowledge", "traces", "reviewed"))
    reviewed.run(*folders, book, **options)  # type: ignore[arg-type]
    return {one.example: one for one in jobs.read(data / "reviewed", Trace)}


def reasons(root: Path) -> dict[str, str]:
    """Why traces were left out, by example."""
    lines = (root / "data" / "reviewed" / "train-00000.quarantine.jsonl").read_text().splitlines()
    return {one["key"]: one["reason"] for one in map(json.loads, lines)}


def test_the_counts_wait_for_all_parts(tmp_path: Path, made: list[Made]) -> None:
    """Also where all parts were there before the last decision."""
    folder, summary = tmp_path / "decisions", tmp_path / "data" / "reviewed" / "summary.json"
    decide(folder, "anna", made[0], "accept")
    run(tmp_path)
    before = summary.read_bytes()
    decide(folder, "anna", made[1], "accept")
    run(tmp_path, shard="1/2")
    assert summary.read_bytes() == before, "the one shard is the other part's"
    run(tmp_path, shard="0/2")
    assert json.loads(summary.read_text())["accepted"] == 2


def test_decisions_are_honoured_and_counted(tmp_path: Path, made: list[Made]) -> None:
    folder = tmp_path / "decisions"
    decide(folder, "anna", made[0], "accept")
    decide(folder, "anna", made[1], "accept")
    decide(folder, "anna", made[2], "reject", "wrong place: not there")
    decide(folder, "ben", made[2], "reject", "other: blurred")
    decide(folder, "anna", made[3], "correct", think=TWO, answer="Moderate NPDR")
    decide(folder, "anna", made[4], "correct", think=BAD, answer="Moderate NPDR")
    decide(folder, "anna", made[5], "accept")
    decide(folder, "ben", made[5], "reject", "answer is wrong")
    decide(folder, "anna", case(6, TWO), "reject", "wrong place")
    decide(folder, "anna", made[8], "correct", think=MILD, answer="Mild NPDR")
    decide(folder, "anna", case(99), "accept")
    held = run(tmp_path)
    assert set(held) == {f"made/{number}" for number in (0, 1, 3, 6, 7, 8)}
    assert held["made/1"].kept, "a person overrules the check"
    assert (held["made/3"].think, held["made/3"].kept) == (TWO, True)
    assert held["made/7"] == made[7].trace, "what nobody decided on stays as it was"
    found = reasons(tmp_path)
    assert found["made/2"] == "rejected: wrong place: not there (anna); other: blurred (ben)"
    assert found["made/4"].startswith("correction fails the check: absent finding claimed: drusen")
    assert found["made/5"] == "reviewers disagree: anna accept, ben reject"
    summary = json.loads((tmp_path / "data" / "reviewed" / "summary.json").read_text())
    assert summary == {
        "traces": 6, "left_out": 3, "accepted": 2, "overruled": 1, "corrected": 2, "corrections_failing": 1,
        "answers_corrected": 0, "rejected": {"other": 1, "wrong place": 1}, "disagree": 1, "void": 3,
    }  # fmt: skip
    rows = (tmp_path / "data" / "reviewed" / "void.tsv").read_text().splitlines()[1:]
    assert [row.split("\t")[0::3] for row in rows] == [
        ["made/6", "the trace has changed since"],
        ["made/8", "a held-out question keeps the published answer"],
        ["made/99", "there is no such trace"],
    ]


def test_a_corrected_answer_reaches_what_is_trained_on(tmp_path: Path) -> None:
    cases = [case(0), case(1, labels=("Mild NPDR",))]
    mild = reviews.Findings(example="made/1", present=("microaneurysm",), votes={}, n=0, origin="pixels")
    cases[1] = Made(cases[1].example, mild, cases[1].trace)
    data = reviews.make(tmp_path / "data", cases)
    decide(tmp_path / "decisions", "anna", cases[1], "correct", think=MILD, answer="Mild NPDR")
    held = run(tmp_path)
    assert (held["made/1"].answer, held["made/1"].kept) == ("Mild NPDR", True)
    assert reviewed.answers(data / "reviewed") == {"made/1": "Mild NPDR"}
    decontaminate.run(data / "examples", data / "clean", alike=False)  # as it was before anybody decided
    decontaminate.run(data / "examples", data / "clean", reviewed=data / "reviewed", alike=False)
    answers = {one.id: one.answer for one in jobs.read(data / "clean", Example)}
    assert answers == {"made/0": "Moderate NPDR", "made/1": "Mild NPDR"}


def test_an_answer_that_is_no_option_fails(tmp_path: Path, made: list[Made]) -> None:
    decide(tmp_path / "decisions", "anna", made[0], "correct", think=GOOD, answer="Measles")
    run(tmp_path)
    assert "'Measles' is not one of the options" in reasons(tmp_path)["made/0"]


def test_the_key_holds_what_was_decided(tmp_path: Path, made: list[Made]) -> None:
    (tmp_path / "decisions").mkdir()
    run(tmp_path)
    out = tmp_path / "data" / "reviewed"
    before = (out / "manifest.jsonl").read_bytes()
    decide(tmp_path / "decisions", "anna", made[0], "reject", "wrong place")
    assert "made/0" not in run(tmp_path)
    assert manifest.load(out)["train-00000"].key not in before.decode()
    ledger = decisions.Ledger.open(tmp_path / "decisions", "anna")
    ledger.add("made/0", "0" * 64, "withdraw")
    ledger.close()
    assert "made/0" in run(tmp_path)
    assert (out / "manifest.jsonl").read_bytes() == before, "withdrawn leaves no trace"
    stamp = (out / "train-00000.jsonl").stat().st_mtime_ns
    run(tmp_path)
    assert (out / "train-00000.jsonl").stat().st_mtime_ns == stamp, "nothing is made again"


def test_the_check_is_that_of_the_traces(tmp_path: Path, made: list[Made]) -> None:
    rules = reviewed.check_rules(tmp_path / "data" / "traces")
    assert rules == {"most_words": 45, "boxes": 0}
    long = " ".join(["So"] * 40) + " " + GOOD
    decide(tmp_path / "decisions", "anna", made[0], "correct", think=long, answer="Moderate NPDR")
    run(tmp_path)
    assert "at most 45 are allowed" in reasons(tmp_path)["made/0"]


def test_an_empty_trace_can_not_be_accepted(tmp_path: Path) -> None:
    empty = case(0, "", ("no findings: nobody looked for any in this image",))
    reviews.make(tmp_path / "data", [empty])
    decide(tmp_path / "decisions", "anna", empty, "accept")
    held = run(tmp_path)
    assert not held["made/0"].kept
    assert "no trace that could be kept" in (tmp_path / "data" / "reviewed" / "void.tsv").read_text()
