"""Phantoms become samples that questions and shards can be made of, each in one split only."""

import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline.datasets import phantom, phantom_source
from data_pipeline.datasets.phantom_source import PhantomConfig
from fundus_jax.findings import vocabulary
from fundus_jax.records import ConfigError


def test_shards_split_the_counts():
    found = phantom_source.shards(PhantomConfig(size=64, train=25, val=0, test=10), shard_size=10)
    assert [one.name for one in found] == ["train-00000", "train-00001", "train-00002", "test-00000"]
    assert [len(one.items()) for one in found] == [10, 10, 5, 10]
    keys = [item().key for one in found for item in one.items()]
    assert len(set(keys)) == 35, "a picture is in one split only"
    assert len({one.key for one in found}) == 4


def test_seeds_and_splits_never_share_a_series():
    keys = []
    for seed in range(3):
        config = PhantomConfig(seed=seed, size=64, train=1, val=1, test=1)
        keys += [item().key for one in phantom_source.shards(config, shard_size=1) for item in one.items()]
    assert len(set(keys)) == 9


def test_a_new_renderer_changes_the_keys(monkeypatch):
    config = PhantomConfig(size=64, train=10, val=0, test=0)
    before = phantom_source.shards(config, shard_size=10)[0].key
    assert phantom_source.shards(config, shard_size=10)[0].key == before
    monkeypatch.setattr(phantom, "encode", lambda _: b"another drawing")
    assert phantom_source.shards(config, shard_size=10)[0].key != before


def test_samples_say_what_was_drawn():
    for index in range(40):
        one = phantom_source.sample("train", 0, index, 64)
        drawn = phantom.render(0, index, size=64)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(one.image))), drawn.image)
        assert (one.modality, one.eye, one.findings) == (drawn.modality, drawn.eye, drawn.findings)
        assert one.labels["disease"] == drawn.label
        assert one.searched == vocabulary(drawn.modality, extended=True)
        assert set(one.findings) <= set(one.searched)
        fundus_dr = drawn.modality != "OCT" and drawn.label in phantom_source.DR_GRADES
        assert ("dr_grade" in one.labels) == fundus_dr


def test_bad_counts():
    with pytest.raises(ConfigError, match="none may be negative"):
        phantom_source.shards(PhantomConfig(train=-1), shard_size=10)
    with pytest.raises(ConfigError, match="not all zero"):
        phantom_source.shards(PhantomConfig(train=0, val=0, test=0), shard_size=10)
