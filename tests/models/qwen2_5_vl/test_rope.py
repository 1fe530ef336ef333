"""M-RoPE ids against transformers' `get_rope_index`: exact, for any images, padding side and batch."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fundus_jax.models.qwen2_5_vl.rope import Grid, mrope_ids
from fundus_jax.records import DataError

PAD, TEXT, IMAGE = 0, 5, 9
grids_of_a_row = st.lists(
    st.tuples(st.just(1), st.integers(1, 9).map(lambda n: 2 * n), st.integers(1, 9).map(lambda n: 2 * n)),
    max_size=4,
)


def row_tokens(grids: list[Grid], lead: int, gap: int, tail: int) -> list[int]:
    """`lead` text tokens, the images with `gap` text tokens between them, `tail` text tokens."""
    tokens = [TEXT] * lead
    for number, (_, height, width) in enumerate(grids):
        tokens += [TEXT] * (gap if number else 0) + [IMAGE] * (height * width // 4)
    return tokens + [TEXT] * tail


def pad(rows: list[list[int]], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask [B,T] of ragged rows, padded on one side."""
    longest = max(map(len, rows))
    tokens, mask = np.full((len(rows), longest), PAD), np.zeros((len(rows), longest), bool)
    for number, row in enumerate(rows):
        where = slice(len(row)) if side == "right" else slice(longest - len(row), None)
        tokens[number, where], mask[number, where] = row, True
    return tokens, mask


def test_equal_to_transformers_on_200_random_layouts() -> None:
    torch = pytest.importorskip("torch", reason="the reference runs in torch")
    from transformers import Qwen2_5_VLModel

    from tests.models.tiny import tiny_config

    model = Qwen2_5_VLModel(tiny_config())
    draw = random.Random(0)
    images = 0
    for case in range(200):
        size = draw.randint(1, 4)
        grids = [
            [(1, 2 * draw.randint(1, 12), 2 * draw.randint(1, 12)) for _ in range(draw.randint(0, 4))]
            for _ in range(size)
        ]
        rows = [
            row_tokens(g, draw.randint(0 if g else 1, 9), draw.randint(1, 5), draw.randint(0, 9))
            for g in grids
        ]
        tokens, mask = pad(rows, ("left", "right")[case % 2])
        flat = [grid for row in grids for grid in row]
        images += len(flat)
        expected, deltas = model.get_rope_index(
            torch.tensor(tokens),
            mm_token_type_ids=torch.tensor(tokens == IMAGE).int(),
            image_grid_thw=torch.tensor(flat) if flat else None,
            attention_mask=torch.tensor(mask).long(),
        )
        ids = mrope_ids(tokens, mask, grids, image_token_id=IMAGE)
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, expected.numpy().swapaxes(0, 1), err_msg=f"case {case}")
        # Decode goes on at the largest id + 1: that is transformers' rope delta.
        np.testing.assert_array_equal(ids.max((1, 2)) + 1 - mask.sum(1), deltas[:, 0].numpy())
    assert images > 300


@given(grids=st.lists(grids_of_a_row, min_size=1, max_size=3), gap=st.integers(1, 3), lead=st.integers(1, 3))
def test_padding_and_neighbours_do_not_matter(grids: list[list[Grid]], gap: int, lead: int) -> None:
    rows = [row_tokens(g, lead, gap, 1) for g in grids]
    alone = [
        mrope_ids(np.array(row), np.ones(len(row), bool), g, image_token_id=IMAGE)
        for row, g in zip(rows, grids, strict=True)
    ]
    for side in ("left", "right"):
        tokens, mask = pad(rows, side)
        together = mrope_ids(tokens, mask, grids, image_token_id=IMAGE)
        assert (together[~np.broadcast_to(mask[:, None], together.shape)] == 0).all()
        for row, ids in enumerate(alone):
            np.testing.assert_array_equal(together[row][:, mask[row]], ids)


def test_one_image_between_words() -> None:
    tokens = np.array([TEXT, TEXT, *[IMAGE] * 6, TEXT, TEXT])  # 4 x 6 patches are 2 x 3 merged tokens
    ids = mrope_ids(tokens, np.ones(10, bool), [(1, 4, 6)], image_token_id=IMAGE)
    assert ids.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_merge_size_is_not_fixed() -> None:
    ids = mrope_ids(np.array([IMAGE] * 6), np.ones(6, bool), [(1, 2, 3)], image_token_id=IMAGE, merge_size=1)
    assert ids[1:].tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]


@pytest.mark.parametrize(
    ("tokens", "grids", "message"),
    [
        ([TEXT, IMAGE], [], "row 1: 1 runs of image tokens but 0 image grids"),
        ([TEXT, TEXT], [(1, 2, 2)], "row 1: 0 runs of image tokens but 1 image grids"),
        ([TEXT, IMAGE], [(1, 2, 4)], "row 1: a run of 1 image tokens for a merged grid of 1x1x2"),
        ([IMAGE, IMAGE], [(2, 2, 2)], "row 1: a run of 2 .* one frame"),
        ([IMAGE, IMAGE], [(1, 2, 2), (1, 2, 2)], "row 1: 1 runs of image tokens but 2"),
    ],
)
def test_what_does_not_match_is_refused(tokens: list[int], grids: list[Grid], message: str) -> None:
    both = np.array([[TEXT, TEXT], tokens])
    with pytest.raises(DataError, match=message):
        mrope_ids(both, np.ones((2, 2), bool), [[], grids], image_token_id=IMAGE)


def test_rows_and_grids_must_be_as_many() -> None:
    with pytest.raises(DataError, match="do not fit together"):
        mrope_ids(np.zeros((2, 3), int), np.ones((2, 3), bool), [[]], image_token_id=IMAGE)
