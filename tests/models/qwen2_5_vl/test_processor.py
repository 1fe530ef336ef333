"""The processor against transformers: chat text, tokens, pixels; what it refuses; the loss mask; saving; no
torch.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from fundus_jax.models.batch import Batch
from fundus_jax.models.qwen2_5_vl.processor import Processor
from fundus_jax.records import ConfigError, DataError
from tests.models import tiny

IMAGE = {"type": "image"}


def words(text: str) -> dict[str, str]:
    """A text part of a message."""
    return {"type": "text", "text": text}


def user(*parts: Any) -> dict[str, Any]:
    """A user turn of parts."""
    return {"role": "user", "content": list(parts)}


def assistant(text: str) -> dict[str, Any]:
    """An assistant turn."""
    return {"role": "assistant", "content": text}


DIALOGS = [
    [{"role": "user", "content": "Is the macula normal?"}],
    [user(IMAGE, words("What disease is visible?"))],
    [{"role": "system", "content": "Read the retina."}, user(IMAGE, words("left"), IMAGE, words(" right?"))],
    [user(IMAGE, words("First?")), assistant("Drusen."), user(words("Why?")), assistant("Yellow deposits.")],
    [user(words("é\n\n 'quoted' <b>{{ x }}</b> 眼底")), {"role": "assistant", "content": [words("no")]}],
]


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's processor files, without weights."""
    return tiny.write_processor_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def processor(hf_dir: Path) -> Processor:
    """Our processor on them."""
    return Processor.from_pretrained(hf_dir)


def reference_processor(hf_dir: Path) -> Any:
    """transformers' own processor, without the video half, which torchvision would be needed for."""
    from transformers import AutoTokenizer, Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil

    class WithoutVideo(Qwen2_5_VLProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    tokenizer = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
    images = Qwen2VLImageProcessorPil.from_pretrained(hf_dir, local_files_only=True)
    return WithoutVideo(images, tokenizer, chat_template=tokenizer.chat_template)


def raster_patches(batch: Batch, row: int) -> np.ndarray:
    """The patches of a row in transformers' order, found from patch_hw and patch_image alone."""
    image, (high, wide) = batch.patch_image[row], batch.patch_hw[row].T
    order = np.lexsort((wide % 2, high % 2, wide // 2, high // 2, image))
    return batch.patches[row][order[(image == -1).sum() :]]


def test_text_tokens_and_pixels_equal_transformers(hf_dir: Path, processor: Processor) -> None:
    pytest.importorskip("torch", reason="transformers' processor classes need it")
    reference = reference_processor(hf_dir)
    for number, dialog in enumerate(DIALOGS):
        for prompt in (False, True):
            text = processor.chat(dialog, add_generation_prompt=prompt)
            assert text == reference.apply_chat_template(dialog, add_generation_prompt=prompt, tokenize=False)
        images = [
            tiny.random_image(40 + 90 * (n + number), 130 + 20 * n, n)
            for n in range(text.count("<|image_pad|>"))
        ]
        expected = reference(text=[text], images=images or None, return_tensors="np")
        batch = processor([text], [images])
        np.testing.assert_array_equal(batch.tokens, expected["input_ids"])
        is_image = batch.tokens == processor.image_token_id
        np.testing.assert_array_equal(is_image, expected["mm_token_type_ids"] == 1)
        if images:
            assert np.array_equal(raster_patches(batch, 0), expected["pixel_values"])


def test_a_batch_holds_its_rows(processor: Processor) -> None:
    dialogs = [DIALOGS[0], DIALOGS[2], DIALOGS[1]]
    drawn = [tiny.random_image(*size) for size in ((100, 150), (250, 90), (112, 112))]
    images = [[], drawn[:2], drawn[2:]]
    texts = [processor.chat(dialog, add_generation_prompt=True) for dialog in dialogs]
    batch = processor(texts, images)
    assert batch.rows == 3
    slots = [processor.row_size(text, row)[1] for text, row in zip(texts, images, strict=True)]
    assert slots == [0, 2 * 64 + 3 * 64, 64]
    assert batch.patches.shape == (3, 5 * 64, 1176)
    assert not batch.packed
    np.testing.assert_array_equal(batch.segments, batch.mask)
    types = {name: getattr(batch, name).dtype.name for name in Batch.__dataclass_fields__ if name != "packed"}
    assert types.pop("mask") == "bool"
    assert types.pop("patches") == "float32"
    assert set(types.values()) == {"int32"}
    for row in range(3):
        alone = processor([texts[row]], [images[row]])
        time, space = alone.tokens.shape[1], alone.patches.shape[1]
        assert (time, space) == processor.row_size(texts[row], images[row])
        assert batch.mask[row].tolist() == [True] * time + [False] * (batch.tokens.shape[1] - time)
        assert (batch.tokens[row, time:] == processor.pad_id).all()
        assert (batch.image_index[row, time:] == -1).all()
        assert (batch.patch_image[row, space:] == -1).all()
        assert not batch.patches[row, space:].any()
        assert not batch.patches[row][batch.patch_image[row] == -1].any()
        np.testing.assert_array_equal(batch.tokens[row, :time], alone.tokens[0])
        np.testing.assert_array_equal(batch.positions[row, :, :time], alone.positions[0])
        np.testing.assert_array_equal(batch.image_index[row, :time], alone.image_index[0])
        np.testing.assert_array_equal(batch.patches[row, :space], alone.patches[0])


def test_image_tokens_find_their_patches(processor: Processor) -> None:
    images = [tiny.random_image(150, 260, 1), tiny.random_image(300, 100, 2)]
    batch = processor([processor.chat(DIALOGS[2])], [images])
    is_image = batch.tokens[0] == processor.image_token_id
    assert ((batch.image_index[0] >= 0) == is_image).all()
    slots = batch.image_index[0][is_image] * 4
    grids = [processor.image_config.grid(image) for image in images]
    expected = [
        (n, 2 * row, 2 * column)
        for n, (_, height, width) in enumerate(grids)
        for row in range(height // 2)
        for column in range(width // 2)
    ]
    found = zip(batch.patch_image[0][slots].tolist(), *batch.patch_hw[0][slots].T.tolist(), strict=True)
    assert list(found) == expected


def test_a_batch_is_a_pytree(processor: Processor) -> None:
    batch = processor(["retina"])
    stacked = jax.tree.map(lambda *rows: np.concatenate(rows), batch, batch)
    assert isinstance(stacked, Batch)
    assert stacked.rows == 2
    assert jax.jit(lambda b: b.tokens.sum())(batch) == batch.tokens.sum()


def test_sizes_can_be_fixed(processor: Processor) -> None:
    text, image = processor.chat(DIALOGS[1]), tiny.random_image(112, 112)
    time, space = processor.row_size(text, [image])
    assert processor([text], [[image]], length=time + 5, patches=space + 64).tokens.shape == (1, time + 5)
    assert processor(["a"], patches=128).patches.shape == (1, 128, 1176)
    assert processor(["a"]).patches.shape == (1, 0, 1176)
    short = f"row 1 has {time} tokens, more than length={time - 1}: leave it out .* never truncated"
    with pytest.raises(DataError, match=short):
        processor(["a", text], [[], [image]], length=time - 1)
    with pytest.raises(DataError, match="row 0 has 128 patch slots, more than patches=64"):
        processor([text], [[tiny.random_image(200, 100)]], patches=64)
    with pytest.raises(ConfigError, match="patches=100 must be a multiple"):
        processor([text], [[image]], patches=100)


def test_what_does_not_fit_together_is_refused(processor: Processor) -> None:
    image, strip = tiny.random_image(60, 60), Image.new("RGB", (900, 2))
    pad = "<|image_pad|>"
    for texts, images, message in [
        ([pad, pad + "\n" + pad], [[image], [image]], "row 1: 2 image pads for 1 images"),
        (["a"], [[image]], "row 0: 0 image pads for 1 images"),
        (["a", "b"], [[]], "2 texts but 1 lists of images"),
        (["a", "<|video_pad|>"], None, "row 1 holds <.video_pad.>: videos are not supported"),
        (["a", ""], None, "row 1 is empty"),
        (["a", pad], [[], [strip]], "row 1: image of 900x2 pixels"),
    ]:
        with pytest.raises(DataError, match=message):
            processor(texts, images)
    for wrong in ("one text", []):
        with pytest.raises(ConfigError, match="list of at least one text"):
            processor(wrong)


def test_settings_of_the_tokenizer_never_truncate_or_pad(hf_dir: Path, tmp_path: Path) -> None:
    raw = tiny.tiny_tokenizer()
    raw.enable_truncation(4)
    raw.enable_padding(length=200)
    tiny.write_processor_files(tmp_path)
    raw.save(str(tmp_path / "tokenizer.json"))
    text = "the retina shows a few small red dots"
    expected = Processor.from_pretrained(hf_dir)([text]).tokens
    assert expected.shape[1] > 4
    np.testing.assert_array_equal(Processor.from_pretrained(tmp_path)([text]).tokens, expected)


def test_threads_may_share_a_processor(processor: Processor) -> None:
    text, image = processor.chat(DIALOGS[1]), tiny.random_image(90, 90)
    expected = processor([text], [[image]])
    with ThreadPoolExecutor(4) as pool:
        for batch in pool.map(lambda _: processor([text], [[image]]), range(40)):
            assert np.array_equal(batch.tokens, expected.tokens)


def learned(processor: Processor, dialog: list[dict[str, Any]], images: Any = ()) -> list[str]:
    """The stretches of text under the loss."""
    tokens, loss = processor.train_row(dialog, images)
    edges = np.flatnonzero(np.diff(loss, prepend=False, append=False)).reshape(-1, 2)
    return [processor.decode(tokens[start:end], skip_special_tokens=False) for start, end in edges]


def test_the_loss_covers_answers_and_their_end(processor: Processor) -> None:
    image = tiny.random_image(112, 112)
    assert learned(processor, DIALOGS[3], [image]) == ["Drusen.<|im_end|>", "Yellow deposits.<|im_end|>"]
    # By position: the same words in another turn, and a literal end token in the answer, change nothing.
    system = {"role": "system", "content": "yes"}
    echo = [system, user(words("yes")), assistant("yes"), user(words("yes<|im_end|>"))]
    assert learned(processor, echo) == ["yes<|im_end|>"]
    assert learned(processor, [*echo[:2], assistant("a<|im_end|>\nb")]) == ["a<|im_end|>\nb<|im_end|>"]
    assert learned(processor, [*echo[:2], assistant("")]) == ["<|im_end|>"]


def test_training_tokens_continue_the_prompt(processor: Processor) -> None:
    image = tiny.random_image(112, 112)
    for answer in ("Drusen.", "\n\nDrusen. ", " é"):
        dialog = [*DIALOGS[1], assistant(answer)]
        prompt = processor([processor.chat(DIALOGS[1], add_generation_prompt=True)], [[image]]).tokens[0]
        tokens, loss = processor.train_row(dialog, [image])
        np.testing.assert_array_equal(tokens[: len(prompt)], prompt)
        assert not loss[: len(prompt)].any()
        assert loss[len(prompt)]
        whole = processor([processor.chat(dialog)], [[image]]).tokens[0]  # tokenised in one piece
        np.testing.assert_array_equal(tokens, whole)


def test_a_dialog_becomes_a_batch_and_its_mask(processor: Processor) -> None:
    image = tiny.random_image(100, 60)
    batch, loss = processor.encode_dialog(DIALOGS[3], [image], length=100, patches=128)
    tokens, expected = processor.train_row(DIALOGS[3], [image])
    assert batch.tokens.shape == loss.shape == (1, 100)
    assert batch.patches.shape == (1, 128, 1176)
    np.testing.assert_array_equal(batch.tokens[0, : len(tokens)], tokens)
    np.testing.assert_array_equal(loss[0], np.pad(expected, (0, 100 - len(expected))))
    both, masks = processor.encode_dialogs([DIALOGS[4], DIALOGS[3]], [[], [image]])
    assert both.rows == len(masks) == 2
    assert not masks[~both.mask].any()


def test_dialogs_that_can_not_be_learned_are_refused(hf_dir: Path, processor: Processor) -> None:
    for dialog in (DIALOGS[0], [assistant("Hello"), user(words("hi"))]):
        with pytest.raises(DataError, match="needs an assistant turn, after"):
            processor.train_row(dialog)
    with pytest.raises(DataError, match="an image stands in an assistant turn"):
        processor.train_row(
            [*DIALOGS[0], {"role": "assistant", "content": [IMAGE]}], [tiny.random_image(60, 60)]
        )
    other = Processor.from_pretrained(hf_dir)
    other.tokenizer.chat_template = "{{ messages | length }}" + tiny.CHAT_TEMPLATE
    with pytest.raises(ConfigError, match="the loss mask can not be placed"):
        other.train_row(DIALOGS[3], [tiny.random_image(60, 60)])


def test_ids_and_decoding(processor: Processor) -> None:
    assert processor.eos_ids == tiny.EOS_IDS
    assert processor.pad_id == 1000
    assert processor.image_token_id == tiny.IMAGE_ID
    assert processor.banned_ids == (1009, 1010, 1011, 1012, 1013)
    tokens = processor(["Drusen é 眼底<|im_end|>"]).tokens[0]
    assert processor.decode(tokens) == "Drusen é 眼底"
    assert processor.decode(jax.numpy.asarray(tokens), skip_special_tokens=False) == "Drusen é 眼底<|im_end|>"


def test_saving_and_loading_give_the_same(hf_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer

    first = Processor.from_pretrained(hf_dir, max_pixels=28 * 28 * 9)
    first.save_pretrained(tmp_path / "a")
    second = Processor.from_pretrained(tmp_path / "a")
    second.save_pretrained(tmp_path / "b")
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert second.image_config == first.image_config
    assert second.image_config.max_pixels == 28 * 28 * 9
    same = (tmp_path / "a" / "tokenizer_config.json").read_bytes()
    assert same == (hf_dir / "tokenizer_config.json").read_bytes()
    image = tiny.random_image(300, 200)
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "a", local_files_only=True)(
        image, return_tensors="np"
    )
    batch = second([first.chat(DIALOGS[1])], [[image]])
    assert np.array_equal(raster_patches(batch, 0), pixels["pixel_values"])
    for dialog in (DIALOGS[0], DIALOGS[4]):
        text = first.chat(dialog)
        assert second.chat(dialog) == text
        theirs = AutoTokenizer.from_pretrained(tmp_path / "a", local_files_only=True)
        assert theirs.apply_chat_template(dialog, tokenize=False) == text
        ours = [loaded([text]).tokens[0].tolist() for loaded in (first, second)]
        assert ours == [theirs(text)["input_ids"]] * 2


def test_every_place_of_the_settings_is_read(hf_dir: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((hf_dir / name).read_bytes())
    with pytest.raises(ConfigError, match="no image settings"):
        Processor.from_pretrained(tmp_path)
    nested = {"image_processor": {"size": {"shortest_edge": 3136, "longest_edge": 9000}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested), encoding="utf-8")
    with pytest.raises(ConfigError, match="no chat template"):
        Processor.from_pretrained(tmp_path)
    template = json.dumps({"chat_template": "{{ messages[0].content }}"})
    (tmp_path / "chat_template.json").write_text(template, encoding="utf-8")
    config = {"model_type": "qwen2_5_vl", "image_token_id": 1012, "vision_config": {"window_size": 56}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    processor = Processor.from_pretrained(tmp_path)
    assert processor.chat([{"role": "user", "content": "fovea"}]) == "fovea"
    assert (processor.image_config.max_pixels, processor.image_config.window_slots) == (9000, 16)
    assert processor.eos_ids == (1002,)
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_token_id": 7}), encoding="utf-8")
    with pytest.raises(ConfigError, match="id 1012 in the tokenizer but 7 in config.json"):
        Processor.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="neither tokenizer.json nor vocab.json"):
        Processor.from_pretrained(tmp_path)


def test_no_torch_is_needed(hf_dir: Path) -> None:
    program = f"""
import sys
sys.modules["torch"] = sys.modules["torchvision"] = None
from PIL import Image
from fundus_jax.models.qwen2_5_vl.processor import Processor
processor = Processor.from_pretrained({str(hf_dir)!r})
text = processor.chat([{{"role": "user", "content": [{{"type": "image"}}]}}], add_generation_prompt=True)
batch = processor([text], [[Image.new("L", (112, 112))]])
print(batch.patches.shape, processor.decode(batch.tokens[0]).split()[0], sys.modules["torch"])
"""
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(1, 64, 1176) system None\n"
