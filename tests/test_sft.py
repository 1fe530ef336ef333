"""Supervised fine-tuning: which rows, which tokens are learned, what the loss is, and a few steps of it."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fundus_jax import data, dialog, sft, training
from fundus_jax.data import Pool
from fundus_jax.models.batch import Batch
from fundus_jax.optim import OptimConfig
from fundus_jax.records import ConfigError, DataError, Trace
from launch.stages import Trainer
from tests import small


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.data(tmp_path_factory)


@pytest.fixture(scope="module")
def trainer(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return small.open_run(tmp_path_factory.mktemp("sft"), source, small.config())


def rows_of(trainer: Trainer, pool: Pool, **changes: object) -> sft.Rows:
    config = trainer.config
    return sft.make_rows(pool, trainer.processor, config.prompt, replace(config.sft, **changes))


def encoded(trainer: Trainer, rows: sft.Rows, index: Iterable[int]) -> tuple[Batch, np.ndarray]:
    return sft.encode(rows, trainer.processor, index)


def test_what_the_assistant_says_is_learned_and_nothing_else(trainer: Trainer) -> None:
    rows, processor = trainer.rows, trainer.processor
    batch, learned = encoded(trainer, rows, list(range(6)))
    assert batch.tokens.shape == (6, rows.length)
    for row in range(6):
        said = processor.decode(batch.tokens[row][learned[row]], skip_special_tokens=False)
        assert said == rows.rows[row][1] + "<|im_end|>"
        places = np.flatnonzero(learned[row])
        assert np.array_equal(places, np.arange(places[0], places[-1] + 1)), "one stretch, after the prompt"
        assert not learned[row][~batch.mask[row]].any()
        before = processor.decode(batch.tokens[row, : places[0]], skip_special_tokens=False)
        assert rows.rows[row][0].question in before
        assert before.count("<|im_end|>") == 1, "the user's end token has the value of the learned one"
        assert batch.tokens[row, places[-1]] in batch.tokens[row, : places[0]]


def test_the_mask_goes_by_position_where_prompt_and_reply_are_the_same_words(trainer: Trainer) -> None:
    example = trainer.pool.examples[0]
    reply = dialog.render("red dots", "Normal")
    twin = replace(example, question=reply, options=(), answer="Normal")
    trace = Trace(example=twin.id, think="red dots", answer="Normal", kept=True, reasons=())
    pool = replace(trainer.pool, examples=(twin,), traces={twin.id: trace})
    batch, learned = encoded(trainer, rows_of(trainer, pool), [0])
    whole = trainer.processor.decode(batch.tokens[0], skip_special_tokens=False)
    assert whole.count(reply) == 2
    count = learned.sum()
    assert trainer.processor.decode(batch.tokens[0][learned[0]]) == reply
    first = np.flatnonzero(learned[0])[0]
    assert np.flatnonzero(learned[0]).tolist() == list(range(first, first + count))
    assert reply in trainer.processor.decode(batch.tokens[0, :first])


def test_rows_that_are_too_long_are_left_out_and_counted(
    trainer: Trainer, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trainer.rows
    lengths = []
    for i in range(len(whole.rows)):
        batch, _ = encoded(trainer, whole, [i])
        lengths.append(int(batch.mask.sum()))
    bound = sorted(lengths)[len(lengths) // 2]
    with caplog.at_level(logging.INFO, logger="absl"):
        cut = rows_of(trainer, whole.pool, max_length=bound)
    assert [row for row, length in zip(whole.rows, lengths, strict=True) if length <= bound] == list(cut.rows)
    assert cut.length == math.ceil(bound / sft.LENGTH_STEP) * sft.LENGTH_STEP
    dropped = sum(length > bound for length in lengths)
    assert dropped > 0
    assert f"'too long': {dropped}" in caplog.text
    assert f"'kept': {len(cut.rows)}" in caplog.text
    with pytest.raises(
        ConfigError, match=r"no training row is left: .*'too long'.*raise sft\.max_length \(10\)"
    ):
        rows_of(trainer, whole.pool, max_length=10)


def test_packed_rows_hold_every_conversation_once(trainer: Trainer, caplog: pytest.LogCaptureFixture) -> None:
    whole = trainer.rows
    with caplog.at_level(logging.INFO, logger="absl"):
        packed = rows_of(trainer, whole.pool, row_length=1024)
    assert packed.rows == whole.rows
    assert sorted(number for row in packed.packs for number in row) == list(range(len(whole.rows)))
    assert packed == rows_of(trainer, whole.pool, row_length=1024), "a resumed run packs as before"
    assert len(packed.packs) < len(whole.packs) / 2
    assert f"{len(packed.packs)} rows of {packed.length} tokens" in caplog.text
    everything = list(range(len(packed.packs)))
    batch, learned = encoded(trainer, packed, everything)
    assert batch.packed
    assert batch.tokens.shape == (len(everything), packed.length)
    assert packed.length <= 1024
    assert batch.patches.shape[1] == packed.patches
    assert batch.segments.max(axis=1).tolist() == [len(row) for row in packed.packs]
    _, apart = encoded(trainer, whole, list(range(len(whole.rows))))
    assert learned.sum() == apart.sum()


@pytest.mark.parametrize(("worth", "length", "told"), [(1.0, 0, True), (0.0, 0, False), (1.0, 1024, False)])
def test_that_rows_are_mostly_padding_is_told(
    trainer: Trainer,
    worth: float,
    length: int,
    told: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sft, "WORTH", worth)
    with caplog.at_level(logging.INFO, logger="absl"):
        rows_of(trainer, trainer.rows.pool, row_length=length)
    assert ("sft.row_length packs several into a row" in caplog.text) == told


def test_a_packed_step_learns_all_that_its_rows_hold(trainer: Trainer, source: Path, tmp_path: Path) -> None:
    packed = rows_of(trainer, trainer.rows.pool, row_length=1024)
    every = encoded(trainer, packed, range(len(packed.packs)))[1].sum()
    stage = replace(trainer.config.sft, steps=2, batch=len(packed.packs), row_length=1024)
    _, _, lines = run(tmp_path, source, stage)
    assert [line["tokens"] for line in lines] == [every, every]


def test_an_example_without_a_kept_trace_is_skipped_or_answered_bare(trainer: Trainer) -> None:
    first, second, third, *_ = (row[0] for row in trainer.rows.rows)
    traces = dict(trainer.pool.traces)
    traces[first.id] = replace(traces[first.id], kept=False, reasons=("for a test",))
    del traces[second.id]
    pool = replace(trainer.pool, examples=(first, second, third), traces=traces)
    assert [example.id for example, _ in rows_of(trainer, pool).rows] == [third.id]
    answered = rows_of(trainer, pool, without_trace="answer").rows
    assert [reply for _, reply in answered[:2]] == [f"<answer>{e.answer}</answer>" for e in (first, second)]
    assert answered[2][1].startswith(f"<think>{traces[third.id].think}</think> <answer>")
    without = sft.make_rows(
        pool, trainer.processor, sft.PromptConfig(style="options", think=False), trainer.config.sft
    )
    assert {reply.startswith("<answer>") for _, reply in without.rows} == {True}, (
        "no trace where none is asked for"
    )
    assert len(without.rows) == 3
    letters = sft.PromptConfig(style="letters", think=True)
    for example, reply in sft.make_rows(pool, trainer.processor, letters, trainer.config.sft).rows:
        answer = "ABCDEFG"[example.options.index(example.answer)]
        assert reply == f"<think>{traces[example.id].think}</think> <answer>{answer}</answer>"


def test_a_style_that_nobody_knows_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="prompt.style is 'letter'; known styles are open, options, letters"
    ):
        sft.PromptConfig(style="letter").validate()


@pytest.fixture(scope="module")
def model(trainer: Trainer) -> Any:
    """A policy with whom everything depends on everything."""
    return small.stir(trainer.start())


@functools.cache
def compiled(graph: Any, what: Any) -> Any:
    return jax.jit(lambda state, *inputs: what(nnx.merge(graph, state), *inputs))


def loss_of(model: Any, rows: tuple[Batch, np.ndarray], total: Any) -> tuple[jax.Array, dict]:
    graph, state = nnx.split(model)
    return compiled(graph, sft.loss)(state, rows, total)


def test_the_loss_is_the_mean_of_minus_log_p_over_learned_tokens(trainer: Trainer, model: Any) -> None:
    batch, learned = encoded(trainer, trainer.rows, [0, 3])
    value, metrics = loss_of(model, (batch, learned), sft.count((batch, learned)))
    graph, state = nnx.split(model)
    logits = np.asarray(compiled(graph, lambda model, batch: model(batch))(state, batch), np.float64)
    total, tokens, entropy = 0.0, 0, 0.0
    for row, place in zip(*np.nonzero(learned), strict=True):
        scores = logits[row, place - 1]
        logs = scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())
        total -= logs[batch.tokens[row, place]]
        entropy -= (np.exp(logs) * logs).sum()
        tokens += 1
    assert tokens == learned.sum() == metrics["tokens"]
    np.testing.assert_allclose(value, total / tokens, rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy"], entropy / tokens, rtol=1e-5)


def test_the_loss_of_parts_adds_up_by_the_count_of_the_whole(trainer: Trainer) -> None:
    model = small.bigram(trainer)
    whole = encoded(trainer, trainer.rows, [0, 3, 5, 7])
    total = sft.count(whole)
    parts = [jax.tree.map(lambda leaf, part=part: leaf[part::2], whole) for part in (0, 1)]
    value, *shares = (loss_of(model, part, total)[0] for part in (whole, *parts))
    np.testing.assert_allclose(sum(shares), value, rtol=1e-5)


def test_the_image_reaches_the_loss(trainer: Trainer, model: Any) -> None:
    batch, learned = encoded(trainer, trainer.rows, [0, 3])
    other = replace(batch, patches=-batch.patches)
    total = sft.count((batch, learned))
    one, two = (loss_of(model, (rows, learned), total)[0] for rows in (batch, other))
    assert abs(one - two) > 1e-4


def run(path: Path, source: Path, config: sft.SftConfig, spoil: float = 1.0) -> tuple[Trainer, Any, list]:
    """The stage from a bigram policy with a zero head; (trainer, its first and last parameters, metrics)."""
    trainer = small.open_run(path, source, small.config(sft=config))
    trainer.plan = trainer.work.stages = {"sft": config.steps, "grpo": 2}
    model = small.bigram(trainer)
    model.output.set_value(spoil * jnp.zeros_like(model.head))
    before = jax.tree.map(np.asarray, training.split(model)[1])
    try:
        params = sft.train(trainer.work, model, trainer.rows, trainer.processor, config, trainer.mesh)
    finally:
        trainer.work.close()
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return trainer, (before, params), lines


def test_training_falls_from_uniform_and_ends_with_a_bundle(source: Path, tmp_path: Path) -> None:
    stage = replace(small.config().sft, steps=10, save_every=5, optim=small.optim(lr=0.1))
    trainer, (before, params), lines = run(tmp_path, source, stage)
    assert [(line["stage"], line["step"]) for line in lines] == [("sft", step) for step in range(1, 11)]
    vocab = before["output"].shape[0]
    assert lines[0]["loss"] == pytest.approx(math.log(vocab), rel=1e-5), "the head is uniform"
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    wanted = {"loss", "entropy", "tokens", "grad_norm", "notfinite", "compiles", "time/data", "time/update"}
    assert wanted <= lines[0].keys()
    assert trainer.work.checkpoints.steps() == [5, 10]
    assert trainer.work.finished("sft")
    saved = trainer.work.params("sft", params)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, saved, params)))
    assert not np.array_equal(params["output"], before["output"])


def test_few_batches_are_made_ahead_where_they_are_large(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, calls = sft.encode, itertools.count()

    def counted(*args: Any) -> Any:
        next(calls)
        return encode(*args)

    monkeypatch.setattr(sft, "encode", counted)
    monkeypatch.setattr(data, "THREADS", 8)
    monkeypatch.setattr(data, "HELD", 1)
    run(tmp_path, source, replace(small.config().sft, steps=3))
    assert 3 <= next(calls) <= 3 + 2


@pytest.mark.parametrize("growing", [False, True])
def test_shapes_that_follow_the_data_are_reported(
    growing: bool,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    encode, calls = sft.encode, itertools.count()

    def longer(rows: sft.Rows, *args: Any) -> Any:
        return encode(replace(rows, length=rows.length + 8 * next(calls) * growing), *args)

    monkeypatch.setattr(sft, "encode", longer)
    with caplog.at_level(logging.WARNING, logger="absl"):
        lines = run(tmp_path, source, replace(small.config().sft, steps=4, save_every=2))[2]
    assert [line["compiles"] > 0 for line in lines] == [True, growing, growing, growing]
    told = [one for one in caplog.messages if "its shapes were known" in one]
    assert len(told) == growing
    assert all(one.startswith("sft: step 3 compiled") for one in told)


def test_micro_batches_train_alike(source: Path, tmp_path: Path) -> None:
    stage = replace(small.config().sft, steps=2, optim=OptimConfig(lr=1e-2))
    one, two = (run(tmp_path / str(n), source, replace(stage, micro_batches=n))[1:] for n in (1, 2))
    for line, other in zip(one[1], two[1], strict=True):
        for name in ("loss", "entropy", "tokens", "grad_norm"):
            assert other[name] == pytest.approx(line[name], rel=1e-5), name


def test_gradients_that_stay_not_finite_stop_the_stage(source: Path, tmp_path: Path) -> None:
    stage = replace(small.config().sft, steps=6, save_every=2, optim=OptimConfig(lr=1e-3))
    with pytest.raises(DataError, match="sft step 3: 3 gradients in a row were not finite"):
        run(tmp_path, source, stage, spoil=float("nan"))
    steps = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert steps == [2], "what was saved stays"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"without_trace": "guess"}, "sft.without_trace is 'guess'; it must be skip or answer"),
        ({"batch": 6, "micro_batches": 4}, "sft.micro_batches 4 must divide sft.batch 6"),
        ({"batch": 4, "micro_batches": 0}, "sft.micro_batches"),
        ({"batch": 0}, "sft.batch"),
        ({"row_length": 1024}, "sft.row_length 1024 must hold the longest .*, sft.max_length 2048"),
        ({"steps": -1}, "sft.steps"),
        ({"epochs": 0.0}, "sft.epochs"),
    ],
)
def test_settings_that_make_no_sense(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sft.SftConfig(**changes).validate()


def test_steps_of_a_stage() -> None:
    assert sft.SftConfig(steps=7).total_steps(1000) == 7
    assert sft.SftConfig(epochs=2, batch=16).total_steps(1000) == 125
    assert sft.SftConfig(epochs=2, batch=16).total_steps(3) == 1


def test_the_mesh_names_the_back_end_of_attention(trainer: Trainer, source: Path, tmp_path: Path) -> None:
    assert trainer.start().options.attention == "xla", "that of a CPU"
    chosen = small.open_run(tmp_path, source, small.config(attention="splash"))
    assert chosen.start().options.attention == "splash"
    with pytest.raises(ConfigError, match="attention is 'flash'; it must be one of auto, xla, splash, cudnn"):
        small.config(attention="flash").validate()


def test_a_loop_has_a_layer_a_turn() -> None:
    with pytest.raises(ConfigError, match="unroll is 0; it must be at least 1"):
        small.config(unroll=0).validate()
