"""Reading what the pipeline wrote: integrity, images, parts by patient, and batches that resume at every
position."""

from __future__ import annotations

import io
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.datasets import phantom_source
from fundus_jax import data
from fundus_jax.records import ConfigError, DataError, Example, Trace
from tests import small
from tests.data_pipeline.test_images import bomb


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.data(tmp_path_factory) / "data"


@pytest.fixture
def examples(run: Path, tmp_path: Path) -> Path:
    """A copy of the examples that may be damaged."""
    return Path(shutil.copytree(run / "examples", tmp_path / "examples"))


def test_every_record_of_a_stage_is_read(run: Path) -> None:
    found = list(data.read_stage(run / "examples", Example))
    lines = [
        line
        for path in sorted((run / "examples").glob("*-0*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert len(found) == len(
        [line for line in lines if '"kind": "Example"' in line or '"kind":"Example"' in line]
    )
    assert {one.split for one in found} == {"train", "test"}
    assert {one.example for one in data.read_stage(run / "traces", Trace)} == {one.id for one in found}


def damage(folder: Path, kind: str) -> None:
    manifest, shard = folder / "manifest.jsonl", folder / "train-00000.jsonl"
    if kind == "flipped":
        whole = bytearray(shard.read_bytes())
        whole[len(whole) // 2] ^= 1
        shard.write_bytes(whole)
    elif kind == "shortened":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif kind == "gone":
        shard.unlink()
    elif kind == "no manifest":
        manifest.unlink()
    elif kind == "unfinished":  # a killed job: one shard is published, the other is not
        manifest.write_text(manifest.read_text().splitlines(keepends=True)[0])
    elif kind == "torn":
        manifest.write_text(manifest.read_text()[:-30])
    else:
        entry = json.loads(manifest.read_text().splitlines()[0])
        manifest.write_text(json.dumps({**entry, "files": {}}) + "\n")


DAMAGES = {
    "flipped": r"train-00000\.jsonl is missing or not what manifest\.jsonl lists; run the job again",
    "shortened": r"train-00000\.jsonl is missing or not what",
    "gone": r"train-00000\.jsonl is missing or not what",
    "no manifest": r"manifest\.jsonl is missing: .* is no finished stage directory",
    "unfinished": "has 1 of 2 shards; run its job to the end",
    "torn": r"manifest\.jsonl: not a manifest line",
    "listed without files": r"manifest\.jsonl: not a manifest line",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_stage_is_refused(examples: Path, kind: str) -> None:
    damage(examples, kind)
    with pytest.raises(DataError, match=DAMAGES[kind]):
        list(data.read_stage(examples, Example))


def test_images_are_those_that_were_drawn(run: Path) -> None:
    pool = data.open_pool(run, "train")
    for example in pool.examples[:5]:
        seed, index = example.patient.removeprefix("phantom/").split("-")
        drawn = phantom_source.sample("train", int(seed), int(index), 56).image
        assert np.array_equal(np.asarray(pool.image(example)), np.asarray(Image.open(io.BytesIO(drawn))))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("train-00000.array_record#36", "has 36 images, none of number '36'"),
        ("train-00000.array_record#-1", "none of number '-1'"),
        ("train-00000.array_record", "none of number ''"),
        ("train-00009.array_record#0", r"train-00009\.array_record is missing, though an Example names it"),
    ],
)
def test_a_key_without_an_image_is_an_error(run: Path, key: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        data.load_image(run / "examples", key)


def test_hostile_images_are_refused_before_they_are_decoded() -> None:
    gif = io.BytesIO()
    Image.new("RGB", (8, 8)).save(gif, "GIF")
    for content in (gif.getvalue(), b"", b"<html>", b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(DataError, match="here#0: not a readable"):
            data.open_image(content, "here#0")
    with pytest.raises(DataError, match="here#1"):
        data.open_image(bomb(), "here#1")
    wide = io.BytesIO()
    Image.new("1", (9990, 10020)).save(wide, "PNG")
    with pytest.raises(DataError, match="here#2: 9990 x 10020 pixels"):
        data.open_image(wide.getvalue(), "here#2")


@given(cut=st.floats(0.05, 0.95))
@settings(max_examples=20, deadline=None)
def test_parts_share_no_patient_and_lose_none(pool: data.Pool, cut: float) -> None:
    def ids(part: tuple[float, float]) -> set[tuple[str, str]]:
        try:
            return {(e.patient, e.id) for e in pool.choose(part=part).examples}
        except ConfigError:  # nobody falls into a small part
            return set()

    low, high = ids((0.0, cut)), ids((cut, 1.0))
    assert {patient for patient, _ in low}.isdisjoint(patient for patient, _ in high)
    assert low | high == {(e.patient, e.id) for e in pool.examples}


@pytest.fixture(scope="module")
def pool(run: Path) -> data.Pool:
    """Examples of which several have one patient."""
    whole = data.open_pool(run, "train")
    return replace(
        whole, examples=tuple(replace(e, patient=f"p{i % 9}") for i, e in enumerate(whole.examples))
    )


def test_a_larger_part_holds_a_smaller_one(pool: data.Pool) -> None:
    half, most = ({e.id for e in pool.choose(part=(0.0, part)).examples} for part in (0.5, 0.8))
    assert half < most


def test_parts_of_another_salt_or_data_set_fall_otherwise(pool: data.Pool) -> None:
    """Else the exam would take the head of what SFT takes, and patients 1 of all data sets lay together."""
    one = pool.examples[0]
    many = [
        replace(one, id=f"{name}/{k}", dataset=name, patient=str(k))
        for name in ("a", "b")
        for k in range(200)
    ]
    pool = replace(pool, examples=tuple(many))

    def half(salt: str) -> dict[str, set[str]]:
        kept = pool.choose(part=(0.0, 0.5), salt=salt).examples
        return {name: {e.patient for e in kept if e.dataset == name} for name in ("a", "b")}

    plain, salted = half(""), half("exam")
    for first, second in ((plain["a"], plain["b"]), (plain["a"], salted["a"])):
        assert 70 < len(first) < 130
        assert 25 < len(first & second) < 75, "as two draws do"


def test_tasks_are_chosen_and_nothing_left_is_an_error(pool: data.Pool) -> None:
    assert {e.task for e in pool.choose(tasks=("modality",)).examples} == {"modality"}
    with pytest.raises(
        ConfigError, match=r"has a task in \['lesion_location'\] and lies in part \(0.0, 1.0\)"
    ):
        pool.choose(tasks=("lesion_location",))


def test_each_picture_is_measured_once(pool: data.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is chosen of the pool, and however many questions there are about a picture."""
    read, load = [], data.load_image
    monkeypatch.setattr(data, "load_image", lambda folder, key: read.append(key) or load(folder, key))
    first, second = (pool.choose(part=part) for part in ((0.0, 0.6), (0.3, 1.0)))
    for part in (first, second, pool):
        wanted = [pool.image(example).size for example in part.examples]
        new = {example.image for example in part.examples} - pool.seen.keys()
        read.clear()
        assert part.sizes(part.examples) == wanted
        assert sorted(read) == sorted(new)
    with pytest.raises(DataError, match="none of number '99999'"):
        pool.sizes([replace(pool.examples[0], image=f"{pool.examples[0].image.split('#')[0]}#99999")])


def test_another_split_has_other_examples_and_a_missing_one_is_an_error(run: Path) -> None:
    test, train = data.open_pool(run, "test"), data.open_pool(run, "train")
    assert {e.patient for e in test.examples}.isdisjoint(e.patient for e in train.examples)
    with pytest.raises(DataError, match="no example of split 'val'"):
        data.open_pool(run, "val")


def draw(count: int, size: int, steps: int, **more: Any) -> list[list[int]]:
    iterator = data.batches(count, size, lambda index: index.tolist(), **{"seed": 3, **more})
    return [next(iterator) for _ in range(steps)]


def test_batches_are_shuffled_epochs_and_may_straddle_them(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = np.concatenate(draw(7, 3, 14))
    epochs = [drawn[i : i + 7].tolist() for i in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1, "every epoch has an order of its own"
    assert draw(7, 3, 14, seed=4) != draw(7, 3, 14)
    for threads in (1, 4):
        monkeypatch.setattr(data, "THREADS", threads)
        assert np.array_equal(np.concatenate(draw(7, 3, 14, ahead=4)), drawn), "whoever makes them"


def test_batches_are_made_side_by_side_and_few_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ones wait for each other: they come only where as many are made at the same time."""
    monkeypatch.setattr(data, "THREADS", 9)
    together, begun = threading.Barrier(6), iter(range(100))
    made = []

    def build(index: np.ndarray) -> list[int]:
        if next(begun) < 6:
            together.wait(timeout=60)
        made.append(index)
        return index.tolist()

    iterator = data.batches(7, 3, build, seed=3, ahead=6)
    found = []
    for taken in range(1, 15):
        found.append(next(iterator))
        assert len(made) <= taken + 6
    assert found == draw(7, 3, 14)


def test_what_is_made_ahead_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "THREADS", 16)
    rows, features = 64, 4 * 1176
    for patches, ahead in ((16, 16), (1024, 6), (5096, 2), (100_000, 2)):  # 448 x 448 and 1280 x 784 pixels
        assert data.ahead_of(rows * patches * features) == ahead
    monkeypatch.setattr(data, "THREADS", 1)
    assert data.ahead_of(1) == 2, "one is made while another waits"


def test_an_iterator_resumes_with_the_very_next_batch_at_every_position() -> None:
    wanted = draw(7, 3, 12)
    iterator = data.batches(7, 3, lambda index: index.tolist(), seed=3)
    for place in range(9):
        state = iterator.get_state()
        state = state if isinstance(state, bytes) else json.loads(json.dumps(state))  # it travels in a bundle
        other = data.batches(7, 3, lambda index: index.tolist(), seed=3)
        next(other)  # one that has been in use elsewhere
        other.set_state(state)
        assert [next(other) for _ in range(3)] == wanted[place : place + 3]
        assert next(iterator) == wanted[place]


def test_batches_of_groups_take_turns_and_resume() -> None:
    groups = [[3, 5, 8], [0, 1, 2, 4, 6, 7]]
    drawn = draw(9, 3, 12, groups=groups)
    assert {tuple(sorted(batch)) for batch in drawn if batch[0] in groups[0]} == {(3, 5, 8)}
    assert all(set(batch) <= set(groups[1]) for batch in drawn if batch[0] in groups[1])
    assert np.bincount(np.concatenate(drawn)).tolist() == [4] * 9, "each as often as any other"
    iterator = data.batches(9, 3, lambda index: index.tolist(), seed=3, groups=groups)
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    other = data.batches(9, 3, lambda index: index.tolist(), seed=3, groups=groups)
    other.set_state(state)
    assert [next(other) for _ in range(7)] == drawn[5:]


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=40),
    most=st.integers(1, 5),
    least=st.integers(1, 9),
)
def test_a_ladder_has_whole_rungs(lengths: list[int], most: int, least: int) -> None:
    groups = data.ladder(lengths, most, least)
    assert sorted(record for group in groups for record in group) == list(range(len(lengths)))
    assert len(groups) <= most
    assert len(groups) == 1 or min(map(len, groups)) >= least
    tops = [max(lengths[record] for record in group) for group in groups]
    bottoms = [min(lengths[record] for record in group) for group in groups]
    assert all(top <= bottom for top, bottom in zip(tops, bottoms[1:], strict=False))
    assert len(set(tops)) == len(tops)


def test_less_than_one_batch_is_an_error() -> None:
    with pytest.raises(ConfigError, match="a batch of 8 rows needs at least as many records, there are 7"):
        data.batches(7, 8, lambda index: index, seed=0)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 4)), min_size=1, max_size=60),
    seed=st.integers(0, 3),
)
def test_packing_keeps_every_record_and_both_bounds(sizes: list[tuple[int, int]], seed: int) -> None:
    rows = data.pack(sizes, (50, 6), seed=seed)
    assert sorted(record for row in rows for record in row) == list(range(len(sizes)))
    totals = [tuple(sum(sizes[record][i] for record in row) for i in range(2)) for row in rows]
    assert all(tokens <= 50 and patches <= 6 for tokens, patches in totals)
    assert rows == data.pack(sizes, (50, 6), seed=seed)


def test_packing_fills_rows_and_the_seed_deals_equals() -> None:
    random = np.random.default_rng(0)
    sizes = [(int(tokens), 1) for tokens in random.integers(5, 60, 400)]
    rows = data.pack(sizes, (128, 400), seed=0)
    assert sum(tokens for tokens, _ in sizes) / (128 * len(rows)) > 0.97
    equal = [(32, 1)] * 12
    assert data.pack(equal, (128, 400), seed=0) != data.pack(equal, (128, 400), seed=1)
    with pytest.raises(ConfigError, match=r"a record of \(3, 7\) tokens and patches fits into no row"):
        data.pack([(4, 1), (3, 7)], (4, 6), seed=0)


@given(size=st.integers(0, 10**6), step=st.integers(1, 512))
def test_rounding_up_adds_less_than_a_step(size: int, step: int) -> None:
    rounded = data.round_up(size, step)
    assert rounded % step == 0
    assert rounded >= max(size, 1)
    assert rounded - size < step or size == 0
