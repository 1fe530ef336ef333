"""A job that asks a server about each of its items, for the tests to kill, fill its disk, or vex its server.

python -m tests.data_pipeline.asked_job OUT ADDRESS [i/n]
"""

import sys
from pathlib import Path
from typing import Any

import pydantic

from data_pipeline import asking, jobs
from fundus_jax.chat import Chat, ChatConfig
from fundus_jax.records import Findings

SHARDS, ITEMS, CONCURRENCY = 10, 20, 8


class Answer(pydantic.BaseModel):
    """What the server is asked for."""

    model_config = pydantic.ConfigDict(extra="forbid")
    count: int


async def ask(chat: Chat, item: int) -> Findings:
    """Two requests about an item, the second of which says what the first one answered."""
    count = 0
    for turn in ("first", "second"):
        [answer] = await chat.ask([{"role": "user", "content": f"{item} {turn} {count}"}], Answer)
        if not isinstance(answer, Answer):
            raise answer
        count = answer.count
    return Findings(example=f"item {item}", present=(), votes={"drusen": count % 6}, n=5, origin="votes")


def shards(number: int = SHARDS, items: int = ITEMS) -> list[jobs.ShardInput]:
    """Items 0, 1, 2, ... in shards."""
    return [jobs.ShardInput(f"s{n:03d}", f"{n}", range(n * items, (n + 1) * items)) for n in range(number)]


def run(
    out: Path, address: str, *, inputs: Any = None, limit: float = 1.0, shard: str = "0/1", **chat: Any
) -> jobs.Summary:
    """The whole job."""
    fields = {"model": "m", "concurrency": CONCURRENCY, "timeout": 5.0, "deadline": 60.0, **chat}
    through = asking.through(ask, ChatConfig(address=address, **fields), "toy.server", name=str)
    job = jobs.Job("asked", {})
    inputs = shards() if inputs is None else inputs
    return jobs.run(job, inputs, asking.as_answered, out, limit=limit, shard=shard, through=through)


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], shard=sys.argv[3] if len(sys.argv) > 3 else "0/1")
