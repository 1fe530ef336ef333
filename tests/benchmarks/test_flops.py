"""The FLOPs of the benchmarks against counts by hand; the back end and the peak of the chip they run on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from benchmarks import common, flops, rollout, sft_step
from fundus_jax.models.batch import Batch
from fundus_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from launch.chips import CHIPS
from tests.benchmarks import run

SIDE, TEXT, ROWS = 12, 8, 2  # an image of 12 x 12 patches: windows of 8 x 8, 8 x 4, 4 x 8 and 4 x 4
PATCHES, TOKENS = SIDE**2, SIDE**2 // 4 + 2 + TEXT
W, M, D, F, V = 32, 48, 64, 96, 512  # widths and MLPs of both towers, vocabulary
LM = 2 * (D * D + 2 * D * 32 + D * D + 3 * D * F)  # of a token: two layers of q, k and v, o, and the MLP
PAIRS = TOKENS * (TOKENS + 1) // 2


def made(monkeypatch: pytest.MonkeyPatch, image: int, **more: Any) -> tuple[Qwen2_5_VLConfig, Batch]:
    """Four vision blocks, of which the second and the last see the whole image."""
    args = run.arguments(monkeypatch, sft_step, **run.MODEL | {"vision_layers": 4} | more)
    config = common.make_config(args)
    assert config.vision.full_attention_layers == (1, 3)
    return config, common.make_inputs(args, ROWS, TEXT, image).batch


def test_the_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    config, batch = made(monkeypatch, SIDE)
    assert batch.tokens.shape == (ROWS, TOKENS)
    products = TOKENS * LM + 2 * PAIRS * 2 * D + (TOKENS - 1) * D * V  # layers; scores and values; head
    assert flops.forward(config, batch).text == 2 * ROWS * products
    assert flops.step(config, batch).text == 3 * 2 * ROWS * products


def test_the_vision_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    config, batch = made(monkeypatch, SIDE)
    assert batch.patch_image.shape == (ROWS, 4 * 64), "slots of four windows, of which 144 are filled"
    pixels = PATCHES * 1176 * W
    blocks = PATCHES * 4 * (W * 3 * W + W * W + 3 * W * M)
    pairs = 2 * PATCHES**2 + 2 * (64**2 + 32**2 + 32**2 + 16**2)
    merger = PATCHES // 4 * (4 * W * 4 * W + 4 * W * D)
    assert flops.forward(config, batch).vision == 2 * ROWS * (pixels + blocks + 2 * pairs * W + merger)
    rest = blocks + 2 * pairs * W + merger
    assert flops.step(config, batch).vision == 2 * ROWS * (2 * pixels + 3 * rest), "pixels have no gradient"


def test_text_alone_and_several_conversations_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    config, batch = made(monkeypatch, 0)
    whole = flops.forward(config, batch)
    assert whole.vision == 0
    assert whole.total == whole.text == 2 * ROWS * (TEXT * LM + 2 * 36 * 2 * D + (TEXT - 1) * D * V)
    segments = batch.segments.copy()
    segments[0, 5:], segments[1, 6:] = 2, 0  # two conversations of 5 and 3 tokens; padding after 6
    changed = Batch(**{**vars(batch), "segments": segments})
    expected = 2 * (14 * LM + 2 * (15 + 6 + 21) * 2 * D + (4 + 2 + 5) * D * V)
    assert flops.forward(config, changed).text == expected


@pytest.mark.parametrize(
    ("platform", "kind", "name", "attention"),
    [
        ("gpu", "NVIDIA H100 80GB HBM3", "h100", "cudnn"),
        ("tpu", "TPU v5 lite", "v5e", "splash"),
        ("tpu", "TPU7x", "tpu7x", "splash"),
        ("gpu", "NVIDIA A100-SXM4-40GB", "", "cudnn"),
        ("cpu", "cpu", "", "xla"),
    ],
)
def test_by_the_devices(
    monkeypatch: pytest.MonkeyPatch, platform: str, kind: str, name: str, attention: str
) -> None:
    """The back end of attention, the share of the published peak, the published bandwidth."""
    device = SimpleNamespace(platform=platform, device_kind=kind)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert common.options().attention == attention
    found = sft_step.rates(flops.Flops(3e12, 1e12), {"ours": 2.0, "hf": 4.0})
    assert found["flops_per_second"] == {"ours": 2e12, "hf": 1e12}
    if not name:
        assert "mfu" not in found
        return
    chip = CHIPS[name]
    assert found["mfu"]["ours"] == pytest.approx(2e12 * chip.devices / chip.flops)
    assert rollout.bandwidth() == (chip.bandwidth / chip.devices / 1e9, f"published for {kind}")
