"""What holds for every data set, on the miniatures in the publishers' layouts: from listing to Examples."""

import inspect
import io
import sys
from importlib import import_module
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from data_pipeline import findings, ingest, jobs, questions
from data_pipeline.datasets import base, registry
from data_pipeline.datasets.builder import SampleBuilder
from fundus_jax.evaluation.benchmarks import LEVELS
from fundus_jax.findings import vocabulary
from fundus_jax.records import EYES, SPLITS, DataError, Example, Findings
from tests.data_pipeline import mini_files, mini_sets

NAMES = [name for name, row in registry.DATASETS.items() if row.module]
SHARED_PATIENTS = {"idrid", "ucsd"}  # the published split cuts through patients
NOT_ASKED = {"diabetes": "of the person, in TOP; the image need not show it"}
ALL_TASKS = dict.fromkeys(ingest.TASKS, 9.0)


@pytest.fixture(scope="module")
def minis(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("minis")
    return {name: mini_sets.write(name, root / name) for name in NAMES}


def listed(name: str, source: Path, **more) -> list[base.Sample]:
    return registry.lister(name)(source, partial=True, **more)


def test_seventeen_and_the_phantoms():
    assert len(NAMES) == 17
    assert set(registry.DATASETS) - set(NAMES) == {"phantom"}
    assert set(mini_sets.WRITERS) == set(NAMES), "a miniature for each"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_listed_keeps_the_contract(name, minis):
    found, row = listed(name, minis[name]), registry.row(name)
    assert found == listed(name, minis[name])
    assert len({(one.split, one.key) for one in found}) == len(found)
    assert {one.split for one in found} <= set(SPLITS)
    assert {one.eye for one in found} <= set(EYES)
    assert {one.modality for one in found} == set(row.modalities)
    known = registry.diseases(name)
    for one in found:
        assert one.labels.get("disease") in (None, *known)
        assert one.labels.get("dr_grade") in (None, *questions.GRADES)
        assert set(one.searched) <= set(vocabulary(one.modality, extended=True))
        assert (one.masks is None) == (not one.searched)
        assert set(one.masks or ()) == set(one.searched)
        if len(one.diseases) > 1:
            assert "disease" not in one.labels, "no single answer is right"
    sides: dict[str, set[str]] = {}
    for one in found:
        sides.setdefault(one.patient, set()).add(one.split)
    torn = [patient for patient, splits in sides.items() if len(splits) > 1]
    assert bool(torn) == (name in SHARED_PATIENTS)


@pytest.mark.parametrize("name", NAMES)
def test_the_table_names_the_tasks_that_can_be_asked(name, minis):
    found = [base.annotated(one) for one in listed(name, minis[name])]
    asked = questions.ask(found, ALL_TASKS, diseases=dict.fromkeys(registry.diseases(name), 1))
    assert {one.task for about in asked for one in about} == set(registry.row(name).tasks)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_builder_reads_is_asked_for(name, minis):
    """Each label alone gives a question at the rates of `ingest`, and so do several diseases."""
    found, diseases = listed(name, minis[name]), dict.fromkeys(registry.diseases(name), 1)
    many = {task: max(1.0, rate) for task, rate in ingest.TASKS.items()}
    for task in {task for one in found for task in one.labels} - NOT_ASKED.keys():
        stated = next(one for one in found if task in one.labels)
        alone = base.Sample(
            key="a", image=b"", split="train", patient="a", modality=stated.modality,
            labels={task: stated.labels[task]},
        )  # fmt: skip
        asked = [one for one in questions.ask([alone], many, diseases=diseases)[0] if one.task != "modality"]
        assert [one.answer for one in asked] == [stated.labels[task]], task
    several = [one for one in found if len(one.diseases) > 1]
    asked = questions.ask(several, many, diseases=diseases)
    assert sum("disease_presence" in {one.task for one in about} for about in asked) == len(several)
    assert all(one.task in LEVELS for about in asked for one in about)


@pytest.mark.parametrize("name", NAMES)
def test_published_counts_are_checked(name, minis):
    with pytest.raises(DataError, match="published are .*the copy is partial"):
        registry.lister(name)(minis[name])


@pytest.mark.parametrize("name", NAMES)
def test_wrong_folder(name, tmp_path):
    (tmp_path / "holiday").mkdir()
    with pytest.raises(DataError, match=r"test_wrong_folder.*(no folder here has|tables named|is here)"):
        listed(name, tmp_path)
    with pytest.raises(DataError):
        listed(name, tmp_path / "nowhere")


def test_ingest_runs_over_every_miniature(minis, tmp_path):
    for name in NAMES:
        out = tmp_path / name
        summary = ingest.run(
            name, minis[name], out, partial_copy=True, tasks=ALL_TASKS, shard_size=20, benchmarks=[]
        )
        assert summary.quarantined == 0
        found = list(jobs.read(out, Example, side_files=True))
        assert len(found) == summary.answers > 0
        assert {one.image for one in found} >= {one.image for one in found if one.task == "modality"}
        assert len({one.image for one in found}) == len(listed(name, minis[name]))
        for image in {one.image for one in found}:
            file, index = image.split("#")
            Image.open(io.BytesIO(ArrayRecordReader(str(out / file)).read([int(index)])[0])).verify()
        records = findings.run(out, tmp_path / f"{name}-findings")
        assert records.quarantined == 0, "every mask shows a finding that its modality can show"
        pixels = {one.example for one in jobs.read(tmp_path / f"{name}-findings", Findings)}
        assert pixels == {one.id for one in found if one.findings is not None}


def test_labels_of_an_image_with_several_diseases_are_all_kept(minis, tmp_path):
    ingest.run("rfmid", minis["rfmid"], tmp_path / "out", partial_copy=True)
    found = list(jobs.read(tmp_path / "out", Example))
    several = [one for one in found if one.id.startswith("rfmid/train/3/")]
    assert {one.labels for one in several} == {("Media haze", "Tessellated fundus")}
    assert "disease" not in {one.task for one in several}
    haze = next(one for one in found if one.id == "rfmid/train/4/disease")
    assert haze.answer == "Macular hole"
    assert len(haze.options) == questions.DRAWN


@pytest.mark.parametrize("name", NAMES)
def test_each_module_has_its_tfds_builder(name):
    module = import_module(f"data_pipeline.datasets.{registry.row(name).module}")
    classes = [
        one
        for _, one in inspect.getmembers(module, inspect.isclass)
        if issubclass(one, SampleBuilder) and one is not SampleBuilder
    ]
    assert len(classes) == 1
    assert classes[0].samples is module.samples
    assert classes[0].MANUAL_DOWNLOAD_INSTRUCTIONS
    assert classes[0].__module__ == module.__name__


@pytest.mark.parametrize("name", ["octid", "retouch", "deepdrid"])
def test_tfds_builder(name, minis, tmp_path, monkeypatch):
    module = import_module(f"data_pipeline.datasets.{name}")
    builder_class = getattr(module, name.capitalize())
    monkeypatch.setattr(builder_class, "samples", staticmethod(lambda source: listed(name, source)))
    builder = builder_class(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=minis[name]))
    for split in {one.split for one in listed(name, minis[name])}:
        wanted = {one.key.encode(): one for one in listed(name, minis[name]) if one.split == split}
        rows = {row["key"]: row for row in builder.as_data_source(split)}
        assert rows.keys() == wanted.keys()
        for key, row in rows.items():
            assert row["image"].shape == (*mini_files.SIZE[::-1], 3)
            assert len(row["findings"]) == len(base.annotated(wanted[key]).findings or ())
    assert "tensorflow" not in sys.modules


def test_list_is_readable_in_a_hundred_columns():
    text = registry.table()
    assert max(map(len, text.splitlines())) <= 100
    for name, row in registry.DATASETS.items():
        block = next(part for part in text.split("\n\n") if part.startswith(f"{name} ("))
        plain = " ".join(block.split())
        for said in (
            row.title,
            row.images,
            row.pixel_labels,
            row.licence,
            row.citation,
            row.where,
            *row.tasks,
        ):
            assert said in plain
