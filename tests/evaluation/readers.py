"""The readers of benchmarks with pictures that a test makes: a question about each file, in each publisher's
layout."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fundus_jax.evaluation.funbench import FunBench
from fundus_jax.evaluation.gmai import FILE, GmaiMMBench
from fundus_jax.evaluation.items import Benchmark, Selection
from fundus_jax.evaluation.omnimedvqa import OmniMedVQA
from fundus_jax.evaluation.retinal_reason import RetinalReason
from tests.evaluation import test_funbench, test_gmai, test_omnimedvqa, test_retinal_reason

ANY = Selection(allow_partial=True)
CUT = {"rotate": True, "crop": [48, 64, 5, -5, 40]}
KEYS = [f"OIA-ODIR/{number}.jpg" for number in range(3)]


def encode(kind: str = "JPEG", size: tuple[int, int] = (64, 48), **how: Any) -> bytes:
    """A picture of noise in some format."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **how)
    return stream.getvalue()


def sideways() -> bytes:
    """A picture of 48 x 64 pixels whose EXIF says that it lies on its side: upright it has 64 x 48."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(size=(48, 64), exif=exif)


def funbench(root: Path, files: list[bytes], how: Selection = ANY, cuts: Any = None) -> FunBench:
    source = test_funbench.tree(root, {key: test_funbench.question() for key in KEYS[: len(files)]})
    for key, file in zip(KEYS, files, strict=False):
        (root / "images" / key).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / key).write_bytes(file)
    fields = {name: getattr(how, name) for name in ("allow_partial", "side")}
    if cuts is not None:
        (root / "info.json").write_text(json.dumps({"OIA-ODIR": dict(zip(KEYS, cuts, strict=False))}))
        fields["preprocess"] = str(root / "info.json")
    chosen = Selection(images=str(root / "images"), tasks=test_funbench.LATERALITY, **fields)
    return FunBench(source, chosen)


def omnimedvqa(root: Path, files: list[bytes], how: Selection = ANY) -> OmniMedVQA:
    questions = [
        test_omnimedvqa.question(question_id=f"q{number}", image_path=f"Images/OLIVES/{number}.tif")
        for number in range(len(files))
    ]
    (root / "Images" / "OLIVES").mkdir(parents=True)
    for number, file in enumerate(files):
        (root / "Images" / "OLIVES" / f"{number}.tif").write_bytes(file)
    return OmniMedVQA(test_omnimedvqa.source(root, questions), how)


def gmai(root: Path, files: list[bytes], how: Selection = ANY) -> GmaiMMBench:
    root.mkdir(exist_ok=True)
    rows = [
        test_gmai.row(number, image=base64.b64encode(file).decode() or "-" * 80)
        for number, file in enumerate(files)
    ]
    return GmaiMMBench(test_gmai.table(root / FILE, rows), how)


def retinal_reason(root: Path, files: list[bytes], how: Selection = ANY) -> RetinalReason:
    """The first picture stands in the item itself, the others in a CSV beside."""
    root.mkdir(exist_ok=True)
    texts = [base64.b64encode(file).decode() or "-" * 80 for file in files]
    names = [texts[0], *(f"{number}.jpg" for number in range(1, len(files)))]
    records = [test_retinal_reason.record(test_retinal_reason.SINGLE, "A", [name]) for name in names]
    test_retinal_reason.write(root, "single_choice_test_data_CFP", records)
    lines = [f"{name},{text}" for name, text in zip(names[1:], texts[1:], strict=True)]
    (root / "single_choice_test_data_CFP.csv").write_text("\n".join([",base64", *lines]) + "\n")
    return RetinalReason(root, how)


READERS: dict[str, Callable[..., Benchmark]] = {
    "funbench": funbench,
    "omnimedvqa": omnimedvqa,
    "gmai": gmai,
    "retinal_reason": retinal_reason,
}
