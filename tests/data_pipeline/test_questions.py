"""Questions are asked only where the data answer them, are short, the same on every run, and balanced."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import ingest, questions
from data_pipeline.datasets import registry
from data_pipeline.datasets.base import Sample
from fundus_jax.evaluation.benchmarks import LEVELS
from fundus_jax.findings import FINDINGS, vocabulary
from fundus_jax.records import Box, ConfigError

ALL = dict.fromkeys(questions.TASKS, 9.0)


def sample(key="a", modality="CFP", **more) -> Sample:
    return Sample(key=key, image=b"", split="train", patient=key, modality=modality, **more)


def searched(key, findings, modality="CFP", **more) -> Sample:
    names = tuple(sorted(findings))
    return sample(key, modality, searched=vocabulary(modality), findings=names, **more)


def asked(one, tasks=None, **more):
    return {q.task: q for q in questions.ask([one], tasks or ALL, **more)[0]}


def test_nothing_is_asked_that_is_not_known():
    assert set(asked(sample())) == {"modality"}
    assert set(asked(sample(modality="OCT", eye="OD"))) == {"modality"}, "no laterality on a B-scan"
    assert set(asked(searched("a", ()))) == {"modality"}, "one image alone can not be balanced"
    known = sample(eye="OS", labels={"disease": "PDR", "dr_grade": "PDR"})
    assert set(asked(known)) == {"modality", "laterality", "disease", "dr_grade"}


@pytest.mark.parametrize("modality", ["CFP", "OCT", "UWF"])
def test_answers_and_options(modality):
    disease = questions.DISEASES[modality][1]
    found = asked(sample(modality=modality, eye="OD", labels={"disease": disease, "dr_grade": "No DR"}))
    assert found["disease"].answer == disease
    assert found["disease"].options == questions.DISEASES[modality]
    assert found["modality"].answer == questions.MODALITIES[modality]
    assert found["dr_grade"].options == ("No DR", "Mild NPDR", "Moderate NPDR", "Severe NPDR", "PDR")
    if modality != "OCT":
        assert found["laterality"].answer == "Right eye"
    few = asked(sample(modality=modality, labels={"disease": "Normal"}), diseases={"Normal": 3, "PDR": 1})
    assert few["disease"].options == ("Normal", "PDR")


def test_every_task_has_a_level_a_rate_and_a_title_in_the_table():
    assert set(questions.TASKS) == set(ingest.TASKS) == set(LEVELS)
    assert set(questions.TASKS) == {task for row in registry.DATASETS.values() for task in row.tasks}


def test_grades_and_courses():
    stated = {"amd_grade": "Late AMD", "dme_risk": "Hard exudates near the fovea"}
    course = {"progression_plr2": "Progression", "progression_md": "No progression"}
    [about] = questions.ask([sample(labels=stated | course)], ALL)
    found = {one.question: one for one in about if one.task == "progression"}
    assert sorted((text.split()[-1], one.answer) for text, one in found.items()) == [
        ("MD?", "No progression"),
        ("PLR2?", "Progression"),
    ]
    grades = {one.task: (one.answer, len(one.options)) for one in about if one.task in stated}
    assert grades == {"amd_grade": ("Late AMD", 4), "dme_risk": ("Hard exudates near the fovea", 3)}


def test_diseases_of_images_with_several_are_asked_for_in_equal_numbers():
    pairs = [("AMD", "Glaucoma"), ("AMD", "Macular hole"), ("Glaucoma", "Macular hole"), ("AMD",), ()]
    many = [sample(f"k{i}", diseases=pairs[i % 5]) for i in range(50)]
    found = questions.ask(many, {"disease_presence": 2.0})
    said = Counter()
    for one, about in zip(many, found, strict=True):
        assert len(about) in ((1, 2) if len(one.diseases) > 1 else (0,))
        for question in about:
            [name] = [name for name in ("AMD", "Glaucoma", "Macular hole") if name in question.question]
            said[name, question.answer] += 1
            assert (question.answer == "Yes") == (name in one.diseases)
    assert all(said[name, "Yes"] == said[name, "No"] > 0 for name, _ in said)
    assert questions.ask(many[:1], {"disease_presence": 2.0}) == [[]], "one image can not be balanced"


def test_labels_outside_the_options_stop():
    with pytest.raises(ConfigError, match="disease is 'Glaucoma', which is not among the options"):
        asked(sample(labels={"disease": "Glaucoma"}), diseases={"Normal": 3, "PDR": 1})


def test_the_options_do_not_say_which_is_right():
    """Of 40 diseases, one of them a third of all answers: who takes the most frequent of the options offered
    is not much better than chance, and the frequent one is offered nearly always."""
    often = {"Normal": 400, **{f"disease {i:02d}": 1 + 800 // (i + 2) ** 2 for i in range(39)}}
    answers = [name for name, count in often.items() for _ in range(count)]
    drawn = [
        asked(sample(f"k{i}", labels={"disease": answer}), {"disease": 1}, diseases=often)["disease"]
        for i, answer in enumerate(answers)
    ]
    assert all(len(one.options) == questions.DRAWN and one.answer in one.options for one in drawn)
    assert all(list(one.options) == sorted(one.options, key=list(often).index) for one in drawn)
    guessed = sum(max(one.options, key=often.__getitem__) == one.answer for one in drawn) / len(drawn)
    assert guessed < 0.45, "0.2 is chance; with others drawn alike it is 0.8"
    offered = [one for one in drawn if "Normal" in one.options]
    assert len(offered) > 0.8 * len(drawn)
    never = asked(sample(labels={"disease": "Normal"}), {"disease": 1}, diseases=often | {"never": 0})[
        "disease"
    ]
    assert "never" not in never.options


@pytest.mark.parametrize("tasks", [{}, {"age": 1.0}, {"disease": -1.0}, {"disease": float("nan")}])
def test_bad_tasks(tasks):
    with pytest.raises(ConfigError, match="known tasks are disease, dr_grade"):
        questions.ask([sample()], tasks)


def test_every_wording_is_short_and_both_are_used():
    for task, wordings in questions.WORDINGS.items():
        for wording in wordings:
            for row in FINDINGS.values():
                text = wording.format(row.plural)
                assert len(text.split()) <= 12, (task, text)
                assert text.endswith("?")
    many = [sample(f"k{i}", labels={"disease": "PDR"}) for i in range(100)]
    texts = Counter(q.question for one in questions.ask(many, {"disease": 1.0}) for q in one)
    assert set(texts) == set(questions.WORDINGS["disease"])
    assert min(texts.values()) > 25


def test_rates_are_probabilities_and_runs_agree():
    many = [sample(f"k{i}", labels={"disease": "PDR", "dr_grade": "PDR"}) for i in range(2000)]
    rates = {"disease": 1.0, "dr_grade": 0.25, "modality": 0.0}
    first = questions.ask(many, rates)
    count = Counter(q.task for one in first for q in one)
    assert count["disease"] == 2000
    assert 420 < count["dr_grade"] < 580
    assert "modality" not in count
    assert questions.ask(many, rates) == first
    assert questions.ask(many[::-1], rates)[::-1] == first, "the order of the shard does not matter"
    other = questions.ask([replace(one, split="test") for one in many], rates)
    assert [len(one) for one in other] != [len(one) for one in first], "splits are drawn apart"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.integers(1, 3))
def test_presence_is_balanced_for_each_finding(seed, count, rate):
    rng = np.random.default_rng(seed)
    shares = dict.fromkeys(vocabulary("CFP"), 0.0) | {
        "microaneurysm": 0.9, "haemorrhage": 0.5, "drusen": 0.1, "hard exudate": 1.0,
    }  # fmt: skip
    many = [
        searched(f"k{i}", [name for name, share in shares.items() if rng.random() < share])
        for i in range(count)
    ]
    found = questions.ask(many, {"lesion_presence": float(rate)})
    answers: Counter = Counter()
    for one, about in zip(many, found, strict=True):
        assert len(about) <= rate
        assert len({q.question for q in about}) == len(about)
        for q in about:
            name = next(n for n in sorted(shares, key=len, reverse=True) if FINDINGS[n].plural in q.question)
            assert q.options == ("Yes", "No")
            assert (q.answer == "Yes") == (name in one.findings)
            answers[name, q.answer] += 1
    for name in shares:
        assert answers[name, "Yes"] == answers[name, "No"]
    assert not answers["hard exudate", "Yes"], "all images show it: the answer needs no image"


def test_presence_is_asked_of_images_from_anywhere_in_a_folder():
    many = [searched(f"k{i}", [] if i % 5 else ["drusen"]) for i in range(200)]
    found = questions.ask(many, {"lesion_presence": 1.0})
    asked = [i for i, one in enumerate(found) for q in one if "drusen" in q.question and q.answer == "No"]
    assert len(asked) >= 20
    assert 0.3 < np.mean(np.asarray(asked) < 100) < 0.7, "not of those that come first"


def test_presence_uses_most_images_where_it_can():
    many = [searched(f"k{i}", ["haemorrhage"] if i % 2 else []) for i in range(100)]
    found = questions.ask(many, {"lesion_presence": 1.0})
    assert sum(map(len, found)) == 100
    assert Counter(one[0].answer for one in found) == {"Yes": 50, "No": 50}


def test_absent_means_looked_for():
    """IDRiD's masks know four lesions: an image without drusen in its masks says nothing of drusen."""
    four = ("microaneurysm", "haemorrhage", "hard exudate", "cotton-wool spot")
    many = [sample(f"k{i}", searched=four, findings=four[: 1 + i % 4]) for i in range(40)]
    many += [sample(f"u{i}") for i in range(10)]  # without masks
    found = questions.ask(many, {"lesion_presence": 4.0})
    assert not any(found[40:])
    texts = " ".join(q.question for one in found for q in one)
    assert "cotton-wool spots" in texts
    assert "drusen" not in texts
    assert "neovascularisation" not in texts


def box(x1, y1, x2, y2, finding="drusen"):
    return Box(finding=finding, x1=x1, y1=y1, x2=x2, y2=y2)


@pytest.mark.parametrize(
    ("boxes", "answer"),
    [
        ([box(10, 10, 100, 100)], "Upper left"),
        ([box(600, 10, 700, 100)], "Upper right"),
        ([box(10, 600, 100, 700)], "Lower left"),
        ([box(600, 600, 700, 700), box(600, 700, 650, 720)], "Lower right"),
        ([box(600, 600, 700, 700), box(10, 10, 20, 20)], "Lower right"),
        ([box(600, 600, 700, 700), box(10, 10, 100, 100)], None),
        ([box(400, 10, 600, 100)], None),
        ([box(300, 10, 540, 100)], "Upper left"),
    ],
)
def test_location_needs_one_dominant_quadrant(boxes, answer):
    found = asked(searched("a", ["drusen"], boxes=tuple(boxes)), {"lesion_location": 1.0})
    assert (found["lesion_location"].answer if found else None) == answer


def test_location_asks_about_as_many_findings_as_wanted():
    boxes = (box(10, 10, 20, 20), box(600, 10, 700, 20, "haemorrhage"))
    one = searched("a", ["drusen", "haemorrhage"], boxes=boxes)
    (both,) = questions.ask([one], {"lesion_location": 2.0})
    assert sorted(q.answer for q in both) == ["Upper left", "Upper right"]
    assert len(questions.ask([one], {"lesion_location": 1.0})[0]) == 1
