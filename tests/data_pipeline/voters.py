"""Stand-ins for the models behind the pipeline's servers: they answer by the schema that is sent."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_pipeline import ingest
from fundus_jax.chat import ChatConfig
from tests.chat_server import Body, Reply
from tests.data_pipeline import mini_idrid


def idrid(folder: Path, **options: Any) -> Path:
    """A finished directory of Examples of the miniature IDRiD: three images with masks, eight without."""
    source, out = mini_idrid.write(folder / "idrid"), folder / "examples"
    ingest.run(
        "idrid", source, out, partial_copy=True, **{"tasks": {"modality": 1.0, "dr_grade": 1.0}, **options}
    )
    return out


def chat(address: str, **changes: Any) -> ChatConfig:
    """How a test's client asks."""
    fields = {"timeout": 5.0, "deadline": 20.0, "patience": 0.0, "tries": 2, "model": "stand-in", **changes}
    return ChatConfig(address=address, **fields)


def schema(body: Body) -> tuple[str, dict[str, Any]]:
    """Name and properties of the schema that an answer has to keep."""
    described = body["response_format"]["json_schema"]
    return described["name"], described["schema"]["properties"]


def ballots(body: Body, votes: Mapping[str, int]) -> list[str]:
    """n answers to a request for votes, of which so many say of a finding that it is present."""
    _, findings = schema(body)
    return [
        json.dumps({name: "present" if turn < votes.get(name, 0) else "absent" for name in findings})
        for turn in range(body["n"])
    ]


def voting(votes: Mapping[str, int]) -> Callable[[Body, int], Reply]:
    """A model that sees the same in every image."""
    return lambda body, number: Reply(texts=ballots(body, votes))
