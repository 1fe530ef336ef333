"""The model card: its head is what the hub reads, its body says what it must."""

from __future__ import annotations

import dataclasses

import pytest

from fundus_jax.evaluation.card import Card, Source, render, scores_of
from fundus_jax.evaluation.report import evaluate
from tests.evaluation.samples import answered, item

CARD = Card(
    name='fundus: a "test"',
    base="Qwen2.5-VL-3B-Instruct",
    stages=("sft", "grpo"),
    sources=(
        Source(name="IDRiD", licence="CC BY 4.0", citation="Porwal et al. 2018", count=413),
        Source(name="a | b", licence="", count=7),
    ),
    scores={"held-out questions of idrid": {"accuracy": {"value": 0.75, "low": 0.5, "high": 0.9, "n": 40}}},
    command="python launch/run.py --config=configs/x.py",
)


def test_the_hub_reads_it() -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(render(CARD))
    assert card.data.license == "other"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.model_name == CARD.name
    [result] = card.data.eval_results
    assert (result.metric_value, result.dataset_name) == (0.75, "held-out questions of idrid")
    assert "grpo" in card.data.tags
    bare = hub.ModelCard(render(dataclasses.replace(CARD, scores={})))
    assert bare.data.eval_results is None


def test_it_says_what_it_must() -> None:
    text = render(CARD)
    for words in (
        "not a medical device and not\nfor diagnosis",
        "Research",
        "CC BY 4.0",
        "Porwal",
        "## Limits",
    ):
        assert words in text
    assert "| a / b | 7 | unknown: see the publisher's page |" in text
    assert "| held-out questions of idrid | accuracy | 75.0 | 50.0 to 90.0 | 40 |" in text
    assert "phantoms" not in text
    drawn = render(dataclasses.replace(CARD, drawn=True, scores={}))
    assert "No number here has a clinical meaning" in drawn
    assert "It was not measured." in drawn


def test_scores_of_a_report() -> None:
    one = item("q1", findings=("drusen",))
    found = scores_of(evaluate([answered(one, "PDR", "Drusen, no haemorrhage.")]))
    assert list(found) == [
        "accuracy",
        "accuracy, CFP",
        "best constant answer, CFP",
        "findings in traces, precision (masks)",
        "findings in traces, recall (masks)",
        "findings in traces, contradictions (masks)",
    ]
    assert all({"value", "low", "high", "n"} <= set(one) for one in found.values())
