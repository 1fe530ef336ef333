"""Our sampler as an engine: order, seeds, shapes, errors; and a real (tiny) model through the command."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from flax import nnx
from PIL import Image

from fundus_jax import training
from fundus_jax.evaluation import run
from fundus_jax.evaluation.engines import Asking
from fundus_jax.evaluation.items import Item, Selection
from fundus_jax.evaluation.predict import TEXT_STEP, Sampler, predict
from fundus_jax.models import read_config
from fundus_jax.models.qwen2_5_vl.processor import Processor
from fundus_jax.records import ConfigError, DataError
from fundus_jax.sharding import parse_mesh
from tests.evaluation.readers import CUT, KEYS, encode, funbench
from tests.evaluation.samples import Pictures, command_flags, example, item, stage
from tests.small import Bigram


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A policy whose words depend on the last token and the pixels and end at many tokens; a processor."""
    from tests.models import tiny

    folder = tmp_path_factory.mktemp("tiny")
    tiny.tiny_config().save_pretrained(tiny.write_processor_files(folder))
    processor = Processor.from_pretrained(folder)
    config = dataclasses.replace(read_config(folder), eos_ids=tuple(range(0, 1000, 8)))
    processor.eos_ids = config.eos_ids
    return Bigram(config, rngs=nnx.Rngs(0)), processor


def asked(number: int) -> Item:
    """An item whose prompt and image depend on its number."""
    text = "look " * (1 + 37 * number % 23) + str(number)
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return item(f"q{number}", images=(str(number),), messages=({"role": "user", "content": content},))


def load_image(name: str) -> Image.Image:
    """A picture whose size and colour depend on its name."""
    return Image.new("RGB", (28 * (1 + int(name) % 3), 56), (int(name), 90, 200))


PICTURES = Pictures(load_image)
ITEMS = [asked(number) for number in range(23)]
DRAWN: dict[str, Any] = {"max_new_tokens": 7, "temperature": 1.0, "group_size": 3, "seed": 5}


def test_answers_stand_in_the_order_of_the_items(talker: tuple[Any, Any]) -> None:
    found = predict(*talker, ITEMS, images=PICTURES, batch_size=4, **DRAWN)
    assert [(one.item.id, one.sample) for one in found] == [
        (one.id, sample) for one in ITEMS for sample in range(3)
    ]
    assert len({one.response for one in found}) > 30
    assert {one.finished for one in found} == {True, False}
    for one in found:
        assert one.finished or one.tokens == 7
        assert one.logprob is not None
        assert one.logprob < 0


def test_an_answer_depends_neither_on_the_slots_nor_on_what_else_is_wanted(talker: tuple[Any, Any]) -> None:
    whole = predict(*talker, ITEMS, images=PICTURES, batch_size=4, **DRAWN)
    assert whole == predict(*talker, ITEMS, images=PICTURES, batch_size=4, **DRAWN)
    other = predict(*talker, ITEMS, images=PICTURES, batch_size=9, **DRAWN)
    assert [one.response for one in other] == [one.response for one in whole]
    asking = Asking(max_new_tokens=7, temperature=1.0, samples=3, seed=5)
    some = dict(Sampler(*talker, slots=4).answer(ITEMS, [20, 3, 11], PICTURES, asking))
    assert some == {index: whole[3 * index : 3 * index + 3] for index in (3, 11, 20)}
    changed = predict(*talker, ITEMS, images=PICTURES, batch_size=4, **DRAWN | {"seed": 6})
    assert [one.response for one in changed] != [one.response for one in whole]


def test_shapes_are_few(talker: tuple[Any, Any]) -> None:
    model, processor = talker
    shapes = set()

    class Watched:
        """The processor, whose batches are looked at."""

        def __getattr__(self, name: str) -> Any:
            return getattr(processor, name)

        def __call__(self, *rows: Any, **shape: Any) -> Any:
            shapes.add((shape["length"], shape["patches"]))
            return processor(*rows, **shape)

    engine = Sampler(model, Watched(), slots=4, groups=2)
    found = dict(engine.answer(ITEMS, range(len(ITEMS)), PICTURES, Asking(max_new_tokens=3)))
    assert len(found) == len(ITEMS)
    assert len(shapes) == 2
    assert all(length % TEXT_STEP == 0 for length, _ in shapes)
    work = engine.work()
    assert work["questions_per_second"] > 0
    assert 0 <= work["idle"] <= 1


def test_errors_arrive(talker: tuple[Any, Any]) -> None:
    def broken(name: str) -> Image.Image:
        raise DataError(f"{name} is broken")

    common: dict[str, Any] = {"max_new_tokens": 4}
    with pytest.raises(DataError, match="7 is broken"):
        predict(*talker, [asked(7)], images=Pictures(broken), batch_size=2, **common)
    with pytest.raises(ConfigError, match="batch_size 0"):
        predict(*talker, ITEMS, images=PICTURES, batch_size=0, **common)
    with pytest.raises(ConfigError, match="temperature 0, where all samples are alike"):
        predict(*talker, ITEMS, images=PICTURES, batch_size=2, group_size=2, **common)


def test_each_picture_is_decoded_once_for_each_question(
    talker: tuple[Any, Any], tmp_path: Path, decodes: list[tuple[int, int]]
) -> None:
    """FunBench as its command is documented: cut, turned, resized. Sizes are asked once for each picture."""
    benchmark = funbench(tmp_path, [encode()] * 3, Selection(side=56, allow_partial=True), [CUT] * 3)
    items = [
        dataclasses.replace(one, id=f"{one.id} {again}") for one in benchmark.items for again in range(4)
    ]
    assert len(items) == 12
    sized: list[str] = []
    plain = benchmark.image_size
    benchmark.image_size = lambda image: sized.append(image) or plain(image)  # type: ignore[method-assign]
    assert decodes == []
    engine = Sampler(*talker, slots=4)
    whole = dict(engine.answer(items, range(12), benchmark, Asking(max_new_tokens=3)))
    assert len(decodes) == 12
    assert sorted(sized) == sorted(KEYS)
    decodes.clear()
    rest = dict(engine.answer(items, [7, 2], benchmark, Asking(max_new_tokens=3)))  # resumed, or a shard
    assert len(decodes) == 2
    assert rest == {index: whole[index] for index in (2, 7)}


def test_a_picture_that_can_not_be_read_costs_its_question_alone(
    talker: tuple[Any, Any], tmp_path: Path
) -> None:
    whole = encode()
    strip = encode("PNG", (300, 1))
    files = [whole, whole[: len(whole) // 2], strip]
    benchmark = funbench(tmp_path, files)
    engine = Sampler(*talker, slots=2)
    asking = Asking(max_new_tokens=3)
    found = dict(engine.answer(benchmark.items, range(3), benchmark, asking))
    assert list(found) == [0]
    assert sorted(engine.failures) == [1, 2]
    assert re.match(r"OIA-ODIR/1.jpg: .*images/OIA-ODIR/1.jpg: its pixels can not", engine.failures[1])
    assert re.match(r"OIA-ODIR/2.jpg: .*300x1 pixels", engine.failures[2])
    with pytest.raises(DataError, match="no answer to L2b-laterality:OIA-ODIR/[12].jpg, nor to 1 others"):
        predict(*talker, benchmark.items, images=benchmark, batch_size=2, max_new_tokens=3)
    (tmp_path / "images" / "OIA-ODIR" / "1.jpg").write_bytes(whole)
    again = dict(engine.answer(benchmark.items, [1], benchmark, asking))
    assert list(again) == [1]
    assert engine.failures == {}


def tiny_model(folder: Path) -> tuple[Any, Any]:
    """A model of random weights, and its processor; no torch."""
    from flax import nnx

    from fundus_jax.models import read_config
    from fundus_jax.models.qwen2_5_vl.model import Qwen2_5_VL
    from fundus_jax.models.qwen2_5_vl.processor import Processor
    from tests.models import tiny

    tiny.tiny_config().save_pretrained(tiny.write_processor_files(folder))
    return Qwen2_5_VL(read_config(folder), rngs=nnx.Rngs(0)), Processor.from_pretrained(folder)


def test_questions_with_several_images(tmp_path: Path) -> None:
    """In one batch with a question that has one; every picture is loaded, in the order of the prompt."""
    model, processor = tiny_model(tmp_path / "tiny")
    loaded: list[str] = []

    def load(name: str) -> Image.Image:
        loaded.append(name)
        return Image.new("RGB", (56, 56), (len(loaded), 80, 10))

    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which disease?"}]
    two = item("two", images=("left.png", "right.png"), messages=({"role": "user", "content": content},))
    found = predict(
        model, processor, [two, item("one")], images=Pictures(load), max_new_tokens=3, batch_size=2
    )
    assert [one.item.id for one in found] == ["two", "one"]
    assert all(1 <= one.tokens <= 3 for one in found)
    assert sorted(loaded) == sorted(2 * ["left.png", "right.png", "one.png"])  # for the size, and the pixels


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any]]:
    """The flags of the command, for a model of random weights in tmp_path/tiny; and how it was loaded."""
    loaded: list[tuple[Any, ...]] = []

    def load_pretrained(*arguments: Any, **named: Any) -> tuple[Any, Any]:
        loaded.append((*arguments, named))
        model, processor = tiny_model(tmp_path / "tiny")
        skeleton, params = training.split(model)
        return skeleton.merge(training.spread(params, skeleton.shardings(named["mesh"]))), processor

    monkeypatch.setattr(run, "load_pretrained", load_pretrained)
    tiny_model(tmp_path / "tiny")
    return command_flags(monkeypatch), loaded


def test_the_command_on_a_tiny_model(
    tmp_path: Path, command: tuple[Any, list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Five questions, two samples each, through the flags, the model and the files. Its answers are noise."""
    values, loaded = command
    source = stage(tmp_path / "examples", [example(k) for k in range(5)])
    out = tmp_path / "out"
    given = {
        "model": tmp_path / "tiny",
        "benchmark": "phantom",
        "source": source,
        "out": out,
        "batch_size": 4,
    }
    given |= {"max_new_tokens": 6, "temperature": 1.0, "group_size": 2}
    values(["run", *(f"--{name}={value}" for name, value in given.items())])
    run.main(["run"])
    mesh = parse_mesh("data:-1")
    assert loaded == [(str(tmp_path / "tiny"), {"dtype": "float32", "mesh": mesh})]

    report = json.loads((out / "report.json").read_text())
    assert (report["n"], report["items"], report["benchmark"]["flags"]["group_size"]) == (10, 5, 2)
    assert report["benchmark"]["missing_images"] == []
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [(line["id"], line["sample"]) for line in lines] == [
        (f"e{k}", s) for k in range(5) for s in (0, 1)
    ]
    assert "A. Normal" in lines[0]["prompt"]
    assert all(1 <= line["tokens"] <= 6 for line in lines)
    assert len({line["response"] for line in lines}) > 2  # noise, not one constant
    assert "accuracy" in capsys.readouterr().out
    assert (out / "report.txt").read_text().startswith("10 answers to 5 items of 5 patients or images")

    journal = out / "answers" / "00000-of-00001.jsonl"
    whole = journal.read_bytes()
    parts = whole.splitlines(keepends=True)
    journal.write_bytes(b"".join(parts[:2]) + parts[2][:20])  # killed while it wrote the third
    (out / "report.json").unlink()
    run.main(["run"])
    assert sorted(journal.read_bytes().splitlines()) == sorted(whole.splitlines())
    values.seed = 3
    with pytest.raises(SystemExit, match="answers of another evaluation .asking.seed: 0 there, 3 here"):
        run.main(["run"])
    values.seed, values.out = 0, str(tmp_path / "shards")
    for shard, said in (("0/2", "3 of 5 questions"), ("1/2", "accuracy")):
        values.shard = shard
        run.main(["run"])
        assert said in capsys.readouterr().out
    name = "predictions.jsonl"
    assert (tmp_path / "shards" / name).read_text() == (out / name).read_text()

    values.source = str(tmp_path)
    with pytest.raises(SystemExit, match="DataError: .*no finished stage directory"):
        run.main(["run"])


def test_the_command_goes_past_a_broken_picture_if_it_may(
    tmp_path: Path, command: tuple[Any, list[Any]]
) -> None:
    """It is named, and the other answers are kept; allowed, the report says what is missing."""
    whole = encode()
    funbench(tmp_path, [whole, whole[: len(whole) // 2], whole])
    values, out = command[0], tmp_path / "out"
    given = {"model": tmp_path / "tiny", "benchmark": "funbench", "source": tmp_path / "FunBench", "out": out}
    given |= {"images": tmp_path / "images", "tasks": "L2b-laterality", "side": 56, "max_new_tokens": 3}
    values(["run", *(f"--{name}={value}" for name, value in given.items())])
    named = f"no answer to 1 of 3 questions, such as L2b-laterality:{KEYS[1]}: .*can not be read: .*truncated"
    with pytest.raises(SystemExit, match=f"ConfigError: there is {named}"):
        run.main(["run"])
    journal = out / "answers" / "00000-of-00001.jsonl"
    kept = journal.read_bytes()
    assert len(kept.splitlines()) == 2
    values.allow_partial = True
    run.main(["run"])
    assert journal.read_bytes() == kept
    report = json.loads((out / "report.json").read_text())
    assert report["partial"][-1] == f"1 of 3 questions have no answer: L2b-laterality:{KEYS[1]}"
    assert list(report["benchmark"]["unanswered"]) == [f"L2b-laterality:{KEYS[1]}"]
    assert "PARTIAL" in (out / "report.txt").read_text().splitlines()[2]
