"""The measure by which other tests tell linear functions from slower ones."""

from tests.growth import LINEAR, growth


def test_linear_and_quadratic_functions_are_told_apart() -> None:
    assert growth(lambda n: sum(range(n)), 1_600_000) < LINEAR
    assert growth(lambda n: [sum(range(n)) for _ in range(n)], 3200) > LINEAR
