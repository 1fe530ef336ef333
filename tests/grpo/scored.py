"""An example with findings and knowledge, a judge that remembers, and the score of a reply to it."""

from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.judge import RulesJudge
from fundus_jax.grpo.rewards import (
    assess,
    score_rollouts,
)
from fundus_jax.records import Example, Findings, Knowledge, Verdict

CONFIG = GrpoConfig()
TRACE = "The image shows microaneurysms and haemorrhages."


def make_example(**changes):
    fields = {
        "id": "e1",
        "dataset": "phantom",
        "split": "train",
        "patient": "p1",
        "eye": "OD",
        "modality": "CFP",
        "image": "images.array_record#0",
        "labels": ("Moderate NPDR",),
        "task": "disease",
        "question": "Which disease does the image show?",
        "options": ("Moderate NPDR", "Mild NPDR", "AMD", "Severe NPDR"),
        "answer": "Moderate NPDR",
        "findings": ("haemorrhage", "microaneurysm"),
        "boxes": (),
    }
    return Example(**fields | changes)


def make_knowledge(label, required, excluded=(), modality="CFP"):
    return Knowledge(
        label=label,
        modality=modality,
        text="text",
        required=required,
        supportive=(),
        excluded=excluded,
        passages=(),
    )


EXAMPLE = make_example()
FINDINGS = Findings(example="e1", present=("haemorrhage", "microaneurysm"), votes={}, n=0, origin="pixels")
ENTRIES = (
    make_knowledge("Moderate NPDR", ("haemorrhage", "microaneurysm")),
    make_knowledge("Mild NPDR", ("microaneurysm",), ("haemorrhage",)),
    make_knowledge("AMD", ("drusen",)),
    make_knowledge("Drusen", ("drusen",), modality="OCT"),
)
KNOWLEDGE = {(entry.label, entry.modality): entry for entry in ENTRIES}


class SpyJudge:
    """Returns one verdict and remembers what it was asked; refuses to be asked when it has none."""

    def __init__(self, rating=None):
        self.rating, self.calls = rating, []

    def __call__(self, requests):
        assert self.rating is not None, "the judge must not be asked here"
        self.calls += [(one.trace, one.reference, one.modality, one.about) for one in requests]
        return [Verdict(rating=self.rating, reference=one.kind, reasons=("because",)) for one in requests]


def score(text, *, example=EXAMPLE, findings=FINDINGS, judge=None, config=CONFIG, finished=True):
    found = assess(text, example, findings, KNOWLEDGE, config, finished=finished)
    return score_rollouts([found], judge or RulesJudge(), config)[0]


def parts(result):
    return (result.answer, result.format, result.process, result.total)
