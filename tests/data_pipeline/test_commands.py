"""Commands that a mistake of the user or a lost server ends: one line that says why, and exit code 1."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.data_pipeline.made import example
from tests.data_pipeline.test_trace_server import stages

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


def test_a_server_that_stays_away_is_one_line_too(tmp_path: Path) -> None:
    folders = zip(("examples", "findings", "knowledge"), stages(tmp_path, [example()]), strict=True)
    server = {"address": "http://127.0.0.1:1/v1", "model": "m", "patience": 0}
    words = [sys.executable, "-m", "data_pipeline.traces", "--traces=server", f"--out={tmp_path / 'out'}"]
    words += [f"--{name}={path}" for name, path in folders]
    words += [f"--writer.server.{name}={value}" for name, value in server.items()]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.search("^traces: down: .* has been lost .*; the same command, given again, goes on", last)
    assert "Traceback" not in done.stderr
