"""A whole run: its artefacts, its second call, its refusals, its export in transformers, and kill -9 in
between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.e2e.conftest import ROOT, command, environment, run


def metrics(workdir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what a clock wrote, and a compiler."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k != "time" and not k.startswith(("time/", "compiles"))}
        for line in lines
    ]


def test_every_artefact_is_there(finished: Path) -> None:
    for name in (
        "config.json",
        "metrics.jsonl",
        "tb",
        "rollouts",
        "evaluation/summary.json",
        "hf",
        "report.html",
    ):
        assert (finished / name).exists(), name
    assert (finished / "checkpoints" / "48" / "manifest.json").exists()  # 4 base + 40 sft + 4 grpo steps
    stages = [line["stage"] for line in metrics(finished)]
    assert [stages.count(stage) for stage in ("base", "sft", "grpo")] == [4, 40, 4]
    grpo = [line for line in metrics(finished) if line["stage"] == "grpo"]
    wanted = {"kl", "entropy", "clip_low", "clip_high", "length", "zero_variance", "sampler_gap"}
    assert wanted | {"reward/answer", "reward/format", "reward/process", "reward/total"} <= grpo[0].keys()
    assert max(line["sampler_gap"] for line in grpo) < 1e-4


def test_the_same_command_again_changes_nothing(finished: Path, cache: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "checkpoints").rglob("*")}
    kept = (finished / "metrics.jsonl").read_bytes()
    done = run(command(finished), environment(cache))
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path: path.stat().st_mtime_ns for path in (finished / "checkpoints").rglob("*")} == before
    assert (finished / "metrics.jsonl").read_bytes() == kept


def test_another_configuration_is_refused_by_name(finished: Path, cache: Path) -> None:
    done = run(command(finished, **{"sft.batch": 4}), environment(cache))
    assert done.returncode != 0
    assert "sft.batch: 8 there, 4 here" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stage_before_its_data_says_so(tmp_path: Path, cache: Path) -> None:
    done = run(command(tmp_path / "empty", "--stage=sft"), environment(cache))
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "run --stage=data first" in done.stderr


def test_transformers_gives_the_same_greedy_answers(finished: Path) -> None:
    torch = pytest.importorskip("torch", reason="the comparison needs torch (Python 3.11 environment)")
    from fundus_jax.data import open_pool
    from fundus_jax.dialog import messages
    from fundus_jax.grpo.rollout import generate
    from fundus_jax.models import load_pretrained
    from tests.models import tiny

    model, processor = load_pretrained(finished / "hf")
    pool = open_pool(finished / "data", "test")
    examples = [example for example in pool.examples if example.task == "disease"][:20]
    assert len(examples) == 20
    texts = [
        processor.chat(messages(example, "open", instruct=False), add_generation_prompt=True)
        for example in examples
    ]
    images = [[pool.image(example)] for example in examples]
    rollout = generate(model, processor(texts, images), max_new_tokens=24, temperature=0.0)
    reference = tiny.load_hf(finished / "hf", attention="sdpa")
    inputs = tiny.hf_inputs(texts, images, finished / "hf", padding_side="left")
    banned = list(model.config.banned_ids)
    with torch.no_grad():
        out = reference.generate(**inputs, max_new_tokens=24, do_sample=False, suppress_tokens=banned)
    theirs = out[:, inputs["input_ids"].shape[1] :].numpy()
    answers = set()
    for row in range(20):
        count = int(rollout.mask[row, 0].sum())
        ours = np.asarray(rollout.tokens[row, 0, :count])
        assert np.array_equal(ours, theirs[row, :count])
        answers.add(processor.decode(ours))
    assert any(len(answer) > 4 for answer in answers)


def test_the_mesh_does_not_change_the_loss(finished: Path, tmp_path: Path, cache: Path) -> None:
    """--mesh=data:2,fsdp:2,tensor:2 on 8 forced devices gives the losses of one device to 1e-5."""
    fields = {"sft.steps": 3, "grpo.steps": 1, "grpo.optim.warmup": 0, "sft.save_every": 0}
    one, eight = tmp_path / "one", tmp_path / "eight"

    def stage(workdir: Path, name: str, mesh: str = "data:1", devices: int = 1) -> None:
        words = command(workdir, f"--stage={name}", f"--mesh={mesh}", **fields)
        done = run(words, environment(cache, devices))
        assert done.returncode == 0, done.stderr[-3000:]

    stage(one, "data")
    stage(one, "base")
    shutil.copytree(one, eight)
    stage(one, "sft")
    for name in ("sft", "grpo"):
        stage(eight, name, "data:2,fsdp:2,tensor:2", 8)
    losses = [[line["loss"] for line in metrics(path) if line["stage"] == "sft"] for path in (one, eight)]
    assert len(losses[0]) == 3
    assert np.abs(np.subtract(*losses)).max() < 1e-5


KILLS = (("sft", 3), ("sft", 21), ("grpo", 3))


@pytest.mark.timeout(1800)  # five runs, of a quarter to a whole one
def test_kill_9_leaves_no_trace(finished: Path, tmp_path: Path, cache: Path) -> None:
    """A run that is killed three times, and once more while it evaluates, ends with the bytes of one that
    never was."""
    workdir, env = tmp_path / "killed", environment(cache)
    for stage, step in KILLS:
        kill_when(command(workdir), env, lambda stage=stage, step=step: (stage, step) in seen(workdir))
    kill_when(command(workdir), env, lambda: (workdir / "evaluation").exists())
    done = run(command(workdir), env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics(workdir) == metrics(finished)
    ours, theirs = (load_file(path / "hf" / "model.safetensors") for path in (workdir, finished))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    for step in ("44", "48"):  # the last bundles of SFT and GRPO, optimizer and iterator included
        a, b = (
            json.loads((path / "checkpoints" / step / "bundle.json").read_text())
            for path in (workdir, finished)
        )
        assert a == b


def seen(workdir: Path) -> set[tuple[str, int]]:
    """(stage, step) of each whole line of metrics.jsonl, where there is one."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return {(line["stage"], line["step"]) for line in found}


def kill_when(words: list[str], env: dict[str, str], condition) -> None:
    """Start the run, and SIGKILL all of it as soon as `condition` holds."""
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
