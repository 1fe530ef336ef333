"""The port against transformers, live: same weights, same logits, features, greedy tokens and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fundus_jax.grpo.rollout import generate
from fundus_jax.models import load_pretrained
from tests.models import tiny

torch = pytest.importorskip("torch", reason="the parity tests need torch (Python 3.11 environment)")

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
# image sizes (width, height) of each row: none a multiple of 112 in every side, several a row, and a row without any
ROWS = ((130, 90),), (), ((112, 112), (60, 200), (150, 150)), ((224, 112), (57, 85))


def conversations(rows=ROWS):
    """One templated text and its images a row; texts of different length, words before, between and after the images."""
    texts, images = [], []
    for row, sizes in enumerate(rows):
        images.append(
            [tiny.random_image(width, height, seed=10 * row + i) for i, (width, height) in enumerate(sizes)]
        )
        body = " and ".join(f"compare {IMAGE} with care" for _ in sizes) + " what does the retina show" * (
            row + 1
        )
        texts.append(f"<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n")
    return texts, images


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def hf_dir(request, tmp_path_factory):
    return tiny.tiny_hf_dir(
        tmp_path_factory.mktemp("hf") / "model", tied=request.param, seed=int(request.param)
    )


def reference(hf_dir, texts, images, dtype="float32", side="right"):
    model = tiny.load_hf(hf_dir, dtype=dtype, attention="sdpa")
    return model, tiny.hf_inputs(texts, images, hf_dir, dtype=dtype, padding_side=side)


@pytest.fixture
def true_float64(monkeypatch):
    """transformers rounds to float32 inside its norms and rotary embeddings, whatever the model's dtype; here it does not.

    (Its inverse frequencies stay float32, as ours do.)
    """
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as hf

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(hf.Qwen2_5_VLRMSNorm, "forward", norm)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def test_logits_fp32(hf_dir):
    texts, images = conversations()
    hf, inputs = reference(hf_dir, texts, images)
    with torch.no_grad():
        want = hf(**inputs).logits.numpy()
    model, processor = load_pretrained(hf_dir)
    batch = processor(texts, images)
    assert np.array_equal(
        batch.tokens[batch.mask], inputs["input_ids"].numpy()[inputs["attention_mask"].numpy() > 0]
    )
    got = np.asarray(jax.jit(lambda batch: model(batch))(batch))
    assert got.dtype == np.float32
    assert np.abs(got - want)[batch.mask].max() < 2e-4
    assert want[batch.mask].std() > 1  # logits of a model that says something


def test_images_matter(hf_dir):
    texts, images = conversations()
    model, processor = load_pretrained(hf_dir)
    first = model(processor(texts, images))
    images[0][0] = tiny.random_image(*images[0][0].size, seed=99)
    second = model(processor(texts, images))
    assert float(jnp.abs(first - second)[0, -1].max()) > 0.1
    assert float(jnp.abs(first - second)[1:].max()) == 0


@pytest.mark.usefixtures("true_float64")
def test_logits_and_features_float64(hf_dir):
    texts, images = conversations()
    hf, inputs = reference(hf_dir, texts, images, "float64")
    with torch.no_grad():
        want = hf(**inputs).logits.numpy()
        features = hf.model.visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output.numpy()
    assert want.dtype == np.float64
    with jax.enable_x64(True):
        model, processor = load_pretrained(hf_dir, dtype="float64")
        batch = processor(texts, images)
        got = np.asarray(model(batch))
        ours = np.asarray(model.encode(batch))
    assert np.abs(got - want)[batch.mask].max() < 1e-8
    order = [ours[row][batch.image_index[row][batch.image_index[row] >= 0]] for row in range(len(texts))]
    assert np.abs(np.concatenate(order) - features).max() < 1e-8


def test_vision_features_fp32(hf_dir):
    texts, images = conversations()
    hf, inputs = reference(hf_dir, texts, images)
    with torch.no_grad():
        want = hf.model.visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output.numpy()
    model, processor = load_pretrained(hf_dir)
    batch = processor(texts, images)
    ours = np.asarray(model.encode(batch))
    got = np.concatenate(
        [ours[row][batch.image_index[row][batch.image_index[row] >= 0]] for row in range(len(texts))]
    )
    assert np.abs(got - want).max() < 2e-4 * max(1.0, np.abs(want).max())


def test_greedy_tokens(hf_dir):
    texts, images = conversations()
    hf, inputs = reference(hf_dir, texts, images, side="left")
    model, processor = load_pretrained(hf_dir)
    with torch.no_grad():
        out = hf.generate(
            **inputs, max_new_tokens=32, do_sample=False, repetition_penalty=1.0, temperature=None, top_p=None, top_k=None,
            suppress_tokens=list(model.config.banned_ids),
        )  # fmt: skip
    want = out[:, inputs["input_ids"].shape[1] :].numpy()
    rollout = generate(model, processor(texts, images), max_new_tokens=32, temperature=0.0)
    mask = np.asarray(rollout.mask[:, 0])
    got = np.asarray(rollout.tokens[:, 0])
    for row in range(len(texts)):
        count = mask[row].sum()
        assert np.array_equal(got[row, :count], want[row, :count])
        assert count == 32 or got[row, count - 1] in model.config.eos_ids


def test_gradients(hf_dir):
    from fundus_jax.models.qwen2_5_vl import params

    texts, images = conversations()
    hf, inputs = reference(hf_dir, texts, images)
    real = inputs["attention_mask"].bool()
    labels = torch.where(real, inputs["input_ids"], -100)
    hf(**inputs, labels=labels).loss.backward()
    want = {params.hub_name(name): p.grad.numpy() for name, p in hf.named_parameters()}

    model, processor = load_pretrained(hf_dir)
    batch = processor(texts, images)
    graph, state = nnx.split(model)

    def loss(state):
        logits = nnx.merge(graph, state)(batch)[:, :-1]
        logs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(logs, batch.tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(batch.mask[:, 1:], chosen, 0)) / batch.mask[:, 1:].sum()

    grads = dict(nnx.to_flat_state(jax.jit(jax.grad(loss))(state)))
    seen = 0
    for name, slot in params.table(model.config).items():
        got = np.asarray(grads[slot.path].get_value())
        got = (got if slot.layer is None else got[slot.layer]).reshape(slot.shape)
        scale = np.abs(want[name]).max()
        assert scale > 0, name
        assert np.abs(got - want[name]).max() <= 1e-4 * scale, name
        seen += 1
    assert seen == len(want)


@pytest.mark.parametrize("group_size", [1, 3])
def test_extend_and_decode_agree_with_the_whole_pass(hf_dir, group_size):
    """Prefill + shared-prefix scoring gives the log-probs of the plain pass over prompt and response, and the sampler's."""
    from fundus_jax.models.logprobs import token_logprobs

    texts, images = conversations()
    model, processor = load_pretrained(hf_dir)
    batch = processor(texts, images)
    rollout = generate(model, batch, max_new_tokens=12, temperature=1.0, group_size=group_size, seed=3)
    prompt = model.prefill(batch)
    hidden = model.extend(prompt, rollout.tokens)
    states = jnp.concatenate(
        [jnp.broadcast_to(prompt.last[:, None, None], hidden[:, :, :1].shape), hidden[:, :, :-1]], axis=2
    )
    logprobs, _ = token_logprobs(states, model.head, rollout.tokens, banned=model.config.banned_ids, chunk=7)
    assert float(jnp.abs(jnp.where(rollout.mask, logprobs - rollout.logprobs, 0)).max()) < 1e-3

    for row in range(len(texts)):
        count = int(rollout.mask[row, -1].sum())
        response = processor.decode(np.asarray(rollout.tokens[row, -1, :count]), skip_special_tokens=False)
        whole = processor([texts[row]], [images[row]])
        tokens = np.concatenate([whole.tokens[0], np.asarray(rollout.tokens[row, -1, :count])])
        start = int(whole.positions.max()) + 1
        positions = np.concatenate(
            [whole.positions[0], np.tile(np.arange(start, start + count), (3, 1))], axis=1
        )
        import dataclasses

        full = dataclasses.replace(
            whole, tokens=tokens[None], mask=np.ones((1, len(tokens)), bool), positions=positions[None],
            image_index=np.pad(whole.image_index, ((0, 0), (0, count)), constant_values=-1),
        )  # fmt: skip
        logits = model(full)[0, whole.tokens.shape[1] - 1 : -1]
        logits = logits.at[:, np.asarray(model.config.banned_ids)].set(-jnp.inf)
        want = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[-count:, None], axis=-1)[:, 0]
        assert float(jnp.abs(want - logprobs[row, -1, :count]).max()) < 1e-3
        assert isinstance(response, str)
