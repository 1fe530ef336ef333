"""The small policy: same architecture as Qwen2.5-VL, a few million parameters, a tokenizer learned from the
traces it will write.

It is written as a Hugging Face directory without weights, so that the processor comes from where every other
processor comes from.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fundus_jax.models import weights
from fundus_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig, VisionConfig
from fundus_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from fundus_jax.records import ConfigError

# Qwen2.5's added tokens, in the order of their ids.
SPECIAL = tuple(
    f"<|{name}|>"
    for name in (
        *("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end"),
        *("quad_start", "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"),
    )
)
# Words, numbers digit by digit, punctuation, line breaks: the cut of Qwen2's tokenizer.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen's grammar, without its default system turn: the small policy has one task and few tokens to spend.
TEMPLATE = """\
{%- for turn in messages -%}
{{- '<|im_start|>' + turn.role + '\\n' -}}
{%- if turn.content is string -%}{{- turn.content -}}{%- else -%}
{%- for part in turn.content -%}
{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- else -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


@dataclass(kw_only=True, slots=True)
class PolicyConfig:
    """Sizes of the small policy; `pixels` is the side of the square that every image is resized to at
    most."""

    vocab: int = 1024
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 352
    vision_width: int = 128
    vision_layers: int = 4
    vision_heads: int = 2
    vision_mlp: int = 352
    rope_theta: float = 1000.0
    pixels: int = 112
    seed: int = 0

    def validate(self) -> None:
        """Raises ConfigError for sizes that do not divide or a vocabulary without room."""
        if self.vocab < 256 + len(SPECIAL) or self.pixels % 28:
            raise ConfigError(
                f"policy.vocab {self.vocab} must hold 256 bytes and {len(SPECIAL)} special tokens; "
                f"policy.pixels {self.pixels} must be a multiple of 28"
            )
        sizes = ("layers", "mlp", "heads", "kv_heads", "pixels")
        for name in (*sizes, "vision_layers", "vision_mlp", "vision_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"policy.{name} is {getattr(self, name)}; it must be at least 1")
        # Rotary embeddings turn pairs of channels, in the vision tower for rows and for columns.
        for name, whole, parts in (
            ("width", self.width, ("heads", 2 * self.heads)),
            ("vision_width", self.vision_width, ("vision_heads", 4 * self.vision_heads)),
        ):
            if whole < 1 or whole % parts[1]:
                raise ConfigError(
                    f"policy.{name} {whole} must be a multiple of {parts[1]}, for policy.{parts[0]}"
                )
        if self.heads % self.kv_heads:
            raise ConfigError(f"policy.kv_heads {self.kv_heads} must divide policy.heads {self.heads}")


def make_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab` entries, the last of them Qwen's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return tokenizer


def model_config(policy: PolicyConfig, tokenizer: Tokenizer) -> Qwen2_5_VLConfig:
    """The policy's Qwen2.5-VL configuration; the vocabulary is rounded up to a multiple of 64."""
    named = ("image_pad", "video_pad", "vision_start", "vision_end", "im_end")
    ids = {name: tokenizer.get_vocab()[f"<|{name}|>"] for name in named}
    half = policy.width // policy.heads // 2
    side = round(half * 3 / 8)
    vision = VisionConfig(
        depth=policy.vision_layers,
        hidden_size=policy.vision_width,
        intermediate_size=policy.vision_mlp,
        num_heads=policy.vision_heads,
        out_hidden_size=policy.width,
        full_attention_layers=(policy.vision_layers - 1,),
    )
    return Qwen2_5_VLConfig(
        vocab_size=-(-tokenizer.get_vocab_size() // 64) * 64,
        hidden_size=policy.width,
        intermediate_size=policy.mlp,
        num_hidden_layers=policy.layers,
        num_attention_heads=policy.heads,
        num_key_value_heads=policy.kv_heads,
        rope_theta=policy.rope_theta,
        mrope_section=(half - 2 * side, side, side),
        tie_word_embeddings=False,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        eos_ids=(ids["im_end"],),
        dtype="float32",
        vision=vision,
        extras=json.dumps(
            {"max_position_embeddings": 4096, "bos_token_id": tokenizer.token_to_id("<|endoftext|>")}
        ),
    )


def write_policy(directory: Path, policy: PolicyConfig, texts: Iterable[str]) -> None:
    """Write the policy as a Hugging Face directory without weights: config, tokenizer, chat template, image
    settings."""
    policy.validate()
    tokenizer = make_tokenizer(texts, policy.vocab)
    config = model_config(policy, tokenizer)
    with weights.new_directory(directory) as scratch:
        tokenizer.save(str(scratch / "tokenizer.json"))
        (scratch / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        weights.write_json(scratch / "config.json", config.to_hf())
        weights.write_json(
            scratch / "tokenizer_config.json",
            {
                "tokenizer_class": "Qwen2Tokenizer",
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
                "bos_token": None,
                "unk_token": None,
                "additional_special_tokens": list(SPECIAL[1:]),
                "model_max_length": 4096,
            },
        )
        weights.write_json(
            scratch / "preprocessor_config.json",
            {
                "image_processor_type": "Qwen2VLImageProcessor",
                "processor_class": "Qwen2_5_VLProcessor",
                "min_pixels": 28 * 28,
                "max_pixels": policy.pixels**2,
                "patch_size": 14,
                "temporal_patch_size": 2,
                "merge_size": 2,
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
            },
        )


def fresh(config: Qwen2_5_VLConfig, seed: int) -> Qwen2_5_VL:
    """A model with first weights that learn fast at this size: fan-in normal matrices, residual outputs
    divided by sqrt(2 L), embedding 0.3, zero head (so the first predictions are uniform)."""
    model = Qwen2_5_VL(config, rngs=nnx.Rngs(seed))
    state = nnx.state(model)
    key = jax.random.key(seed)
    for number, (path, param) in enumerate(nnx.to_flat_state(state)):
        names, value = [str(part) for part in path], param.get_value()
        if names[-1] == "bias" or "norm" in names[-2] or names[-2] == "ln_q":
            continue
        depth = config.vision.depth if names[0] == "visual" else config.num_hidden_layers
        if names[0] == "lm_head":
            scale = 0.0
        elif names[-1] == "embed_tokens":
            scale = 0.3
        else:
            residual = names[-2] in ("down_proj", "o_proj", "proj")
            scale = value.shape[-1] ** -0.5 / (math.sqrt(2 * depth) if residual else 1.0)
        param.set_value(scale * jax.random.normal(jax.random.fold_in(key, number), value.shape, jnp.float32))
    nnx.update(model, state)
    return model
