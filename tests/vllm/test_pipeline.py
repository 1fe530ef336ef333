"""The pipeline's two server stages with a real vLLM in the loop. The model is small and random, so what it
says is noise; that it is asked, answers by the schemas, and that every answer is accounted for, is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline import findings, ingest, jobs, knowledge_base, traces
from data_pipeline.datasets.phantom_source import PhantomConfig
from data_pipeline.trace_server import ServerWriter, WriterConfig
from fundus_jax.chat import ChatConfig
from fundus_jax.records import Example, Findings, Trace
from tests.conftest import ROOT
from tests.data_pipeline import mini_idrid
from tests.vllm.conftest import RANDOM, Vllm

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples of IDRiD's images with masks, reduced: the real 81 where they are, else a miniature."""
    root = tmp_path_factory.mktemp("idrid")
    folder = Path(os.environ.get("FUNDUS_SHARED_DATA") or ROOT.parent / "shared" / "data")
    real = folder / "idrid" / "A. Segmentation"
    if real.is_dir():
        (root / "source").mkdir()
        (root / "source" / real.name).symlink_to(real, target_is_directory=True)
    else:
        mini_idrid.write(root / "source")
    ingest.run(
        "idrid", root / "source", root / "examples", tasks={"modality": 1.0}, max_side=112, workers=2,
        partial_copy=not real.is_dir(),
    )  # fmt: skip
    return root / "examples"


def test_table_6_of_idrid(vllm: Vllm, masked: Path, tmp_path: Path) -> None:
    out = tmp_path / "votes"
    words = [
        sys.executable,
        "-m",
        "data_pipeline.findings",
        "--quality",
        f"--examples={masked}",
        f"--out={out}",
    ]
    words += [f"--votes.server.address={vllm.address}", f"--votes.server.model={RANDOM}"]
    words += ["--votes.answer_tokens=1024", "--votes.server.timeout=120", "--votes.server.deadline=240"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    images = {one.image: one for one in jobs.read(masked, Example) if one.findings is not None}
    found = {one.example: one for one in jobs.read(out, Findings)}
    assert found.keys() >= {one.id for one in images.values()}, "every image with masks is voted on"
    assert {(one.n, one.origin) for one in found.values()} == {(5, "votes")}
    assert {name for one in found.values() for name in one.votes} == set(findings.vocabulary()["CFP"])
    assert len({tuple(one.votes.values()) for one in found.values()}) > 1, "the answers differ between images"
    report = json.loads((out / "quality.json").read_text())
    [table] = report["tables"]
    assert (report["model"], table["images"], table["unanswered"]) == (RANDOM, len(images), 0)
    for row in table["rows"]:
        shown = [one for one in images.values() if row["finding"] in (one.findings or ())]
        hits = sum(row["finding"] in found[one.id].present for one in shown)
        assert (row["positives"], row["negatives"]) == (len(shown), len(images) - len(shown))
        assert row["sensitivity"]["value"] == pytest.approx(100 * hits / len(shown))


def test_every_trace_is_accounted_for(vllm: Vllm, tmp_path: Path) -> None:
    examples, found, knowledge, out = (
        tmp_path / name for name in ("examples", "findings", "knowledge", "traces")
    )
    drawn = PhantomConfig(seed=1, size=56, train=6, val=0, test=0)
    ingest.run("phantom", None, examples, phantom=drawn, tasks={"disease": 1.0, "lesion_presence": 1.0})
    knowledge_base.run(knowledge, examples=examples)
    findings.run(examples, found)
    server = ChatConfig(address=vllm.address, model=RANDOM, timeout=200, deadline=250, patience=20)
    writer = ServerWriter(WriterConfig(server=server, retries=1, answer_tokens=1800, temperature=1.0))
    traces.run(examples, found, knowledge, out, writer=writer, limit=1)
    asked = [one.id for one in jobs.read(examples, Example)]
    made = {one.example: one for one in jobs.read(out, Trace)}
    lost = [json.loads(line)["key"] for path in out.glob("*.quarantine.jsonl") for line in path.open()]
    assert sorted([*made, *lost]) == sorted(asked)
    tried = [json.loads(line) for path in out.glob("*.tries.jsonl") for line in path.open()]
    assert [one for one in tried if one["think"]], "vLLM wrote some text by the schema"
    assert not [one for one in made.values() if one.kept], "a random model convinces nobody"
    for one in made.values():
        mine = [line for line in tried if line["example"] == one.example and line["think"]]
        assert not mine or list(one.reasons) == mine[-1]["reasons"]
