"""Conversations with images -> `Batch`, and tokens -> text: what stands before and after the model.

The tokenizer and the chat template are the checkpoint's own, through transformers; everything that concerns
images is ours (`images`, `rope`), so that no torch and no torchvision is needed. All of it is numpy, done
once, at data time.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from fundus_jax.models.batch import Batch
from fundus_jax.models.qwen2_5_vl.images import ImageConfig, Sized
from fundus_jax.models.qwen2_5_vl.processor_files import load_tokenizer, read_files, write_files
from fundus_jax.models.qwen2_5_vl.rows import Row, collate, expand, join
from fundus_jax.records import ConfigError, DataError

IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"  # noqa: S105 (names of tokens, not secrets)
BANNED_TOKENS = (IMAGE_TOKEN, VIDEO_TOKEN, "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")

Messages = Sequence[dict[str, Any]]  # Hugging Face's form: {"role": ..., "content": text or list of parts}


class Processor:
    """Tokenizer, chat template and image path of one checkpoint.

    Args:
        tokenizer: a fast tokenizer of transformers, with a chat template.
        image_config: sizes and normalisation of images.
        eos_ids: tokens that end an answer; the tokenizer's end token if None.
        tokenizer_config: text of the source's tokenizer_config.json, which `save_pretrained` writes back.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_config: ImageConfig,
        *,
        eos_ids: tuple[int, ...] | None = None,
        tokenizer_config: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_config = image_config
        self._tokenizer_config = tokenizer_config
        # Used directly, and set once: transformers' call switches padding and truncation on the shared Rust
        # object, which fails when Grain's reading threads do it at the same time.
        self._encoder = tokenizer.backend_tokenizer
        self._encoder.no_padding()
        self._encoder.no_truncation()
        for name, value in (("pad", tokenizer.pad_token_id), ("end", tokenizer.eos_token_id)):
            if value is None:
                raise ConfigError(f"the tokenizer has no {name} token; tokenizer_config.json must name one")
        if self._encoder.token_to_id(IMAGE_TOKEN) is None:
            raise ConfigError(f"the tokenizer has no {IMAGE_TOKEN}; it is not one of a Qwen2.5-VL checkpoint")
        self.pad_id: int = tokenizer.pad_token_id
        self.eos_ids: tuple[int, ...] = eos_ids or (tokenizer.eos_token_id,)
        self.image_token_id: int = self._encoder.token_to_id(IMAGE_TOKEN)
        self._video_token_id: int | None = self._encoder.token_to_id(VIDEO_TOKEN)

    @classmethod
    def from_pretrained(
        cls, hf_dir: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> "Processor":
        """Read a Hugging Face directory; `min_pixels`/`max_pixels` replace the checkpoint's, also when saved.

        Raises ConfigError if a file is missing, or the tokenizer and config.json differ on the image token.
        """
        path = Path(hf_dir)
        files, tokenizer = read_files(path), load_tokenizer(path)
        if files.chat_template is not None:
            tokenizer.chat_template = files.chat_template
        if not tokenizer.chat_template:
            raise ConfigError(f"{path} has no chat template: add the checkpoint's chat_template.jinja")
        sizes = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        image_config = replace(
            files.image, **{name: value for name, value in sizes.items() if value is not None}
        )
        processor = cls(
            tokenizer, image_config, eos_ids=files.eos_ids, tokenizer_config=files.tokenizer_config
        )
        if files.image_token_id not in (None, processor.image_token_id):
            raise ConfigError(
                f"{path}: {IMAGE_TOKEN} has id {processor.image_token_id} in the tokenizer "
                f"but {files.image_token_id} in config.json (image_token_id)"
            )
        return processor

    def save_pretrained(self, directory: str | Path) -> None:
        """Write tokenizer, chat template and image settings into `directory`, each file atomically."""
        write_files(Path(directory), self.tokenizer, self._tokenizer_config, self.image_config)

    @property
    def banned_ids(self) -> tuple[int, ...]:
        """Ids that must never be sampled: the next forward pass would take them for images. Sorted."""
        ids = (self._encoder.token_to_id(name) for name in BANNED_TOKENS)
        return tuple(sorted(number for number in ids if number is not None))

    def chat(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation by the checkpoint's template: one image pad for each image part."""
        return self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """The text of one row of token ids (a list, or a numpy or jax array of one axis)."""
        return self.tokenizer.decode(
            np.asarray(tokens).tolist(),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )

    def __call__(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[Image.Image]] | None = None,
        *,
        length: int | None = None,
        patches: int | None = None,
    ) -> Batch:
        """Turn templated texts and their images into one padded batch of numpy arrays.

        Args:
            texts: B texts as `chat` makes them, each with one image pad per image.
            images: B lists of images, in the order of the pads; None if there are none at all.
            length: T; the longest row if None.
            patches: P, a multiple of the window slots; the largest row if None, so 0 without images.

        Raises:
            DataError: a row does not fit `length` or `patches` (rows are never truncated: an image would lose
                tokens), its pads and images differ in number, or an image can not be used. The message names
                the row.
        """
        if isinstance(texts, str) or not len(texts):
            raise ConfigError(f"texts must be a list of at least one text, got {texts!r:.60}")
        rows = [[(text, False)] for text in texts]
        return self._collate(self._rows(rows, images), length=length, patches=patches)[0]

    def row_size(self, text: str, images: Sequence[Sized] = ()) -> tuple[int, int]:
        """(tokens, patch slots) a row would take, from the images' sizes alone: for filters and buckets."""
        row = self._rows([[(text, False)]], [cast("Sequence[Image.Image]", images)])[0]  # reads no pixel
        return len(row.tokens), row.slots

    def train_row(
        self, messages: Messages, images: Sequence[Image.Image] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [T] int32, loss_mask [T] bool) of a conversation that has assistant turns.

        The loss covers what the assistant says and the end token after it, by position: the template is
        rendered before and after each assistant turn, and the difference is the answer. Prompt and answer are
        tokenised apart, as they are when the model answers, so the tokens before an answer equal those of the
        prompt in a rollout. The mask is True at the tokens to be predicted, not shifted.

        Raises:
            DataError: no assistant turn, or one that comes first.
            ConfigError: a template that rewrites earlier turns when later ones come.
        """
        row = self._rows([self._segments(messages)], [images])[0]
        return row.tokens, row.loss

    def encode_dialogs(
        self,
        dialogs: Sequence[Messages],
        images: Sequence[Sequence[Image.Image]] | None = None,
        *,
        length: int | None = None,
        patches: int | None = None,
        per_row: Sequence[int] | None = None,
    ) -> tuple[Batch, np.ndarray]:
        """A batch of whole conversations and its loss mask [B,T]; see `__call__` and `train_row`.

        per_row: how many conversations, in order, each row is packed with; None gives each a row of its own.
        Raises ConfigError if they do not add up.
        """
        rows = self._rows([self._segments(messages) for messages in dialogs], images)
        if per_row is None:
            return self._collate(rows, length=length, patches=patches)
        if sum(per_row) != len(rows) or min(per_row) < 1:
            raise ConfigError(f"per_row {list(per_row)} must be counts from 1 that add up to {len(rows)}")
        ends = np.cumsum(per_row)
        joined = [join(rows[end - count : end]) for end, count in zip(ends, per_row, strict=True)]
        return self._collate(joined, length=length, patches=patches, packed=True)

    def encode_dialog(
        self,
        messages: Messages,
        images: Sequence[Image.Image] = (),
        *,
        length: int | None = None,
        patches: int | None = None,
    ) -> tuple[Batch, np.ndarray]:
        """`encode_dialogs` of one conversation: a batch of one row, and its loss mask [1,T]."""
        return self.encode_dialogs([messages], [images], length=length, patches=patches)

    def _segments(self, messages: Messages) -> list[tuple[str, bool]]:
        """The templated conversation cut into (text, whether the loss covers it)."""
        answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers or answers[0] == 0:
            raise DataError("a training conversation needs an assistant turn, after at least one other turn")
        whole, end_token = self.chat(messages), self.tokenizer.eos_token
        segments: list[tuple[str, bool]] = []
        done = 0
        for turn in answers:
            prompt = self.chat(messages[:turn], add_generation_prompt=True)
            answered = self.chat(messages[: turn + 1])
            end = len(answered.rstrip())  # the line break after the end token is the template's
            plain = whole.startswith(answered) and answered.startswith(prompt) and done <= len(prompt) < end
            if not plain or not answered[:end].endswith(end_token):
                raise ConfigError(
                    f"the chat template does not append turn {turn} as prompt, answer, {end_token}: "
                    "the loss mask can not be placed; use the checkpoint's own Qwen2.5-VL template"
                )
            segments += [(whole[done : len(prompt)], False), (whole[len(prompt) : end], True)]
            done = end
        return [*segments, (whole[done:], False)]

    def _rows(
        self, rows: Sequence[list[tuple[str, bool]]], images: Sequence[Sequence[Image.Image]] | None
    ) -> list[Row]:
        """Tokenise the segments of every row, join them, and expand the image pads."""
        images = [()] * len(rows) if images is None else images
        if len(images) != len(rows):
            raise DataError(
                f"{len(rows)} texts but {len(images)} lists of images; give a list for every text"
            )
        segments = [text for row in rows for text, _ in row]
        encoded = iter(self._encoder.encode_batch(segments, add_special_tokens=False))
        done = []
        for number, row in enumerate(rows):
            pieces = [(np.asarray(next(encoded).ids, np.int32), learned) for _, learned in row]
            ids = np.concatenate([piece for piece, _ in pieces])
            loss = np.concatenate([np.full(len(piece), learned) for piece, learned in pieces])
            if (ids == self._video_token_id).any():
                raise DataError(f"row {number} holds {VIDEO_TOKEN}: videos are not supported")
            done.append(expand(ids, loss, images[number], self.image_config, self.image_token_id, number))
        return done

    def _collate(self, rows: list[Row], **shape: Any) -> tuple[Batch, np.ndarray]:
        return collate(rows, self.image_config, pad_id=self.pad_id, **shape)
