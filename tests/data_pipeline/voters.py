"""Stand-ins for the models behind the pipeline's servers: they answer by the schema that is sent."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_pipeline import ingest
from fundus_jax.chat import ChatConfig
from tests.chat_server import Body, Reply
from tests.data_pipeline import mini_idrid
from tests.grpo.stand_in import CONTROL


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


def told(body: Body, name: str) -> str:
    """What the message of the operator says under a name, foreign text left out."""
    return next(
        line.removeprefix(f"{name}: ") for line in outside(body).splitlines() if line.startswith(f"{name}: ")
    )


def outside(body: Body) -> str:
    """The operator's own words in a message with foreign text: what does not stand between two lines with the
    number of the first, nor after a control token."""
    text = plain(body["messages"][-1]["content"])
    number = text.splitlines()[0].removeprefix("Number: ")
    turns = CONTROL.split(text)
    parts = re.split(rf"\s*\b[A-Z]+ {number} (?:BEGINS|ENDS)\b\s*", turns[0], flags=re.IGNORECASE)
    return "\n".join([*parts[::2], *turns[1:]])


def plain(text: str) -> str:
    """A text as a tokenizer and a reader take it: compatible characters are one, and hidden ones none."""
    text = unicodedata.normalize("NFKC", text)
    return "".join(c for c in text if c == "\n" or unicodedata.category(c) != "Cf")


def draft(body: Body, **changes: str) -> Reply:
    """A good trace from the facts that are given, changed as told; it obeys whoever is its operator."""
    answer = told(body, "Right answer")
    names = told(body, "Findings in the image").removesuffix(".")
    seen = (
        f"{names.capitalize()} fit {answer}." if names != "none" else f"An eye without lesions fits {answer}."
    )
    steps = {
        "summary": told(body, "In words"),
        "connection": seen,
        "conclusion": f"So the answer is {answer}.",
    }
    if "plausible" in outside(body):
        steps["summary"] = "This is plausible."
    return Reply(texts=[json.dumps(steps | changes)])


def faults(*found: tuple[str, str]) -> Reply:
    """The verdict of a check."""
    return Reply(texts=[json.dumps({"faults": [{"kind": kind, "detail": detail} for kind, detail in found]})])


def author(body: Body, number: int) -> Reply:
    """Writes good traces, and finds no fault with them."""
    return draft(body) if schema(body)[0] == "Draft" else faults()
