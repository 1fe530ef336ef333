"""Positioned traces: regions and boxes as the masks have them, checked against faults, right at any size."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline import composing, findings, ingest, jobs, knowledge_base, quality, traces, writer
from data_pipeline.datasets import phantom
from fundus_jax import dialog, localisation
from fundus_jax.findings import parse_mentions
from fundus_jax.grpo.judge import Request, RulesJudge
from fundus_jax.models.qwen2_5_vl.images import ImageConfig, image_patches
from fundus_jax.records import Box, Example, Findings, Trace
from tests.data_pipeline import mini_idrid
from tests.data_pipeline.made import SPOT, example, write_examples
from tests.data_pipeline.test_ingest import picture
from tests.data_pipeline.test_quality import FOUND, MODERATE, kinds
from tests.data_pipeline.test_traces import CASES, NOTES, drawn

PLACES = (*SPOT, Box(finding="microaneurysm", x1=40, y1=700, x2=60, y2=720))
THINK = (
    "Lower left: <ref>microaneurysm</ref><box>[[40, 700, 60, 720]]</box>. Upper left: "
    "<ref>haemorrhage</ref><box>[[100, 100, 200, 200]]</box>. The image shows microaneurysms and "
    "haemorrhages. Haemorrhages beyond microaneurysms without neovascularisation fit moderate disease. So "
    "the answer is Moderate NPDR."
)


def compose(one: Example, boxes: int) -> Trace:
    """The positioned trace of an example, from its own masks."""
    found = next(iter(findings.PixelSource().find([one])))
    assert isinstance(found, Findings)
    known = NOTES.get((one.answer, one.modality))
    return composing.compose(one, found, known, writer.RuleWriter(boxes), boxes=boxes)


def check(think: str, **changes) -> tuple[str, ...]:
    """The reasons against a positioned trace of `PLACES`."""
    return quality.check(example(boxes=PLACES, **changes), FOUND, MODERATE, think, "Moderate NPDR", boxes=2)


def test_the_wording() -> None:
    trace = compose(example(boxes=PLACES), 2)
    assert (trace.think, trace.reasons) == (THINK, ())
    plain = compose(example(boxes=PLACES), 0)
    assert THINK.endswith(plain.think)
    assert plain.kept


@pytest.mark.parametrize(("modality", "label"), CASES)
def test_every_phantom_gets_a_positioned_trace_that_passes(modality: str, label: str) -> None:
    for index, most in itertools.product(range(3), (1, 2, 4)):
        one = drawn(index, modality, label)
        trace = compose(one, most)
        assert trace.kept, (trace.think, trace.reasons)
        said = dialog.parse_boxes(trace.think)
        assert sorted(map(str, said.boxes)) == sorted(map(str, dialog.positioned(one, most).boxes))
        assert said.malformed == ()
        assert {box.finding for box in said.boxes} == set(one.findings or ())
        if said.boxes:
            assert localisation.score(trace.think, dialog.positioned(one, most).boxes) == 1
        seen = Findings(example=one.id, present=one.findings or (), votes={}, n=0, origin="pixels")
        request = Request(trace=trace.think, reference=seen, modality=modality)
        assert RulesJudge().rate(request).rating == "plausible"
        plain = compose(one, 0).think
        assert parse_mentions(trace.think) == parse_mentions(plain)


def test_boxes_hold_the_pixels_of_the_masks() -> None:
    for (modality, label), index in itertools.product(CASES, range(2)):
        case = phantom.render(5, index, size=112, modality=modality, label=label)
        for name, mask in case.masks.items():
            boxes = [box for box in dialog.fewer(case.boxes, 2) if box.finding == name]
            rows, columns = (index * 999 / 112 for index in np.nonzero(mask))
            inside = [
                (b.x1 <= columns) & (columns + 999 / 112 <= b.x2 + 1e-6)
                & (b.y1 <= rows) & (rows + 999 / 112 <= b.y2 + 1e-6)
                for b in boxes
            ]  # fmt: skip
            assert np.any(inside, axis=0).all()


@pytest.mark.parametrize(
    ("kind", "think"),
    [
        (quality.PLACE, THINK.replace("[[40, 700,", "[[44, 700,")),
        (quality.PLACE, THINK.replace("60, 720]]", "60, 720], [70, 700, 80, 720]]")),
        (
            quality.PLACE,
            THINK.replace(" Upper left: <ref>haemorrhage</ref><box>[[100, 100, 200, 200]]</box>.", ""),
        ),
        (quality.PLACE, THINK.replace("<ref>haemorrhage<", "<ref>microaneurysm<")),
        (quality.PLACE, THINK.replace("Upper left", "Upper right")),
        (quality.PLACE, THINK.replace("Upper left", "Upper left and lower right")),
        (quality.MALFORMED, THINK.replace("[[40, 700, 60,", "[[40, 700, 40,")),
        (quality.MALFORMED, THINK.replace("</box>", "", 1)),
        (quality.MALFORMED, THINK.replace("[[40", "[[-1")),
        (quality.ABSENT, THINK.replace("<ref>haemorrhage<", "<ref>hard exudate<")),
        (quality.MALFORMED, THINK + " very" * 60),
    ],
)
def test_each_fault_is_found(kind: str, think: str) -> None:
    assert think != THINK
    assert check(THINK) == ()
    assert kind in kinds(check(think))


def test_corners_may_differ_by_rounding() -> None:
    assert check(THINK.replace("[[40, 700, 60, 720]]", "[[41, 699, 60, 721]]")) == ()


def test_boxes_that_nobody_asked_for_are_refused() -> None:
    one = example(boxes=PLACES)
    assert kinds(quality.check(one, FOUND, MODERATE, THINK, "Moderate NPDR")) == {quality.PLACE}


def test_a_question_of_where_keeps_its_own_place() -> None:
    one = example(
        task="lesion_location",
        question="Where does this image mainly show haemorrhages?",
        options=("Upper left", "Lower left"),
        answer="Upper left",
        boxes=PLACES,
    )
    trace = compose(one, 2)
    assert trace.kept, trace.reasons  # although microaneurysms lie in the lower left
    wrong = trace.think.replace("lie in the upper left", "lie in the lower left")
    assert quality.PLACE in kinds(quality.check(one, FOUND, None, wrong, "Upper left", boxes=2))


def test_corners_may_be_off_by_one_and_length_is_for_each_finding() -> None:
    (first, *_) = dialog.parse_boxes(THINK).boxes
    said = f"[{first.x1}, {first.y1}, {first.x2}, {first.y2}]"
    for off, wrong in ((1, set()), (2, {quality.PLACE})):
        moved = THINK.replace(said, f"[{first.x1}, {first.y1}, {first.x2 - off}, {first.y2}]")
        assert moved != THINK
        assert kinds(check(moved)) == wrong, off
    one = example(boxes=(*PLACES, replace(PLACES[0], x1=PLACES[0].x1 + 200, x2=PLACES[0].x2 + 200)))
    think, places = compose(one, 2).think, dialog.positioned(one, 2).boxes
    names = {box.finding for box in places}
    assert len(names) < len(places)
    words = len(dialog.without_boxes(think).split()) - quality.PLACE_WORDS * len(names)
    for bound, wrong in ((words, set()), (words - 1, {quality.MALFORMED})):
        found = quality.check(one, FOUND, MODERATE, think, one.answer, boxes=2, most_words=bound)
        assert kinds(found) == wrong, bound


def test_the_bound_of_a_traces_length_reaches_its_check() -> None:
    one = example(boxes=PLACES)
    known = NOTES[one.answer, one.modality]
    trace = composing.compose(one, FOUND, known, writer.RuleWriter(), most_words=3)
    assert not trace.kept


def test_tasks_without_findings_have_no_boxes() -> None:
    one = example(task="laterality", options=("Right eye", "Left eye"), answer="Right eye", boxes=PLACES)
    assert compose(one, 2) == compose(one, 0)


@pytest.mark.parametrize(
    ("corners", "where"),
    [
        ((0, 0, 100, 100), ("upper left",)),
        ((500, 0, 700, 499), ("upper right",)),
        ((400, 900, 600, 999), ("lower left", "lower right")),
        ((490, 10, 900, 90), ("upper right",)),  # a fortieth of it lies left
        ((50, 50, 950, 950), writer.REGIONS),
    ],
)
def test_regions(corners: tuple[int, int, int, int], where: tuple[str, ...]) -> None:
    x1, y1, x2, y2 = corners
    assert writer.regions([Box(finding="drusen", x1=x1, y1=y1, x2=x2, y2=y2)]) == where


SPAN = st.tuples(st.integers(0, 998), st.integers(0, 999)).filter(lambda pair: pair[0] < pair[1])


@given(SPAN, SPAN)
def test_every_box_lies_somewhere(x: tuple[int, int], y: tuple[int, int]) -> None:
    box = Box(finding="drusen", x1=x[0], y1=y[0], x2=x[1], y2=y[1])
    middle = ("lower" if y[0] + y[1] > 1000 else "upper", "right" if x[0] + x[1] > 1000 else "left")
    assert " ".join(middle) in writer.regions([box])


def test_the_stage_writes_positions_and_its_old_traces_are_unchanged(tmp_path) -> None:
    examples = write_examples(tmp_path / "examples", {"a": [example(boxes=PLACES)]})
    findings.run(examples, tmp_path / "findings")
    knowledge_base.run(tmp_path / "knowledge", examples=examples)
    parts = examples, tmp_path / "findings", tmp_path / "knowledge"
    traces.run(*parts, tmp_path / "plain")
    traces.run(*parts, tmp_path / "where", writer=composing.Rules(boxes=2))
    (plain,), (where,) = (list(jobs.read(tmp_path / name, Trace)) for name in ("plain", "where"))
    assert where.think == THINK
    assert THINK.endswith(plain.think)
    assert writer.RuleWriter().config == {"version": 2}  # boxes add to it only where they are asked for


def bright(image: Image.Image, config: ImageConfig) -> list[float]:
    """Corners on the 0-999 grid of what is bright in the pixels that the model gets of an image."""
    patches, (_, tall, wide) = image_patches(image, config)
    size, merge = config.patch_size, config.merge_size
    blocks = patches.reshape(tall // merge, wide // merge, merge, merge, 3, 2, size, size)[..., 0, 0, :, :]
    rows, columns = np.nonzero(blocks.transpose(0, 2, 4, 1, 3, 5).reshape(tall * size, wide * size) > 0)
    across, down = 999 / (wide * size), 999 / (tall * size)
    corners = columns.min() * across, rows.min() * down, (columns.max() + 1) * across, (rows.max() + 1) * down
    return [float(corner) for corner in corners]


@pytest.mark.parametrize("max_side", [0, 900, 333])
@pytest.mark.parametrize("max_pixels", [28 * 28 * 1280, 28 * 28 * 40])
def test_boxes_are_right_in_what_the_model_sees(tmp_path, max_side: int, max_pixels: int) -> None:
    source, shape = mini_idrid.write(tmp_path / "idrid"), (1010, 1490)
    lesion = np.zeros(shape, np.uint8)
    lesion[303:707, 201:1002] = 1
    for path in source.rglob("IDRiD_02*"):
        if path.suffix == ".jpg":
            Image.fromarray(lesion * 255).convert("RGB").save(path, quality=95)
        else:
            mini_idrid.save_mask(path, lesion if path.stem.endswith("HE") else 0 * lesion)
    ingest.run("idrid", source, tmp_path / "out", partial_copy=True, max_side=max_side)
    found = [one for one in jobs.read(tmp_path / "out", Example) if "IDRiD_02" in one.id]
    (box,) = found[0].boxes
    corners = (box.x1, box.y1, box.x2, box.y2)
    exact = [201 * 999 / 1490, 303 * 999 / 1010, 1002 * 999 / 1490, 707 * 999 / 1010]
    assert corners == pytest.approx(exact, abs=3), "masks are pooled in cells of 3 pixels"
    image = picture(tmp_path / "out", found[0])
    seen = bright(image, ImageConfig(max_pixels=max_pixels))
    assert corners == pytest.approx(seen, abs=3 + 999 / 140), "up to the pixels that the model sees"


def test_masks_of_an_image_that_exif_turns_are_refused(tmp_path) -> None:
    source = mini_idrid.write(tmp_path / "idrid")
    path = next(source.rglob("IDRiD_02.jpg"))
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = 3
    image.save(path, exif=exif)
    ingest.run("idrid", source, tmp_path / "out", partial_copy=True, quarantine=0.3)
    assert "turn the image, but not its masks" in (tmp_path / "out/train-00000.quarantine.jsonl").read_text()
