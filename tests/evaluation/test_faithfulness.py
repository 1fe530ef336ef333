"""Traces against findings, and everything by data set, modality and disease, by hand."""

from __future__ import annotations

import json

import pytest

from fundus_jax.evaluation.faithfulness import Trace, evaluate_faithfulness
from fundus_jax.evaluation.report import evaluate
from fundus_jax.evaluation.slices import dataset_of, evaluate_more
from fundus_jax.evaluation.table import table
from fundus_jax.records import Findings
from tests.evaluation.samples import answered, item, reply


def trace(text: str, *there: str, diagnosis: bool = True, unit: str = "p") -> Trace:
    return Trace(text, frozenset(there), diagnosis, unit)


def test_by_hand() -> None:
    found = evaluate_faithfulness(
        [
            trace("There are drusen and hard exudates. No haemorrhage.", "drusen", "haemorrhage", unit="a"),
            trace("Drusen are seen. No drusen are seen.", "drusen", unit="b"),
            trace("No hard exudate is seen.", "drusen", diagnosis=False, unit="c"),
            trace("The image is dark.", unit="d"),
        ]
    )
    assert found is not None
    assert found["traces"] == 4
    values = {name: (one["value"], one["n"]) for name, one in found.items() if name != "traces"}
    assert values == {
        "precision": (pytest.approx(2 / 3), 3),  # drusen and not exudates; drusen
        "recall": (pytest.approx(2 / 3), 3),  # the haemorrhage is not claimed; c need not name drusen
        "false_denials": (pytest.approx(2 / 3), 3),  # haemorrhage, drusen; not exudate
        "contradictions": (0.5, 4),
    }
    assert evaluate_faithfulness([]) is None


def test_what_nobody_looked_for_counts_neither_way() -> None:
    text = "There are drusen and new vessels. No irma, no hard exudates. Venous beading. No venous beading."
    unseen = frozenset({"neovascularisation", "irma", "venous beading"})
    both = [Trace(text, frozenset({"drusen"}), True, "p", known) for known in (unseen, frozenset())]
    some, everything = (evaluate_faithfulness([one]) for one in both)
    assert some is not None
    assert everything is not None
    assert (some["precision"]["value"], some["precision"]["n"]) == (1.0, 1)
    assert (everything["precision"]["value"], everything["precision"]["n"]) == (pytest.approx(1 / 3), 3)
    assert (some["false_denials"]["n"], everything["false_denials"]["n"]) == (1, 3)
    assert some["contradictions"]["value"] == 1.0, "it contradicts itself, whatever there is"


def test_the_votes_of_an_item_say_what_they_are_about() -> None:
    one, text = item("b", "AMD", findings=None), reply("AMD", "Drusen and hard exudates.")
    voted = Findings(
        example="b", present=("drusen",), votes={"drusen": 5}, n=5, origin="votes", searched=("drusen",)
    )
    found = evaluate_more([one], [text], [("AMD",)], [1], votes={"b": voted})["faithfulness"]["votes"]
    assert (found["precision"]["value"], found["precision"]["n"]) == (1.0, 1)


ITEMS = [
    item("a", "PDR", unit="idrid/1", findings=("drusen",)),
    item("b", "AMD", unit="idrid/2", findings=None),
    item("c", "PDR", unit="octid/1", modality="OCT", findings=("drusen", "haemorrhage")),
    item("d", "CFP", unit="octid/1", task="modality", level="L1", part="modality", findings=("drusen",)),
]
TEXTS = [reply("PDR", "Drusen."), reply("PDR", "Drusen."), reply("PDR", "No drusen."), reply("CFP", "Round.")]
CHOSEN = [("PDR",), ("PDR",), None, ("CFP",)]


def test_slices() -> None:
    voted = Findings(example="b", present=("haemorrhage",), votes={"haemorrhage": 3}, n=5, origin="votes")
    found = evaluate_more(ITEMS, TEXTS, CHOSEN, [10, 20, 30, 40], votes={"b": voted})
    assert found["accuracy"]["value"] == 0.5
    length = found["length"]
    assert (length["all"]["value"], length["right"]["value"], length["wrong"]["value"]) == (25, 25, 25)
    assert (length["median"], length["p90"]) == (25, pytest.approx(37))
    masks, votes = found["faithfulness"]["masks"], found["faithfulness"]["votes"]
    assert (masks["traces"], votes["traces"]) == (2, 1)  # d asks nothing of findings
    assert (masks["precision"]["value"], masks["recall"]["value"]) == (1.0, pytest.approx(1 / 3))
    assert (votes["precision"]["value"], votes["recall"]["value"]) == (0.0, 0.0)
    assert masks["contradictions"]["value"] == 0.5
    assert {name: one["accuracy"]["n"] for name, one in found["by_dataset"].items()} == {
        "idrid": 2,
        "octid": 2,
    }
    assert {name: one["accuracy"]["value"] for name, one in found["by_disease"].items()} == {
        "PDR": 0.5,
        "AMD": 0,
    }
    assert found["by_modality"]["OCT"]["faithfulness"]["masks"]["contradictions"]["value"] == 1
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_conclusion_is_no_claim_here_either() -> None:
    """As in the reward: neither for the findings that are there, nor against them."""
    wrong = Trace("No lesion is seen. So the answer is Drusen.", frozenset(), True, "p1")
    found = evaluate_faithfulness([wrong])
    assert found is not None
    assert found["precision"] is None
    behind = Trace(
        "The diagnosis is Drusen, and haemorrhages are seen.", frozenset({"haemorrhage"}), True, "p1"
    )
    found = evaluate_faithfulness([behind])
    assert found is not None
    assert (found["precision"]["value"], found["recall"]["value"]) == (1, 1)


@pytest.mark.parametrize(
    ("unit", "dataset"),
    [("idrid/p1", "idrid"), ("Images/OLIVES/a/b.png", "OLIVES"), ("OIA-ODIR/x.jpg", "OIA-ODIR"), ("12", "")],
)
def test_the_data_set_of_an_item(unit: str, dataset: str) -> None:
    assert dataset_of(item(unit=unit)) == dataset


def test_it_stands_in_the_report_and_its_table() -> None:
    answers = [answered(ITEMS[0], text, "Drusen.", sample) for sample, text in enumerate(("PDR", "AMD"))]
    report = evaluate(answers)
    assert report["more"]["repeats"]["pass_at"]["2"]["value"] == 1
    assert report["more"]["repeats"]["majority_at"]["2"]["value"] == 0.5
    text = table(report)
    for words in ("traces, contradictions (masks)", "pass@2", "majority@1", "calibration error", "Brier"):
        assert words in text
