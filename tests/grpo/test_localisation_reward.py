"""The localisation part of the reward: what it adds, where it does not apply, and what made-up boxes cost."""

import dataclasses

import pytest

from fundus_jax.dialog import positioned, render, render_boxes
from fundus_jax.grpo.advantages import group_advantages
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.rewards import Score, from_dict, reward_arrays, reward_metrics
from fundus_jax.records import Box, ConfigError
from fundus_jax.sft import PromptConfig
from launch.config import RunConfig
from tests.grpo.test_rewards import TRACE, make_example, score

THERE = (
    Box(finding="haemorrhage", x1=0, y1=0, x2=100, y2=100),
    Box(finding="microaneurysm", x1=500, y1=500, x2=600, y2=600),
)
EXAMPLE = make_example(boxes=THERE)
CONFIG = GrpoConfig(localisation_weight=2.0)


def scored(boxes: str, *, example=EXAMPLE, config=CONFIG, answer="Moderate NPDR", **changes) -> Score:
    """The score of a reply that says some boxes, and is right otherwise."""
    return score(render(f"{boxes} {TRACE}", answer), example=example, config=config, **changes)


@pytest.mark.parametrize(
    ("boxes", "value"),
    [
        (render_boxes(THERE), 1),
        (render_boxes(THERE[::-1]), 1),
        (render_boxes(THERE[:1]), 0.5),
        (render_boxes(THERE).replace("[[0, 0, 100, 100]]", "[[50, 0, 150, 100]]"), (1 / 3 + 1) / 2),
        (render_boxes(THERE).replace("[[0, 0, 100, 100]]", "[[0, 0, 100, 100], [0, 0, 100, 100]]"), 0.75),
        (render_boxes(THERE) + "<ref>drusen</ref><box>[[1, 1, 9, 9]]</box>", 2 / 3),
        (render_boxes(THERE).replace("600, 600]]", "500, 600]]"), 0.5),  # malformed
        ("", 0),
    ],
)
def test_the_part_is_the_agreement_of_the_boxes(boxes: str, value: float) -> None:
    result = scored(boxes)
    assert result.localisation == pytest.approx(value)
    expected = result.answer + result.format + result.process + 2 * value
    assert result.total == pytest.approx(expected)


def test_it_is_earned_by_a_wrong_answer_too_but_only_inside_the_trace() -> None:
    assert scored(render_boxes(THERE), answer="AMD").localisation == 1
    outside = score(f"{render_boxes(THERE)} {render(TRACE, 'AMD')}", example=EXAMPLE, config=CONFIG)
    assert (outside.localisation, outside.format) == (0, 0)
    assert score("", example=EXAMPLE, config=CONFIG).localisation == 0


def test_without_boxes_it_applies_to_nobody_of_the_group() -> None:
    for example in (make_example(), positioned(make_example(boxes=THERE, task="laterality"), 2)):
        rollouts = [scored(boxes, example=example) for boxes in ("", render_boxes(THERE))]
        assert [one.localisation for one in rollouts] == [None, None]
        assert (
            rollouts[0].total
            == rollouts[1].total
            == sum((rollouts[0].answer, rollouts[0].format, rollouts[0].process))
        )
        rewards, valid = reward_arrays([rollouts])
        assert valid.all()
        assert not group_advantages(rewards, valid).any()
        assert "localisation" not in reward_metrics([rollouts])


def test_without_a_weight_nobody_looks() -> None:
    plain = scored(render_boxes(THERE), config=GrpoConfig())
    assert plain.localisation is None
    assert plain.total == 3


def test_it_is_logged_and_travels_between_processes() -> None:
    rollouts = [
        scored(render_boxes(THERE)),
        scored(render_boxes(THERE[:1])),
        scored("", example=make_example()),
    ]
    assert reward_metrics([rollouts])["localisation"] == 0.75
    assert from_dict(dataclasses.asdict(rollouts[1])) == rollouts[1]


@pytest.mark.parametrize(
    ("prompt", "weight", "message"),
    [
        (PromptConfig(), 1.0, "grpo.localisation_weight is 1.0, but traces say no boxes; set prompt.boxes"),
        (PromptConfig(boxes=2, think=False), 0.0, "prompt.boxes is 2"),
        (PromptConfig(boxes=-1), 0.0, "prompt.boxes is -1"),
        (PromptConfig(boxes=2), -1.0, "grpo.localisation_weight is -1.0; it must be at least 0"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(prompt, weight, message) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig(prompt=prompt, grpo=GrpoConfig(localisation_weight=weight)).validate()
    RunConfig(prompt=PromptConfig(boxes=2), grpo=GrpoConfig(localisation_weight=1.0)).validate()
