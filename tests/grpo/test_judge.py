"""The rule judge: hand-made traces against findings and against knowledge, and what holds for any trace."""

import importlib
import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.datasets import registry
from data_pipeline.datasets.phantom.rules import LABELS
from data_pipeline.knowledge.note import shipped_notes
from data_pipeline.writer import RuleWriter
from fundus_jax.findings import FINDINGS, Mentions, observations, parse_mentions, proofs, vocabulary
from fundus_jax.grpo.judge import Request, RulesJudge
from fundus_jax.records import Box, DataError, Example, Findings, Knowledge


def JUDGE(trace, reference, modality, about=None):  # noqa: N802
    return RulesJudge()([Request(trace=trace, reference=reference, modality=modality, about=about)])[0]


def findings(*present):
    return Findings(example="e1", present=tuple(sorted(present)), votes={}, n=0, origin="pixels")


def knowledge(required=(), supportive=(), excluded=(), modality="CFP"):
    return Knowledge(
        label="Moderate NPDR",
        modality=modality,
        text="text",
        required=tuple(required),
        supportive=tuple(supportive),
        excluded=tuple(excluded),
        passages=(),
    )


BLEEDING = findings("microaneurysm", "haemorrhage")


@pytest.mark.parametrize(
    ("trace", "rating"),
    [
        ("Haemorrhages and neovascularisation are seen.", "plausible"),
        ("Haemorrhages without neovascularisation or irma are seen.", "plausible"),
        ("Haemorrhages and hard exudates are seen.", "tenuous"),
        ("Haemorrhages are seen without subretinal fluid.", "tenuous"),  # no photograph can show it
        ("Haemorrhages and irma are seen. No irma is seen.", "tenuous"),
        ("No lesion is seen. There is neovascularisation.", "flawed"),
        ("Neovascularisation is seen.", "flawed"),  # of what is known, it names nothing
    ],
)
def test_what_nobody_looked_for_speaks_neither_for_a_trace_nor_against_it(trace, rating):
    some = replace(findings("haemorrhage"), searched=("haemorrhage", "hard exudate"))
    assert JUDGE(trace, some, "CFP").rating == rating


@pytest.mark.parametrize(
    ("trace", "rating", "reasons"),
    [
        ("The image shows microaneurysms and haemorrhages. No drusen are seen.", "plausible", ()),
        ("Several MAs. Dot-blot hemorrhages are visible.", "plausible", ()),
        ("The image shows microaneurysms.", "tenuous", ("haemorrhage is not mentioned",)),
        (
            "The image shows microaneurysms, haemorrhages and drusen.",
            "tenuous",
            ("drusen is claimed present but not there",),
        ),
        (
            "The image shows microaneurysms. No haemorrhages are seen.",
            "tenuous",
            ("haemorrhage is claimed absent but there",),
        ),
        (
            "The image shows microaneurysms and haemorrhages. No haemorrhages are seen.",
            "tenuous",
            ("haemorrhage is claimed both present and absent",),
        ),
        (
            "The image shows microaneurysms, haemorrhages and subretinal fluid.",
            "tenuous",
            ("subretinal fluid is claimed present but not there, which CFP does not show",),
        ),
        (
            "The image shows microaneurysms and haemorrhages. No subretinal fluid is seen.",
            "tenuous",
            ("subretinal fluid is mentioned, which CFP does not show",),
        ),
        (
            "The image shows drusen. No haemorrhages are seen.",
            "flawed",
            (
                "drusen is claimed present but not there",
                "haemorrhage is claimed absent but there",
                "microaneurysm is not mentioned",
            ),
        ),
        (
            "Drusen are seen. Drusen are not seen. Microaneurysms and haemorrhages. "
            "Hard exudates. No hard exudates.",
            "flawed",
            ("drusen is claimed both present and absent", "hard exudate is claimed both present and absent"),
        ),
    ],
)
def test_traces_against_findings(trace, rating, reasons):
    verdict = JUDGE(trace, BLEEDING, "CFP")
    assert (verdict.rating, verdict.reference) == (rating, "findings")
    assert verdict.reasons == reasons


@pytest.mark.parametrize("trace", ["", "   ", "The answer must be this one.", "The optic disc is pink."])
@pytest.mark.parametrize("reference", [findings(), findings("haemorrhage"), BLEEDING])
def test_a_trace_that_names_no_finding_is_flawed(trace, reference):
    verdict = JUDGE(trace, reference, "CFP")
    assert verdict.rating == "flawed"
    assert "names no finding" in verdict.reasons


def test_a_healthy_eye():
    assert JUDGE("No haemorrhages and no drusen are seen.", findings(), "CFP").rating == "plausible"
    assert JUDGE("The image shows drusen.", findings(), "CFP").rating == "tenuous"


@pytest.mark.parametrize(
    ("trace", "present", "rating"),
    [
        ("No lesion is seen. A retina without lesions fits a normal eye.", (), "plausible"),
        ("No retinal abnormalities are visible.", (), "plausible"),
        ("No lesion is seen.", ("haemorrhage",), "flawed"),  # denied, and left out
        ("No lesion is seen. The image shows drusen.", (), "flawed"),  # false, and against itself
        ("The image shows drusen. No lesion is seen.", ("drusen",), "tenuous"),
        ("The image shows drusen. No other lesion is seen.", ("drusen",), "plausible"),
        ("The image shows drusen. No lesion in the macula is seen.", ("drusen",), "plausible"),
    ],
)
def test_denying_all_findings_at_once(trace, present, rating):
    assert JUDGE(trace, findings(*present), "CFP").rating == rating


def test_denying_all_findings_against_knowledge():
    normal = knowledge(excluded=["drusen", "haemorrhage"])
    assert JUDGE("No lesion is seen.", normal, "CFP").rating == "plausible"
    assert JUDGE("No lesion is seen. The image shows a large cup.", normal, "CFP").rating == "implausible"
    assert JUDGE("No lesion is seen.", MODERATE, "CFP").rating == "implausible"


def test_the_answer_is_no_observation():
    """Drusen is a label as well as a finding: naming the answer must not pass for having seen it."""
    drusen = knowledge(["drusen"], modality="OCT")
    seen = "The image shows drusen. So the answer is Drusen."
    for said, good in (
        ("So the answer is Drusen.", False),
        ("The diagnosis must be drusen", False),
        (seen, True),
    ):
        assert (JUDGE(said, drusen, "OCT").rating == "plausible") is good
        assert (JUDGE(said, findings("drusen"), "OCT").rating == "plausible") is good
    denied = "No lesion is seen. So the answer is Drusen."
    assert JUDGE(denied, findings(), "OCT").rating == "plausible"  # what it says of the image is true


@pytest.mark.parametrize("conclusion", ["The diagnosis is", "So the answer must be", "label should be:"])
@pytest.mark.parametrize(
    "hidden",
    [
        *("with {}", "and {}", "or {}", "because {} are seen", "since there are {}", "given {}", "due to {}"),
        *(", {}", ", as {} show", "; {}", ": {}", "({})", "- {}", "– {}", "/ {}", "that shows {}"),
        *("and the image shows {}", "in view of {}", "a b c d e f g {}"),
    ],
)
def test_nothing_hides_behind_a_conclusion(conclusion, hidden):
    """Neither what the label excludes, nor the evidence for it."""
    said = f"{conclusion} PDR {hidden.format('haemorrhages')}."
    seen = "The image shows microaneurysms."
    assert JUDGE(f"{seen} {said}", knowledge(["microaneurysm"], (), ["haemorrhage"]), "CFP").reasons == (
        "haemorrhage is excluded but claimed",
    )
    assert JUDGE(f"{seen} {said}", MODERATE, "CFP").rating == "plausible"
    assert JUDGE(f"{said} {seen}", BLEEDING, "CFP").rating == "plausible"


def every_label():
    modules = (row.module for row in registry.DATASETS.values() if row.module)
    tables = (importlib.import_module(f"data_pipeline.datasets.{module}").DISEASES for module in modules)
    return sorted({*itertools.chain(*tables, *LABELS.values()), *(note.label for note in shipped_notes())})


@pytest.mark.parametrize(
    "said", ["the answer is {}.", "the diagnosis must be {}", "the answer is: **{}**", "the label is (B) {},"]
)
def test_no_label_is_a_claim(said):
    """Of any data set: those that carry the name of a finding, a comma, "and", "or" or "with"."""
    labels = every_label()
    assert sum(bool(parse_mentions(label).present) for label in labels) >= 10
    assert {"Blurred fundus with suspected PDR", "Disc swelling and elevation"} <= set(labels)
    for label in labels:
        assert parse_mentions(observations(f"No lesion is seen. So {said.format(label)}")) == Mentions(
            frozenset(), frozenset()
        ), label


def test_a_conclusion_ends_what_was_denied_before_it():
    trace = "No drusen, so the diagnosis is PDR, haemorrhages and microaneurysms."
    assert JUDGE(trace, BLEEDING, "CFP").rating == "plausible"
    assert JUDGE("Without drusen the diagnosis is PDR, haemorrhages.", BLEEDING, "CFP").reasons == (
        "microaneurysm is not mentioned",
    )


@pytest.mark.parametrize("note", shipped_notes(), ids=lambda note: note.address.rpartition("/")[2])
def test_the_traces_of_the_rule_writer_are_plausible(note):
    """What SFT teaches by rule must be worth the most to the judge by rule, for every label of the notes."""
    fields = {
        name: getattr(note, name)
        for name in ("label", "modality", "text", "required", "supportive", "excluded")
    }
    known = Knowledge(**fields, passages=())
    found = findings(*known.required)
    spread = (
        (Box(finding="haemorrhage", x1=100, y1=100, x2=900, y2=900),)
        if "haemorrhage" in found.present
        else ()
    )
    example = Example(
        id="e1",
        dataset="phantom",
        split="train",
        patient="p1",
        eye="OD",
        modality=note.modality,
        image="images.array_record#0",
        labels=(note.label,),
        task="disease",
        question="Which disease does this image show, if any?",
        options=(),
        answer=note.label,
        findings=found.present,
        boxes=spread,
    )
    trace = RuleWriter().write(example, found, known)
    assert JUDGE(trace, found, note.modality).reasons == ()
    assert JUDGE(trace, known, note.modality).reasons == ()


def test_the_question_says_what_may_be_left_out():
    partial = "The image shows haemorrhages."
    assert JUDGE(partial, BLEEDING, "CFP").rating == "tenuous"
    assert JUDGE(partial, BLEEDING, "CFP", about=("haemorrhage",)).rating == "plausible"
    assert JUDGE(partial, BLEEDING, "CFP", about=()).rating == "plausible"
    # A false claim is an error whatever the question was, and so is silence about what was asked.
    assert JUDGE("The image shows drusen.", BLEEDING, "CFP", about=()).rating == "tenuous"
    verdict = JUDGE("The image shows haemorrhages.", BLEEDING, "CFP", about=("drusen",))
    assert (verdict.rating, verdict.reasons) == ("tenuous", ("drusen is not mentioned",))
    assert JUDGE("It is a photograph.", BLEEDING, "CFP", about=()).rating == "plausible"
    assert JUDGE("It is a photograph.", BLEEDING, "CFP", about=("drusen",)).rating == "flawed"


MODERATE = knowledge(["microaneurysm", "haemorrhage"], ["hard exudate"], ["neovascularisation"])


@pytest.mark.parametrize(
    ("trace", "rating", "reasons"),
    [
        ("Microaneurysms and haemorrhages are seen.", "plausible", ()),
        ("Microaneurysms, haemorrhages and hard exudates, no new vessels.", "plausible", ()),
        ("Microaneurysms, haemorrhages and drusen are seen.", "plausible", ()),
        ("Microaneurysms are seen.", "implausible", ("haemorrhage is required but not claimed",)),
        ("Haemorrhages are seen.", "plausible", ()),  # more than microaneurysms, which may hide
        ("Microaneurysms and hard exudates are seen.", "plausible", ()),
        (
            "Drusen are seen.",
            "implausible",
            ("microaneurysm is required but not claimed", "haemorrhage is required but not claimed"),
        ),
        (
            "Microaneurysms are seen, no haemorrhages.",
            "implausible",
            ("haemorrhage is required but not claimed",),
        ),
        (
            "Microaneurysms, haemorrhages and neovascularisation are seen.",
            "implausible",
            ("neovascularisation is excluded but claimed",),
        ),
        (
            "Microaneurysms and haemorrhages are seen. Hard exudates are seen. No hard exudates are seen.",
            "implausible",
            ("hard exudate is claimed both present and absent",),
        ),
        (
            "Microaneurysms, haemorrhages and intraretinal fluid are seen.",
            "implausible",
            ("intraretinal fluid is mentioned, which CFP does not show",),
        ),
        ("It looks like it.", "implausible", ("names no finding",)),
        ("", "implausible", ("names no finding",)),
    ],
)
def test_traces_against_knowledge(trace, rating, reasons):
    verdict = JUDGE(trace, MODERATE, "CFP")
    assert (verdict.rating, verdict.reference) == (rating, "knowledge")
    assert verdict.reasons == reasons


def test_a_label_that_requires_nothing():
    normal = knowledge(excluded=["drusen", "haemorrhage"])
    assert JUDGE("No drusen and no haemorrhages are seen.", normal, "CFP").rating == "plausible"
    assert JUDGE("The image shows drusen.", normal, "CFP").rating == "implausible"
    assert JUDGE("Trust me.", normal, "CFP").rating == "implausible"


def test_knowledge_of_another_modality_is_refused():
    with pytest.raises(DataError, match="'Moderate NPDR' is for CFP, the image is OCT"):
        JUDGE("Drusen are seen.", MODERATE, "OCT")


# ---- for any trace ----------------------------------------------------------------------------------------

names = st.sets(st.sampled_from(vocabulary("CFP")), max_size=6)


def spoken(present, absent=()):
    claims = [f"The image shows {FINDINGS[name].plural}." for name in sorted(present)]
    return " ".join(claims + [f"No {FINDINGS[name].name} is seen." for name in sorted(absent)])


@given(names, names, names)
@settings(deadline=None)
def test_the_rating_is_the_number_of_errors(there, claimed, denied):
    denied = denied - claimed
    verdict = JUDGE(spoken(claimed, denied), findings(*there), "CFP")
    errors = len(claimed - there) + len(there - claimed)
    expected = ("plausible", "tenuous")[errors] if errors < 2 else "flawed"
    assert verdict.rating == ("flawed" if not claimed | denied else expected)
    assert (verdict.rating == "plausible") == (not verdict.reasons)


@given(names, names, names)
@settings(deadline=None)
def test_knowledge_asks_for_what_is_required_and_nothing_excluded(required, excluded, claimed):
    excluded = excluded - required
    verdict = JUDGE(spoken(claimed), knowledge(sorted(required), (), sorted(excluded)), "CFP")
    met = all(claimed & {name, *proofs("Moderate NPDR", name)} for name in required)
    good = bool(claimed) and met and not excluded & claimed
    assert verdict.rating == ("plausible" if good else "implausible")


@given(st.text(), st.sampled_from([BLEEDING, findings(), MODERATE]))
@settings(deadline=None)
def test_it_never_raises_and_never_abstains(trace, reference):
    verdict = JUDGE(trace, reference, "CFP")
    assert verdict.rating in ("plausible", "tenuous", "flawed", "implausible")
