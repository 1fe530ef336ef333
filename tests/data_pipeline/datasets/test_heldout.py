"""Images that benchmarks use leave the training split, with all others of their patients."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline import ingest, jobs
from data_pipeline.datasets import heldout, registry
from data_pipeline.datasets.base import Sample
from fundus_jax.records import ConfigError, DataError, Example
from fundus_jax.workdir import Workdir
from launch import stages
from launch.config import DataConfig, as_json
from tests import small
from tests.data_pipeline import mini_sets


def funbench(root, *paths):
    root.mkdir(parents=True, exist_ok=True)
    task = {"info": {"data source": ["x"]}, "data": {path: {"gt": "A"} for path in paths}}
    (root / "L4b.json").write_text(json.dumps(task))
    return root


def test_names_of_both_benchmarks(tmp_path):
    fun = funbench(
        tmp_path / "FunBench" / "L4",
        "TOP/TOP/001805_00.jpg",
        "JSIEC/0.0.Normal/1ff-45cb817f5b..JPG",
        "RFMiD/1. Original Images/c. Testing Set/344.png",
        "NEH/NEH_UT_2021RetinalOCTDataset/CNV/1/OS/2.jpg",
    )
    omni = tmp_path / "omni"
    omni.mkdir()
    questions = [
        {"image_path": "Images/Diabetic Retinopathy/3/10_left.jpeg"},
        {"image_path": "Images/PALM2019/T1.jpg"},
    ]
    (omni / "DR.json").write_text(json.dumps(questions))
    assert heldout.names([fun.parent, omni]) == {
        "top": {"001805_00"},
        "jsiec": {"1ff-45cb817f5b."},
        "neh": {"1/os/2"},
        "retinal_lesions": {"10_left"},
    }, "RFMiD's test part is published, and its numbers restart"
    with pytest.raises(DataError, match="no file of FunBench or OmniMedVQA here"):
        heldout.names([mini_sets.write("octid", tmp_path / "octid")])
    (omni / "DR.json").write_text("{")
    with pytest.raises(DataError, match="DR.json: not JSON"):
        heldout.names([omni])


def test_wide_photographs_are_numbered_apart(tmp_path):
    """DeepDRiD counts its ultra-widefield patients anew: 58 there is not 58 of the regular ones."""
    held = heldout.names([funbench(tmp_path, "DeepDRiD/ultra-widefield_images/u/58/58_l2.jpg")])
    assert held == {"deepdrid": {"wide/58_l2"}}
    one = Sample(key="", image=b"", split="train", patient="", modality="CFP")
    paths = ("regular_fundus_images/r/Images/58/58_l2.jpg", "ultra-widefield_images/u/Images/58/58_l2.jpg")
    samples = [replace(one, key=path, patient=path, image=tmp_path / path) for path in paths]
    assert [sample.split for sample in heldout.moved("deepdrid", samples, held)] == ["train", "test"]


CASES = {  # data set -> a path in a benchmark, the keys of its patient
    "top": ("TOP/TOP/000000_01.jpg", {"000000_00", "000000_01"}),
    "jsiec": (
        "JSIEC/8.MH/1ff0000e-8d87-11e8-9daf-6045cb817f5b..JPG",
        {"8.MH/1ff0000e-8d87-11e8-9daf-6045cb817f5b."},
    ),
    "retinal_lesions": ("Retinal-Lesions/images_896x896/10_left.jpg", {"10_left", "10_right"}),
    "octid": ("OCTID/AMRD/AMRD2.jpeg", {"AMRD/AMRD2"}),
    "octdl": ("OCTDL/OCTDL/AMD/amd_101_2.jpg", {"amd_101_1", "amd_101_2"}),
    "neh": (
        "NEH/NEH_UT_2021RetinalOCTDataset/CNV/1/OS/2.jpg",
        {f"CNV/1/OS/{n}" for n in (1, 2, 3)} | {"DRUSEN/9/OS/y"},
    ),
    "ucsd": (
        "OCT & X-Ray 2017/train/CNV/CNV-1000-1.jpeg",
        {f"{name}-1000-1" for name in ("CNV", "DME", "DRUSEN", "NORMAL")},
    ),
    "retouch": (
        "RETOUCH/pre_processed/oct_imgs/RETOUCH-TrainingSet-Cirrus_TRAIN001_002.png",
        {f"RETOUCH-TrainingSet-Cirrus_TRAIN001_{n:03d}" for n in range(3)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_whole_patients_move(name, tmp_path):
    path, wanted = CASES[name]
    found = registry.lister(name)(mini_sets.write(name, tmp_path / name), partial=True)
    held = heldout.names([funbench(tmp_path / "benchmark", path)])
    assert set(held) == {name}
    moved = heldout.moved(name, found, held)
    changed = {one.key for one, other in zip(moved, found, strict=True) if one.split != other.split}
    assert changed == {one.key for one in found if one.key in wanted and one.split != "test"}
    assert {one.key for one in moved if one.split == "test"} >= wanted
    assert wanted <= {one.key for one in found}


def test_ingest_takes_folders_of_benchmarks(tmp_path):
    source = mini_sets.write("octdl", tmp_path / "octdl")
    folder = funbench(tmp_path / "benchmark", "OCTDL/OCTDL/AMD/amd_101_2.jpg")
    ingest.run("octdl", source, tmp_path / "out", partial_copy=True, benchmarks=[folder])
    splits = {one.id.split("/")[2]: one.split for one in jobs.read(tmp_path / "out", Example)}
    assert splits["amd_101_1"] == splits["amd_101_2"] == "test"
    assert splits["amd_102_1"] == "train"


@pytest.mark.parametrize("name", sorted(set(heldout.SOURCES.values())))
def test_what_benchmarks_draw_on_is_refused_where_nothing_is_said(name, tmp_path):
    with pytest.raises(
        ConfigError, match=f"{name}: benchmarks ask about .*--benchmarks.*data.benchmarks.*'none'"
    ):
        ingest.run(name, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_has_to_be_said_where_benchmarks_show_published_test_parts(tmp_path):
    ingest.run("rfmid", mini_sets.write("rfmid", tmp_path / "rfmid"), tmp_path / "out", partial_copy=True)


def test_what_a_user_says():
    assert heldout.folders([]) is None
    assert heldout.folders(["none"]) == []
    assert heldout.folders(["fun", "omni"]) == [Path("fun"), Path("omni")]


@pytest.mark.parametrize("said", ["none", "benchmark"])
def test_a_run_keeps_them_out_of_training(said, tmp_path):
    """From the run's config to the Examples that are trained on; by default the run stops."""
    source = mini_sets.write("octdl", tmp_path / "octdl")
    folder = funbench(tmp_path / "benchmark", "OCTDL/OCTDL/AMD/amd_101_2.jpg")
    fields = {"dataset": "octdl", "source": str(source), "partial": True, "near": False, "workers": 1}
    config = small.config(data=DataConfig(**fields))
    work = Workdir(tmp_path / "refused", as_json(config))
    with pytest.raises(ConfigError, match="data.benchmarks"):
        stages.prepare_data(config, work)
    config = small.config(data=DataConfig(**fields, benchmarks="none" if said == "none" else str(folder)))
    work = Workdir(tmp_path / "run", as_json(config))
    stages.prepare_data(config, work)
    clean = [one for one in jobs.read(work.path / "data" / "clean", Example) if one.split == "train"]
    shown = {one.id.split("/")[2] for one in clean}
    assert "amd_102_1" in shown
    named = {"amd_101_1", "amd_101_2"}
    assert shown & named == (named if said == "none" else set())


def test_real_files_of_the_benchmarks(shared_data):
    folders = [shared_data / name for name in ("funbench_samples", "omnimedvqa")]
    if not all(folder.is_dir() for folder in folders):
        pytest.skip(f"no files of FunBench and OmniMedVQA in {shared_data}")
    found = heldout.names(folders)
    assert {"1043_left", "9712_left", "34175_left"} <= found["retinal_lesions"]
    assert "cnv-3030629-1" in found["ucsd"]
    assert "retouch-trainingset-cirrus_train002_118" in found["retouch"]
    assert found["octdl"] == {"amd_2135874_1", "amd_5022300_2"}
    assert len(found["jsiec"]) > 100
