"""Qwen2.5-VL's configuration, read from Hugging Face's config.json in both its layouts and written in the hub's.

The hub's files are flat (text fields at the top, `rope_scaling`); transformers >= 4.52 saves them nested (`text_config`,
`rope_parameters`). Fields that change the arithmetic are parsed and checked; the others are carried along unread.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from fundus_jax.records import ConfigError

# What config.json may call a field, in order of preference.
TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps",
)  # fmt: skip
VISION_FIELDS = (
    "depth", "hidden_size", "intermediate_size", "num_heads", "patch_size", "spatial_merge_size", "temporal_patch_size",
    "window_size", "out_hidden_size",
)  # fmt: skip
TOKEN_FIELDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
DERIVED = {*TEXT_FIELDS, *TOKEN_FIELDS, "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings",
           "vision_config", "text_config", "torch_dtype", "dtype", "hidden_act", "model_type", "head_dim"}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision tower: `depth` blocks of width `hidden_size`, window attention except in `full_attention_layers`."""

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    window_size: int = 112
    out_hidden_size: int = 3584
    full_attention_layers: tuple[int, ...] = (7, 15, 23, 31)
    rope_theta: float = 10000.0

    @property
    def patch_features(self) -> int:
        """Numbers in one flattened patch: channels x frames x height x width (1176 for Qwen2.5-VL)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_slots(self) -> int:
        """Patch slots that one attention window owns in `Batch.patches` (64 for Qwen2.5-VL)."""
        blocks = self.window_size // self.spatial_merge_size // self.patch_size
        return (blocks * self.spatial_merge_size) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2_5_VLConfig:
    """The whole model. `extras` are config.json's other entries as JSON text, written back unchanged."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, ...] = (16, 24, 24)
    tie_word_embeddings: bool = False
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    eos_ids: tuple[int, ...] = (151645,)
    dtype: str = "bfloat16"  # of the checkpoint on disk; exports are written in it
    initializer_range: float = 0.02
    vision: VisionConfig = dataclasses.field(default_factory=VisionConfig)
    extras: str = "{}"

    def __post_init__(self) -> None:
        channels, rest = divmod(self.hidden_size, self.num_attention_heads)
        if rest or self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}, "
                f"and that of num_key_value_heads {self.num_key_value_heads}"
            )
        if 2 * sum(self.mrope_section) != channels:
            raise ConfigError(f"mrope_section {self.mrope_section} must sum to half the head width {channels}")
        if self.vision.out_hidden_size != self.hidden_size:
            raise ConfigError(f"vision out_hidden_size {self.vision.out_hidden_size} is not hidden_size {self.hidden_size}")

    @property
    def head_dim(self) -> int:
        """C, the width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def banned_ids(self) -> tuple[int, ...]:
        """Ids the sampler must never draw, since the next forward pass would take them for images."""
        return (self.image_token_id, self.video_token_id, self.vision_start_token_id, self.vision_end_token_id)

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Qwen2_5_VLConfig:
        """Parse the dictionary of a config.json, flat or nested. Raises ConfigError for what this port does not compute."""
        if raw.get("model_type") != "qwen2_5_vl":
            raise ConfigError(f"config.json has model_type {raw.get('model_type')!r}; this port reads 'qwen2_5_vl'")
        text = {**raw, **raw.get("text_config", {})}
        missing = [name for name in TEXT_FIELDS if name not in text and name != "rms_norm_eps"]
        if missing or "vision_config" not in raw:
            raise ConfigError(f"config.json lacks {', '.join(missing) or 'vision_config'}")
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        unsupported = {
            "hidden_act": text.get("hidden_act", "silu") != "silu",
            "use_sliding_window": bool(text.get("use_sliding_window")),
            "rope type": kind not in ("default", "mrope"),
        }
        if any(unsupported.values()):
            names = ", ".join(name for name, bad in unsupported.items() if bad)
            raise ConfigError(f"config.json asks for {names} in a way this port does not compute (silu, no sliding window, mrope)")
        eos = text.get("eos_token_id", raw.get("eos_token_id"))
        eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        skip = {"model_type", "_name_or_path", "architectures", "transformers_version"}
        nested = {key: value for key, value in raw.get("text_config", {}).items() if key not in skip}
        extras = {key: value for key, value in {**nested, **raw}.items() if key not in DERIVED}
        return cls(
            **{name: text[name] for name in TEXT_FIELDS if name in text},
            **{name: raw[name] for name in TOKEN_FIELDS if name in raw},
            rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 1e6))),
            mrope_section=tuple(rope.get("mrope_section", (16, 24, 24))),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
            eos_ids=eos_ids,
            dtype=str(raw.get("torch_dtype") or raw.get("dtype") or text.get("torch_dtype") or text.get("dtype") or "float32"),
            initializer_range=float(text.get("initializer_range", 0.02)),
            vision=_vision(raw["vision_config"]),
            extras=json.dumps(extras, sort_keys=True),
        )

    def to_hf(self) -> dict[str, Any]:
        """The hub's flat config.json of this configuration: `from_hf(to_hf())` gives it back."""
        vision = dataclasses.asdict(self.vision)
        vision |= {
            "model_type": "qwen2_5_vl", "hidden_act": "silu", "in_chans": vision.pop("in_channels"),
            "fullatt_block_indexes": list(vision.pop("full_attention_layers")), "spatial_patch_size": self.vision.patch_size,
        }  # fmt: skip
        if vision.pop("rope_theta") != 10000.0:
            vision["rope_parameters"] = {"rope_type": "axial", "rope_theta": self.vision.rope_theta}
        extras = json.loads(self.extras)
        eos = extras.get("eos_token_id", list(self.eos_ids) if len(self.eos_ids) != 1 else self.eos_ids[0])
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "hidden_act": "silu",
            **extras,
            **{name: getattr(self, name) for name in (*TEXT_FIELDS, *TOKEN_FIELDS)},
            "eos_token_id": eos,
            "initializer_range": self.initializer_range,
            "rope_theta": self.rope_theta,
            "rope_scaling": {"type": "mrope", "mrope_section": list(self.mrope_section)},
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": self.dtype,
            "vision_config": vision,
        }  # fmt: skip


def _vision(raw: dict[str, Any]) -> VisionConfig:
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"vision_config.hidden_act is {raw['hidden_act']!r}; this port computes 'silu'")
    rope = raw.get("rope_parameters") or {}
    return VisionConfig(
        **{name: raw[name] for name in VISION_FIELDS if name in raw},
        in_channels=raw.get("in_channels", raw.get("in_chans", 3)),
        full_attention_layers=tuple(raw.get("fullatt_block_indexes", (7, 15, 23, 31))),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
    )
