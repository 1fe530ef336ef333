"""Ingest: Examples with their images, bad files quarantined, and a killed run ending with the same bytes."""

import io
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from data_pipeline import files, images, ingest, jobs, manifest
from data_pipeline.datasets.phantom_source import PhantomConfig
from fundus_jax.records import ConfigError, DataError, Example
from tests.data_pipeline import mini_idrid
from tests.data_pipeline.test_images import bomb

PHANTOMS = PhantomConfig(size=64, train=24, val=6, test=6)


def idrid(source: Path, out: Path, **more) -> jobs.Summary:
    return ingest.run("idrid", source, out, partial_copy=True, **more)


def picture(out: Path, example: Example) -> Image.Image:
    name, index = example.image.split("#")
    reader = ArrayRecordReader(str(out / name))
    return Image.open(io.BytesIO(reader.read([int(index)])[0]))


def original(source: Path, example: Example) -> Path:
    """The file in a miniature that an example's image is from."""
    part, stem = example.id.split("/")[2:4]
    half = mini_idrid.HALVES[example.split]
    return next(p for p in source.rglob(f"{stem}.jpg") if p.parent.name == half and f"{part}. " in str(p))


def contents(out: Path) -> dict[str, bytes]:
    assert not list(out.glob(".*.part-*"))
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".lock")}


def test_examples_and_images_of_a_miniature(tmp_path):
    source, out = mini_idrid.write(tmp_path / "idrid"), tmp_path / "out"
    tasks = dict.fromkeys(ingest.TASKS, 1.0) | {"lesion_location": 2.0}
    assert any(b"010119991" in path.read_bytes() for path in source.rglob("*.jpg"))
    summary = idrid(source, out, tasks=tasks)
    found = list(jobs.read(out, Example, side_files=True))
    assert summary == jobs.Summary(len(found), 0, 2, 0)
    assert len({one.id for one in found}) == len(found)
    by_id = {one.id: one for one in found}
    graded = by_id["idrid/train/B/IDRiD_003/disease"]
    assert (graded.answer, graded.labels, graded.findings) == ("Severe NPDR", ("Severe NPDR",), None)
    assert graded.options == ("Normal", "Mild NPDR", "Moderate NPDR", "Severe NPDR", "PDR")
    assert picture(out, graded).tobytes() == Image.open(original(source, graded)).tobytes()
    assert "idrid/train/B/IDRiD_005/dr_grade" in by_id
    lesions = ("cotton-wool spot", "haemorrhage", "hard exudate", "microaneurysm")
    assert {one.searched for one in found if one.findings is not None} == {lesions}
    assert {one.searched for one in found if one.findings is None} == {None}
    kept = b"".join(ArrayRecordReader(str(out / "train-00000.array_record")).read_all())
    assert b"010119991" not in kept, "the number of a patient's visit is cut out of the images"
    assert not any(b"010119991" in path.read_bytes() for path in out.glob("*.json*"))
    places = [by_id[f"idrid/train/A/IDRiD_02/lesion_location-{n}"] for n in (1, 2)]
    assert {one.answer for one in places} == {"Upper left"}
    assert places[0].labels == ()
    assert len(places[0].findings) == 3
    presence = Counter(one.answer for one in found if one.task == "lesion_presence" and one.split == "train")
    assert presence == {"Yes": 1, "No": 1}, "cotton-wool spots: one training image has them, one has not"
    assert by_id["idrid/train/A/IDRiD_01/disease"].patient == by_id["idrid/train/B/IDRiD_001/disease"].patient


def test_images_are_reduced_and_limited_on_request(tmp_path):
    source, out = mini_idrid.write(tmp_path / "idrid"), tmp_path / "out"
    idrid(source, out, max_side=48, kind="PNG", limit=2, shard_size=1)
    found = list(jobs.read(out, Example))
    assert {entry.name for entry in manifest.complete(out)} == {
        "train-00000", "train-00001", "test-00000", "test-00001",
    }  # fmt: skip
    assert {picture(out, one).size for one in found} == {(48, 32)}
    assert {picture(out, one).format for one in found} == {"PNG"}


def spoil(source: Path) -> None:
    """Three bad files among the graded training images, one among those with masks."""
    folder = next(path for path in source.rglob("a. Training Set") if "B. Disease" in str(path))
    first, second, third = (folder / f"IDRiD_{n:03d}.jpg" for n in (2, 3, 4))
    next(source.rglob("IDRiD_02.jpg")).write_text("an image with masks that is none")
    first.write_bytes(first.read_bytes()[:-150])
    second.write_bytes(bomb())
    third.write_text("<html>404</html>")


def test_corrupt_files_are_quarantined_with_reasons(tmp_path):
    source, out = mini_idrid.write(tmp_path / "idrid", graded=10), tmp_path / "out"
    spoil(source)
    summary = idrid(source, out, quarantine=0.3)
    assert summary.quarantined == 4
    lines = (out / "train-00000.quarantine.jsonl").read_text()
    bad = {"B/IDRiD_002": "truncated", "B/IDRiD_003": "pixels allowed", "B/IDRiD_004": "markup"}
    for key, reason in {**bad, "A/IDRiD_02": "unknown data"}.items():
        line = next(line for line in lines.splitlines() if f'"idrid/train/{key}"' in line)
        assert reason in line
    found = list(jobs.read(out, Example))
    assert {"002", "003", "004"}.isdisjoint(
        one.id.split("IDRiD_")[1][:3] for one in found if "/train/B" in one.id
    )
    for one in found:  # indices still point at the right images
        assert np.array_equal(np.asarray(picture(out, one)), np.asarray(images.decode(original(source, one))))


def test_more_than_two_per_cent_stop(tmp_path):
    source, out = mini_idrid.write(tmp_path / "idrid", graded=60), tmp_path / "out"
    spoil(source)
    with pytest.raises(DataError, match="4 of 6[0-9] items are quarantined, more than 2.0%") as error:
        idrid(source, out)
    assert "idrid/train/B/IDRiD_003: more than the 100000000 pixels allowed" in str(error.value)
    assert "train-00000" not in manifest.load(out)


def test_killed_ingest_resumes_to_the_same_bytes(tmp_path, repo_root):
    source = mini_idrid.write(tmp_path / "idrid")
    undisturbed = tmp_path / "undisturbed"
    command = [
        sys.executable,
        "-m",
        "data_pipeline.ingest",
        "--dataset=idrid",
        f"--source={source}",
        "--partial",
    ]
    command += ["--shard_size=3", "--max_side=48"]
    idrid(source, undisturbed, shard_size=3, max_side=48)
    for point in ("after_process:2", "after_rename:2", "before_manifest:3", "after_manifest:1"):
        out = tmp_path / point.replace(":", "-")
        killed = subprocess.run(
            [*command, f"--out={out}"],
            cwd=repo_root,
            env={**os.environ, "FUNDUS_FAULT": point},
            capture_output=True,
        )
        assert killed.returncode == -signal.SIGKILL
        idrid(source, out, shard_size=3, max_side=48)
        assert contents(out) == contents(undisturbed)


def test_phantoms_in_two_processes_are_those_of_one(tmp_path):
    one = ingest.run("phantom", None, tmp_path / "one", phantom=PHANTOMS, shard_size=8)
    two = ingest.run("phantom", None, tmp_path / "two", phantom=PHANTOMS, shard_size=8, workers=2)
    assert {one.searched for one in jobs.read(tmp_path / "one", Example)} == {None}, "all was looked for"
    assert one == two
    assert one.shards_done == 5
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    found = list(jobs.read(tmp_path / "one", Example, side_files=True))
    assert {one.split for one in found} == {"train", "val", "test"}
    assert {one.task for one in found} >= {"disease", "dr_grade", "lesion_presence"}
    sizes = {picture(tmp_path / "one", one).size for one in found}
    assert sizes == {(64, 64)}


def test_settings_that_cannot_work(tmp_path):
    with pytest.raises(ConfigError, match="known are ddr, deepdrid, .* top, ucsd"):
        ingest.run("eyes", tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match="needs a source"):
        ingest.run("idrid", None, tmp_path / "out")
    with pytest.raises(ConfigError, match="kind 'GIF'"):
        ingest.run("phantom", None, tmp_path / "out", kind="GIF")
    with pytest.raises(ConfigError, match="task 'age'"):
        ingest.run("phantom", None, tmp_path / "out", phantom=PHANTOMS, tasks={"age": 1.0})
    ingest.run("phantom", None, tmp_path / "out", phantom=PHANTOMS)
    with pytest.raises(ConfigError, match="config.tasks.modality: 0.25 there, 'nothing' here"):
        ingest.run("phantom", None, tmp_path / "out", phantom=PHANTOMS, tasks={"disease": 1.0})


def test_command_line(tmp_path, repo_root):
    def call(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "data_pipeline.ingest", *arguments]
        return subprocess.run(command, cwd=repo_root, capture_output=True, text=True)

    shown = call("--list")
    assert shown.returncode == 0
    assert "CC BY 4.0" in shown.stdout
    wrong = call("--dataset=idrid", f"--source={tmp_path}", f"--out={tmp_path / 'out'}")
    assert wrong.returncode == 1
    assert "neither 'A. Segmentation' nor 'B. Disease Grading' is here" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    done = call("--dataset=phantom", "--phantoms=4,0,2", "--phantom_size=56", "--tasks=disease,modality:0.5",
                f"--out={tmp_path / 'out'}", "--workers=2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Counter(one.task for one in jobs.read(tmp_path / "out", Example))["disease"] == 6


def test_real_idrid(tmp_path, shared_data):
    if not (shared_data / "idrid").is_dir():
        pytest.skip(f"no real copy of IDRiD in {shared_data}")
    out = tmp_path / "out"
    summary = ingest.run("idrid", shared_data / "idrid", out, max_side=224, limit=40)
    assert summary.quarantined == 0
    found = list(jobs.read(out, Example))
    assert len({one.image for one in found if one.task == "disease"}) > 60
    small = {picture(out, one).size for one in found}
    assert small == {(224, 149)}


def test_a_full_disk_is_one_by_its_number(tmp_path):
    """The library of the images says it in words; `files.room` makes one line of the number."""

    class Full:
        def write(self, data):
            raise RuntimeError("write() failed: No space left on device; writing")

    with pytest.raises(ConfigError, match="the disk is full.*make room"), files.room(tmp_path):
        ingest._write(Full(), b"image", tmp_path)
