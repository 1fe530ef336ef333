"""The files a processor is read from and written to: tokenizer, chat template, image settings, end ids.

Hugging Face has kept these in several places over time (chat_template.jinja or .json or inside
tokenizer_config.json; preprocessor_config.json or nested in processor_config.json); what differs is settled
here, so that `processor` sees one form. What is written is the hub's form, which old and new transformers and
vLLM read.
"""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fundus_jax.models.qwen2_5_vl.images import ImageConfig
from fundus_jax.models.weights import read_json
from fundus_jax.records import ConfigError, DataError

IMAGE_FILES = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True, kw_only=True)
class ProcessorFiles:
    """What a directory says beside the vocabulary itself.

    Attributes:
        image: size bounds, patch sizes and normalisation.
        image_token_id: of config.json; None where that file is absent.
        chat_template: the Jinja text; None if only the tokenizer's own files hold it.
        eos_ids: of generation_config.json; None if it names none.
        tokenizer_config: tokenizer_config.json as text, to be written back unchanged.
    """

    image: ImageConfig
    image_token_id: int | None
    chat_template: str | None
    eos_ids: tuple[int, ...] | None
    tokenizer_config: str | None


def read_files(hf_dir: Path) -> ProcessorFiles:
    """Read all but the vocabulary. Raises ConfigError without image settings, DataError for bad JSON."""
    config = _optional(hf_dir / "config.json")
    window = (config.get("vision_config") or {}).get("window_size", ImageConfig.window_size)
    eos = _optional(hf_dir / "generation_config.json").get("eos_token_id")
    template = _text(hf_dir / "chat_template.jinja")
    if template is None:
        template = _optional(hf_dir / "chat_template.json").get("chat_template")
    try:
        image = ImageConfig.from_hf(_image_settings(hf_dir), window_size=window)
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{hf_dir}: image settings of another form than the hub's ({error})") from error
    return ProcessorFiles(
        image=image,
        image_token_id=config.get("image_token_id"),
        chat_template=template,
        eos_ids=None if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        tokenizer_config=_text(hf_dir / "tokenizer_config.json"),
    )


def _image_settings(hf_dir: Path) -> dict[str, Any]:
    nested, flat = (_optional(hf_dir / name) for name in IMAGE_FILES)
    settings = nested.get("image_processor") or flat  # transformers' own order of preference
    if not settings:
        raise ConfigError(f"{hf_dir} has no image settings: {IMAGE_FILES[1]} of the checkpoint is needed")
    return settings


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def load_tokenizer(hf_dir: Path) -> Any:
    """The fast tokenizer of a directory (tokenizer.json, or vocab.json and merges.txt), without network or
    torch.
    """
    from transformers import AutoTokenizer  # here, because importing transformers takes a second

    if not any((hf_dir / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ConfigError(
            f"{hf_dir} has neither tokenizer.json nor vocab.json; give a Hugging Face directory"
        )
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"):
        _optional(hf_dir / name)  # what is broken is named
    try:
        tokenizer = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{hf_dir} has no tokenizer that can be read: {error}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ConfigError(
            f"{hf_dir}: {type(tokenizer).__name__} is not a fast tokenizer; add a tokenizer.json"
        )
    return tokenizer


def write_files(directory: Path, tokenizer: Any, tokenizer_config: str | None, image: ImageConfig) -> None:
    """Write tokenizer.json, tokenizer_config.json, chat_template.jinja and preprocessor_config.json, each
    atomically.

    An unchanged tokenizer_config.json of the source is preferred to a new one: versions of transformers
    disagree on its form (lists or dictionaries of extra tokens), and the source's is known to load.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tokenizer.", dir=directory) as scratch:
        tokenizer.save_pretrained(scratch)
        if tokenizer_config is not None:
            (Path(scratch) / "tokenizer_config.json").write_text(tokenizer_config, encoding="utf-8")
        settings = json.dumps(image.to_hf(), indent=2) + "\n"
        (Path(scratch) / "preprocessor_config.json").write_text(settings, encoding="utf-8")
        # a folder of further templates is left: tokenizer_config.json has them all
        for path in sorted(one for one in Path(scratch).iterdir() if one.is_file()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.replace(directory / path.name)
