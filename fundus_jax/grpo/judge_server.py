"""A language model behind a server as the judge, and the choice between the judges.

It rates what `judge.RulesJudge` rates, by the same definitions, but reads language where the rules read a
table of names. Its instructions are the files of prompts/; `version` is their hash, and metrics.jsonl has it.

The trace is written by the policy, which is rewarded for a good rating and will find whatever earns one. So
the trace is never trusted to stay where it is put: it stands between lines with a number that is drawn for
each call and that it can not know, and loses what a tokenizer would read as a control token, or what shows
no glyph. The answer is one word of an enumeration, which the server's grammar enforces.

Neighbours: `chat` (the client), `rewards.py` (what a rating is worth), `abstentions.py`.
"""

import asyncio
import hashlib
import json
import re
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from string import Template
from typing import Annotated, Any, Literal

import pydantic

from fundus_jax import stop
from fundus_jax.chat import Chat, ChatConfig, ChatError, LostError
from fundus_jax.dialog import harmless
from fundus_jax.findings import ordered, required, unknown
from fundus_jax.grpo.judge import Judge, JudgeError, Request, RulesJudge
from fundus_jax.records import ConfigError, Findings, Verdict

KINDS = ("rules", "server")
GIVES_UP = {"down": LostError, "budget": JudgeError}  # kinds of ChatError that no other trace would escape
GO_ON = "the same command, given again, goes on from here"
LONGEST = 120  # characters of an error, which people read; the verdict does not depend on it
# Cut, not refused: grammars of servers count characters otherwise where text is escaped or not valid.
_Error = Annotated[
    str,
    pydantic.BeforeValidator(lambda said: said[:LONGEST] if isinstance(said, str) else said),
    pydantic.Field(max_length=LONGEST),
]
MOST = 4  # errors that are told; more make no other rating
_NONE = re.compile(
    r"\W*(none|n/?a|nothing|no errors?( (were |was |is )?(found|present|here))?)\W*", re.IGNORECASE
)


def _told_errors(said: Any) -> Any:
    """The errors of an answer without those that say that there is none, and cut as long texts are."""
    if not isinstance(said, list):
        return said
    return [one for one in said if not (isinstance(one, str) and _NONE.fullmatch(one))][:MOST]


_Errors = Annotated[list[_Error], pydantic.BeforeValidator(_told_errors), pydantic.Field(max_length=MOST)]


@dataclass(kw_only=True, slots=True)
class JudgeConfig:
    """Who rates the traces: kind "rules", or "server", a language model at `server`.

    answer_tokens: the longest answer of the model; one that is longer is an abstention.
    """

    kind: str = "rules"
    server: ChatConfig = field(default_factory=ChatConfig)
    answer_tokens: int = 512

    def validate(self) -> None:
        """Raises ConfigError that names the field, its value and what is allowed."""
        if self.kind not in KINDS:
            raise ConfigError(f"judge.kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if self.answer_tokens < 1:
            raise ConfigError(f"judge.answer_tokens is {self.answer_tokens}; it must be at least 1")
        if self.kind == "server":
            self.server.validate("judge.server")
        elif (self.server, self.answer_tokens) != (ChatConfig(), type(self)().answer_tokens):
            raise ConfigError(
                f"judge.kind is {self.kind!r}, which asks no server, but judge.server or judge.answer_tokens "
                "is set; set judge.kind to server, or leave them"
            )


def make_judge(config: JudgeConfig) -> Judge:
    """The judge of `config`. Raises ConfigError for a server's address or key that can not be used."""
    return RulesJudge() if config.kind == "rules" else ServerJudge(config)


class FindingsRating(pydantic.BaseModel):
    """What the model answers about a trace and the findings of the image."""

    model_config = pydantic.ConfigDict(extra="forbid")
    errors: _Errors
    rating: Literal["plausible", "tenuous", "flawed"]


class KnowledgeRating(pydantic.BaseModel):
    """What the model answers about a trace and the knowledge of a label."""

    model_config = pydantic.ConfigDict(extra="forbid")
    errors: _Errors
    rating: Literal["plausible", "implausible"]


SCHEMAS: dict[str, type[FindingsRating] | type[KnowledgeRating]] = {
    "findings": FindingsRating,
    "knowledge": KnowledgeRating,
}


class ServerJudge:
    """The judge at `config.server`; the calls of one step are made at the same time.

    On several processes each has its own, with its own bounds.

    Attributes:
        version: sha256 of prompts and schemas, as hexadecimal digits.

    Raises ConfigError for an address or key that can not be used.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self.config, self.chat = config, Chat(config.server, "judge.server")
        folder = resources.files("fundus_jax.grpo") / "prompts"
        self.prompts = {
            name: (folder / f"{name}.txt").read_text(encoding="utf-8") for name in (*SCHEMAS, "trace")
        }
        schemas = {kind: schema.model_json_schema() for kind, schema in SCHEMAS.items()}
        told = json.dumps([self.prompts, schemas], sort_keys=True)
        self.version = hashlib.sha256(told.encode()).hexdigest()
        self._reported: Counter[str] = Counter()

    def __call__(self, requests: Sequence[Request]) -> list[Verdict]:
        """Returns the verdicts; a call that fails is an abstention with the reason.

        Raises LostError when the server was away for longer than `patience`, JudgeError when the budget is
        spent and for what only the user can mend, such as a wrong key.
        """
        return stop.run(self._rate_all(requests))

    def metrics(self) -> dict[str, float]:
        """Requests, retries and tokens of this process since the last call; and the version of the prompts,
        as the number that the first six hexadecimal digits of its hash write."""
        new = self.chat.counts - self._reported
        self._reported = Counter(self.chat.counts)
        names = ("requests", "retries", "prompt_tokens", "answer_tokens")
        told = {f"judge/{name}": float(new[name]) for name in names}
        return told | {"judge/version": float(int(self.version[:6], 16))}

    def messages(self, request: Request) -> list[dict[str, Any]]:
        """The conversation that asks for the rating of one trace."""
        trace = harmless(request.trace)
        while (nonce := secrets.token_hex(8)) in trace:
            pass
        text = Template(self.prompts["trace"]).substitute(
            nonce=nonce, modality=request.modality, reference=_told(request), trace=trace
        )
        rules = self.prompts[request.kind].strip()
        return [{"role": "system", "content": rules}, {"role": "user", "content": text.strip()}]

    async def _rate_all(self, requests: Sequence[Request]) -> list[Verdict]:
        async with self.chat:
            return list(await asyncio.gather(*map(self._rate, requests)))

    async def _rate(self, request: Request) -> Verdict:
        schema, bound = SCHEMAS[request.kind], self.config.answer_tokens
        try:
            [answer] = await self.chat.ask(self.messages(request), schema, max_tokens=bound)
        except ChatError as error:
            if error.kind in GIVES_UP:
                raise GIVES_UP[error.kind](f"{error}; no trace can be rated, and {GO_ON}") from None
            answer = error
        except ConfigError as error:
            raise JudgeError(f"{error}; then {GO_ON}") from None
        if isinstance(answer, ChatError):
            return Verdict(rating="abstain", reference=request.kind, reasons=(str(answer),))
        reasons = tuple(" ".join(harmless(one).split()) for one in answer.errors)
        return Verdict(rating=answer.rating, reference=request.kind, reasons=reasons)


def _told(request: Request) -> str:
    """The reference in words."""
    reference = request.reference
    if isinstance(reference, Findings):
        unseen = unknown(request.modality, reference.searched)
        lines = [f"Findings in the image: {_listed(reference.present)}."]
        lines += [f"Nobody looked for: {_listed(ordered(unseen))}."] if unseen else []
        if request.about is None:
            lines += ["The trace has to speak of every finding in the image."]
        else:
            lines += [f"The trace has to speak of: {_listed(request.about)}."]
    else:
        lines = [
            f"Diagnosis: {harmless(reference.label)}",
            f"Required findings: {_listed(required(reference))}.",
            f"Findings that support it: {_listed(reference.supportive)}.",
            f"Findings that exclude it: {_listed(reference.excluded)}.",
            f"What is known: {' '.join(harmless(reference.text).split())}",
        ]
    return "\n".join(lines)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
