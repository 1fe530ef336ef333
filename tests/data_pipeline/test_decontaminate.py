"""The job: folders to pairs, Examples to those that may be used; bad files, parts, and running it again."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline import decontaminate, files, ingest, jobs, manifest
from data_pipeline.datasets.phantom_source import PhantomConfig
from fundus_jax.records import DataError, Example
from tests.data_pipeline import mini_idrid, mini_sets
from tests.data_pipeline.copies import COPIES, retina


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(newline=""), delimiter="\t"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set with a copy of each kind and a broken file, and a benchmark."""
    root = tmp_path_factory.mktemp("folders")
    ours, theirs = root / "ours", root / "theirs" / "inner"
    ours.mkdir()
    theirs.mkdir(parents=True)
    retina(0, "CFP").save(ours / "a.png")
    retina(1, "CFP").save(ours / "b.png")
    (ours / "c.png").write_bytes((ours / "a.png").read_bytes())
    retina(0, "CFP").save(ours / "d.bmp")
    (ours / "e.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    COPIES["all"](retina(1, "CFP")).save(theirs / "f.png")
    retina(2, "CFP").save(theirs / "g.png")
    return ours, theirs.parent


@pytest.fixture(scope="module")
def looked(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("looked")
    decontaminate.look(folders, out)
    return out


def test_folders_to_pairs(folders: tuple[Path, Path], looked: Path) -> None:
    ours, theirs = folders
    found = {(one["a"], one["b"]): one for one in rows(looked / "pairs.tsv")}
    first, other = str(ours / "a.png"), str(ours / "b.png")
    kinds = {pair: one["kind"] for pair, one in found.items() if one["kind"] in ("exact", "same pixels")}
    assert kinds == {(first, str(ours / "c.png")): "exact", (first, str(ours / "d.bmp")): "same pixels"}
    alike = found[other, str(theirs / "inner" / "f.png")]
    assert alike["kind"] in ("same picture", "same eye")
    assert 0 < float(alike["distance"]) < 0.3
    known = {first, str(ours / "c.png"), str(ours / "d.bmp")}
    assert all({*pair} <= known or pair == (alike["a"], alike["b"]) for pair in found)


def test_a_broken_file_is_listed_with_the_reason(folders: tuple[Path, Path], looked: Path) -> None:
    lines = (looked / "prints" / "0-00000.quarantine.jsonl").read_text().splitlines()
    (bad,) = [json.loads(line) for line in lines]
    assert bad["key"] == str(folders[0] / "e.jpg")
    assert "not a readable JPEG" in bad["reason"]
    summary = json.loads((looked / "summary.json").read_text())
    assert (summary["pictures"], summary["removed"]) == (6, {"unreadable": 1})


def test_running_it_again_makes_nothing_again(folders: tuple[Path, Path], looked: Path) -> None:
    def stamps() -> Iterator[tuple[str, int]]:
        for path in sorted(looked.rglob("*.jsonl")):
            if path.name != manifest.MANIFEST:
                yield path.name, path.stat().st_mtime_ns

    before = list(stamps())
    decontaminate.look(folders, looked)
    assert list(stamps()) == before
    assert not list(looked.glob("table-*"))


def test_two_parts_find_what_one_run_finds(folders: tuple[Path, Path], looked: Path, tmp_path: Path) -> None:
    calls = [decontaminate.look(folders, tmp_path, shard=f"{part}/2") for part in (0, 1, 0, 1)]
    assert calls[0] is None, "the prints of the other part are missing"
    assert calls[3], "all are there"
    for name in ("pairs.tsv", "summary.json", "pairs/manifest.jsonl", "prints/manifest.jsonl"):
        assert (tmp_path / name).read_bytes() == (looked / name).read_bytes()


def test_pictures_that_have_other_names_now_are_paired_anew(tmp_path: Path) -> None:
    """Equal pictures, asked about otherwise, have another first question, and that is their name."""
    source = mini_idrid.write(tmp_path / "idrid")
    for name, tasks in (("first", {"disease": 1.0}), ("second", {"modality": 1.0})):
        ingest.run("idrid", source, tmp_path / name, partial_copy=True, tasks=tasks, benchmarks=[])
        (tmp_path / "examples").unlink(missing_ok=True)
        (tmp_path / "examples").symlink_to(tmp_path / name, target_is_directory=True)
        decontaminate.look([tmp_path / "examples"], tmp_path / "looked")
        told = rows(tmp_path / "looked" / "pairs.tsv")
        assert all(one[side].endswith("/" + [*tasks][0]) for one in told for side in "ab"), told


def test_what_another_part_made_of_an_older_picture_is_not_taken(tmp_path: Path) -> None:
    """The prints, and then the pairs, of the other part are of the picture that stood here before."""
    ours, theirs, out = tmp_path / "ours", tmp_path / "theirs", tmp_path / "out"
    for number, folder in enumerate((ours, theirs)):
        folder.mkdir()
        retina(number, "CFP").save(folder / "x.png")
    calls = [decontaminate.look([ours, theirs], out, shard=f"{part}/2") for part in (0, 1, 0)]
    assert calls == [None, None, []]
    retina(0, "CFP").save(theirs / "x.png")
    assert decontaminate.look([ours, theirs], out, shard="0/2") is None, "the print of the other part is old"
    assert decontaminate.look([ours, theirs], out, shard="1/2") is None, "the pairs of the other part are old"
    (pair,) = decontaminate.look([ours, theirs], out, shard="0/2") or ()
    assert (pair.a, pair.b, pair.relation) == (str(ours / "x.png"), str(theirs / "x.png"), "exact")


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image"):
        decontaminate.look([tmp_path], tmp_path / "out")


def test_nothing_is_taken_from_phantoms(tmp_path: Path) -> None:
    examples, clean = tmp_path / "examples", tmp_path / "clean"
    ingest.run("phantom", None, examples, phantom=PhantomConfig(train=12, val=2, test=6))
    decontaminate.run(examples, clean)
    assert [one.id for one in jobs.read(clean, Example)] == [one.id for one in jobs.read(examples, Example)]
    for path in examples.glob("*-00000.jsonl"):
        assert files.sha256(path) == files.sha256(clean / path.name)
    assert json.loads((clean / "summary.json").read_text())["removed"] == {}


def test_copies_that_contradict_each_other_are_told_with_all_their_labels(tmp_path: Path) -> None:
    """TOP's flags: three pairs of copies, of which one agrees in both of its two diseases."""
    source, examples, clean = (
        mini_sets.write("top", tmp_path / "top"),
        tmp_path / "examples",
        tmp_path / "clean",
    )
    head = "filename,ID,age,sex,LR,AMD,RVO,Gla,MH,DR,RD,RP,AO,DM"
    flags = {
        **{"000000_00": "1,0,1", "000000_01": "1,0,0"},
        **{"000001_02": "1,0,1", "000006_01": "0,0,1"},
        **{"000089_00": "1,0,1", "000011_01": "1,0,1"},
    }
    lines = [f"{name}.jpg,{name},60,M,L,{three},0,0,0,0,0,0" for name, three in flags.items()]
    (source / "data.csv").write_text("\n".join([head, *lines]))
    for path in (source / "img").iterdir():
        if path.stem not in flags:
            path.unlink()
    names = list(flags)
    for one, other in zip(names[::2], names[1::2], strict=True):
        shutil.copyfile(source / "img" / f"{one}.jpg", source / "img" / f"{other}.jpg")
    asked = {"disease": 1.0, "modality": 1.0}
    ingest.run("top", source, examples, tasks=asked, partial_copy=True, benchmarks=[])
    decontaminate.run(examples, clean, alike=False)
    assert len(rows(clean / "pairs.tsv")) == 3
    found = [
        {one[side].split("/")[2]: one[f"answer_{side}"] for side in "ab"}
        for one in rows(clean / "conflicts.tsv")
    ]
    assert sorted(found, key=str) == [
        {"000000_00": "AMD; Glaucoma", "000000_01": "AMD"},
        {"000001_02": "AMD; Glaucoma", "000006_01": "Glaucoma"},
    ]


def test_patients_and_pictures_of_the_test_split_leave_training(tmp_path: Path) -> None:
    source = mini_idrid.write(tmp_path / "idrid")
    training = source / "B. Disease Grading" / "1. Original Images" / mini_idrid.HALVES["train"]
    examples, clean, held_out = tmp_path / "examples", tmp_path / "clean", tmp_path / "benchmark"
    ingest.run("idrid", source, examples, tasks={"disease": 1.0, "modality": 1.0}, partial_copy=True)
    held_out.mkdir()
    (held_out / "x.jpg").write_bytes((training / "IDRiD_003.jpg").read_bytes())
    decontaminate.run(examples, clean, against=[held_out])
    kept = {one.id.rpartition("/")[0] for one in jobs.read(clean, Example)}
    everything = {one.id.rpartition("/")[0] for one in jobs.read(examples, Example)}
    assert everything - kept == {"idrid/train/B/IDRiD_006", "idrid/train/B/IDRiD_003"}
    lines = (clean / "train-00000.quarantine.jsonl").read_text().splitlines()
    reasons = {one["key"]: one["reason"] for one in map(json.loads, lines)}
    assert "has pictures that are held out" in reasons["idrid/train/B/IDRiD_006/disease"]
    assert f"as {held_out}/x.jpg (benchmark)" in reasons["idrid/train/B/IDRiD_003/disease"]
    assert len(reasons) == 4, "two questions each"
    summary = json.loads((clean / "summary.json").read_text())
    assert summary["removed"] == {"patient": 1, "picture": 1}
