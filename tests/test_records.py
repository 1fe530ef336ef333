"""Records survive a round trip through a line of JSON, and nothing else gets in."""

import dataclasses
import json
import os
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fundus_jax import records
from fundus_jax.records import Box, DataError, Example, Findings, Knowledge, Passage, Trace, Verdict

NAMES = st.lists(st.text(string.ascii_lowercase, min_size=1, max_size=8), unique=True, max_size=4)
TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(str.strip)


def example(**changes: object) -> Example:
    values = {
        "id": "phantom/7",
        "dataset": "phantom",
        "split": "train",
        "patient": "7",
        "eye": "OD",
        "modality": "CFP",
        "image": "phantom-000.array_record#7",
        "labels": ("Mild NPDR",),
        "task": "disease",
        "question": "Which disease does the image show?",
        "options": ("Normal", "Mild NPDR"),
        "answer": "Mild NPDR",
        "findings": ("microaneurysm",),
        "boxes": (Box(finding="microaneurysm", x1=10, y1=20, x2=30, y2=40),),
    }
    return Example(**{**values, **changes})  # type: ignore[arg-type]


@st.composite
def some_record(draw: st.DrawFn) -> records.Record:
    names = draw(NAMES)
    text = draw(TEXT)
    return draw(
        st.sampled_from(
            [
                example(id=text, findings=tuple(sorted(names)), question=text),
                example(findings=None, boxes=(), options=(), answer=text),
                Knowledge(
                    label=text,
                    modality="OCT",
                    text=text,
                    required=tuple(names[:1]),
                    supportive=tuple(names[1:2]),
                    excluded=tuple(names[2:]),
                    passages=(
                        Passage(
                            text=text, source="a", address="", licence="c", sha256=records.text_sha256(text)
                        ),
                    ),
                ),
                Findings(
                    example=text,
                    present=tuple(sorted(names)),
                    votes=dict.fromkeys(names, 3),
                    n=5,
                    origin="votes",
                ),
                Trace(example=text, think=text, answer=text, kept=True, reasons=()),
                Trace(example=text, think="", answer="", kept=False, reasons=("no findings",)),
                Verdict(rating="tenuous", reference="findings", reasons=tuple(names)),
            ]
        )
    )


@given(some_record())
def test_round_trip(record: records.Record) -> None:
    line = records.to_json(record)
    assert "\n" not in line
    assert records.from_json(type(record), line) == record
    head = json.loads(line)
    assert (head["schema"], head["kind"]) == (records.SCHEMA, type(record).__name__)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema is 2"),
        ({"schema": True}, "schema is True"),
        ({"kind": "Trace"}, "kind is 'Trace'"),
        ({"extra": 1}, r"unknown fields \['extra'\]"),
        ({"id": 3}, r"place\.id: expected str, got int"),
        ({"id": None}, r"place\.id: expected str, got NoneType"),
        ({"labels": "Normal"}, r"place\.labels: .*got str"),
        ({"labels": [1]}, r"place\.labels\[0\]: expected str, got int"),
        ({"boxes": [{"finding": "drusen"}]}, r"place\.boxes\[0\]: unknown fields \[\], missing fields"),
        (
            {"boxes": [{"finding": "a", "x1": 5, "y1": 1, "x2": 5, "y2": 9}]},
            r"boxes\[0\]: Box .*x1 < x2 <= 999",
        ),
        ({"boxes": [{"finding": "a", "x1": True, "y1": 1, "x2": 5, "y2": 9}]}, r"x1: expected int, got bool"),
        ({"split": "Train"}, "place: Example.split is 'Train'"),
        ({"modality": "FFA"}, "modality is 'FFA'"),
        ({"eye": "left"}, "eye is 'left'"),
        ({"answer": "PDR"}, "answer 'PDR' is not one of the options"),
        ({"options": ["Mild NPDR", "Mild NPDR"]}, "repeats an option"),
        ({"findings": ["b", "a"]}, "sorted"),
        ({"findings": ["a", "a"]}, "sorted"),
        ({"image": "../x#1"}, "Example.image"),
        ({"image": "/etc/x#1"}, "Example.image"),
        ({"image": "x"}, "Example.image"),
        ({"question": " "}, "question is empty"),
    ],
)
def test_a_bad_line_is_refused_by_name(change: dict, message: str) -> None:
    line = {**json.loads(records.to_json(example())), **change}
    with pytest.raises(DataError, match=message):
        records.from_json(Example, json.dumps(line), "place")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Example)])
def test_a_missing_field_is_named(field: str) -> None:
    line = json.loads(records.to_json(example()))
    del line[field]
    with pytest.raises(DataError, match=rf"missing fields \['{field}'\]"):
        records.from_json(Example, json.dumps(line))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "null",
        "{",
        '{"schema": 1, "schema": 1, "kind": "Verdict"}',
        '{"schema": NaN}',
        "[" * 100_000,
        '{"schema": ' + "9" * 10_000 + "}",
        '{"schema": 1, "kind": "Verdict", "rating": "x", "reference": "findings", "reasons": ["\\ud800"]}',
    ],
)
def test_what_is_no_record_is_a_data_error(line: str) -> None:
    with pytest.raises(DataError):
        records.from_json(Verdict, line)


def test_the_invariants_of_the_other_records() -> None:
    with pytest.raises(DataError, match="sha256"):
        Passage(text="a", source="a", address="", licence="c", sha256=records.text_sha256("b"))
    with pytest.raises(DataError, match=r"'drusen'.*two of required"):
        Knowledge(
            label="AMD",
            modality="CFP",
            text="a",
            required=("drusen",),
            supportive=(),
            excluded=("drusen",),
            passages=(),
        )
    with pytest.raises(DataError, match="between 0 and n = 5"):
        Findings(example="a", present=(), votes={"drusen": 6}, n=5, origin="votes")
    with pytest.raises(DataError, match="nobody voted"):
        Findings(example="a", present=("drusen",), votes={}, n=5, origin="votes")
    with pytest.raises(DataError, match="kept is True"):
        Trace(example="a", think="t", answer="a", kept=True, reasons=("flawed",))
    with pytest.raises(DataError, match="kept is False"):
        Trace(example="a", think="t", answer="a", kept=False, reasons=())
    with pytest.raises(DataError, match="rating is 'good'"):
        Verdict(rating="good", reference="findings", reasons=())


def test_a_file_round_trip(tmp_path) -> None:
    path = tmp_path / "some.jsonl"
    written = [example(id=str(i), question="Größe\u2028?") for i in range(3)]
    assert records.write_jsonl(path, written) == 3
    assert list(records.read_jsonl(path, Example)) == written
    assert os.listdir(tmp_path) == ["some.jsonl"]


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path) -> None:
    path = tmp_path / "some.jsonl"
    records.write_jsonl(path, [example()])

    def breaks():
        yield example(id="other")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        records.write_jsonl(path, breaks())
    assert [record.id for record in records.read_jsonl(path, Example)] == ["phantom/7"]
    assert os.listdir(tmp_path) == ["some.jsonl"]


def test_the_new_file_appears_by_a_rename_of_a_complete_one(tmp_path, monkeypatch) -> None:
    path = tmp_path / "some.jsonl"
    records.write_jsonl(path, [example()])

    def no_rename(source, target):
        assert os.fspath(target) == os.fspath(path)
        assert [record.id for record in records.read_jsonl(source, Example)] == ["other"]
        raise OSError("no rename")

    monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(OSError, match="no rename"):
        records.write_jsonl(path, [example(id="other")])
    assert [record.id for record in records.read_jsonl(path, Example)] == ["phantom/7"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "some.jsonl:2: the last line has no line break"),
        (lambda data: data + b"\n", "some.jsonl:3: not a line of JSON"),
        (lambda data: data.replace(b"phantom/7", b"phantom\xff7", 1), "some.jsonl:1: not UTF-8"),
    ],
)
def test_a_damaged_file_names_the_line(tmp_path, damage, message) -> None:
    path = tmp_path / "some.jsonl"
    records.write_jsonl(path, [example(), example()])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        list(records.read_jsonl(path, Example))


def test_records_are_frozen_and_have_no_dict() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        example().id = "x"  # type: ignore[misc]
    assert not hasattr(example(), "__dict__")


@pytest.mark.parametrize("searched", [("drusen", "drusen"), ("haemorrhage", "drusen"), ("drusen",)])
def test_nothing_is_known_of_what_nobody_looked_for(searched: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="searched"):
        example(findings=("haemorrhage",), searched=searched)
    with pytest.raises(DataError, match="searched"):
        Findings(example="a", present=("haemorrhage",), votes={}, n=0, origin="pixels", searched=searched)
    with pytest.raises(DataError, match="there are no masks"):
        example(findings=None, boxes=(), searched=("drusen",))
    with pytest.raises(DataError, match="votes names"):
        Findings(example="a", present=(), votes={"irma": 1}, n=5, origin="both", searched=("drusen",))


def test_old_findings_are_refused_since_nobody_knows_what_was_looked_for() -> None:
    line = json.loads(records.to_json(Findings(example="a", present=(), votes={}, n=0, origin="pixels")))
    del line["searched"]
    with pytest.raises(DataError, match=r"missing fields \['searched'\]"):
        records.from_json(Findings, json.dumps(line))
