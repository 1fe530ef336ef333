"""Qwen2.5-VL's configuration, read from Hugging Face's config.json in both its
layouts and written in the hub's.

The hub's files are flat (text fields at the top, `rope_scaling`); transformers >= 4.52 saves them nested
(`text_config`, `rope_parameters`). Fields that change the arithmetic are parsed and checked; the others are
carried along unread.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from fundus_jax.records import ConfigError

TEXT_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps"),
)
# What transformers takes where vision_config names no value: older versions wrote only what differs from it.
VISION_DEFAULTS = {
    **{"depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14},
    **{"spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "out_hidden_size": 3584},
}
RMS_NORM_EPS = 1e-5  # likewise
TOKEN_FIELDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
# Fields that are parsed, or that have one value for every model of this kind; the others are `extras`.
DERIVED = {
    *(*TEXT_FIELDS, *TOKEN_FIELDS, "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings"),
    *("vision_config", "text_config", "torch_dtype", "dtype", "hidden_act", "model_type", "head_dim"),
    *("eos_token_id", "initializer_range", "architectures"),
}
VISION_DERIVED = {
    *(*VISION_DEFAULTS, "in_channels", "in_chans", "fullatt_block_indexes", "rope_parameters", "hidden_act"),
    *("model_type", "spatial_patch_size"),
}
DTYPES = ("bfloat16", "float16", "float32")
# Of a saved sub-configuration, not of the model: nothing to carry along.
NOISE = {"model_type", "_name_or_path", "architectures", "transformers_version"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision tower: `depth` blocks of width `hidden_size`.

    Attention is within windows, except in `full_attention_layers`. `extras` are as in Qwen2_5_VLConfig.
    """

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
    extras: str = "{}"

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
        vision = self.vision
        counts = {name: getattr(self, name) for name in TEXT_FIELDS if name != "rms_norm_eps"}
        counts |= {"vision num_heads": vision.num_heads, "vision depth": vision.depth}
        wrong = [f"{name} {value!r}" for name, value in counts.items() if type(value) is not int or value < 1]
        if wrong:
            raise ConfigError(f"{', '.join(wrong)}: these must be whole numbers from 1")
        if vision.hidden_size % (4 * vision.num_heads):
            raise ConfigError(
                f"vision hidden_size {vision.hidden_size} must be a multiple of 4 x num_heads "
                f"{vision.num_heads}"
            )
        channels, rest = divmod(self.hidden_size, self.num_attention_heads)
        if rest or self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
                f"{self.num_attention_heads}, and that of num_key_value_heads {self.num_key_value_heads}"
            )
        if 2 * sum(self.mrope_section) != channels:
            raise ConfigError(
                f"mrope_section {self.mrope_section} must sum to half the head width {channels}"
            )
        if self.vision.out_hidden_size != self.hidden_size:
            raise ConfigError(
                f"vision out_hidden_size {self.vision.out_hidden_size} is not hidden_size {self.hidden_size}"
            )

        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} of a checkpoint is not one of {', '.join(DTYPES)}")

    @property
    def head_dim(self) -> int:
        """C, the width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def banned_ids(self) -> tuple[int, ...]:
        """Ids the sampler must never draw, since the next forward pass would take them for images."""
        return (
            self.image_token_id,
            self.video_token_id,
            self.vision_start_token_id,
            self.vision_end_token_id,
        )

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Qwen2_5_VLConfig:
        """Parse the dictionary of a config.json, flat or nested.

        Raises ConfigError naming the fields that are missing or ask for what this port does not compute, and
        for one of another type than the hub's.
        """
        try:
            return cls._from_hf(raw)
        except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"config.json has a field of another type than the hub's ({error}); use the checkpoint's "
                "own file"
            ) from error

    @classmethod
    def _from_hf(cls, raw: dict[str, Any]) -> Qwen2_5_VLConfig:
        if raw.get("model_type") != "qwen2_5_vl":
            raise ConfigError(
                f"config.json has model_type {raw.get('model_type')!r}; this port reads 'qwen2_5_vl'"
            )
        nested = raw.get("text_config") or {}
        text = {**raw, **nested}
        missing = [name for name in TEXT_FIELDS if name not in text and name != "rms_norm_eps"]
        missing += [] if isinstance(raw.get("vision_config"), dict) else ["vision_config"]
        if missing:
            raise ConfigError(f"config.json lacks {', '.join(missing)}; use the checkpoint's own file")
        rope = text.get("rope_scaling") or text.get("rope_parameters") or {}  # transformers' own preference
        _require_computable(text, rope)
        eos = text.get("eos_token_id")
        dtype = raw.get("torch_dtype") or raw.get("dtype") or text.get("torch_dtype") or text.get("dtype")
        extras = {**{key: value for key, value in nested.items() if key not in NOISE}, **raw}
        fields = {name: text[name] for name in TEXT_FIELDS if name in text}
        fields["num_key_value_heads"] = text["num_key_value_heads"] or text["num_attention_heads"]
        return cls(
            **({"rms_norm_eps": RMS_NORM_EPS} | fields),
            **{name: raw[name] for name in TOKEN_FIELDS if name in raw},
            rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 1e6))),
            mrope_section=tuple(rope.get("mrope_section", (16, 24, 24))),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
            eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            dtype=str(dtype or "float32").removeprefix("torch."),
            initializer_range=float(text.get("initializer_range", 0.02)),
            vision=_vision(raw["vision_config"]),
            extras=_carried(extras, DERIVED),
        )

    def to_hf(self) -> dict[str, Any]:
        """The hub's flat config.json of this configuration: `from_hf(to_hf())` gives it back."""
        vision = dataclasses.asdict(self.vision)
        vision = json.loads(vision.pop("extras")) | vision
        vision |= {
            **{"model_type": "qwen2_5_vl", "hidden_act": "silu", "in_chans": vision.pop("in_channels")},
            "fullatt_block_indexes": list(vision.pop("full_attention_layers")),
            "spatial_patch_size": self.vision.patch_size,
        }
        if vision.pop("rope_theta") != 10000.0:
            vision["rope_parameters"] = {"rope_type": "axial", "rope_theta": self.vision.rope_theta}
        eos = self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None
        return {
            **{"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"},
            **{"hidden_act": "silu", "eos_token_id": eos},
            **json.loads(self.extras),
            **{name: getattr(self, name) for name in (*TEXT_FIELDS, *TOKEN_FIELDS)},
            "initializer_range": self.initializer_range,
            "rope_theta": self.rope_theta,
            "rope_scaling": {"type": "mrope", "mrope_section": list(self.mrope_section)},
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": self.dtype,
            "vision_config": vision,
        }

    def ending_with(self, eos_ids: tuple[int, ...]) -> Qwen2_5_VLConfig:
        """This configuration with other end ids, as generation_config.json may name them.

        What config.json said stays in `extras`, so that `to_hf` writes it back unchanged.
        """
        extras = {"eos_token_id": self.to_hf()["eos_token_id"]} | json.loads(self.extras)
        return dataclasses.replace(self, eos_ids=eos_ids, extras=json.dumps(extras, sort_keys=True))


def _require_computable(text: dict[str, Any], rope: dict[str, Any]) -> None:
    """Raise ConfigError naming every field of the text model that asks for arithmetic this port has not."""
    width = text["hidden_size"] // text["num_attention_heads"]
    wrong = {
        "hidden_act": text.get("hidden_act", "silu") != "silu",
        "use_sliding_window": bool(text.get("use_sliding_window")),
        "layer_types": bool(set(text.get("layer_types") or ()) - {"full_attention"}),
        "rope type": rope.get("rope_type", rope.get("type", "default")) not in ("default", "mrope"),
        "mrope_interleaved": bool(rope.get("mrope_interleaved")),
        "head_dim": (text.get("head_dim") or width) != width,
    }
    names = [f"{name} {text.get(name, rope)!r}" for name, is_wrong in wrong.items() if is_wrong]
    if names:
        raise ConfigError(
            f"config.json asks for {', '.join(names)}; this port computes silu, full attention, M-RoPE in "
            "sections, and heads of width hidden_size / num_attention_heads"
        )


def _vision(raw: dict[str, Any]) -> VisionConfig:
    fields = {name: raw.get(name, value) for name, value in VISION_DEFAULTS.items()}
    rope = raw.get("rope_parameters") or {}
    if raw.get("hidden_act", "silu") != "silu" or rope.get("rope_type", "axial") not in ("axial", "default"):
        raise ConfigError(
            f"vision_config has hidden_act {raw.get('hidden_act')!r} and rope {rope}; "
            "this port computes silu and plain axial rotary embeddings"
        )
    odd = [f"{name} {value!r}" for name, value in fields.items() if not isinstance(value, int)]
    if odd:
        raise ConfigError(f"vision_config has {', '.join(odd)}; this port takes one whole number for each")
    return VisionConfig(
        **fields,
        in_channels=raw.get("in_channels", raw.get("in_chans", 3)),
        full_attention_layers=tuple(raw.get("fullatt_block_indexes", (7, 15, 23, 31))),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        extras=_carried({key: value for key, value in raw.items() if key not in NOISE}, VISION_DERIVED),
    )


def _carried(raw: dict[str, Any], derived: set[str]) -> str:
    """The entries that are not parsed, as JSON text: the configuration is hashable."""
    return json.dumps({key: value for key, value in raw.items() if key not in derived}, sort_keys=True)
