"""The reward of a rollout: its three parts, the reference that the judge gets, and a judge that fails."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fundus_jax.dialog import render
from fundus_jax.grpo.advantages import group_advantages
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.judge import RulesJudge
from fundus_jax.grpo.rewards import (
    Score,
    assess,
    from_dict,
    process_value,
    reward_arrays,
    reward_metrics,
    score_rollouts,
)
from fundus_jax.records import DataError, Verdict
from tests.grpo.scored import (
    CONFIG,
    EXAMPLE,
    FINDINGS,
    KNOWLEDGE,
    TRACE,
    SpyJudge,
    make_example,
    parts,
    score,
)


def test_right_and_well_reasoned():
    assert parts(score(render(TRACE, "Moderate NPDR"))) == (1, 1, 1, 3)
    assert parts(score(render(TRACE, " moderate  npdr."))) == (1, 1, 1, 3)


def test_right_for_weaker_reasons():
    assert parts(score(render("The image shows microaneurysms.", "Moderate NPDR"))) == (1, 1, 0.5, 2.5)
    assert parts(score(render("The image shows drusen.", "Moderate NPDR"))) == (1, 1, 0, 2)


def test_wrong_is_judged_by_the_knowledge_of_what_was_answered():
    assert parts(score(render("The image shows microaneurysms.", "Mild NPDR"))) == (0, 1, 0.5, 1.5)
    assert parts(score(render("The image shows drusen.", "amd"))) == (0, 1, 0.5, 1.5)
    # What is right about the image does not support mild disease: no sum of the two references.
    assert parts(score(render(TRACE, "Mild NPDR"))) == (0, 1, 0, 1)


def test_the_judge_gets_exactly_one_reference():
    for answer, reference, about in (
        ("Moderate NPDR", FINDINGS, None),
        ("MILD NPDR", KNOWLEDGE["Mild NPDR", "CFP"], None),
    ):
        judge = SpyJudge("plausible")
        score(render(TRACE, answer), judge=judge)
        assert judge.calls == [(TRACE, reference, "CFP", about)]


def test_where_letters_are_asked_for_a_letter_stands_for_its_label():
    example = make_example(options=("Mild NPDR", "Moderate NPDR", "AMD"))
    for answer, right, about in (
        ("B", 1, FINDINGS),
        ("A", 0, KNOWLEDGE["Mild NPDR", "CFP"]),
        ("C", 0, KNOWLEDGE["AMD", "CFP"]),
        ("B. Moderate NPDR", 1, FINDINGS),
        ("AMD", 0, KNOWLEDGE["AMD", "CFP"]),
    ):
        text, judge = render(TRACE, answer), SpyJudge("plausible")
        found = assess(text, example, FINDINGS, KNOWLEDGE, CONFIG, finished=True, style="letters")
        score_rollouts([found], judge, CONFIG)
        assert found.answer == right
        assert [reference for _, reference, *_ in judge.calls] == [about]
    for answer in ("A. Moderate NPDR", "B, C", "D"):
        text = render(TRACE, answer)
        found = assess(text, example, FINDINGS, KNOWLEDGE, CONFIG, finished=True, style="letters")
        assert (found.answer, [part.rating for part in found.due]) == (0, ["implausible"])


@pytest.mark.parametrize("answer", ["Severe NPDR", "banana", "Drusen"])
def test_a_wrong_answer_that_nothing_is_known_about_is_implausible(answer):
    # Severe NPDR has no entry here, and Drusen is a label of OCT only.
    result = score(render(TRACE, answer), judge=SpyJudge())
    assert parts(result) == (0, 1, 0, 1)
    reason = f"no knowledge of {answer!r} in CFP"
    assert result.verdicts == (Verdict(rating="implausible", reference="knowledge", reasons=(reason,)),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{TRACE} Moderate NPDR", (0, 0, 0, 0)),
        ("", (0, 0, 0, 0)),
        ("<answer>Moderate NPDR</answer>", (1, 0, 0, 1)),
        ("<think> </think> <answer>Moderate NPDR</answer>", (1, 0, 0, 1)),
        (f"Well: <think>{TRACE}</think> <answer>Moderate NPDR</answer>", (1, 0, 1, 2)),
        ("<answer>Mild NPDR</answer>", (0, 0, 0, 0)),
        (f"<think>{TRACE}</think> <answer>Moderate NPDR</answer> <answer>AMD</answer>", (0, 0, 0, 0)),
    ],
)
def test_replies_out_of_form(text, expected):
    assert parts(score(text)) == expected


def test_a_reply_without_trace_is_not_sent_to_the_judge():
    assert score("<answer>Moderate NPDR</answer>", judge=SpyJudge()).verdicts[0].rating == "flawed"
    assert score("<answer>Mild NPDR</answer>", judge=SpyJudge()).verdicts[0].rating == "implausible"


def test_a_reply_that_was_cut_off_has_no_format():
    assert parts(score(render(TRACE, "Moderate NPDR"), finished=False)) == (1, 0, 1, 2)


def test_weights_and_worths_come_from_the_config():
    config = GrpoConfig(
        answer_weight=2.0, format_weight=0.5, process_weight=4.0, tenuous=0.25, knowledge_plausible=0.125
    )
    config.validate()
    assert score(render("Microaneurysms.", "Moderate NPDR"), config=config).total == 2 + 0.5 + 4 * 0.25
    assert score(render("Microaneurysms.", "Mild NPDR"), config=config).total == 0.5 + 4 * 0.125
    everything = GrpoConfig(
        flawed=0.1, tenuous=0.2, plausible=0.3, knowledge_implausible=0.4, knowledge_plausible=0.6
    )
    table = {
        (rating, reference): process_value(
            Verdict(rating=rating, reference=reference, reasons=()), everything
        )
        for reference, ratings in (
            ("findings", ("flawed", "tenuous", "plausible")),
            ("knowledge", ("implausible", "plausible")),
        )
        for rating in ratings
    }
    assert list(table.values()) == [0.1, 0.2, 0.3, 0.4, 0.6]


def test_without_a_process_weight_no_judge_is_asked():
    result = score(render(TRACE, "Moderate NPDR"), judge=SpyJudge(), config=GrpoConfig(process_weight=0.0))
    assert parts(result) == (1, 1, 0, 2)
    assert result.verdicts == ()


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("<answer>Moderate NPDR</answer>", 1),
        (" <answer> Moderate NPDR </answer>\n", 1),
        (render(TRACE, "Moderate NPDR"), 0),
        ("So: <answer>Moderate NPDR</answer>", 0),
        ("<answer>Moderate NPDR</answer> indeed", 0),
        ("<answer> </answer>", 0),
        ("<answer>Moderate NPDR</answer><answer>AMD</answer>", 0),
    ],
)
def test_without_a_trace_the_format_is_the_answer_alone(text, form):
    config = GrpoConfig(process_weight=0.0)
    result = assess(text, EXAMPLE, FINDINGS, KNOWLEDGE, config, finished=True, think=False)
    assert (result.format, result.due) == (form, ())
    assert assess(text, EXAMPLE, FINDINGS, KNOWLEDGE, config, finished=False, think=False).format == 0


# ---- not applicable, and abstention -----------------------------------------------------------------------


def test_without_findings_the_part_is_zero_for_the_whole_group():
    right = score(render(TRACE, "Moderate NPDR"), findings=None, judge=SpyJudge())
    wrong = score(render("The image shows microaneurysms.", "Mild NPDR"), findings=None, judge=SpyJudge())
    assert parts(right) == (1, 1, 0, 2)
    assert parts(wrong) == (0, 1, 0, 1)  # not 1.5: what is not applicable is so for all
    rewards, valid = reward_arrays([[right, wrong, wrong, wrong]])
    assert valid.all()
    assert group_advantages(rewards, valid)[0, 0] > 0
    assert reward_metrics([[right, wrong]])["not_applicable"] == 1
    assert "process" not in reward_metrics([[right, wrong]])


@given(st.integers(0, 3), st.booleans(), st.sampled_from(["std", "none"]))
@settings(deadline=None)
def test_an_abstention_is_never_a_score_of_zero(position, right, scale):
    text = render(TRACE, "Moderate NPDR" if right else "Mild NPDR")
    failed = score(text, judge=SpyJudge("abstain"))
    worst = score(text, judge=SpyJudge("flawed" if right else "implausible"))
    assert (failed.process, failed.total, failed.valid) == (None, None, False)
    assert (worst.process, worst.valid) == (0.0, True)
    others = [score(render(TRACE, "Moderate NPDR")), score(render("Drusen.", "Severe NPDR")), score("")]
    rows = [others[:position] + [one] + others[position:] for one in (failed, worst)]
    rewards, valid = reward_arrays(rows)
    assert list(valid[0]) == [index != position for index in range(4)]
    assert np.isnan(rewards[0, position])
    got = group_advantages(rewards, valid, scale=scale)
    alone = group_advantages(*reward_arrays([others]), scale=scale)
    assert got[0, position] == 0
    np.testing.assert_array_equal(np.delete(got[0], position), alone[0])  # as if it had not been sampled
    assert not np.array_equal(np.delete(got[1], position), alone[0])


def test_metrics_of_a_step():
    scores = [
        [score(render(TRACE, "Moderate NPDR")), score("")],
        [
            score(render(TRACE, "Moderate NPDR"), judge=SpyJudge("abstain")),
            score(render(TRACE, "Moderate NPDR"), findings=None),
        ],
    ]
    assert reward_metrics(scores) == {
        "answer": 0.75,
        "format": 0.75,
        "process": 0.5,
        "total": pytest.approx(5 / 3),
        "not_applicable": 0.25,
        "rated_plausible": 0.25,
        "rated_tenuous": 0,
        "rated_flawed": 0,
        "rated_implausible": 0.25,
        "rated_abstain": 0.25,
    }


def test_the_judge_is_asked_once_about_all_and_two_judgements_of_one_rollout_are_summed():
    replies = [render("Drusen.", "Moderate NPDR"), "", render("Microaneurysms.", "Mild NPDR")]
    found = [assess(text, EXAMPLE, FINDINGS, KNOWLEDGE, CONFIG, finished=True) for text in replies]
    both = dataclasses.replace(found[0], due=(*found[0].due, *found[2].due, *found[1].due))
    calls = []

    class Batched(RulesJudge):
        def __call__(self, requests):
            calls.append(len(requests))
            return super().__call__(requests)

    scores = score_rollouts([*found, both], Batched(), CONFIG)
    assert calls == [4], "two single requests and the pair; the empty reply needs no judge"
    assert [one.asked for one in scores] == [1, 0, 1, 2]
    assert [one.process for one in scores] == [0, 0, 0.5, 0.5]
    assert [one.rating for one in scores[3].verdicts] == ["flawed", "plausible", "implausible"]
    assert scores[3].total == 1 + 1 + 0.5
    lost = score_rollouts([both], SpyJudge("abstain"), CONFIG)[0]
    assert (lost.process, lost.total, lost.asked, lost.agreed) == (None, None, 2, ())


def test_another_judge_is_compared_with_the_rules():
    replies = [render(TRACE, "Moderate NPDR"), render("Drusen.", "Moderate NPDR"), ""]
    found = [assess(text, EXAMPLE, FINDINGS, KNOWLEDGE, CONFIG, finished=True) for text in replies]
    scores = score_rollouts(found, SpyJudge("plausible"), CONFIG)
    assert [one.agreed for one in scores] == [(True,), (False,), ()]
    assert reward_metrics([scores])["agreement"] == 0.5
    assert "agreement" not in reward_metrics([score_rollouts(found, RulesJudge(), CONFIG)])
    assert [from_dict(json.loads(json.dumps(dataclasses.asdict(one)))) for one in scores] == scores


# ---- tasks whose answer is no label -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "question", "answer", "wrong", "about"),
    [
        ("modality", "What kind of image is this?", "Colour fundus photograph", "OCT", ()),
        ("laterality", "Which eye is it?", "Right eye", "Left eye", ()),
        ("lesion_presence", "Does the image show haemorrhages?", "Yes", "No", ("haemorrhage",)),
        ("lesion_presence", "Is there no sign of drusen?", "Yes", "No", ("drusen",)),
        (
            "lesion_location",
            "Where are the cotton-wool spots?",
            "Upper left",
            "Upper right",
            ("cotton-wool spot",),
        ),
        ("dr_grade", "Which grade of retinopathy is it?", "No DR", "PDR", None),
    ],
)
def test_the_question_decides_what_the_trace_must_speak_of(task, question, answer, wrong, about):
    example = make_example(task=task, question=question, answer=answer, options=(answer, wrong))
    judge = SpyJudge("tenuous")
    assert parts(score(render(TRACE, answer), example=example, judge=judge)) == (1, 1, 0.5, 2.5)
    assert judge.calls == [(TRACE, FINDINGS, "CFP", about)]
    assert parts(score(render(TRACE, wrong), example=example, judge=SpyJudge())) == (0, 1, 0, 1)


# ---- refusals ---------------------------------------------------------------------------------------------


def test_a_judge_that_breaks_the_contract_is_named():
    def confused(requests):
        return [Verdict(rating="plausible", reference="knowledge", reasons=()) for _ in requests]

    with pytest.raises(DataError, match="was given findings and returned a verdict against knowledge"):
        score(render(TRACE, "Moderate NPDR"), judge=confused)
    with pytest.raises(
        DataError, match="rated 'tenuous' against knowledge; known there are implausible, plausible"
    ):
        score(render(TRACE, "Mild NPDR"), judge=SpyJudge("tenuous"))


def test_a_judge_that_raises_is_not_scored():
    def broken(requests):
        raise RuntimeError("a bug, not a verdict")

    with pytest.raises(RuntimeError):
        score(render(TRACE, "Moderate NPDR"), judge=broken)


def test_findings_of_another_image_are_refused():
    with pytest.raises(DataError, match="findings of 'e2' were passed for 'e1'"):
        score(render(TRACE, "Moderate NPDR"), findings=dataclasses.replace(FINDINGS, example="e2"))


def test_a_score_can_not_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Score(answer=1.0, format=1.0, process=1.0, total=3.0).total = 4.0
