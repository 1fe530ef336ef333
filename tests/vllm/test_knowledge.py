"""The extractor's schema and prompt against a real vLLM. Its model has random weights, so that no claim is
expected to hold: what counts is that the server takes the request, and that each label ends somewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline import knowledge_base
from data_pipeline.knowledge.config import KnowledgeConfig
from fundus_jax.chat import ChatConfig
from tests.vllm.conftest import NAME, Vllm

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


def test_every_label_ends_as_a_record_or_with_a_reason(vllm: Vllm, tmp_path: Path) -> None:
    server = ChatConfig(address=vllm.address, model=NAME, concurrency=4, timeout=240, deadline=480)
    config = KnowledgeConfig(extractor="server", passages=2, answer_tokens=400, limit=1.0, server=server)
    pairs = [("PDR", "CFP"), ("DME", "OCT"), ("AMD", "UWF"), ("Glaucoma", "CFP")]
    summary = knowledge_base.run(tmp_path / "out", pairs=pairs, config=config)
    assert summary.answers + summary.quarantined == len(pairs)
    lines = (tmp_path / "out" / "knowledge-0000.quarantine.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in lines]
    assert all(reason.startswith(("truncated", "no claim on")) for reason in reasons), reasons
