"""Agreement of boxes: cases by hand, an exhaustive search, and what has to hold for any boxes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fundus_jax import localisation
from fundus_jax.dialog import render_boxes
from fundus_jax.records import Box

SPAN = st.tuples(st.integers(0, 30), st.integers(1, 12))  # small, so that boxes meet


def box(x1: int, y1: int, x2: int, y2: int, finding: str = "drusen") -> Box:
    """A box of a finding."""
    return Box(finding=finding, x1=x1, y1=y1, x2=x2, y2=y2)


BOX = st.builds(lambda x, y: box(x[0], y[0], x[0] + x[1], y[0] + y[1]), SPAN, SPAN)
BOXES = st.lists(BOX, max_size=5)
NAMED = st.builds(
    lambda one, name: box(one.x1, one.y1, one.x2, one.y2, name),
    BOX,
    st.sampled_from(("drusen", "haemorrhage", "hard exudate")),
)
GIVEN = st.lists(NAMED, min_size=1, max_size=6)


def test_overlaps_by_hand() -> None:
    first = [box(0, 0, 10, 10)]
    second = [box(0, 0, 10, 10), box(5, 0, 15, 10), box(0, 0, 5, 5), box(10, 0, 20, 10), box(50, 50, 60, 60)]
    assert localisation.overlaps(first, second).tolist() == [pytest.approx([1, 50 / 150, 25 / 100, 0, 0])]


@pytest.mark.parametrize(
    ("first", "second", "value"),
    [
        ([box(0, 0, 10, 10)], [box(0, 0, 10, 10)], 1),
        ([box(0, 0, 10, 10)], [box(5, 0, 15, 10)], 1 / 3),
        ([box(0, 0, 10, 10)], [], 0),
        ([box(0, 0, 10, 10)], [box(0, 0, 10, 10), box(20, 0, 30, 10)], 1 / 2),  # one is missing, or too many
        ([box(0, 0, 10, 10)] * 2, [box(0, 0, 10, 10)], 1 / 2),  # said twice
        # crosswise: 4/16 + 5/15 beats 6/14 + 0, which a greedy matching would take
        (
            [box(0, 0, 10, 10), box(10, 0, 20, 10)],
            [box(6, 0, 16, 10), box(15, 0, 25, 10)],
            (4 / 16 + 5 / 15) / 2,
        ),
    ],
)
def test_agreement_by_hand(first: list[Box], second: list[Box], value: float) -> None:
    assert localisation.agreement(first, second) == pytest.approx(value)
    assert localisation.agreement(second, first) == pytest.approx(value)


def test_two_empty_sides_have_nothing_to_agree_on() -> None:
    with pytest.raises(ValueError, match="not defined"):
        localisation.agreement([], [])


def test_hits_are_as_many_as_can_be_paired() -> None:
    wide, left, right = box(0, 0, 20, 10), box(0, 0, 11, 10), box(0, 0, 20, 9)
    assert localisation.hits([wide], [left, right]) == 1
    # the matching of the largest sum, 0.9 + 0.375, has one hit only; 0.55 and 0.52 are two
    assert localisation.hits([wide, box(5, 0, 16, 10)], [left, right]) == 2
    assert localisation.hits([wide], [box(0, 0, 10, 10)]) == 1  # exactly a half
    assert localisation.hits([wide], [box(0, 0, 9, 10)]) == 0
    assert localisation.hits([], [wide]) == 0


@given(BOXES.filter(bool), BOXES)
def test_the_matching_is_the_best_of_all(first: list[Box], second: list[Box]) -> None:
    table = localisation.overlaps(first, second)
    if len(first) > len(second):
        table = table.T
    sums = [
        sum(table[i, j] for i, j in enumerate(order))
        for order in itertools.permutations(range(table.shape[1]), table.shape[0])
    ]
    assert localisation.agreement(first, second) == pytest.approx(max(sums) / table.shape[1])


@given(GIVEN, GIVEN, st.randoms())
def test_what_holds_for_any_boxes(first: list[Box], second: list[Box], random) -> None:
    value = localisation.score(render_boxes(first), second)
    assert value is not None
    assert 0 <= value <= 1
    assert value == pytest.approx(localisation.score(render_boxes(second), first))
    key = str
    assert (value > 1 - 1e-12) == (sorted(first, key=key) == sorted(second, key=key))
    mixed = random.sample(first, len(first)), random.sample(second, len(second))
    assert localisation.score(render_boxes(mixed[0]), mixed[1]) == pytest.approx(value)


@given(GIVEN, NAMED)
def test_one_box_too_many_or_too_few_costs(boxes: list[Box], extra: Box) -> None:
    assert localisation.score(render_boxes([*boxes, extra]), boxes) < 1
    assert localisation.score(render_boxes(boxes), [*boxes, extra]) < 1


def test_the_score_is_the_mean_over_findings() -> None:
    there = [box(0, 0, 10, 10), box(0, 0, 10, 10, "haemorrhage")]
    assert localisation.score("I see drusen.", there) == 0
    assert localisation.score(render_boxes(there[:1]), there) == 1 / 2  # one is missing
    made_up = render_boxes([*there, box(0, 0, 9, 9, "hard exudate")])
    assert localisation.score(made_up, there) == 2 / 3
    assert localisation.score(made_up, there, {"hard exudate"}) == 1  # it may be there
    assert localisation.score(render_boxes(there), ()) is None  # not applicable
    plural = render_boxes(there).replace("haemorrhage", "Hemorrhages")
    assert localisation.score(plural, there) == 1


def test_malformed_boxes_are_never_worth_more_than_silence() -> None:
    there = [box(0, 0, 10, 10), box(0, 0, 10, 10, "haemorrhage")]
    good, bad = render_boxes(there[:1]), "<ref>{}</ref><box>[[5, 5, 5, 9]]</box>"
    assert localisation.score(good + bad.format("haemorrhage"), there) == 1 / 2
    assert localisation.score(render_boxes(there) + bad.format("haemorrhage"), there) == 1 / 2
    assert localisation.score(render_boxes(there) + bad.format("hard exudate"), there) == 2 / 3
    assert localisation.score(render_boxes(there) + bad.format("hard exudate"), there, {"hard exudate"}) == 1
    assert localisation.score(render_boxes(there) + "<box>", there) == 2 / 3
