"""Rates a reasoning trace against a reference: what a judge is, and the one that works by rules.

The judge of the process reward (paper, section 3.3) sees a trace and one reference: the findings of the image
when the answer was right, the knowledge of the predicted label when it was wrong. `rewards.py` chooses the
reference and turns the rating into a number. `RulesJudge` is the embedded default; it reads claims with
`findings.parse_mentions`, knows no more than that table, and is called `rules` in configs and reports. A
language model behind a server can take its place.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from fundus_jax.findings import (
    FINDINGS,
    Mentions,
    contradictions,
    missing,
    observations,
    parse_mentions,
    unknown,
)
from fundus_jax.records import ConfigError, DataError, Findings, Knowledge, Verdict

# Denies every finding at once. "No other lesion" does not, nor does "no lesion in the macula".
_CLEAN = re.compile(
    r"\bno (?:(?:visible|retinal|obvious|apparent|pathological) ){0,2}"
    r"(?:lesions?|abnormalit(?:y|ies)|findings?) (?:(?:is|are|was|were|can be) )?"
    r"(?:seen|visible|present|found|detected|observed|noted|identified|evident)\b",
    re.IGNORECASE,
)


class JudgeError(ConfigError):
    """There is no judge until the user has changed something; the run saves what it has, and goes on then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One trace to be rated against one reference.

    `about`: the findings that the question asks about, None when it asks about the whole image (a diagnosis).
    Silence about the other findings is then no error; a false claim always is one. It matters only against
    Findings.
    """

    trace: str
    reference: Findings | Knowledge
    modality: str
    about: tuple[str, ...] | None = None

    @property
    def kind(self) -> str:
        """The `reference` that a verdict on this request carries."""
        return "findings" if isinstance(self.reference, Findings) else "knowledge"


class Judge(Protocol):
    """Rates traces, all of a step at once: they do not depend on each other, and a server takes many."""

    def __call__(self, requests: Sequence[Request]) -> list[Verdict]:
        """Returns the verdicts on the requests, in their order.

        Against Findings the rating is plausible, tenuous or flawed; against Knowledge plausible or
        implausible. Where a judge can not decide (no answer in time, a reply that can not be read) it returns
        "abstain" with the reason and does not raise. It raises JudgeError when it will never be able to, and
        LostError when it could not for long and may again.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """What the calls since the last one of these took, by name, for metrics.jsonl."""
        ...


@dataclass(frozen=True, slots=True)
class RulesJudge:
    """Compares the findings that a trace claims with the reference; reasons name every error.

    "No lesion is seen" names findings too: it denies all of them. The label after "the answer is" is no
    claim, because some carry the name of a finding; what else such a sentence says is one.

    Against Findings: no error is plausible, one is tenuous, more are flawed. Each finding counts at most
    once: claimed present but not there, claimed absent but there, claimed both, mentioned although this
    modality can not show it, or left out although asked about. Denying all findings where there are some, or
    while claiming some, is one more error. What nobody looked for is neither there nor absent: to claim or
    to deny it is no error. A trace that names no other finding is flawed, unless none is asked about.

    Against Knowledge: plausible when every required finding (or one that meets it) is claimed present, no
    excluded one is, nothing is claimed both ways and nothing is named that this modality can not show;
    otherwise, or when no finding is named, implausible.
    """

    def __call__(self, requests: Sequence[Request]) -> list[Verdict]:
        """Raises DataError when the knowledge of a request is not for its modality."""
        return [self.rate(request) for request in requests]

    def metrics(self) -> dict[str, float]:
        """Nothing: it is arithmetic."""
        return {}

    def rate(self, request: Request) -> Verdict:
        """The verdict on one request; raises as the call does."""
        trace, reference = observations(request.trace), request.reference
        modality, about = request.modality, request.about
        said, clean = parse_mentions(trace), _CLEAN.search(trace) is not None
        unseen = unknown(modality, reference.searched) if isinstance(reference, Findings) else frozenset()
        claims = said.without(unseen - (said.present & said.absent))
        named = clean or bool(claims.present or claims.absent)
        if isinstance(reference, Knowledge):
            if reference.modality != modality:
                raise DataError(
                    f"knowledge of {reference.label!r} is for {reference.modality}, the image is {modality}: "
                    "pass that of the image's modality"
                )
            errors = _against_knowledge(claims, reference) if named else ["names no finding"]
            if clean and said.present:
                errors.append("all findings are denied, yet some are claimed")
            return Verdict(
                rating="implausible" if errors else "plausible", reference="knowledge", reasons=tuple(errors)
            )
        errors = _against_findings(claims, reference, modality, about)
        if clean and (said.present or reference.present):
            errors.append("all findings are denied")
        silent = not named and (about is None or len(about) > 0)
        if silent:
            errors = ["names no finding", *errors]
        rating = "flawed" if silent or len(errors) > 1 else ("tenuous" if errors else "plausible")
        return Verdict(rating=rating, reference="findings", reasons=tuple(errors))


def _against_findings(
    claims: Mentions, reference: Findings, modality: str, about: Collection[str] | None
) -> list[str]:
    there = frozenset(reference.present)
    asked = there if about is None else frozenset(about)
    errors = []
    for name in sorted(claims.present | claims.absent | asked):
        fault = _conflict(name, claims, there, modality)
        if fault is None and name in asked and name not in claims.present | claims.absent:
            fault = "is not mentioned"
        if fault is not None:
            errors.append(f"{name} {fault}")
    return errors


def _conflict(name: str, claims: Mentions, there: frozenset[str], modality: str) -> str | None:
    """Returns what is wrong with the claim about one finding, or None."""
    if name in claims.present and name in claims.absent:
        return "is claimed both present and absent"
    if name in claims.present and name not in there:
        return f"is claimed present but not there{_foreign(name, modality)}"
    if name in claims.absent and name in there:
        return "is claimed absent but there"
    if name in claims.absent and _foreign(name, modality):
        return f"is mentioned{_foreign(name, modality)}"
    return None


def _against_knowledge(claims: Mentions, reference: Knowledge) -> list[str]:
    errors = [f"{name} is required but not claimed" for name in missing(reference, claims.present)]
    errors += [f"{name} is excluded but claimed" for name in reference.excluded if name in claims.present]
    errors += [
        f"{name} is claimed both present and absent" for name in contradictions(claims.present, claims.absent)
    ]
    named = {*reference.required, *reference.supportive, *reference.excluded}
    for name in sorted((claims.present | claims.absent) - named):
        if foreign := _foreign(name, reference.modality):
            errors.append(f"{name} is mentioned{foreign}")
    return errors


def _foreign(name: str, modality: str) -> str:
    """Returns a remark when images of this modality can not show the finding, else the empty string."""
    return "" if modality in FINDINGS[name].modalities else f", which {modality} does not show"
