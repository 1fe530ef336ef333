"""Items of the held-out Examples: levels, files, prompts, selection, pictures; and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fundus_jax.data import open_image
from fundus_jax.evaluation.benchmarks import BENCHMARKS, PhantomBenchmark, item_of, open_benchmark
from fundus_jax.evaluation.items import Selection
from fundus_jax.records import ConfigError, DataError
from tests.evaluation.samples import example, item, picture, stage


@pytest.fixture
def source(tmp_path: Path) -> Path:
    changes = [
        {},
        {"task": "modality", "options": ("colour fundus photograph", "OCT scan"), "answer": "OCT scan"},
        {"task": "laterality", "options": ("Right eye", "Left eye"), "answer": "Left eye", "findings": None},
        {"split": "train"},
        {"patient": "p0", "modality": "UWF"},
    ]
    return stage(tmp_path / "examples", [example(number, **one) for number, one in enumerate(changes)])


def test_phantoms_on_the_levels_of_funbench(source: Path) -> None:
    benchmark = PhantomBenchmark(source)
    assert [(one.id, one.level, one.task, one.modality) for one in benchmark.items] == [
        ("e0", "L4", "disease", "CFP"),
        ("e1", "L1", "modality", "CFP"),
        ("e2", "L2", "laterality", "CFP"),
        ("e4", "L4", "disease", "UWF"),
    ]
    first, _, third, last = benchmark.items
    assert first.unit == last.unit == "toy/p0"
    assert first.lettered
    assert first.findings == ()
    assert third.findings is None
    assert "A. Normal\nB. Glaucoma\nC. AMD" in first.prompt
    assert first.answer == "Normal"


def test_pictures_are_the_examples_own(source: Path) -> None:
    benchmark = PhantomBenchmark(source)
    for one in benchmark.items:
        number = int(one.id[1:])
        np.testing.assert_array_equal(
            np.asarray(benchmark.load_image(one.images[0]).convert("RGB")), np.asarray(picture(number))
        )
    with pytest.raises(DataError, match="has 5 images"):
        benchmark.load_image("toy.images.array_record#5")
    with pytest.raises(DataError, match="gone.array_record is missing"):
        benchmark.load_image("gone.array_record#0")


def test_prompts_follow_the_selection(source: Path) -> None:
    plain = PhantomBenchmark(source, Selection(style="open", instruct=False, tasks=("disease",))).items[0]
    assert plain.prompt == "Which disease does the image show?"
    assert not plain.lettered
    thinking, direct = (
        PhantomBenchmark(source, Selection(think=think)).items[0].prompt for think in (True, False)
    )
    assert "<think>" in thinking
    assert "<think>" not in direct


def test_lesion_questions_have_a_file_for_each_lesion() -> None:
    asked = {
        "Is there any haemorrhage in this image?": "lesion_presence-haemorrhage",
        "Can hard exudates be seen?": "lesion_presence-hard exudate",
        "Is anything there?": "lesion_presence",
    }
    for question, part in asked.items():
        one = example(0, task="lesion_presence", question=question, options=("Yes", "No"), answer="Yes")
        found = item_of(one, Selection())
        assert (found.level, found.task, found.part) == ("L3", "lesion_presence", part)
    with pytest.raises(DataError, match="'poetry' has no level"):
        item_of(example(0, task="poetry"), Selection())


def test_a_limit_draws_the_same_items_every_time() -> None:
    items = [item(f"q{number}") for number in range(100)]
    drawn = Selection(limit=10).choose(items)
    assert len(drawn) == 10
    assert drawn == Selection(limit=10).choose(items)
    assert [one.id for one in drawn] != [one.id for one in items[:10]]
    assert {one.id for one in drawn} <= {one.id for one in Selection(limit=20).choose(items[::-1])}
    assert Selection(limit=100).choose(items) == tuple(items)


def test_selections_that_leave_nothing_are_named(source: Path) -> None:
    with pytest.raises(
        ConfigError, match="no item has task grading: there are disease, laterality, modality"
    ):
        PhantomBenchmark(source, Selection(tasks=("disease", "grading")))
    with pytest.raises(ConfigError, match="split 'val'"):
        PhantomBenchmark(source, Selection(split="val"))
    with pytest.raises(DataError, match="2 items have only 1 ids"):
        Selection().choose([item("q"), item("q")])


def test_damaged_sources_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished stage directory"):
        PhantomBenchmark(tmp_path)
    records = source / "toy.jsonl"
    records.write_text(records.read_text().replace("Glaucoma", "glaucoma", 1))
    with pytest.raises(DataError, match="toy.jsonl is missing or not what"):
        PhantomBenchmark(source)
    (source / "manifest.jsonl").write_text('{"name": "toy"}\n')
    with pytest.raises(DataError, match="not a manifest line"):
        PhantomBenchmark(source)


def test_pictures_are_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="somewhere: not a readable JPEG, PNG"):
        open_image(b"GIF89a....", "somewhere")
    picture(1).save(tmp_path / "p.png")
    monkeypatch.setattr("fundus_jax.data.MAX_PIXELS", 56 * 56 - 1)
    with pytest.raises(DataError, match="56 x 56 pixels, at most 3135"):
        open_image((tmp_path / "p.png").read_bytes(), "somewhere")


def test_the_table_of_benchmarks(source: Path) -> None:
    assert set(BENCHMARKS) == {"phantom", "funbench", "omnimedvqa", "gmai", "retinal_reason", "reports"}
    assert open_benchmark("phantom", source, Selection()).name == "phantom"
    with pytest.raises(ConfigError, match="'mmlu' is unknown: use one of phantom, funbench, omnimedvqa"):
        open_benchmark("mmlu", source, Selection())
