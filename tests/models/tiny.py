"""Build a tiny Qwen2.5-VL directory in Hugging Face's layout, with random weights, for parity tests.

Everything is made here, offline: a byte-level BPE of 1,000 entries with Qwen's 22 added tokens behind it, a
chat template of the same grammar, and a torch `Qwen2_5_VLForConditionalGeneration` of 0.3 M parameters. Every
parameter is drawn at random, biases and norm weights too, so that a port that forgets one can not pass.

`torch` is imported inside the functions: the tokenizer half works without it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

BASE_VOCAB = 1000
VOCAB = 1024
MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 64
EOS_IDS = (1002, 1000)
IMAGE_ID, VIDEO_ID, VISION_START_ID, VISION_END_ID = 1012, 1013, 1009, 1010

SPECIAL = tuple(
    f"<|{name}|>"
    for name in (
        *("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end"),
        *("quad_start", "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"),
    )
)
NON_SPECIAL = (
    *("<tool_call>", "</tool_call>"),
    *(
        f"<|{name}|>"
        for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")
    ),
)
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for turn in messages -%}
{%- if loop.first and turn.role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + turn.role + '\\n' -}}
{%- if turn.content is string -%}
{{- turn.content -}}
{%- else -%}
{%- for part in turn.content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' or 'video' in part -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_WORDS = """
the retina shows a few small red dots near macula and fovea which are microaneurysm lesions without
haemorrhage hard exudate forms yellow deposits around temporal arcade superior inferior nasal quadrant optic
disc cup ratio is enlarged suggesting glaucoma while drusen between pigment epithelium membrane indicate age
related degeneration subretinal intraretinal fluid detachment on optical coherence tomography suggests
diabetic oedema or choroidal neovascularisation vitreous venous beading cotton wool spot ischaemia
proliferative moderate severe mild normal photograph ultra widefield colour fundus scan modality question
answer think option letter choose correct image describe what can you see here please explain reasoning step
by before giving final conclusion no evidence visible left right eye patient diagnosis grade therefore because
however although consistent with none of these findings present absent count location size border sharp
blurred bright dark vessel artery vein calibre tortuous reflex quality good poor artefact reference box user
assistant system helpful model language vision picture first second third compare both images difference
similar identify likely disease label yes certain uncertain several numerous
""".split()  # noqa: SIM905 (prose is easier to read than a list of words)


def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE: ids 0-999 learned from a fixed word list, 1000-1021 Qwen's added tokens in Qwen's
    order.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_VOCAB, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    corpus = [" ".join(_WORDS), " ".join(word.capitalize() for word in _WORDS)]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in NON_SPECIAL])
    if tokenizer.token_to_id("<|image_pad|>") != IMAGE_ID:
        raise AssertionError(
            f"the word list gave {tokenizer.get_vocab_size()} entries, not {BASE_VOCAB} + 22"
        )
    return tokenizer


def write_processor_files(path: Path) -> Path:
    """Write the tokenizer, chat template, image processor and generation files of the tiny model. No torch
    needed.
    """
    path.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer().save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": None,
            "unk_token": None,
            "additional_special_tokens": list(SPECIAL[1:]),
            "model_max_length": 2048,
        },
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "min_pixels": MIN_PIXELS,
            "max_pixels": MAX_PIXELS,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
        "generation_config.json": {"eos_token_id": list(EOS_IDS), "pad_token_id": EOS_IDS[1]},
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return path


def tiny_config(*, tied: bool = False) -> Any:
    """The `Qwen2_5_VLConfig` of the tiny model: 2 text layers of width 64, 4 vision layers, full attention in
    1 and 3.
    """
    from transformers import Qwen2_5_VLConfig

    text = {
        **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048},
        **{"rms_norm_eps": 1e-6, "initializer_range": 0.2, "tie_word_embeddings": tied},
        **{"bos_token_id": 1000, "eos_token_id": 1002, "pad_token_id": 1000},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }
    vision = {
        **{"depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64},
        **{"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112},
        **{"fullatt_block_indexes": [1, 3], "tokens_per_second": 2, "initializer_range": 0.2},
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=tied,
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=VISION_START_ID,
        vision_end_token_id=VISION_END_ID,
    )


def tiny_hf_dir(path: str | Path, *, tied: bool = False, seed: int = 0, dtype: str = "float32") -> Path:
    """Write a complete tiny Hugging Face directory at `path` and return it; equal arguments give equal
    weights.

    Matrices are normal with deviation 0.2, biases too; norm weights are 1 + 0.2 normal. `dtype` is a torch
    dtype's name and also the weights' type on disk.
    """
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    model = Qwen2_5_VLForConditionalGeneration(tiny_config(tied=tied))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name or "ln_q" in name
            parameter.normal_(1.0 if is_norm else 0.0, 0.2, generator=generator)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    return write_processor_files(path)  # last, so that its generation_config.json is the one that stays


def load_hf(path: str | Path, *, dtype: str = "float32", attention: str = "eager") -> Any:
    """The torch model of a directory written by `tiny_hf_dir`, in evaluation mode."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation=attention, local_files_only=True
    ).eval()


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def hf_inputs(
    texts: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    hf_dir: str | Path,
    *,
    dtype: str = "float32",
    padding_side: str = "right",
) -> dict[str, Any]:
    """What HF's processor hands HF's model, as torch tensors, made from HF's own tokenizer and image
    processor.

    HF's `Qwen2_5_VLProcessor` can not be built without torchvision, so its three steps are done here: process
    the images, repeat each image pad h*w/4 times in the text, tokenise with padding. Keys: input_ids,
    attention_mask, mm_token_type_ids [B,T] int64, and where there are images pixel_values [n, 1176],
    image_grid_thw [images, 3].
    """
    import torch
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
    flat = [image for row in images for image in row]
    inputs: dict[str, Any] = {}
    expanded = list(texts)
    if flat:
        processor = Qwen2VLImageProcessorPil.from_pretrained(hf_dir, local_files_only=True)
        pixels = processor(images=flat, return_tensors="pt")
        inputs["pixel_values"] = pixels["pixel_values"].to(getattr(torch, dtype))
        inputs["image_grid_thw"] = pixels["image_grid_thw"]
        counts = iter((pixels["image_grid_thw"].prod(-1) // processor.merge_size**2).tolist())
        for row, text in enumerate(expanded):
            head, *rest = text.split("<|image_pad|>")
            expanded[row] = head + "".join("<|image_pad|>" * next(counts) + part for part in rest)
    tokens = tokenizer(expanded, padding=True, padding_side=padding_side, return_tensors="pt")
    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    inputs["input_ids"], inputs["attention_mask"] = tokens["input_ids"], tokens["attention_mask"]
    inputs["mm_token_type_ids"] = (tokens["input_ids"] == image_id).long()
    return inputs
