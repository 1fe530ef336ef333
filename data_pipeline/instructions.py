"""What language models are told by the pipeline, and how the text of others stands in it.

The files of prompts/ are `string.Template`s. The hash of those that a job uses goes into its config, so that
shards made with another wording are another job's.

Whatever is drawn here follows from a hash of what it is for: the same records and settings make the same
requests, on any machine and after any crash. That holds for the number on the lines that fence foreign text
too. Whoever wrote the text can not know it, because the text itself is hashed. Neighbours: `votes.py` and
`trace_server.py` ask, `asking.py` runs many of them at a time.
"""

import hashlib
import json
from collections.abc import Iterable
from importlib import resources
from string import Template

import pydantic

from data_pipeline import files

# What is wrong with an answer that another one, drawn with another seed, may escape (kinds of ChatError).
ANOTHER = ("refused", "filtered", "truncated", "malformed")


def load(*names: str) -> dict[str, str]:
    """The prompts of these names, without white space around them."""
    folder = resources.files("data_pipeline") / "prompts"
    return {name: (folder / f"{name}.txt").read_text(encoding="utf-8").strip() for name in names}


def version(prompts: dict[str, str], schemas: Iterable[type[pydantic.BaseModel]]) -> str:
    """Hex SHA-256 of what a model is told: prompts, and the schemas of its answers."""
    return files.digest([prompts, [schema.model_json_schema() for schema in schemas]])


def fill(template: str, **values: str) -> str:
    """A prompt with its $names replaced."""
    return Template(template).substitute(values)


def seed(*of: str | int) -> int:
    """A seed for a server's sampler, from 0 to 2**31 - 1, that depends on `of` only."""
    return int(files.digest(list(of))[:8], 16) >> 1


def nonce(*texts: str) -> str:
    """A number of 16 hexadecimal digits that stands in none of `texts`, and depends on them only."""
    count = 0
    while True:
        number = hashlib.sha256(json.dumps([count, *texts]).encode()).hexdigest()[:16]
        if not any(number in text for text in texts):
            return number
        count += 1
