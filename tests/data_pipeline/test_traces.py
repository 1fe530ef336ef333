"""Traces from end to end: phantoms to kept traces, unseen images to empty ones, faults to their reasons."""

import collections
import json
from dataclasses import replace

import pytest

from data_pipeline import composing, findings, jobs, knowledge_base, questions, traces, writer
from data_pipeline.datasets import phantom
from data_pipeline.knowledge.note import shipped_notes
from fundus_jax import dialog
from fundus_jax.findings import FINDINGS
from fundus_jax.records import DataError, Example, Findings, Knowledge, Trace
from tests.data_pipeline.made import GRADES, OPTIONS, SPOT, SPREAD, example, write_examples

NOTES = {
    (note.label, note.modality): Knowledge(
        label=note.label,
        modality=note.modality,
        text=note.text,
        required=note.required,
        supportive=note.supportive,
        excluded=note.excluded,
        passages=(),
    )
    for note in shipped_notes()
}
WRITER = writer.RuleWriter()


def compose(one: Example) -> Trace:
    """The trace of an example whose findings are those of its masks."""
    found = next(iter(findings.PixelSource().find([one])), None)
    assert not isinstance(found, jobs.Quarantine)
    return composing.compose(one, found, NOTES.get((one.answer, one.modality)), WRITER)


def drawn(index: int, modality: str, label: str, task: str = "disease") -> Example:
    """A question about a phantom."""
    case = phantom.render(3, index, size=112, modality=modality, label=label)
    answer = "No DR" if (task, label) == ("dr_grade", "Normal") else label
    return example(
        id=f"{modality}/{label}/{task}/{index}",
        eye=case.eye,
        modality=modality,
        labels=(label,),
        task=task,
        options=GRADES if task == "dr_grade" else phantom.LABELS[modality],
        answer=answer,
        findings=case.findings,
        boxes=case.boxes,
    )


CASES = [(modality, label) for modality, labels in phantom.LABELS.items() for label in labels]


@pytest.mark.parametrize(("modality", "label"), CASES)
def test_every_phantom_gets_a_short_trace_that_passes(modality: str, label: str) -> None:
    for index in range(4):
        for task in ("disease", "dr_grade"):
            if task == "dr_grade" and label not in ("Normal", *GRADES):
                continue
            if task == "dr_grade" and modality == "OCT":
                continue
            trace = compose(drawn(index, modality, label, task))
            assert trace.kept, (trace.think, trace.reasons)
            assert len(trace.think.split()) <= 45
            assert trace.think.count(".") == 3  # findings, connection, answer
            assert dialog.parse(dialog.render(trace.think, trace.answer)).well_formed


def test_the_vocabulary_is_small_and_the_writer_is_deterministic() -> None:
    words: collections.Counter[str] = collections.Counter()
    for modality, label in CASES:
        one = drawn(0, modality, label)
        assert compose(one) == compose(one)
        words.update(compose(one).think.replace(".", "").replace(",", "").lower().split())
    assert len(words) <= 80


@pytest.mark.parametrize(
    ("changes", "think"),
    [
        (
            {"task": "disease"},
            "The image shows microaneurysms and haemorrhages. Haemorrhages beyond microaneurysms without "
            "neovascularisation fit moderate disease. So the answer is Moderate NPDR.",
        ),
        (
            {"answer": "Severe NPDR", "boxes": SPREAD},
            "The image shows microaneurysms and many haemorrhages in all quadrants. Haemorrhages in all "
            "quadrants without neovascularisation fit severe disease. So the answer is Severe NPDR.",
        ),
        (
            {"answer": "PDR", "findings": ("vitreous haemorrhage",)},
            "The image shows vitreous haemorrhage. Vitreous haemorrhage fits proliferative disease. So the "
            "answer is PDR.",
        ),
        (
            {"answer": "Normal", "findings": (), "boxes": ()},
            "No lesion is seen. A retina without lesions fits a normal eye. So the answer is Normal.",
        ),
        (
            {"task": "dr_grade", "answer": "No DR", "options": GRADES, "findings": ("drusen",), "boxes": ()},
            "The image shows drusen. Without microaneurysms or haemorrhages there is no retinopathy. So the "
            "answer is No DR.",
        ),
        (
            {
                "task": "modality",
                "modality": "OCT",
                "eye": "",
                "options": (),
                "findings": None,
                "answer": "B-scan",
            },
            "The image is a cross-section of retinal layers. So the answer is B-scan.",
        ),
        (
            {
                "task": "laterality",
                "findings": None,
                "options": ("Right eye", "Left eye"),
                "answer": "Right eye",
            },
            "The optic disc lies to the right of the macula. So the answer is Right eye.",
        ),
        (
            {
                "task": "lesion_presence",
                "question": "Does this image show a large cup?",
                "options": ("Yes", "No"),
                "answer": "No",
            },
            "The image shows microaneurysms and haemorrhages. A large cup is absent. So the answer is No.",
        ),
        (
            {
                "task": "lesion_presence",
                "question": "Can haemorrhages be seen in this image?",
                "options": ("Yes", "No"),
                "answer": "Yes",
            },
            "The image shows microaneurysms and haemorrhages. Haemorrhages are present. So the answer is "
            "Yes.",
        ),
        (
            {
                "task": "lesion_location",
                "question": "Which quadrant mainly shows haemorrhages?",
                "options": ("Upper left", "Lower right"),
                "answer": "Upper left",
            },
            "The image shows microaneurysms and haemorrhages. Haemorrhages lie in the upper left of the "
            "image. So the answer is Upper left.",
        ),
    ],
)
def test_the_wording(changes: dict, think: str) -> None:
    trace = compose(example(**changes))
    assert (trace.think, trace.reasons) == (think, ())


@pytest.mark.parametrize("finding", ["haemorrhage", "large cup", "pigment epithelial detachment", "drusen"])
@pytest.mark.parametrize("task", ["lesion_presence", "lesion_location"])
def test_the_questions_of_ingest_name_their_finding(finding: str, task: str) -> None:
    for wording in questions.WORDINGS[task]:
        text = wording.format(FINDINGS[finding].plural)
        assert writer.asked(example(question=text)) == finding


def test_no_findings_are_made_up_for_an_image_that_nobody_looked_at() -> None:
    for task in ("disease", "dr_grade", "lesion_presence"):
        trace = compose(example(task=task, findings=None, boxes=()))
        assert (trace.think, trace.kept) == ("", False)
        assert [reason.partition(":")[0] for reason in trace.reasons] == ["no findings"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"findings": ("microaneurysm",)}, "required finding omitted: haemorrhage"),
        ({"answer": "Mild NPDR"}, "excluded finding claimed: haemorrhage"),
        (
            {"answer": "Severe NPDR"},
            "label not reached: Severe NPDR needs many haemorrhages in all quadrants",
        ),
        ({"boxes": SPREAD}, "label not reached: many haemorrhages in all quadrants fit Severe NPDR"),
        ({"options": ("Cataract",), "answer": "Cataract"}, "knowledge missing: there is no record"),
        ({"task": "laterality", "eye": ""}, "malformed: the think text '' is empty"),
    ],
)
def test_what_the_records_do_not_support_is_rejected_with_the_reason(changes: dict, reason: str) -> None:
    trace = compose(example(**changes))
    assert not trace.kept
    assert any(one.startswith(reason) for one in trace.reasons), trace.reasons


def test_everywhere_needs_all_quadrants_and_area() -> None:
    assert writer.everywhere(SPREAD)
    assert not writer.everywhere(SPOT)
    assert not writer.everywhere(())


def stages(tmp_path, shards):
    examples = write_examples(tmp_path / "examples", shards)
    findings.run(examples, tmp_path / "findings")
    knowledge_base.run(tmp_path / "knowledge", examples=examples)
    return examples, tmp_path / "findings", tmp_path / "knowledge", tmp_path / "traces"


def test_the_stage_keeps_the_rejected_ones_and_counts_reasons(tmp_path) -> None:
    shards = {
        "a": [example(id="good"), example(id="severe", answer="Severe NPDR")],
        "b": [example(id="unseen", findings=None, boxes=()), example(id="mild", answer="Mild NPDR")],
    }
    parts = stages(tmp_path, shards)
    summary = traces.run(*parts)
    assert (summary.answers, summary.quarantined, summary.shards_done) == (4, 0, 2)
    kept = {trace.example: trace.kept for trace in jobs.read(parts[-1], Trace)}
    assert kept == {"good": True, "severe": False, "unseen": False, "mild": False}
    counts = json.loads((parts[-1] / "summary.json").read_text())
    assert (counts["writer"], counts["traces"], counts["kept"]) == ("rules", 4, 1)
    assert counts["reasons"]["no findings"] == 1
    assert counts["reasons"]["excluded finding claimed"] == 1
    assert traces.run(*parts).shards_skipped == 2


def test_a_finished_directory_is_not_counted_again(tmp_path, monkeypatch) -> None:
    *parts, out = stages(tmp_path, {"a": [example(id="1")], "b": [example(id="2")]})
    traces.run(*parts, out)
    written = (out / "summary.json").read_bytes()
    counted = []
    monkeypatch.setattr(
        traces,
        "summarise",
        lambda found: counted.append(list(found)) or {"traces": 0, "kept": 0, "reasons": {}},
    )
    traces.run(*parts, out)
    assert counted == []
    assert (out / "summary.json").read_bytes() == written
    (out / "b.jsonl").unlink()  # so that the shard is made again
    traces.run(*parts, out)
    assert counted == [], "the same shards: what was counted still holds"
    (out / "summary.json").write_text('{"of": "before"}')
    traces.run(*parts, out)
    assert len(counted[0]) == 2


def test_one_run_and_two_half_runs_write_the_same(tmp_path) -> None:
    shards = {"a": [example(id="1")], "b": [example(id="2", answer="Mild NPDR")]}
    *parts, out = stages(tmp_path, shards)
    traces.run(*parts, out)
    halves = tmp_path / "halves"
    traces.run(*parts, halves, shard="0/2")
    assert not (halves / "summary.json").exists()
    traces.run(*parts, halves, shard="1/2")
    for name in ("summary.json", "a.jsonl", "b.jsonl", "manifest.jsonl"):
        assert (halves / name).read_bytes() == (out / name).read_bytes()


def test_other_findings_make_the_shards_again(tmp_path) -> None:
    """And the counts wait for all of them: they are never of old and new ones."""
    *parts, out = stages(tmp_path, {"a": [example(id="a")], "b": [example(id="b")]})
    traces.run(*parts, out)
    before = (out / "summary.json").read_bytes()
    changed = Findings(example="a", present=("microaneurysm",), votes={}, n=0, origin="pixels")
    inputs = [jobs.ShardInput(name, "other", (replace(changed, example=name),)) for name in "ab"]
    again = tmp_path / "again"
    jobs.run(jobs.Job("findings", {}), inputs, lambda shard, _: shard.items, again)
    assert traces.run(parts[0], again, parts[2], out, shard="0/2").shards_done == 1
    assert (out / "summary.json").read_bytes() == before
    assert traces.run(parts[0], again, parts[2], out, shard="1/2").shards_done == 1
    assert json.loads((out / "summary.json").read_text())["kept"] == 0
    assert not any(trace.kept for trace in jobs.read(out, Trace))


def test_a_missing_shard_of_findings_stops_the_stage(tmp_path) -> None:
    *parts, out = stages(tmp_path, {"a": [example(id="1")], "b": [example(id="2")]})
    other = tmp_path / "other"
    inputs = [jobs.ShardInput("a", "other", ())]
    jobs.run(jobs.Job("findings", {}), inputs, lambda shard, _: shard.items, other)
    with pytest.raises(DataError, match="has no shard b"):
        traces.run(parts[0], other, parts[2], out)


def test_all_options_of_the_questions_have_knowledge() -> None:
    wanted = {(label, modality) for modality, labels in questions.DISEASES.items() for label in labels}
    wanted |= {(label, modality) for label in questions.GRADES for modality in ("CFP", "UWF")}
    assert wanted <= NOTES.keys()
    assert set(OPTIONS) == set(questions.FUNDUS)


@pytest.mark.parametrize(("modality", "label"), CASES)
def test_the_phantoms_obey_the_knowledge(modality: str, label: str) -> None:
    rule, knowledge = phantom.RULES[modality][label], NOTES[label, modality]
    required = set(rule.required) | set(rule.any_of[:1])
    assert set(knowledge.required) <= required
    assert set(rule.allowed) <= {*knowledge.required, *knowledge.supportive}
    assert not set(rule.allowed) & set(knowledge.excluded)
