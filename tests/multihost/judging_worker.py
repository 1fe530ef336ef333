"""One of several processes that judge a step together.

    python -m tests.multihost.judging_worker COORDINATOR PROCESSES PROCESS ADDRESS...

For each ADDRESS of a judge it prints a line of JSON: texts and totals of all rollouts, or why there are none.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from fundus_jax import hosts
from fundus_jax.chat import ChatConfig, LostError
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.judge import JudgeError
from fundus_jax.grpo.judge_server import JudgeConfig, ServerJudge
from fundus_jax.grpo.rollout import Rollout
from fundus_jax.grpo.train import score_together
from fundus_jax.records import Example, Findings

PROMPTS, GROUP = 5, 2
SAYS = ("The image shows drusen.", "Microaneurysms are seen.", "No lesion is seen.")


def example(number: int) -> Example:
    """A question that is asked about image `number`."""
    return Example(
        id=f"e{number}", dataset="made", split="train", patient="p", eye="OD", modality="CFP", boxes=(),
        image="images#0", labels=("AMD",), task="disease", question="Which?", options=(), answer="AMD",
        findings=("drusen",),
    )  # fmt: skip


def prompts() -> Any:
    """What `score_together` reads of Prompts; the reply is known by its first token."""
    rows = [(example(number), "") for number in range(PROMPTS)]
    found = {
        one.id: Findings(example=one.id, present=("drusen",), votes={}, n=0, origin="pixels")
        for one, _ in rows
    }

    def decode(tokens: Any, *, skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return f"<think>{SAYS[int(tokens[0]) % len(SAYS)]}</think> <answer>AMD</answer>"

    processor = SimpleNamespace(eos_ids=(0,), decode=decode)
    pool = SimpleNamespace(findings=found, knowledge={})
    return SimpleNamespace(rows=rows, processor=processor, pool=pool, form={"think": True})


def main(coordinator: str, processes: str, process: str, *addresses: str) -> None:
    """Join the others where there are any, and judge once for each address."""
    if int(processes) > 1:
        jax.distributed.initialize(coordinator, int(processes), int(process), initialization_timeout=240)
    said = np.arange(PROMPTS * GROUP, dtype=np.int32).reshape(PROMPTS, GROUP, 1)
    tokens = np.concatenate([said, np.zeros_like(said)], axis=-1)  # and the end
    rollout: Any = Rollout(tokens, np.zeros(tokens.shape, np.float32), np.ones(tokens.shape, bool))
    for address in addresses:
        server = ChatConfig(address=address, model="m", patience=0.5)
        judge = ServerJudge(JudgeConfig(kind="server", server=server))
        try:
            texts, scores = score_together(prompts(), np.arange(PROMPTS), rollout, judge, GrpoConfig())
        except (JudgeError, LostError) as error:
            print(json.dumps({"given up": f"{type(error).__name__}: {error}"}), flush=True)
        else:
            told = [[[score.total, score.asked, score.agreed] for score in group] for group in scores]
            print(json.dumps({"texts": texts, "scores": told}), flush=True)
    hosts.gather("all are done")


if __name__ == "__main__":
    main(*sys.argv[1:])
