"""Corrections: read strictly, applied as a passage with its claims, shown as what they are; and the page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline import jobs, knowledge_base
from data_pipeline.knowledge import corrections, extract, show
from data_pipeline.knowledge.config import KnowledgeConfig
from data_pipeline.knowledge.note import shipped_notes
from data_pipeline.knowledge.passages import split_notes
from fundus_jax.records import ConfigError, DataError, Knowledge

FILE = """[[correction]]
label = "Moderate NPDR"
modality = "CFP"
required = ["haemorrhage"]
supportive = ["microaneurysm", "hard exudate", "cotton-wool spot"]
by = "A. Example, retina service"
when = 2026-11-28
why = "Microaneurysms are often too small for our camera."

[[correction]]
label = "Cataract"
modality = "CFP"
text = "A cataract hides the fundus."
excluded = ["drusen"]
by = "A. Example"
when = 2026-11-28
why = "Nobody can see drusen through it."
"""


@pytest.fixture
def moderate() -> Knowledge:
    [note] = [one for one in shipped_notes() if (one.label, one.modality) == ("Moderate NPDR", "CFP")]
    return extract.from_notes(note.label, note.modality, split_notes([note]), [note])


def written(tmp_path: Path, text: str = FILE) -> Path:
    path = tmp_path / "overrides.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_correction_moves_findings_and_says_why(tmp_path, moderate) -> None:
    found = corrections.read(written(tmp_path))
    [record] = corrections.apply([moderate], found, "overrides.toml")
    assert record.required == ("haemorrhage",)
    assert record.supportive == ("microaneurysm", "hard exudate", "cotton-wool spot")
    assert record.excluded == moderate.excluded
    assert record.text == moderate.text
    passage = record.passages[-1]
    assert passage.source == "correction by A. Example, retina service, 2026-11-28"
    moved = [(one.finding, one.role) for one in record.claims if one.passage == passage.sha256]
    assert moved == [("microaneurysm", "supportive")]
    assert ("microaneurysm", "required") not in {(one.finding, one.role) for one in record.claims}
    text = show.page(record)
    assert "Corrected: A. Example, retina service, 2026-11-28, in overrides.toml" in text
    assert "“Microaneurysms are often too small for our camera.” [3]" in text


def test_the_job_takes_corrections_and_is_run_again_for_other_ones(tmp_path) -> None:
    path = written(tmp_path)
    config = KnowledgeConfig(overrides=str(path))
    pairs = [("Moderate NPDR", "CFP"), ("PDR", "CFP"), ("Cataract", "CFP")]
    knowledge_base.run(tmp_path / "out", pairs=pairs, config=config)
    records = {one.label: one for one in jobs.read(tmp_path / "out", Knowledge)}
    assert records["Moderate NPDR"].required == ("haemorrhage",)
    assert records["Cataract"].excluded == ("drusen",)
    assert records["Cataract"].claims[0].quote == "Nobody can see drusen through it."
    assert knowledge_base.run(tmp_path / "out", pairs=pairs, config=config).shards_skipped == 1
    path.write_text(FILE.replace("often too small", "sometimes too small"))
    assert knowledge_base.run(tmp_path / "out", pairs=pairs, config=config).shards_done == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('label = "Moderate NPDR"', 'name = "Moderate NPDR"', r"correction 1: \['name'\] are no fields"),
        ('modality = "CFP"', 'modality = "FFA"', "modality is 'FFA'"),
        ('"haemorrhage"]', '"bleeding"]', "required is .*lists findings of CFP"),
        ('"haemorrhage"]', '"intraretinal fluid"]', "required is .*lists findings of CFP"),
        ('"haemorrhage"]', '"haemorrhage", "haemorrhage"]', "each once"),
        ('required = ["haemorrhage"]', 'required = "haemorrhage"', "lists findings"),
        ('by = "A. Example, retina service"', 'by = " "', "by is ' '"),
        ('why = "Micro', 'text = ""\nwhy = "Micro', "text is ''"),
        ('when = 2026-11-28\nwhy = "Micro', 'when = "yesterday"\nwhy = "Micro', "expected a date"),
        ('when = 2026-11-28\nwhy = "Micro', 'why = "Micro', "when is None"),
        (
            'label = "Cataract"',
            'label = "Moderate NPDR"',
            "correction 2: Moderate NPDR on CFP is corrected twice",
        ),
        ('[[correction]]\nlabel = "C', '[[addition]]\nlabel = "C', "holds .*addition"),
        ("[[correction]]", "[correction", "not a file of corrections in TOML"),
    ],
)
def test_a_bad_file_is_refused_by_the_entry(tmp_path, old: str, new: str, message: str) -> None:
    assert old in FILE
    with pytest.raises(DataError, match=f"overrides.toml: .*{message}"):
        corrections.read(written(tmp_path, FILE.replace(old, new, 1)))


def test_corrections_that_can_not_be_applied_are_refused(tmp_path, moderate) -> None:
    overlap = FILE.replace('required = ["haemorrhage"]', 'excluded = ["haemorrhage"]')
    found = corrections.read(written(tmp_path, overlap))
    with pytest.raises(DataError, match="the correction of Moderate NPDR on CFP: .*stand in two"):
        corrections.apply([moderate], found, "overrides.toml")
    with pytest.raises(DataError, match="no record to correct, so it has to give a text"):
        corrections.corrected(None, found["Moderate NPDR", "CFP"], "overrides.toml")
    nothing = FILE.replace('required = ["haemorrhage"]\n', "").replace(
        'supportive = ["micro', 'by = "x"\nx = ["micro'
    )
    with pytest.raises(DataError):
        corrections.read(written(tmp_path, nothing))
    empty = '[[correction]]\nlabel = "PDR"\nmodality = "CFP"\nby = "x"\nwhen = 2026-11-28\nwhy = "y"\n'
    with pytest.raises(DataError, match="corrects nothing"):
        corrections.read(written(tmp_path, empty))


def test_the_command_prints_an_entry_for_a_clinician(tmp_path, repo_root) -> None:
    def shown(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "data_pipeline.knowledge", "show", *words]
        return subprocess.run(
            command, cwd=repo_root, capture_output=True, text=True, timeout=120, check=False
        )

    out = shown("DR-moderate", "cfp", f"--overrides={written(tmp_path)}").stdout
    assert out.startswith("Moderate NPDR on CFP\n\nCorrected: A. Example")
    for line in ("Required: the label", "  haemorrhage\n", "Apache-2.0 · sha256", "[1] notes: Moderate NPDR"):
        assert line in out
    knowledge_base.run(tmp_path / "out", pairs=[("PDR", "UWF")])
    assert shown("pdr", "UWF", f"--knowledge={tmp_path / 'out'}").stdout.startswith("PDR on UWF")
    failed = shown("Bird strike", "CFP")
    assert failed.returncode != 0
    assert "no entry on 'Bird strike' in CFP; entries in it are on AMD" in failed.stderr


def test_names_are_found_in_any_case_and_by_alias(moderate) -> None:
    for name in ("Moderate NPDR", "moderate npdr", "DR-moderate", "dr-MODERATE"):
        assert show.find([moderate], name, "cfp") == moderate
    with pytest.raises(ConfigError, match="in OCT; entries in it are on nothing"):
        show.find([moderate], "Moderate NPDR", "OCT")
    assert all(len(line) <= show.WIDTH + 30 for line in show.page(moderate).splitlines())
