"""Findings by vote: a vision-language model behind a server is asked several times what an image shows.

Paper, section 3.2.2: one prompt asks of every finding of a vocabulary whether it is present, five answers are
drawn, and a finding is held to be present with more than two votes. The five are drawn in one request, so the
image is sent and encoded once, for all questions about it. Answers are JSON by a schema that has the findings
as its fields: what the modality can not show can not be voted for.

The vocabulary is that of the knowledge in play: all findings that the labels of a modality require, are
supported or excluded by. The paper asks for those of the image's own label and task; here the label stays out
of the question, so that it can not suggest the answer. Beside masks, the model is asked for what they are not
about: masks of four lesions say nothing of new vessels. Neighbours: `findings.py` is the job, `agreement.py`
compares with masks; docs/data.md says what is recorded.
"""

import asyncio
import functools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pydantic

from data_pipeline import asking, instructions, jobs, pictures, stages
from data_pipeline.pixels import PixelSource, from_masks
from data_pipeline.questions import MODALITIES
from fundus_jax import findings
from fundus_jax.chat import Chat, ChatConfig, ChatError, picture
from fundus_jax.records import ConfigError, DataError, Example, Findings, Knowledge

WHERE = "votes.server"  # what errors call the server
Vocabulary = Mapping[str, tuple[str, ...]]  # by modality


@dataclass(kw_only=True, slots=True)
class VotesConfig:
    """How images are voted on.

    n: answers that count; a finding is present with more than half of them. temperature, seed: how they are
    drawn. retries: further requests about an image, each for the answers that are still missing; where they
    do not suffice, the image is quarantined. answer_tokens: the longest answer.
    """

    n: int = 5
    temperature: float = 1.0
    seed: int = 0
    retries: int = 2
    answer_tokens: int = 512
    server: ChatConfig = field(default_factory=ChatConfig)

    def validate(self) -> None:
        """Raises ConfigError that names the field, its value and what is allowed."""
        for name, least in (("n", 1), ("temperature", 0), ("retries", 0), ("answer_tokens", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"votes.{name} is {getattr(self, name)}; it must be at least {least}")
        self.server.validate(WHERE)


@dataclass(frozen=True)
class Image:
    """A picture and the Examples that ask about it; it goes by the id of the first of them."""

    examples: tuple[Example, ...]
    picture: pictures.Picture

    @property
    def id(self) -> str:
        return self.examples[0].id


@dataclass(frozen=True)
class Outcome:
    """The records of an image's Examples, and a line for each request that was made for them."""

    records: tuple[Findings | jobs.Quarantine, ...]
    tries: tuple[dict[str, Any], ...] = ()


class VoteSource:
    """The findings that a model sees in images.

    Args:
        config: how it is asked.
        vocabulary: the findings that it is asked for, by modality.
        masks: where they exist they are used directly, and the model is asked for the findings that they are
            not about.
        only_masked: images without masks are left out, as for measuring the model against them.

    Raises ConfigError for a setting that does not make sense.
    """

    name = "votes"

    def __init__(
        self,
        config: VotesConfig,
        vocabulary: Vocabulary,
        *,
        masks: PixelSource | None = None,
        only_masked: bool = False,
    ) -> None:
        config.validate()
        self.settings, self.vocabulary = config, {name: tuple(words) for name, words in vocabulary.items()}
        self.masks, self.only_masked = masks, only_masked
        self.prompts = instructions.load("votes")

    @property
    def ways(self) -> list[dict]:
        asked = self.settings
        mine = {
            "name": self.name,
            "version": 2,  # of the records that the same votes give
            "model": asked.server.model,
            "prompts": instructions.version(self.prompts, map(ballot, self.vocabulary.values())),
            "vocabulary": {name: list(words) for name, words in self.vocabulary.items()},
            **{
                name: getattr(asked, name)
                for name in ("n", "temperature", "seed", "retries", "answer_tokens")
            },
        }
        only = {"only_masked": True} if self.only_masked else {}
        return [*(self.masks.ways if self.masks else []), mine | only]

    @property
    def through(self) -> jobs.Through:
        return asking.through(self.ask, self.settings.server, WHERE)

    def inputs(self, examples: Path) -> list[jobs.ShardInput]:
        """One item an image; a shard's key hashes its images too."""
        return [
            replace(one, items=functools.partial(_images, examples, one.name, self.only_masked))
            for one in stages.shards(examples, Example, side_files=True)
        ]

    def find(self, items: Iterable[Outcome], side: Path) -> Iterator[Findings | jobs.Quarantine]:
        """The records; what was asked for them goes to `side`.votes.jsonl."""
        with Path(f"{side}.votes.jsonl").open("w", encoding="utf-8") as log:
            for outcome in items:
                log.writelines(json.dumps(line, sort_keys=True) + "\n" for line in outcome.tries)
                yield from outcome.records

    async def ask(self, chat: Chat, image: Image) -> Outcome | jobs.Quarantine:
        """The votes on one image. Raises ChatError where there are fewer than n of them in the end."""
        first = image.examples[0]
        masked = [one for one in map(from_masks, image.examples) if one] if self.masks else []
        seen = [one for one in masked if isinstance(one, Findings)]
        words = self.vocabulary[first.modality]
        if masked:
            left = findings.unknown(first.modality, first.searched)
            words = tuple(name for name in words if name in left)
        if masked and (not words or not seen):
            return Outcome(tuple(masked))
        try:
            data = await asyncio.to_thread(image.picture.read)
        except DataError as error:
            return jobs.Quarantine(image.id, str(error))
        assert isinstance(data, bytes)  # noqa: S101 - a record of an ArrayRecord file
        messages = self.messages(data, first.modality, words)
        counted, tries = await self._collect(chat, image.id, messages, ballot(words))
        votes = dict.fromkeys(words, 0)
        for answer in counted:
            for name, said in answer.model_dump(by_alias=True).items():
                votes[name] += said == "present"
        voted = Findings(
            example=image.id,
            present=tuple(sorted(name for name in votes if 2 * votes[name] > len(counted))),
            votes=votes,
            n=len(counted),
            origin="votes",
            searched=tuple(sorted(votes)),
        )
        if seen:
            return Outcome(tuple(merged(one, voted) for one in seen), tuple(tries))
        return Outcome(tuple(replace(voted, example=one.id) for one in image.examples), tuple(tries))

    async def _collect(
        self, chat: Chat, name: str, messages: list[dict[str, Any]], schema: type[pydantic.BaseModel]
    ) -> tuple[list[pydantic.BaseModel], list[dict[str, Any]]]:
        """n answers that count, with as few further requests as that takes, and a line for each request."""
        asked = self.settings
        counted: list[pydantic.BaseModel] = []
        failed: list[ChatError] = []
        tries: list[dict[str, Any]] = []
        for attempt in range(1 + asked.retries):
            missing, seed = asked.n - len(counted), instructions.seed(asked.seed, name, attempt)
            try:
                answers: Sequence[Any] = await chat.ask(
                    messages,
                    schema,
                    n=missing,
                    max_tokens=asked.answer_tokens,
                    temperature=asked.temperature,
                    seed=seed,
                )
            except ChatError as error:
                if error.kind not in instructions.ANOTHER:
                    raise
                answers = [error] * missing
            failed = [one for one in answers if isinstance(one, ChatError)]
            counted += [one for one in answers if not isinstance(one, ChatError)]
            kinds = dict(sorted(Counter(one.kind for one in failed).items()))
            tries.append({"image": name, "seed": seed, "asked": missing, "failed": kinds})
            if not failed:
                return counted, tries
        told = (
            f"{len(counted)} of {asked.n} answers count after {len(tries)} requests; the last: {failed[-1]}"
        )
        raise ChatError(failed[-1].kind, told)

    def messages(self, image: bytes, modality: str, words: Sequence[str]) -> list[dict[str, Any]]:
        """The conversation that asks for some findings in an image: PNG or JPEG bytes."""
        kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
        told = {"modality": MODALITIES[modality].lower(), "findings": ", ".join(words)}
        text = {"type": "text", "text": instructions.fill(self.prompts["votes"], **told)}
        return [{"role": "user", "content": [picture(image, kind), text]}]


def merged(masks: Findings, voted: Findings) -> Findings:
    """What masks and votes on the findings that they are not about say together."""
    return replace(
        voted,
        example=masks.example,
        present=tuple(sorted({*masks.present, *voted.present})),
        origin="both",
        searched=tuple(sorted({*(masks.searched or ()), *(voted.searched or ())})),
    )


@functools.cache
def ballot(vocabulary: tuple[str, ...]) -> type[pydantic.BaseModel]:
    """The schema of one answer: each finding of the vocabulary, by its name, is "present" or "absent"."""
    said = Literal["present", "absent"]
    fields: dict[str, Any] = {
        f"finding_{number}": (said, pydantic.Field(alias=name)) for number, name in enumerate(vocabulary)
    }
    return pydantic.create_model("Ballot", __config__=pydantic.ConfigDict(extra="forbid"), **fields)


def vocabulary(known: Iterable[Knowledge] = ()) -> dict[str, tuple[str, ...]]:
    """The findings to ask for, by modality, in the fixed order: those that `known` names and the modality can
    show; where it names none, the core of the table."""
    named: dict[str, set[str]] = {modality: set() for modality in MODALITIES}
    for one in known:
        named[one.modality].update(one.required, one.supportive, one.excluded)
    return {
        modality: tuple(name for name in findings.vocabulary(modality, extended=True) if name in words)
        or findings.vocabulary(modality)
        for modality, words in named.items()
    }


def _images(examples: Path, shard: str, only_masked: bool) -> list[Image]:
    """The images of a shard, in the order of their first Examples."""
    groups: dict[str, list[Example]] = {}
    for one in stages.load(examples, shard, Example):
        if one.findings is not None or not only_masked:
            groups.setdefault(one.image, []).append(one)
    return [Image(tuple(group), pictures.of(examples, group[0])) for group in groups.values()]
