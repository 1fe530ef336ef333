"""The findings stage: masks where there are masks, and nothing at all where there are none."""

import pytest

from data_pipeline import findings, jobs, stages
from fundus_jax.records import DataError, Example, Findings
from tests.data_pipeline.made import example, write_examples


def test_pixels() -> None:
    seen = example(id="seen")
    clean = example(id="clean", findings=(), boxes=())
    unseen = example(id="unseen", findings=None, boxes=())
    assert list(findings.PixelSource().find([seen, clean, unseen])) == [
        Findings(example="seen", present=("haemorrhage", "microaneurysm"), votes={}, n=0, origin="pixels"),
        Findings(example="clean", present=(), votes={}, n=0, origin="pixels"),
    ]


def test_masks_say_what_they_are_about() -> None:
    lesions = ("haemorrhage", "hard exudate", "microaneurysm")
    partly = example(id="partly", searched=lesions)
    nothing = example(id="nothing", findings=(), boxes=(), searched=())  # an image without one mask file
    (found,) = findings.PixelSource().find([partly, nothing])
    assert isinstance(found, Findings)
    assert (found.example, found.present, found.searched) == ("partly", partly.findings, lesions)


def test_masks_that_the_modality_can_not_show_are_quarantined() -> None:
    wrong = example(id="wrong", modality="OCT", findings=("drusen", "microaneurysm"))
    (result,) = findings.PixelSource().find([wrong])
    assert isinstance(result, jobs.Quarantine)
    assert "'microaneurysm'" in result.reason
    assert "drusen" not in result.reason


def test_the_stage_keeps_shard_names_and_resumes(tmp_path, caplog) -> None:
    examples = write_examples(
        tmp_path / "examples",
        {"a": [example(id="1"), example(id="2", findings=None, boxes=())], "b": [example(id="3")]},
    )
    with caplog.at_level("INFO"):
        summary = findings.run(examples, tmp_path / "out")
    assert (summary.answers, summary.quarantined, summary.shards_done) == (2, 0, 2)
    assert "without_pixels: 1 of 3" in caplog.text
    assert sorted(stages.hashes(tmp_path / "out")) == ["a", "b"]
    assert [record.example for record in jobs.read(tmp_path / "out", Findings)] == ["1", "3"]
    assert findings.run(examples, tmp_path / "out").shards_skipped == 2


def test_damaged_input_stops_the_stage(tmp_path) -> None:
    examples = write_examples(tmp_path / "examples", {"a": [example()]})
    path = examples / "a.jsonl"
    path.write_text(path.read_text().replace("made/0", "made/1"))
    with pytest.raises(DataError, match=r"a\.jsonl"):
        findings.run(examples, tmp_path / "out")
    with pytest.raises(DataError, match="no shard z"):
        stages.load(examples, "z", Example)
