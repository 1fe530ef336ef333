"""OIMHS and RETOUCH: images and masks that are parts of files; and the volumes of MetaImage."""

import pickle

import numpy as np
import pytest
from PIL import Image

from data_pipeline import images
from data_pipeline.datasets import base, metaimage, oimhs, retouch
from fundus_jax.records import DataError
from tests.data_pipeline import mini_sets
from tests.data_pipeline.mini_files import SIZE, book, volume


def keyed(module, source):
    return {one.key: one for one in module.samples(source, partial=True)}


def test_oimhs_halves(tmp_path):
    found = keyed(oimhs, mini_sets.write("oimhs", tmp_path))
    one = base.annotated(found["1/1"])
    assert one.findings == ("intraretinal fluid", "macular hole"), "retina and choroid are anatomy"
    assert images.size(one.image) == SIZE
    whole = Image.open(tmp_path / "Images" / "1" / "1.png")
    assert np.array_equal(np.asarray(images.load(one.image)), np.asarray(whole)[:, : SIZE[0]]), "without loss"
    hole = next(box for box in one.boxes if box.finding == "macular hole")
    assert (hole.x1, hole.y1) == (20 * 999 // SIZE[0], 12 * 999 // SIZE[1])
    assert base.annotated(found["2/1"]).findings == ()
    assert found["1/1"].patient == found["2/1"].patient == "1", "two eyes of one patient, says the workbook"
    assert (found["1/1"].eye, found["2/1"].eye) == ("OD", "OS")


def test_oimhs_without_workbook_counts_eyes(tmp_path):
    mini_sets.write("oimhs", tmp_path)
    (tmp_path / oimhs.TABLE).unlink()
    assert {one.patient for one in keyed(oimhs, tmp_path).values()} == {"eye 1", "eye 2", "eye 3"}


def test_oimhs_broken(tmp_path):
    mini_sets.write("oimhs", tmp_path)
    Image.new("RGB", (51, 32)).save(tmp_path / "Images" / "3" / "7.png")
    with pytest.raises(DataError, match="7.png: 51 pixels wide; two halves"):
        base.annotated(keyed(oimhs, tmp_path)["3/7"])
    book(tmp_path / oimhs.TABLE, {"S": [["Patient ID", "Eye ID", "Eye category"], [1, 1, "OD"]]})
    with pytest.raises(DataError, match="2 eyes have no row: 2, 3"):
        keyed(oimhs, tmp_path)


def test_retouch_slices(tmp_path):
    found = keyed(retouch, mini_sets.write("retouch", tmp_path))
    assert len(found) == 9
    assert {one.patient for one in found.values()} == {"TRAIN001", "TRAIN025", "TRAIN049"}
    last = base.annotated(found["RETOUCH-TrainingSet-Topcon_TRAIN049_002"])
    assert last.findings == ("intraretinal fluid", "pigment epithelial detachment", "subretinal fluid")
    assert base.annotated(found["RETOUCH-TrainingSet-Topcon_TRAIN049_000"]).findings == ()
    box = next(box for box in last.boxes if box.finding == "subretinal fluid")
    assert (box.x1, box.y1) == (30 * 999 // SIZE[0], 20 * 999 // SIZE[1])
    pixels = np.asarray(images.load(last.image))
    assert np.array_equal(pixels, (np.arange(2 * 32 * 48, 3 * 32 * 48) % 251).reshape(32, 48)), "without loss"
    spectralis = base.annotated(found["RETOUCH-TrainingSet-Spectralis_TRAIN025_001"])
    wanted = np.arange(32 * 48, 2 * 32 * 48).reshape(32, 48) * 14 / 2**16 * 255
    assert np.array_equal(np.asarray(images.load(spectralis.image)), np.floor(wanted))


def test_a_cut_travels_to_a_worker_and_into_the_fingerprint(tmp_path):
    found = list(keyed(retouch, mini_sets.write("retouch", tmp_path)).values())
    assert pickle.loads(pickle.dumps(found)) == found
    assert len({base.fingerprint([one]) for one in found}) == len(found)


def test_retouch_broken(tmp_path):
    home = mini_sets.write("retouch", tmp_path)
    case = home / "TrainingCirrus" / "RETOUCH-TrainingSet-Cirrus" / "TRAIN001"
    truth = np.zeros((3, 32, 48), np.uint8)
    truth[1, 5, 5] = 4
    volume(case, "reference", truth)
    with pytest.raises(DataError, match="plane 1 has codes from 0 to 4; known are 0-3"):
        base.annotated(keyed(retouch, tmp_path)["RETOUCH-TrainingSet-Cirrus_TRAIN001_001"])
    volume(case, "reference", truth[:2])
    with pytest.raises(DataError, match=r"TRAIN001: oct.mhd is \(48, 32, 3\), reference.mhd \(48, 32, 2\)"):
        keyed(retouch, tmp_path)
    (case / "reference.mhd").unlink()
    with pytest.raises(DataError, match="reference.mhd: no such file"):
        keyed(retouch, tmp_path)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_metaimage_planes(dtype, tmp_path):
    planes = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (4, 5, 7)).astype(dtype)
    volume(tmp_path, "v", planes)
    assert np.array_equal(np.stack([metaimage.plane(tmp_path / "v.mhd", n) for n in range(4)]), planes)
    with pytest.raises(DataError, match="plane 4 of 4"):
        metaimage.plane(tmp_path / "v.mhd", 4)


def test_metaimage_big_endian(tmp_path):
    planes = np.arange(24, dtype=np.uint16).reshape(2, 3, 4) * 1000
    volume(tmp_path, "v", planes)
    text = (tmp_path / "v.mhd").read_text().replace("OrderMSB = False", "OrderMSB = True")
    (tmp_path / "v.mhd").write_text(text)
    (tmp_path / "v.raw").write_bytes(planes.astype(">u2").tobytes())
    assert np.array_equal(metaimage.plane(tmp_path / "v.mhd", 1), planes[1])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("NDims = 3", "NDims = 2", "NDims = 2; only 3 is read"),
        ("CompressedData = False", "CompressedData = True", "CompressedData = True; only False"),
        ("MET_UCHAR", "MET_FLOAT", "ElementType = MET_FLOAT; read are MET_UCHAR"),
        ("DimSize = 4 3 2", "DimSize = 4 3", "DimSize = 4 3; three sides"),
        ("DimSize = 4 3 2", "DimSize = 99999 3 2", "three sides of 1 to 8192"),
        ("DimSize = 4 3 2", "DimSize = 4 3 3", "24 bytes, but .* ask for 36"),
        ("v.raw", "LOCAL", "ElementDataFile = LOCAL; a file of that name has to lie beside"),
        ("v.raw", "../secret.raw", "ElementDataFile = ../secret.raw; a file"),
        ("ElementDataFile", "Elements", "without ElementDataFile"),
    ],
)
def test_metaimage_refuses_what_it_does_not_read(old, new, said, tmp_path):
    (tmp_path / "secret.raw").write_bytes(bytes(24))
    home = tmp_path / "case"
    volume(home, "v", np.zeros((2, 3, 4), np.uint8))
    text = (home / "v.mhd").read_text()
    assert old in text
    (home / "v.mhd").write_text(text.replace(old, new))
    with pytest.raises(DataError, match=said):
        metaimage.header(home / "v.mhd")


def test_metaimage_header_is_bounded_and_raw_is_no_link(tmp_path):
    volume(tmp_path / "case", "v", np.zeros((2, 3, 4), np.uint8))
    (tmp_path / "case" / "v.raw").rename(tmp_path / "elsewhere.raw")
    (tmp_path / "case" / "v.raw").symlink_to(tmp_path / "elsewhere.raw")
    with pytest.raises(DataError, match="ElementDataFile = v.raw"):
        metaimage.header(tmp_path / "case" / "v.mhd")
    (tmp_path / "case" / "v.mhd").write_bytes(b"x" * (metaimage.MOST_HEADER + 1))
    with pytest.raises(DataError, match="too many for a MetaImage header"):
        metaimage.header(tmp_path / "case" / "v.mhd")
