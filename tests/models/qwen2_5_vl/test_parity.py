"""The port against transformers, live: same weights, same logits, features, greedy tokens and gradients.

Every batch of a test module is padded to one shape and every function compiled once a model, since compiling
is nearly all of the time here. The natural shapes are those of the float64 tests.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fundus_jax.grpo.rollout import generate
from fundus_jax.models import load_pretrained
from fundus_jax.models.logprobs import token_logprobs
from fundus_jax.models.qwen2_5_vl import params
from tests.models import tiny

torch = pytest.importorskip("torch", reason="the parity tests need torch (Python 3.11 environment)")

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
# sizes (width, height) of each row's images: only one is a multiple of 112 on both sides; several a row, none
ROWS = ((130, 90),), (), ((112, 112), (60, 200), (150, 150)), ((224, 112), (57, 85))
LENGTH, PATCHES = 192, 1024  # holds every batch here
LESS_COMPILING = {"xla_backend_optimization_level": 0}  # half the time; the numbers are bound below


def layouts(seed):
    """0-4 images a row in four rows, every count but one; sizes that are no multiples of 28."""
    rng = np.random.default_rng(seed)
    counts = rng.permutation(5)[:4]
    sides = rng.choice([side for side in range(29, 178) if side % 28], (4, 4, 2))
    return tuple(tuple(map(tuple, row[:count].tolist())) for row, count in zip(sides, counts, strict=True))


def conversations(rows=ROWS):
    """One templated text and its images a row; texts of different length, words before, between, after."""
    texts, images = [], []
    for row, sizes in enumerate(rows):
        images.append(
            [tiny.random_image(width, height, seed=10 * row + i) for i, (width, height) in enumerate(sizes)]
        )
        asked = " what does the retina show" * (row + 1)
        body = " and ".join(f"compare {IMAGE} with care" for _ in sizes) + asked
        texts.append(f"<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n")
    return texts, images


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Torch's threads wait for each other in a busy loop: beside other programs, one is many times faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request, tmp_path_factory):
    """One checkpoint in both implementations, and our forward pass, compiled."""
    path = tmp_path_factory.mktemp("hf") / "model"
    tiny.tiny_hf_dir(path, tied=request.param, seed=int(request.param))
    model, processor = load_pretrained(path)
    graph, state = nnx.split(model)

    def both(state, batch):
        model = nnx.merge(graph, state)
        return model(batch), model.encode(batch)

    def greedy(state, batch):
        return generate(nnx.merge(graph, state), batch, max_new_tokens=32, temperature=0.0)

    compiled, decoder = (jax.jit(f, compiler_options=LESS_COMPILING) for f in (both, greedy))

    def batch(texts, images):
        return processor(texts, images, length=LENGTH, patches=PATCHES)

    return SimpleNamespace(
        path=path,
        hf=tiny.load_hf(path, attention="sdpa"),
        model=model,
        processor=processor,
        graph=graph,
        state=state,
        batch=batch,
        forward=lambda batch: tuple(np.asarray(x) for x in compiled(state, batch)),
        greedy=lambda batch: decoder(state, batch),
    )


@pytest.fixture
def true_float64(monkeypatch):
    """transformers rounds to float32 inside its norms and rotary embeddings, whatever the model's dtype; here
    it does not. (Its inverse frequencies stay float32, as ours do.)"""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as hf

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(hf.Qwen2_5_VLRMSNorm, "forward", norm)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def in_order(features, batch):
    """Our features [B,P/4,D] as transformers gives them: one row a merged patch, image after image."""
    rows = zip(features, batch.image_index, strict=True)
    return np.concatenate([one[index[index >= 0]] for one, index in rows])


def reference(hf, inputs):
    """Logits at the real tokens, and image features."""
    with torch.no_grad():
        logits = hf(**inputs).logits[inputs["attention_mask"].bool()].numpy()
        features = hf.model.visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output.numpy()
    return logits, features


@pytest.mark.parametrize("rows", [ROWS, layouts(0), layouts(1), layouts(2)], ids=["fixed", "0", "1", "2"])
def test_logits_and_features_fp32(pair, rows):
    texts, images = conversations(rows)
    inputs = tiny.hf_inputs(texts, images, pair.path)
    want, features = reference(pair.hf, inputs)
    batch = pair.batch(texts, images)
    real = inputs["attention_mask"].numpy() > 0
    assert np.array_equal(batch.tokens[batch.mask], inputs["input_ids"].numpy()[real])
    got, ours = pair.forward(batch)
    assert got.dtype == np.float32
    assert np.abs(got[batch.mask] - want).max() < 2e-4
    assert np.abs(in_order(ours, batch) - features).max() < 2e-4 * max(1.0, np.abs(features).max())
    assert want.std() > 1  # logits of a model that says something


def test_images_matter(pair):
    texts, images = conversations()
    first, _ = pair.forward(pair.batch(texts, images))
    images[0][0] = tiny.random_image(*images[0][0].size, seed=99)
    second, _ = pair.forward(pair.batch(texts, images))
    assert np.abs(first - second)[0, pair.batch(texts, images).mask[0].sum() - 1].max() > 0.1
    assert np.abs(first - second)[1:].max() == 0


@pytest.mark.usefixtures("true_float64")
def test_logits_and_features_float64(pair):
    texts, images = conversations()
    hf = tiny.load_hf(pair.path, dtype="float64", attention="sdpa")
    want, features = reference(hf, tiny.hf_inputs(texts, images, pair.path, dtype="float64"))
    assert want.dtype == features.dtype == np.float64
    with jax.enable_x64(True):
        model, processor = load_pretrained(pair.path, dtype="float64")
        batch = processor(texts, images)
        graph, state = nnx.split(model)

        def both(state, batch):
            model = nnx.merge(graph, state)
            return model(batch), model.encode(batch)

        outputs = jax.jit(both, compiler_options=LESS_COMPILING)(state, batch)
        got, ours = (np.asarray(x) for x in outputs)
    assert np.abs(got[batch.mask] - want).max() < 1e-8
    assert np.abs(in_order(ours, batch) - features).max() < 1e-8


@pytest.mark.parametrize("rows", [ROWS, layouts(5)], ids=["fixed", "random"])
def test_greedy_tokens(pair, rows):
    texts, images = conversations(rows)
    inputs = tiny.hf_inputs(texts, images, pair.path, padding_side="left")
    with torch.no_grad():
        out = pair.hf.generate(
            **inputs,
            **{"max_new_tokens": 32, "do_sample": False, "repetition_penalty": 1.0},
            **{"temperature": None, "top_p": None, "top_k": None},
            suppress_tokens=list(pair.model.config.banned_ids),
        )
    want = out[:, inputs["input_ids"].shape[1] :].numpy()
    rollout = pair.greedy(pair.batch(texts, images))
    got, mask = np.asarray(rollout.tokens[:, 0]), np.asarray(rollout.mask[:, 0])
    for row in range(len(texts)):
        count = mask[row].sum()
        assert np.array_equal(got[row, :count], want[row, :count])
        assert count == 32 or got[row, count - 1] in pair.model.config.eos_ids


def test_gradients(pair):
    texts, images = conversations()
    inputs = tiny.hf_inputs(texts, images, pair.path)
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    pair.hf.zero_grad()
    pair.hf(**inputs, labels=labels).loss.backward()
    want = {params.hub_name(name): p.grad.numpy().copy() for name, p in pair.hf.named_parameters()}
    pair.hf.zero_grad()

    def loss(state, batch):
        logs = jax.nn.log_softmax(nnx.merge(pair.graph, state)(batch)[:, :-1])
        chosen = jnp.take_along_axis(logs, batch.tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(batch.mask[:, 1:], chosen, 0)) / batch.mask[:, 1:].sum()

    gradient = jax.jit(jax.grad(loss), compiler_options=LESS_COMPILING)
    grads = dict(nnx.to_flat_state(gradient(pair.state, pair.processor(texts, images))))
    seen = 0
    for name, slot in params.table(pair.model.config).items():
        got = np.asarray(grads[slot.path].get_value())
        got = (got if slot.layer is None else got[slot.layer]).reshape(slot.shape)
        scale = np.abs(want[name]).max()
        assert scale > 0, name
        assert np.abs(got - want[name]).max() <= 1e-4 * scale, name
        seen += 1
    assert seen == len(want)


@pytest.mark.parametrize("group_size", [1, 3])
def test_extend_and_decode_agree_with_the_whole_pass(pair, group_size):
    """Prefill + shared-prefix scoring gives the log-probs of the plain pass over prompt and response, and the
    sampler's."""
    texts, images = conversations()
    batch = pair.batch(texts, images)
    banned = pair.model.config.banned_ids

    def sample_and_score(state, batch):
        model = nnx.merge(pair.graph, state)
        rollout = generate(model, batch, max_new_tokens=12, temperature=1.0, group_size=group_size, seed=3)
        prompt = model.prefill(batch)
        hidden = model.extend(prompt, rollout.tokens)
        first = jnp.broadcast_to(prompt.last[:, None, None], hidden[:, :, :1].shape)
        states = jnp.concatenate([first, hidden[:, :, :-1]], axis=2)
        return rollout, token_logprobs(states, model.head, rollout.tokens, banned=banned, chunk=7)[0]

    rollout, logprobs = jax.jit(sample_and_score, compiler_options=LESS_COMPILING)(pair.state, batch)
    rollout, logprobs = jax.tree.map(np.asarray, (rollout, logprobs))
    assert np.abs(np.where(rollout.mask, logprobs - rollout.logprobs, 0)).max() < 1e-3

    counts = rollout.mask[:, -1].sum(axis=-1)
    logits, _ = pair.forward(append(batch, rollout.tokens[:, -1], counts))
    logits = np.where(np.isin(np.arange(logits.shape[-1]), banned), -np.inf, logits)
    logs = np.asarray(jax.nn.log_softmax(logits))
    for row, count in enumerate(counts):
        start = batch.mask[row].sum()
        place = np.arange(start - 1, start - 1 + count)
        want = logs[row, place, rollout.tokens[row, -1, :count]]
        assert np.abs(want - logprobs[row, -1, :count]).max() < 1e-3


def append(batch, responses, counts):
    """The batch with `counts` [B] tokens of `responses` [B,N] behind each prompt, as one conversation."""
    tokens, mask, positions = (np.array(x) for x in (batch.tokens, batch.mask, batch.positions))
    for row, count in enumerate(counts):
        start = mask[row].sum()
        place = slice(start, start + count)
        tokens[row, place], mask[row, place] = responses[row, :count], True
        positions[row, :, place] = positions[row].max() + 1 + np.arange(count)
    return dataclasses.replace(batch, tokens=tokens, mask=mask, positions=positions)
