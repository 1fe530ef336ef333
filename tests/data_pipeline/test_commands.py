"""Commands that a user's mistake ends: one line that says what to change, and exit code 1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

BROKEN = "[[correction]]\nlabel = "


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("knowledge", "show", "Foo", "CFP"), "knowledge: no entry on 'Foo' in CFP; entries in it are on "),
        (
            ("knowledge", "show", "PDR", "CFP", "--overrides={broken}"),
            "knowledge: {broken}: not a file of corrections in TOML: ",
        ),
        (
            ("knowledge", "show", "PDR", "CFP", "--knowledge={folder}"),
            "knowledge: {folder}: no job.json here; give the output directory of a pipeline job",
        ),
        (
            ("knowledge_base", "--out={out}", "--pairs=XX:PDR"),
            "knowledge_base: pair 'XX:PDR': write MODALITY:LABEL with one of CFP, ",
        ),
        (
            ("knowledge_base", "--out={out}", "--pairs=CFP:PDR", "--extractor=server"),
            "knowledge_base: knowledge.server.",
        ),
        (
            ("knowledge_base", "--out={out}", "--pairs=CFP:PDR", "--overrides={broken}"),
            "knowledge_base: {broken}: not a file of corrections in TOML: ",
        ),
    ],
)
def test_a_mistake_is_one_line(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    names = {"broken": tmp_path / "broken.toml", "folder": tmp_path, "out": tmp_path / "out"}
    names["broken"].write_text(BROKEN, encoding="utf-8")
    module, *rest = (word.format(**names) for word in words)
    done = subprocess.run(
        [sys.executable, "-m", f"data_pipeline.{module}", *rest], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert [line.startswith(said.format(**names)) for line in done.stderr.splitlines()] == [True], done.stderr
