"""Decisions in files: the last counts, nothing is lost or half written, reviewers do not clash."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from data_pipeline import decisions
from data_pipeline.decisions import Decision, Ledger, trace_sha256
from fundus_jax import records
from fundus_jax.records import ConfigError, DataError, Trace, to_json

SHA = trace_sha256(Trace(example="e", think="t", answer="a", kept=True, reasons=()))


def one(**changes: str) -> Decision:
    """A decision of anna's, changed as told."""
    values = {
        "example": "e", "trace": SHA, "outcome": "accept", "reason": "", "think": "", "answer": "",
        "reviewer": "anna", "time": "2026-11-28T10:00:00Z",
    }  # fmt: skip
    return Decision(**values | changes)


def write(path: Path, *made: Decision) -> Path:
    """A file of these lines."""
    path.write_text("".join(to_json(each) + "\n" for each in made), encoding="utf-8")
    return path


def test_the_last_of_a_reviewer_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "anna.jsonl", one(), one(outcome="reject", reason="other: x"))
    (found,) = decisions.read([path])["e"]
    assert found.outcome == "reject", "of equal times the later line"
    earlier = write(tmp_path / "b.jsonl", one(time="2026-11-28T09:00:00Z"))
    (found,) = decisions.read([path, earlier])["e"]
    assert found.outcome == "reject", "of two files the later time"


def test_withdrawn_is_as_if_nothing_was_decided(tmp_path: Path) -> None:
    path = write(tmp_path / "anna.jsonl", one(), one(outcome="withdraw"))
    assert decisions.read([path]) == {}
    assert decisions.digest(decisions.read([path])) == decisions.digest({})


def test_reviewers_agree_or_do_not(tmp_path: Path) -> None:
    def both(other: Decision) -> bool:
        paths = [write(tmp_path / "a.jsonl", one()), write(tmp_path / "b.jsonl", other)]
        found = decisions.read(paths)["e"]
        assert [each.reviewer for each in found] == ["anna", "ben"]
        return decisions.agree(found)

    assert both(one(reviewer="ben"))
    assert not both(one(reviewer="ben", outcome="reject", reason="other: x"))
    assert not both(one(reviewer="ben", outcome="correct", think="t", answer="a"))


def test_reasons_may_differ_and_corrections_may_not() -> None:
    rejected = [one(outcome="reject", reason=reason) for reason in ("wrong place", "other: x")]
    assert decisions.agree(rejected)
    assert not decisions.agree([one(outcome="correct", think=think, answer="a") for think in ("t", "u")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outcome": "maybe"}, "outcome is 'maybe'"),
        ({"outcome": "reject"}, "reason: empty"),
        ({"outcome": "correct", "think": "t"}, "answer: empty"),
        ({"think": "t"}, "only a correction has one"),
        ({"trace": "x"}, "no sha256"),
        ({"time": "yesterday"}, "has to be UTC"),
        ({"reviewer": " "}, "reviewer: empty"),
    ],
)
def test_what_is_no_decision_is_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        one(**changes)


def test_a_round_trip() -> None:
    made = one(outcome="correct", think="a\nb <x>", answer="ü")
    assert records.from_json(Decision, to_json(made)) == made


def test_a_session_writes_lines_and_takes_them_back(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, "anna")
    ledger.add("e", SHA, "accept")
    ledger.add("e", SHA, "reject", "other: x")
    ledger.add("f", SHA, "accept")
    path = tmp_path / "anna.jsonl"
    assert ledger.take_back() == "f"
    assert decisions.read([path]).keys() == {"e"}
    assert ledger.take_back() == "e"
    assert decisions.read([path])["e"][0].outcome == "accept", "what held before holds again"
    assert ledger.take_back() == "e"
    assert decisions.read([path]) == {}
    assert ledger.take_back() is None
    assert len(path.read_text().splitlines()) == 6, "nothing is ever deleted"
    ledger.close()
    again = Ledger.open(tmp_path, "anna")
    assert again.standing == {}
    again.close()


def test_a_line_that_a_crash_cut_off_goes(tmp_path: Path) -> None:
    path = write(tmp_path / "anna.jsonl", one())
    whole = path.read_bytes()
    path.write_bytes(whole + to_json(one(example="f")).encode()[:40])
    assert decisions.read([path]).keys() == {"e"}
    ledger = Ledger.open(tmp_path, "anna")
    assert path.read_bytes() == whole
    ledger.add("g", SHA, "accept")
    ledger.close()
    assert decisions.read([path]).keys() == {"e", "g"}


def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, "anna")
    ledger.add("e", SHA, "accept")
    path = tmp_path / "anna.jsonl"
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))  # of any file of this process
    try:
        with pytest.raises(OSError, match="part of the line|too large"):
            ledger.add("f", SHA, "accept")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert ledger.standing.keys() == {"e"}
    assert [name for name, _ in ledger.undo] == ["e"]
    ledger.add("f", SHA, "accept")
    ledger.close()
    assert decisions.read([path]).keys() == {"e", "f"}


def test_times_never_go_back_within_a_file(tmp_path: Path) -> None:
    write(tmp_path / "anna.jsonl", one(time="2999-01-01T00:00:00Z"))
    ledger = Ledger.open(tmp_path, "anna")
    ledger.add("e", SHA, "reject", "other: x")
    ledger.close()
    (found,) = decisions.read(decisions.paths(str(tmp_path)))["e"]
    assert (found.outcome, found.time) == ("reject", "2999-01-01T00:00:00Z")


def test_one_file_has_one_session_and_one_reviewer(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, "anna")
    with pytest.raises(ConfigError, match="reviews in another process"):
        Ledger.open(tmp_path, "anna")
    other = Ledger.open(tmp_path, "ben")
    other.add("e", SHA, "accept")
    other.close()
    ledger.close()
    (tmp_path / "ben.jsonl").rename(tmp_path / "cleo.jsonl")
    with pytest.raises(DataError, match="has decisions of ben"):
        Ledger.open(tmp_path, "cleo")
    with pytest.raises(ConfigError, match="it names a file"):
        Ledger.open(tmp_path, "../anna")


def test_paths_and_damage(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        decisions.paths(f"{tmp_path}/none")
    assert decisions.paths(str(tmp_path)) == []
    path = write(tmp_path / "anna.jsonl", one())
    assert decisions.paths(f"{tmp_path}, {path}") == [path, path]
    path.write_text("{}\n")
    with pytest.raises(DataError, match=r"anna.jsonl:1"):
        decisions.read([path])
