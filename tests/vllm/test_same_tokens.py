"""vLLM, given what our export wrote, says what our own sampler says: the same greedy tokens."""

from __future__ import annotations

import io
import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fundus_jax import dialog
from fundus_jax.chat import picture
from fundus_jax.grpo.rollout import generate
from fundus_jax.models import load_pretrained
from launch.stages import Trainer
from tests.vllm.conftest import NAME, Vllm

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

PROMPTS, TOKENS = 20, 16
CLOSE = 2e-3  # between log-probabilities in float32 of two implementations; a tie is nearer than this


def ask(server: Vllm, body: dict[str, Any]) -> dict[str, Any]:
    """One greedy request, with token ids and log-probabilities of the two likeliest."""
    more = {"model": NAME, "temperature": 0, "max_tokens": TOKENS, "logprobs": True, "top_logprobs": 2}
    more |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
    data, kind = json.dumps(body | more).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.address}/chat/completions", data, kind)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def served(messages: list[dict[str, Any]], image: Any) -> list[dict[str, Any]]:
    """Our conversation in OpenAI's form: the image as a data URL."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    shown = picture(file.getvalue())
    return [
        {
            "role": turn["role"],
            "content": [shown if part["type"] == "image" else part for part in turn["content"]]
            if isinstance(turn["content"], list)
            else turn["content"],
        }
        for turn in messages
    ]


def first_difference(mine: list[int], choice: dict[str, Any]) -> int:
    """How many tokens of ours and of the server's choice are alike before one differs, or one text ends."""
    theirs = choice["token_ids"]
    pairs = enumerate(zip(mine, theirs, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(mine), len(theirs)))


def assert_tie(mine: list[int], choice: dict[str, Any]) -> None:
    """The first token of ours that is not the server's was a tie in the numbers of the server."""
    alike = first_difference(mine, choice)
    assert alike < min(len(mine), len(choice["token_ids"])), (mine, choice["token_ids"])
    first, second = choice["logprobs"]["content"][alike]["top_logprobs"]
    assert abs(first["logprob"] - second["logprob"]) < CLOSE, (alike, mine, choice["token_ids"])
    assert f"token_id:{mine[alike]}" in (first["token"], second["token"])


def test_a_difference_is_no_tie_unless_the_numbers_say_so() -> None:
    def choice(gap: float) -> dict[str, Any]:
        top = [{"token": "token_id:5", "logprob": -0.5}, {"token": "token_id:6", "logprob": -0.5 - gap}]
        content = [{"logprob": -0.1, "top_logprobs": top}] * 3
        return {"token_ids": [4, 5, 9], "logprobs": {"content": content}}

    assert_tie([4, 6, 8], choice(CLOSE / 2))
    for mine, gap in (([4, 6, 8], 2 * CLOSE), ([4, 7, 8], CLOSE / 2), ([4, 5], CLOSE / 2)):
        with pytest.raises(AssertionError):
            assert_tie(mine, choice(gap))


def test_greedy_tokens_are_the_same(vllm: Vllm, exported: Path, trainer: Trainer) -> None:
    model, processor = load_pretrained(exported, "float32")
    prompt = trainer.config.prompt
    by_image = {example.image: example for example in trainer.pool.examples}  # a picture each
    examples = list(by_image.values())[:PROMPTS]
    assert len(examples) == PROMPTS
    asked = [dialog.messages(one, prompt.style, prompt.think, instruct=prompt.instruct) for one in examples]
    images = [trainer.pool.image(one) for one in examples]
    texts = [processor.chat(messages, add_generation_prompt=True) for messages in asked]
    batch = processor(texts, [[image] for image in images])
    ours = generate(model, batch, max_new_tokens=TOKENS, temperature=0.0, group_size=1, seed=0)
    banned = {str(token): -100.0 for token in model.config.banned_ids}

    same, gaps, said = 0, [], set()
    for row in range(PROMPTS):
        answer = ask(vllm, {"messages": served(asked[row], images[row]), "logit_bias": banned})
        [choice] = answer["choices"]
        prompt_ids = np.asarray(batch.tokens)[row][np.asarray(batch.mask)[row]].tolist()
        assert answer["prompt_token_ids"] == prompt_ids, "template, tokenizer, or image placeholders"
        mask = np.asarray(ours.mask)[row, 0]
        mine = np.asarray(ours.tokens)[row, 0][mask].tolist()
        logprobs = np.asarray(ours.logprobs)[row, 0][mask]
        theirs, told = choice["token_ids"], choice["logprobs"]["content"]
        said.add(tuple(mine))
        gaps += [abs(told[i]["logprob"] - logprobs[i]) for i in range(first_difference(mine, choice))]
        if mine == theirs:
            same += 1
        else:
            assert_tie(mine, choice)
    print(f"{same} of {PROMPTS} the same; largest difference of a log-probability {max(gaps):.1e}")
    assert max(gaps) < CLOSE
    assert same >= PROMPTS - 2, "ties are rare"
    assert len(said) > PROMPTS / 2, "the answers depend on the images, or this would prove little"
