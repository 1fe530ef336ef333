"""What a trace is judged against: the paper's set-ups G (selective), H (findings), I (knowledge), J (sum)."""

import dataclasses
import json

import pytest

from fundus_jax.dialog import render
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.rewards import (
    from_dict,
    reward_metrics,
)
from fundus_jax.records import ConfigError
from tests.grpo.scored import (
    TRACE,
    SpyJudge,
    make_example,
    score,
)

TENUOUS = "The image shows microaneurysms."  # half of what the image shows; all of what mild disease requires
REFERENCES = {
    # (trace, answer): process by selective, findings, knowledge, sum
    (TRACE, "Moderate NPDR"): (1, 1, 0.5, 1.5),
    (TENUOUS, "Moderate NPDR"): (0.5, 0.5, 0, 0.5),
    ("The image shows drusen.", "Moderate NPDR"): (0, 0, 0, 0),
    (TRACE, "Mild NPDR"): (0, 1, 0, 1),  # all that is there, which mild disease excludes
    (TENUOUS, "Mild NPDR"): (0.5, 0.5, 0.5, 1),
    ("The image shows drusen.", "AMD"): (0.5, 0, 0.5, 0.5),
    (TRACE, "Severe NPDR"): (0, 1, 0, 1),  # of which nothing is known
}


@pytest.mark.parametrize(("said", "worth"), REFERENCES.items())
def test_the_process_reward_of_each_mode(said, worth):
    trace, answer = said
    for mode, expected in zip(("selective", "findings", "knowledge", "sum"), worth, strict=True):
        config = GrpoConfig(process=mode)
        config.validate()
        result = score(render(trace, answer), config=config)
        assert result.process == expected, mode
        assert result.total == (answer == "Moderate NPDR") + 1 + expected
        against = [verdict.reference for verdict in result.verdicts]
        right = "findings" if answer == "Moderate NPDR" else "knowledge"
        assert against == {"selective": [right], "sum": ["findings", "knowledge"]}.get(mode, [mode])


def test_without_an_answer_only_the_findings_can_be_met():
    text = f"<think>{TRACE}</think>"
    assert [score(text, config=GrpoConfig(process=mode)).process for mode in ("findings", "sum")] == [1, 1]
    assert [score(text, config=GrpoConfig(process=mode)).process for mode in ("selective", "knowledge")] == [
        0,
        0,
    ]


class HalfJudge(SpyJudge):
    """Abstains against one reference, and finds everything plausible against the other."""

    def __init__(self, silent):
        super().__init__("plausible")
        self.silent = silent

    def __call__(self, requests):
        return [
            dataclasses.replace(one, rating="abstain") if one.reference == self.silent else one
            for one in super().__call__(requests)
        ]


@pytest.mark.parametrize("silent", ["findings", "knowledge"])
@pytest.mark.parametrize("answer", ["Moderate NPDR", "Mild NPDR"])
def test_in_a_sum_one_abstention_is_enough(silent, answer):
    config = GrpoConfig(process="sum")
    judge = HalfJudge(silent)
    result = score(render(TRACE, answer), judge=judge, config=config)
    assert len(judge.calls) == 2  # the other verdict is there to be seen
    ratings = {verdict.reference: verdict.rating for verdict in result.verdicts}
    assert ratings == {"findings": "plausible", "knowledge": "plausible"} | {silent: "abstain"}
    assert (result.process, result.total, result.valid) == (None, None, False)
    metrics = reward_metrics(
        [[result, score(render(TRACE, answer), judge=SpyJudge("plausible"), config=config)]]
    )
    assert (metrics["rated_abstain"], metrics["rated_plausible"], metrics["process"]) == (0.5, 1, 1.5)


def test_what_is_not_applicable_is_so_for_the_whole_group():
    """The knowledge item needs a right answer that is a label, the findings item an image with findings."""
    right, wrong = render(TRACE, "Moderate NPDR"), render("The image shows drusen.", "AMD")
    for mode, worth in (("findings", (0, 0)), ("knowledge", (0.5, 0.5)), ("sum", (0.5, 0.5))):
        config = GrpoConfig(process=mode)
        assert tuple(score(t, findings=None, config=config).process for t in (right, wrong)) == worth
    severe = make_example(answer="Severe NPDR", labels=("Severe NPDR",))  # nothing is known of it
    for mode, count in (("findings", 1), ("knowledge", 0), ("sum", 1)):
        config = GrpoConfig(process=mode)
        for text in (render(TRACE, "Severe NPDR"), wrong):
            result = score(text, example=severe, config=config)
            assert [verdict.reference for verdict in result.verdicts] == ["findings"] * count
    eye = make_example(
        task="laterality", question="Which eye is it?", answer="Right eye", options=("Right eye",)
    )
    assert (
        score(render(TRACE, "Right eye"), example=eye, config=GrpoConfig(process="knowledge")).verdicts == ()
    )


def test_a_score_survives_its_way_through_json():
    result = score(render(TRACE, "Mild NPDR"), config=GrpoConfig(process="sum"))
    assert len(result.verdicts) == 2
    assert from_dict(json.loads(json.dumps(dataclasses.asdict(result)))) == result


def test_an_unknown_mode_is_named():
    with pytest.raises(ConfigError, match=r"grpo.process is 'both'; it must be one of selective, findings"):
        GrpoConfig(process="both").validate()
