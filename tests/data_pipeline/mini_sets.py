"""Writes a miniature of each data set in its publisher's layout: few tiny pictures, true names and tables."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.datasets import jsiec, octdl, octid, rfmid
from tests.data_pipeline import mini_idrid
from tests.data_pipeline.mini_files import book, photo, spot, text, volume


def write_fgadr_143_9(root: Path) -> None:
    """Two images, nine lesions; the second shows none of them."""
    four = ("microaneurysm", "hemorrhages", "hard exudate", "soft exudate")
    lesions = (
        *four,
        "irma",
        "new vessels",
        "venous beading",
        "preretinal haemorrhage",
        "vitreous haemorrhage",
    )
    lines = ["image,lesion,mask"]
    for number, name in enumerate(("0001_1.png", "0002_1.png")):
        photo(root / "Seg-set" / "Original_Images" / name)
        for lesion in lesions:
            mask = (
                f"nine/{lesion}/{name}" if number == 0 and lesion in ("microaneurysm", "hard exudate") else ""
            )
            if mask:
                spot(root / mask, 130)  # soft edges: 128 and above is the lesion
            lines.append(f"Seg-set/Original_Images/{name},{lesion},{mask}")
    text(root / "fgadr_143_9.csv", *lines)
    text(root / "Seg-set" / "DR_Seg_Grading_Label.csv", "0001_1.png,3", "0002_1.png,0")


def write_grape(root: Path) -> None:
    """Two patients, three eyes, five visits, one of them without a photograph."""
    head = ["Subject Number", "Laterality", "Age"], ["", "", ""]
    baseline = [
        [*head[0], "Corresponding CFP", "Progression Status", "", "", "VF", ""],
        [*head[1], "", "PLR2", "PLR3", "MD", "0", "1"],
        [1, "OD", 40, "1_OD_1.jpg", 0, 0, 0, 28, 30],
        [1, "OS", 40, "1_OS_1.jpg", 1, 0, 1, 28, 30],
        [2, "OD", 61, "2_OD_1.jpg", 0, 1, 0, 28, 30],
    ]
    visits = [
        ["Subject Number", "Laterality", "Visit Number", "Interval Years", "Corresponding CFP"],
        ["", "", "", "", ""],
        [1, "OD", 1, 0, "1_OD_1.jpg"],
        [1, "OD", 2, 1, "1_OD_2.jpg"],
        [1, "OS", 1, 0, "1_OS_1.jpg"],
        [2, "OD", 1, 0, "2_OD_1.jpg"],
        [2, "OD", 2, 2, "/"],
    ]
    book(root / "VF and clinical information.xlsx", {"Baseline": baseline, "Follow-up": visits})
    for name in ("1_OD_1", "1_OD_2", "1_OS_1", "2_OD_1"):
        photo(root / "CFPs" / "CFPs" / f"{name}.jpg")
        photo(root / "Annotated Images" / f"{name}.jpg")


def write_jsiec(root: Path) -> None:
    """One image a class, with the double dot of the true names; and Kaggle's second copy of one."""
    for number, name in enumerate(jsiec.CLASSES):
        photo(root / "1000images" / name / f"1ff{number:05x}-8d87-11e8-9daf-6045cb817f5b..JPG")
    photo(root / "1000images" / "1000images" / name / f"1ff{number:05x}-8d87-11e8-9daf-6045cb817f5b..JPG")


def write_retinal_lesions(root: Path) -> None:
    """Both eyes of patient 10, one of 430: a lesion, one that only stands under 127, and none."""
    home = root / "retinal-lesions-v20191227"
    text(
        home / "dr_grades.csv",
        "image id,kaggle label,our label",
        "10_left,0,1",
        "10_right,2,4",
        "430_left,0,0",
    )
    for name in ("10_left", "10_right", "430_left"):
        photo(home / "images_896x896" / f"{name}.jpg")
    spot(home / "lesion_segs_896x896" / "10_left" / "microaneurysm.png", at=(36, 4))
    spot(home / "lesion_segs_896x896" / "10_right" / "neovascularization.png")
    spot(home / "lesion_segs_896x896" / "10_right" / "preretinal_hemorrhage.png", 127)


def write_rfmid(root: Path) -> None:
    """Six, two and two images in IEEE's layout, with none, one or two flags; IDs restart in each part."""
    rows = {1: (), 2: ("DR",), 3: ("MH", "TSLN"), 4: ("MHL",), 5: (), 6: ("DR", "DN")}
    parts = (("a. Training Set", "a. RFMiD_Training", 6), ("b. Validation Set", "b. RFMiD_Validation", 2))
    for folder, name, many in (*parts, ("c. Testing Set", "c. RFMiD_Testing", 2)):
        lines = [",".join(("ID", "Disease_Risk", *rfmid.CODES))]
        for number in range(1, many + 1):
            photo(root / "1. Original Images" / folder / f"{number}.png")
            flags = ("1" if code in rows[number] else "0" for code in rfmid.CODES)
            lines.append(",".join((str(number), str(int(bool(rows[number]))), *flags)))
        text(root / "2. Groundtruths" / f"{name}_Labels.csv", *lines, mark=True)


ODIR_HEAD = [
    "ID", "Patient Age", "Patient Sex", "Left-Fundus", "Right-Fundus",
    "Left-Diagnostic Keywords", "Right-Diagnostic Keywords", *"NDGCAHMO",
]  # fmt: skip
ODIR_ROWS = (
    ("Training Set", 0, "cataract", "normal fundus", "C"),
    ("Training Set", 1, "moderate non proliferative retinopathy，epiretinal membrane",
     "lens dust，drusen", "DO"),
    ("Training Set", 2, "low image quality", "suspected glaucoma", "G"),
    ("Off-site Test Set", 3000, "wet age-related macular degeneration",
     "mild nonproliferative retinopathy", "AD"),
    ("On-site Test Set", 4999, "severe proliferative diabetic retinopathy，hypertensive retinopathy",
     "anterior segment image", "DH"),
)  # fmt: skip


def odir_row(number: int, left: str, right: str, flags: str) -> list[str | int]:
    """One row of an annotation table."""
    head = [number, 60, "Male", f"{number}_left.jpg", f"{number}_right.jpg", left, right]
    return [*head, *(int(flag in flags) for flag in "NDGCAHMO")]


def write_odir(root: Path) -> None:
    """Five patients: a remark, two diagnoses, a grade in several spellings, photographs that are none."""
    names = {
        "Training Set": "training",
        "Off-site Test Set": "off-site test",
        "On-site Test Set": "on-site test",
    }
    for folder, name in names.items():
        rows = [odir_row(*row[1:]) for row in ODIR_ROWS if row[0] == folder]
        book(
            root / folder / "Annotation" / f"{name} annotation (English).xlsx", {"Sheet1": [ODIR_HEAD, *rows]}
        )
        book(root / folder / "Annotation" / f"{name} annotation (Chinese).xlsx", {"Sheet1": [["ID"], [1]]})
        for row in rows:
            for cell in row[3:5]:
                photo(root / folder / "Images" / str(cell))


def write_ddr(root: Path) -> None:
    """Graded images, one ungradable; masks for some of them, one on another side, and for one that is not."""
    grading = {"train": {"a-1": 0, "a-2": 2, "a-3": 5}, "valid": {"b-1": 4}, "test": {"c-1": 1, "c-2": 3}}
    home = root / "DDR-dataset"
    for part, grades in grading.items():
        for name in grades:
            photo(home / "DR_grading" / part / f"{name}.jpg")
        text(home / "DR_grading" / f"{part}.txt", *(f"{name}.jpg {grade}" for name, grade in grades.items()))
    for part, name in (("train", "a-2"), ("train", "c-2"), ("valid", "d-1"), ("test", "c-1")):
        part_ = home / "lesion_segmentation" / part
        photo(part_ / "image" / f"{name}.jpg")
        for code in ("EX", "HE", "MA", "SE"):
            labels = part_ / ("segmentation label" if part == "valid" else "label")
            spot(labels / code / f"{name}.tif", 255 if code == "HE" or code + name == "MAa-2" else 0)


def write_octid(root: Path) -> None:
    """Three grey images a class."""
    for name in octid.CLASSES:
        for number in range(1, 4):
            photo(root / name / f"{name}{number}.jpeg", grey=True)


def write_octdl(root: Path) -> None:
    """Eight images of seven patients, two of one; AMD in all its stages."""
    rows = [
        ("amd_101_1", "AMD", "early", "drusen", 101, 0),
        ("amd_101_2", "AMD", "intermediate", "MNV_suspected", 101, 0),
        ("amd_102_1", "AMD", "late", "MNV", 102, "OD"),
    ]
    others = [name for name in octdl.CLASSES if name != "AMD"]
    rows += [
        (f"{name.lower()}_20{n}_1", name, "none", "none", f"20{n}", "OS") for n, name in enumerate(others)
    ]
    columns = "file_name,disease,subcategory,condition,patient_id,eye,sex,year,image_width,image_hight"
    text(root / "OCTDL_labels.csv", columns, *(",".join(map(str, (*row, 0, 0, 48, 32))) for row in rows))
    for name, disease, *_ in rows:
        photo(root / "OCTDL" / disease / f"{name}.jpg", grey=True)


def write_oimhs(root: Path) -> None:
    """Three eyes of two patients; a hole and cysts in one B-scan, anatomy alone in the others."""
    colours = {(255, 255, 0): (0, 24, 48, 32), (0, 255, 0): (0, 12, 48, 24)}  # choroid, retina
    for eye, scan in (("1", "1"), ("1", "2"), ("2", "1"), ("3", "7")):
        left = np.asarray(Image.open(photo(root / "scratch.png")))
        right = np.zeros_like(left)
        findings = (
            {(255, 0, 0): (20, 12, 28, 24), (0, 0, 255): (4, 2, 10, 8)} if (eye, scan) == ("1", "1") else {}
        )
        for colour, (x1, y1, x2, y2) in {**colours, **findings}.items():
            right[y1:y2, x1:x2] = colour
        path = root / "Images" / eye / f"{scan}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate([left, right], axis=1)).save(path)
    (root / "scratch.png").unlink()
    people = [["Patient ID", "Eye ID", "Eye category", "Age(years)", "Sex", "Stage"]]
    people += [[1, 1, "OD", 60, "F", 4], [1, 2, "OS", 60, "F", 2], [2, 3, "OD", 71, "M", 3]]
    book(root / "Demographics of the participants.xlsx", {"Sheet1": people})


def write_retouch(root: Path) -> None:
    """One volume a device, of three planes: no fluid, two kinds, all three; Spectralis in 16 bits."""
    for number, device in ((1, "Cirrus"), (25, "Spectralis"), (49, "Topcon")):
        folder = root / f"Training{device}" / f"RETOUCH-TrainingSet-{device}" / f"TRAIN{number:03d}"
        ramp = np.arange(3 * 32 * 48).reshape(3, 32, 48) * (14 if device == "Spectralis" else 1)
        volume(
            folder,
            "oct",
            (ramp % 65536).astype(np.uint16) if device == "Spectralis" else (ramp % 251).astype(np.uint8),
        )
        truth = np.zeros((3, 32, 48), np.uint8)
        truth[1:, 4:8, 4:12] = 1
        truth[1:, 20:24, 30:44] = 2
        truth[2, 28:31, 10:40] = 3
        volume(folder, "reference", truth)


def write_neh(root: Path) -> None:
    """Patient 1 of two classes; a volume of three labels; a file named twice; an eye under two numbers."""
    rows = [
        ("1", "NORMAL", "OD", "1", "normal", "a.jpg"),
        ("1", "CNV", "OS", "1", "normal", "1.jpg"),
        ("1", "CNV", "OS", "2", "drusen", "2.jpg"),
        ("1", "CNV", "OS", "3", "CNV", "3.jpg"),
        ("7", "DRUSEN", "OD", "1", "drusen", "x.TIFF"),
        ("7", "DRUSEN", "OD", "2", "drusen", "x.TIFF"),
        ("9", "DRUSEN", "OS", "1", "drusen", "y.jpg"),
    ]
    home = root / "NEH_UT_2021RetinalOCTDataset"
    lines = ["Patient ID,Class,Eye,B-scan,Label,Image Name,Directory"]
    for patient, home_class, eye, scan, label, name in rows:
        place = f"{home_class}/{patient}/{eye}/{name}"
        photo(home / place, grey=True)
        lines.append(f"{patient},{home_class},{eye},{scan},{label},{name},{place}")
    (home / "DRUSEN" / "9" / "OS" / "y.jpg").write_bytes((home / "CNV" / "1" / "OS" / "3.jpg").read_bytes())
    text(home / "data_information.csv", *lines)


def write_ucsd(root: Path) -> None:
    """Version 3: two images a class and split; patient 1001 stands on both sides."""
    home = root / "ZhangLabData" / "CellData" / "OCT"
    for split, first in (("train", 1000), ("test", 1001)):
        for name in ("CNV", "DME", "DRUSEN", "NORMAL"):
            for patient in (first, first + 10):
                photo(home / split / name / f"{name}-{patient}-1.jpeg", grey=True)
    photo(home / "train" / "CNV" / "CNV-1001-2.jpeg", grey=True)


def write_top(root: Path) -> None:
    """Rows of the true table: nothing, glaucoma, diabetes alone, two diseases, retinopathy; and two more."""
    text(
        root / "data.csv",
        "filename,ID,age,sex,LR,AMD,RVO,Gla,MH,DR,RD,RP,AO,DM",
        "000000_00.jpg,03090,78,M,L,0,0,0,0,0,0,0,0,0",
        "000000_01.jpg,03090,78,M,R,0,0,0,0,0,0,0,0,0",
        "000001_02.jpg,01136,69,M,L,0,0,1,0,0,0,0,0,0",
        "000006_01.jpg,04125,48,M,L,0,0,0,0,0,0,0,0,1",
        "000089_00.jpg,04951,42,M,L,0,1,1,0,0,0,0,0,0",
        "000011_01.jpg,03719,70,F,L,0,0,0,0,1,0,0,0,1",
        "000012_01.jpg,03720,70,F,L,1,0,0,1,0,0,0,0,0",
    )
    for name in ("000000_00", "000000_01", "000001_02", "000006_01", "000089_00", "000011_01", "000012_01"):
        photo(root / "img" / f"{name}.jpg")


def write_deepdrid(root: Path) -> None:
    """Two views of each eye, grades by eye, one ungradable; evaluation tables as .xlsx. As published, two
    names contradict the eye of their grade, and a wide-field patient has two left eyes."""
    regular, wide = root / "regular_fundus_images", root / "ultra-widefield_images"
    columns = (
        "patient_id,image_id,image_path,Overall quality,left_eye_DR_Level,right_eye_DR_Level,patient_DR_Level"
    )
    for part, patient in (("regular-fundus-training", 1), ("regular-fundus-validation", 265)):
        lines = [f"{columns},Clarity,Field definition,Artifact"]
        for view, grades in (("l1", "3,"), ("l2", "3,"), ("r1", ",4"), ("r2", ",5")):
            lines.append(
                f"{patient},{patient}_{view},\\{part}\\{patient}\\{patient}_{view}.jpg,0,{grades},4,4,8,10"
            )
            photo(regular / part / "Images" / str(patient) / f"{patient}_{view}.jpg")
        if part == "regular-fundus-training":
            for view, grades in (("r3", "0,"), ("l3", ",1")):
                lines.append(f"56,56_{view},\\{part}\\56\\56_{view}.jpg,0,{grades},1,4,8,10")
                photo(regular / part / "Images" / "56" / f"56_{view}.jpg")
        text(regular / part / f"{part}.csv", *lines)
    home = regular / "Online-Challenge1&2-Evaluation"
    book(
        home / "Challenge1_labels.xlsx", {"Sheet1": [["image_id", "DR_Levels"], ["347_l1", 4], ["347_r1", 0]]}
    )
    for name in ("347_l1", "347_r1"):
        photo(home / "Images" / "347" / f"{name}.jpg")
    for part, patient in (("ultra-widefield-training", 1), ("ultra-widefield-validation", 34)):
        lines = ["patient_id,image_id,image_path,DR_level,position"]
        for view, side, grade in (("l2", "left_eye", 0), ("r1", "right_eye", 2)):
            lines.append(f"{patient},{patient}_{view},{part}\\{patient}\\{patient}_{view}.jpg,{grade},{side}")
            photo(wide / part / "Images" / str(patient) / f"{patient}_{view}.jpg")
        text(wide / part / f"{part}.csv", *lines)
    home = wide / "Online-Challenge3-Evaluation"
    rows = [["image_id", "UWF_DR_Levels"], ["58_l2", 0], ["76_l1", 0], ["76_l2", 1]]
    book(home / "Challenge3_labels.xlsx", {"Sheet1": rows})
    for name in ("58_l2", "76_l1", "76_l2"):
        photo(home / "Images" / name[:2] / f"{name}.jpg")


def write_mmc_amd(root: Path) -> None:
    """Both modalities of some eyes; photographs with and without CLAHE, B-scans with a median filter."""
    sets = {
        "train": ("f-h-2051-l", "f-d-ICG-5579-r", "o-d-ICG-5579-r_1", "o-d-ICG-5579-r_2", "f-w-77-l"),
        "val": ("f-p-ICG-5590", "o-p-ICG-5590"),
        "test": ("f-w-900-r", "o-h-31-l"),
    }
    for split, names in sets.items():
        home = root / f"mmc-amd-splitAP-{split}"
        for kind in ("cfp", "oct"):
            here = [name for name in names if name.startswith("f" if kind == "cfp" else "o")]
            text(home / "ImageSets" / f"{kind}.txt", *here)
            text(home / "annotations" / f"{kind}.txt", *(f"{name} {'hdpw'.index(name[2])}" for name in here))
        for name in names:
            folders = ("cfp-448x448", "cfp-clahe-448x448") if name[0] == "f" else ("oct-median3x3-448x448",)
            for folder in folders:
                photo(root / "mmc-amd" / "ImageData" / folder / f"{name}.jpg")


def _write_idrid(root: Path) -> None:
    mini_idrid.write(root)


WRITERS: dict[str, Callable[[Path], None]] = {
    "idrid": _write_idrid,
    **{name.removeprefix("write_"): made for name, made in globals().items() if name.startswith("write_")},
}


def write(name: str, root: Path) -> Path:
    """The miniature of one data set in `root`, which is returned."""
    root.mkdir(parents=True, exist_ok=True)
    WRITERS[name](root)
    return root
