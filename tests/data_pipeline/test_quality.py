"""The quality check finds every kind of fault when it is put into a good trace, and only then."""

from dataclasses import replace

import pytest

from data_pipeline import quality, trace_server
from data_pipeline.composing import Case, compose
from data_pipeline.pixels import from_masks
from data_pipeline.quality import check
from data_pipeline.votes import merged
from data_pipeline.writer import SEVERE, RuleWriter
from fundus_jax import findings
from fundus_jax.findings import vocabulary
from fundus_jax.grpo.judge import Request, RulesJudge
from fundus_jax.records import Findings, Trace
from tests.data_pipeline.made import GRADES, SPREAD, example
from tests.data_pipeline.test_traces import NOTES

THINK = (
    "The image shows microaneurysms and haemorrhages. Haemorrhages beyond microaneurysms without "
    "neovascularisation fit moderate disease. So the answer is Moderate NPDR."
)
FOUND = Findings(example="made/0", present=("haemorrhage", "microaneurysm"), votes={}, n=0, origin="pixels")
MODERATE = NOTES["Moderate NPDR", "CFP"]


def kinds(reasons: tuple[str, ...]) -> set[str]:
    return {quality.kind(reason) for reason in reasons}


def test_a_good_trace_passes() -> None:
    assert check(example(), FOUND, MODERATE, THINK, "Moderate NPDR") == ()


def test_a_free_text_of_another_writer_passes_too() -> None:
    think = (
        "Several MAs and dot-blot hemorrhages are visible in the posterior pole, with no new vessels or "
        "vitreous hemorrhage. More than microaneurysms alone without proliferation is consistent with "
        "moderate NPDR."
    )
    assert check(example(), FOUND, MODERATE, think, "moderate NPDR.") == ()


@pytest.mark.parametrize(
    ("kind", "think"),
    [
        (quality.MODALITY, THINK.replace("shows ", "shows intraretinal fluid, ")),
        (quality.MODALITY, THINK.replace("The image", "The OCT B-scan")),
        (quality.MODALITY, THINK.replace("The image", "The ultra-widefield image")),
        (quality.ABSENT, THINK.replace("shows ", "shows hard exudates, ")),
        (quality.ABSENT, THINK.replace("and haemorrhages", "and many haemorrhages in all quadrants")),
        (quality.DENIED, "There are no microaneurysms. " + THINK),
        (quality.DENIED, "No lesion is seen. " + THINK),
        (quality.CONTRADICTION, "There are no haemorrhages. " + THINK),
        (
            quality.OMITTED,
            THINK.replace("and haemorrhages", "").replace("Haemorrhages beyond", "Lesions with"),
        ),
        (quality.EXCLUDED, THINK.replace("and haem", "and neovascularisation and haem")),
        (quality.KNOWLEDGE, THINK.split(". ")[0] + ". So the answer is Moderate NPDR."),
        (quality.KNOWLEDGE, THINK.replace("moderate disease", "mild disease")),
        (quality.LABEL, THINK.replace("So the answer is Moderate NPDR.", "")),
        (quality.LABEL, THINK.replace("answer is Moderate NPDR", "answer is PDR")),
        (quality.MALFORMED, ""),
        (quality.MALFORMED, THINK + " <answer>"),
        (quality.MALFORMED, THINK + " very" * 45),
    ],
)
def test_each_fault_in_the_text_is_found(kind: str, think: str) -> None:
    assert kind in kinds(check(example(), FOUND, MODERATE, think, "Moderate NPDR"))


def test_the_conclusion_is_no_evidence() -> None:
    """Drusen are a finding and a label: who only says that the answer is Drusen has seen none."""
    one = example(answer="Drusen", options=("Normal", "Drusen"), modality="OCT")
    found = replace(FOUND, present=("drusen",), searched=None)
    known = NOTES["Drusen", "OCT"]
    bare = check(one, found, known, "The layers look even. So the answer is Drusen.", "Drusen")
    assert kinds(bare) == {quality.OMITTED, quality.KNOWLEDGE}
    seen = "The image shows drusen. Drusen fit the label Drusen. So the answer is Drusen."
    assert check(one, found, known, seen, "Drusen") == ()


def test_severe_disease_from_votes_alone() -> None:
    """Votes say no spread: the rule writer names what the note requires, and the check takes it."""
    seen = ("haemorrhage", "microaneurysm")
    found = Findings(example="made/0", present=seen, votes=dict.fromkeys(seen, 5), n=5, origin="votes")
    trace = compose(example(answer=SEVERE), found, NOTES[SEVERE, "CFP"], RuleWriter())
    assert trace.kept, trace.reasons
    assert "aemorrhages" in trace.think.split(". ")[1]


def test_masks_that_do_not_reach_severe_disease_are_not_asked_about() -> None:
    case = masked(SEVERE, "haemorrhage", "microaneurysm")
    assert not written(case).kept
    assert not trace_server._possible(case), "no text could pass"
    assert trace_server._possible(voted(case, "venous beading"))


def test_each_fault_in_the_records_is_found() -> None:
    good = (example(), FOUND, MODERATE, THINK, "Moderate NPDR")
    assert kinds(check(*good[:2], None, *good[3:])) == {quality.KNOWLEDGE}
    assert kinds(check(*good[:2], NOTES["Moderate NPDR", "UWF"], *good[3:])) == {quality.KNOWLEDGE}
    assert kinds(check(*good[:2], NOTES["Mild NPDR", "CFP"], *good[3:])) == {quality.KNOWLEDGE}
    assert kinds(check(*good[:4], "Mild NPDR")) == {quality.LABEL}
    assert kinds(check(*good[:4], "")) == {quality.MALFORMED}
    assert kinds(check(good[0], None, *good[2:])) == {quality.NO_FINDINGS}


def test_severe_disease_is_told_from_moderate_by_the_spread() -> None:
    severe, found = example(answer="Severe NPDR", boxes=SPREAD), FOUND
    think = (
        "The image shows microaneurysms and many haemorrhages in all quadrants. Haemorrhages in all "
        "quadrants without neovascularisation fit severe disease. So the answer is Severe NPDR."
    )
    knowledge = NOTES["Severe NPDR", "CFP"]
    assert check(severe, found, knowledge, think, "Severe NPDR") == ()
    vague = think.replace(" in all quadrants", "")
    assert kinds(check(severe, found, knowledge, vague, "Severe NPDR")) == {quality.LABEL}
    assert quality.ABSENT in kinds(
        check(example(answer="Severe NPDR"), found, knowledge, think, "Severe NPDR")
    )
    moderate = think.replace("severe disease", "moderate disease").replace("Severe", "Moderate")
    assert kinds(check(example(boxes=SPREAD), found, MODERATE, moderate, "Moderate NPDR")) == {quality.LABEL}


def test_a_normal_eye_needs_a_sentence_on_the_absence_of_lesions() -> None:
    normal = example(answer="Normal", findings=(), boxes=())
    clean = Findings(example="made/0", present=(), votes={}, n=0, origin="pixels")
    knowledge = NOTES["Normal", "CFP"]
    for middle in ("A retina without lesions fits a normal eye.", "No drusen fits a normal eye."):
        think = f"No lesion is seen. {middle} So the answer is Normal."
        assert check(normal, clean, knowledge, think, "Normal") == ()
    think = "No lesion is seen. So the answer is Normal."
    assert kinds(check(normal, clean, knowledge, think, "Normal")) == {quality.KNOWLEDGE}


def test_the_connection_is_with_a_finding_that_matters() -> None:
    found = Findings(
        example="made/0", present=("drusen", "haemorrhage", "microaneurysm"), votes={}, n=0, origin="pixels"
    )
    think = "The image shows microaneurysms, haemorrhages and drusen. {} fit moderate disease. So it is {}."
    one, known = (
        example(task="dr_grade", options=GRADES, answer="Moderate NPDR"),
        NOTES["Moderate NPDR", "CFP"],
    )
    for signs, wrong in (("Haemorrhages", set()), ("Drusen", {quality.KNOWLEDGE})):
        said = think.format(signs, one.answer)
        assert kinds(check(one, found, known, said, one.answer)) == wrong, signs


def test_npdr_does_not_say_pdr() -> None:
    found = Findings(example="made/0", present=("neovascularisation",), votes={}, n=0, origin="pixels")
    think = "The image shows neovascularisation. Neovascularisation fits proliferative disease. So NPDR."
    reasons = check(
        example(task="dr_grade", options=GRADES, answer="PDR"), found, NOTES["PDR", "CFP"], think, "PDR"
    )
    assert kinds(reasons) == {quality.LABEL}


def test_the_other_tasks() -> None:
    side = example(task="laterality", options=("Right eye", "Left eye"), answer="Right eye")
    think = "The optic disc lies to the right of the macula. So the answer is Right eye."
    assert check(side, None, None, think, "Right eye") == ()
    wrong = think.replace("to the right", "to the left")
    assert kinds(check(side, None, None, wrong, "Right eye")) == {quality.PLACE}
    claims = think.replace("So", "Drusen are seen. So")
    assert kinds(check(side, None, None, claims, "Right eye")) == {quality.NO_FINDINGS}

    seen = example(
        task="lesion_presence",
        question="Does this image show drusen?",
        options=("Yes", "No"),
        answer="No",
    )
    think = "The image shows haemorrhages. Drusen are absent. So the answer is No."
    assert check(seen, FOUND, None, think, "No") == ()
    silent = think.replace("Drusen are absent. ", "")
    assert kinds(check(seen, FOUND, None, silent, "No")) == {quality.LABEL}

    place = example(
        task="lesion_location",
        question="Where does this image mainly show haemorrhages?",
        options=("Upper left", "Lower right"),
        answer="Upper left",
    )
    think = "Haemorrhages lie in the upper left of the image. So the answer is Upper left."
    assert check(place, FOUND, None, think, "Upper left") == ()
    both = think.replace("So", "They are in the lower right. So")
    assert kinds(check(place, FOUND, None, both, "Upper left")) == {quality.PLACE}
    elsewhere = example(**{**_values(place), "answer": "Lower right"})
    think = "Haemorrhages lie in the lower right of the image. So the answer is Lower right."
    assert kinds(check(elsewhere, FOUND, None, think, "Lower right")) == {quality.PLACE}


def _values(one) -> dict:
    return {name: getattr(one, name) for name in one.__dataclass_fields__}


def test_every_kind_of_reason_is_listed() -> None:
    constants = {
        value
        for name, value in vars(quality).items()
        if name.isupper() and not name.startswith("_") and isinstance(value, str)
    }
    assert constants - {quality.EVERYWHERE, quality.SEVERE} == set(quality.KINDS)


LESIONS = ("cotton-wool spot", "haemorrhage", "hard exudate", "microaneurysm")  # of IDRiD's and DDR's masks


def masked(answer: str, *present: str, **changes: object) -> Case:
    """A photograph with masks of the four lesions alone, as far as masks know it."""
    one = example(answer=answer, findings=tuple(sorted(present)), searched=LESIONS, **changes)
    found = from_masks(one)
    assert isinstance(found, Findings)
    return Case(one, found, NOTES[answer, "CFP"])


def voted(case: Case, *present: str) -> Case:
    """The same with votes on everything else that the notes name."""
    asked = {name: 5 * (name in present) for name in vocabulary("CFP", extended=True) if name not in LESIONS}
    votes = Findings(
        example="made/0", present=tuple(sorted(present)), votes=asked, n=5, origin="votes",
        searched=tuple(sorted(asked)),
    )  # fmt: skip
    assert case.found is not None
    return replace(case, found=merged(case.found, votes))


def written(case: Case) -> Trace:
    return compose(case.example, case.found, case.knowledge, RuleWriter())


def test_proliferative_disease_with_masks_of_other_lesions() -> None:
    """Nobody looked for new vessels: they are not left out, nor absent. Votes say whether they are there."""
    case = masked("PDR", "haemorrhage", "hard exudate", "microaneurysm")
    trace = written(case)
    assert trace.reasons == (
        "no findings: nobody looked for neovascularisation, on which the answer depends",
    )
    assert not trace_server._possible(case)
    proven = voted(case, "vitreous haemorrhage")
    assert trace_server._possible(proven)
    assert written(proven).think == (
        "The image shows microaneurysms, haemorrhages, hard exudates and vitreous haemorrhage. "
        "Vitreous haemorrhage fits proliferative disease. So the answer is PDR."
    )
    assert written(proven).kept
    unproven = written(voted(case))
    assert kinds(unproven.reasons) >= {quality.OMITTED}, "looked for, and not there"
    assert not trace_server._possible(voted(case))


def test_moderate_disease_with_masks_denies_nothing_that_nobody_looked_for() -> None:
    case = masked("Moderate NPDR", "haemorrhage", "microaneurysm")
    trace = written(case)
    assert trace.think == (
        "The image shows microaneurysms and haemorrhages. Haemorrhages beyond microaneurysms fit moderate "
        "disease. So the answer is Moderate NPDR."
    )
    assert trace.kept
    assert written(voted(case)).think == THINK
    assert kinds(check(case.example, case.found, case.knowledge, THINK, "Moderate NPDR")) == {
        quality.NO_FINDINGS
    }
    claims = THINK.replace("without neovascularisation", "and irma")
    assert kinds(check(case.example, case.found, case.knowledge, claims, "Moderate NPDR")) == {
        quality.NO_FINDINGS
    }


def test_mild_disease_with_masks_says_what_was_ruled_out() -> None:
    case = masked("Mild NPDR", "microaneurysm")
    assert written(case).kept
    assert written(case).think == (
        "The image shows microaneurysms. Microaneurysms without haemorrhages, hard exudates or cotton-wool "
        "spots fit mild disease. So the answer is Mild NPDR."
    )
    assert "Microaneurysms alone fit" in written(voted(case)).think


def test_an_image_with_empty_masks_is_not_one_without_lesions() -> None:
    for answer in ("Normal", "No DR"):
        case = masked(answer, options=(answer, "PDR"), task="dr_grade" if answer == "No DR" else "disease")
        (reason,) = written(case).reasons
        assert reason.startswith("no findings: nobody looked for neovascularisation, vitreous haemorrhage")
        assert written(case).think.startswith(
            "No microaneurysms, haemorrhages, hard exudates or cotton-wool spots are seen."
        )
        trace = written(voted(case))
        assert trace.kept, trace.reasons
        assert trace.think.startswith("No lesion is seen.")


@pytest.mark.parametrize("claim", ["No lesion is seen.", "An eye without any lesions."])
def test_no_lesion_may_be_said_only_where_all_were_looked_for(claim: str) -> None:
    one = example(
        task="lesion_presence", question="Does this image show haemorrhages?", options=("Yes", "No"),
        answer="No", findings=(), searched=LESIONS,
    )  # fmt: skip
    think = f"{claim} Haemorrhages are absent. So the answer is No."
    found = from_masks(one)
    assert isinstance(found, Findings)
    assert kinds(check(one, found, None, think, "No")) == {quality.NO_FINDINGS}
    assert check(one, replace(found, searched=None), None, think, "No") == ()
    other = replace(one, question="Does this image show drusen?")
    (reason,) = check(other, found, None, think.replace("Haemorrhages", "Drusen"), "No")
    assert reason == "no findings: nobody looked for drusen, on which the answer depends"


@pytest.mark.parametrize(
    ("label", "modality", "present", "right"),
    [
        ("CNV", "OCT", ("subretinal hyperreflective material", "subretinal fluid"), True),
        ("CNV", "OCT", ("pigment epithelial detachment", "subretinal fluid"), True),
        ("CNV", "OCT", ("subretinal fluid", "intraretinal fluid"), True),
        ("CNV", "OCT", ("intraretinal fluid",), False),
        ("DME", "OCT", ("retinal thickening", "hyperreflective focus"), True),
        ("DME", "OCT", ("subretinal fluid",), False),
        ("Central serous chorioretinopathy", "OCT", ("retinal detachment",), True),
        ("Polypoidal choroidal vasculopathy", "OCT", ("subretinal hyperreflective material",), False),
        ("Moderate NPDR", "CFP", ("haemorrhage",), True),
        ("Moderate NPDR", "CFP", ("hard exudate", "microaneurysm"), True),
        ("Moderate NPDR", "UWF", ("cotton-wool spot", "microaneurysm"), True),
        ("Moderate NPDR", "CFP", ("microaneurysm",), False),
        ("Moderate NPDR", "CFP", ("drusen",), False),
        ("Moderate NPDR", "CFP", ("haemorrhage", "neovascularisation"), False),
        ("Severe NPDR", "CFP", ("irma", "microaneurysm"), True),
        ("Severe NPDR", "CFP", ("haemorrhage", "venous beading"), True),
        ("Severe NPDR", "CFP", ("haemorrhage", "microaneurysm"), False),  # in one spot
        ("PDR", "CFP", ("preretinal haemorrhage",), True),
        ("PDR", "CFP", ("haemorrhage", "microaneurysm"), False),
        ("AMD", "CFP", ("geographic atrophy",), True),
        ("AMD", "UWF", ("subretinal haemorrhage",), True),
        ("AMD", "CFP", ("hard exudate", "haemorrhage"), False),
        ("AMD", "CFP", ("pigmentary change",), True),
        ("AMD", "CFP", ("fibrous proliferation", "hard exudate"), True),
        ("AMD", "CFP", ("hard exudate",), False),
        ("Dry AMD", "OCT", ("geographic atrophy",), True),
        ("Dry AMD", "CFP", ("subretinal haemorrhage",), False),
        ("Diabetic retinopathy", "CFP", ("haemorrhage", "hard exudate"), True),
        ("Diabetic retinopathy", "UWF", ("hard exudate", "laser scar"), True),
        ("Diabetic retinopathy", "CFP", ("drusen",), False),
        ("Diabetic retinopathy, stage 1 of 3", "CFP", ("haemorrhage",), True),
        ("Diabetic retinopathy, stage 2 of 3", "CFP", ("venous beading", "irma"), True),
        ("PDR", "CFP", ("fibrous proliferation",), True),
        ("Severe NPDR", "CFP", ("irma", "fibrous proliferation"), False),
        ("Glaucoma", "CFP", ("rim thinning", "disc haemorrhage"), True),
        ("Glaucoma", "CFP", ("disc haemorrhage",), False),
        ("Branch retinal vein occlusion", "CFP", ("laser scar", "neovascularisation"), True),
        ("Branch retinal vein occlusion", "CFP", ("drusen",), False),
        ("Severe hypertensive retinopathy", "CFP", ("haemorrhage", "hard exudate"), True),
        ("Severe hypertensive retinopathy", "CFP", ("microaneurysm",), False),
    ],
)
def test_a_label_is_known_by_any_of_its_signs(
    label: str, modality: str, present: tuple[str, ...], right: bool
) -> None:
    """The schemes of ICDR and AREDS, and what a B-scan shows of new vessels: in the trace, in the check, for
    the model that writes, and for the judge of the process reward."""
    one = example(
        modality=modality, options=(label, "Normal"), answer=label, findings=tuple(sorted(present)), boxes=()
    )
    found, known = from_masks(one), NOTES[label, modality]
    assert isinstance(found, Findings)
    trace = written(Case(one, found, known))
    assert trace.kept is right, (trace.think, trace.reasons)
    if right:
        assert trace_server._possible(Case(one, found, known))
        seen = trace.think.split(". ")[1].lower()
        assert any(findings.FINDINGS[name].plural in seen for name in present), "what proves it is named"
        request = Request(trace=trace.think, reference=known, modality=modality)
        assert RulesJudge().rate(request).rating == "plausible"


@pytest.mark.parametrize("task", ["amd_grade", "dme_risk", "progression", "disease_presence"])
def test_where_no_note_leads_to_the_answer_there_is_no_trace(task: str) -> None:
    case = masked("Moderate NPDR", "haemorrhage", "microaneurysm", task=task)
    assert kinds(written(case).reasons) == {quality.KNOWLEDGE}
    assert not trace_server._possible(case)


def test_models_are_told_what_meets_a_required_finding() -> None:
    assert findings.required(NOTES["AMD", "CFP"]) == (
        "drusen (or subretinal haemorrhage or fibrous proliferation or geographic atrophy "
        "or pigmentary change)",
    )
    assert findings.required(NOTES["Large optic cup", "CFP"]) == ("large cup",)
