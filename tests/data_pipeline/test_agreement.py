"""Table 6: rates that can be checked by hand, what is compared with what, and the command from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import agreement, findings, jobs
from data_pipeline.agreement import PAPER, Table, tables, wilson
from data_pipeline.votes import VotesConfig
from fundus_jax.records import DataError, Example, Findings
from tests.chat_server import Body, Reply, Server
from tests.data_pipeline import voters
from tests.data_pipeline.made import example, write_examples

ASKED = ("haemorrhage", "hard exudate", "microaneurysm")


def image(number: int, *present: str, **changes: object) -> Example:
    values = {"id": f"e{number}", "image": f"made.array_record#{number}", "patient": f"p{number}"}
    return example(**{**values, "findings": present, "boxes": (), **changes})


def votes(name: str, *present: str, asked: Sequence[str] = ASKED) -> Findings:
    counts = {finding: 5 if finding in present else 1 for finding in asked}
    return Findings(example=name, present=tuple(sorted(present)), votes=counts, n=5, origin="votes")


def table(examples: Sequence[Example], *found: Findings) -> Table:
    [only] = tables(examples, {one.example: one for one in found})
    return only


def cells(
    tp: int, fn: int, tn: int, fp: int, name: str = "haemorrhage"
) -> tuple[list[Example], list[Findings]]:
    """Examples and votes with so many of each outcome."""
    outcomes = [(True, True)] * tp + [(True, False)] * fn + [(False, False)] * tn + [(False, True)] * fp
    examples = [image(k, *([name] if gold else [])) for k, (gold, _) in enumerate(outcomes)]
    return examples, [votes(f"e{k}", *([name] if said else [])) for k, (_, said) in enumerate(outcomes)]


def test_rates_by_hand() -> None:
    examples, found = cells(8, 2, 45, 45)
    [row] = table(examples, *found).rows
    assert (row.finding, row.positives, row.negatives) == ("haemorrhage", 10, 90)
    assert row.sensitivity.value == pytest.approx(80)
    assert row.specificity.value == pytest.approx(50)
    assert row.s2.value == pytest.approx(2 * 80 * 50 / 130)
    for rate in (row.sensitivity, row.specificity, row.s2):
        assert rate.low < rate.value < rate.high


def test_wilson_by_hand() -> None:
    rate = wilson(8, 10)  # 0.4901 and 0.9433: Newcombe's formula, worked out with a calculator
    assert (rate.value, rate.low, rate.high) == pytest.approx((80, 49.02, 94.33), abs=0.01)
    assert wilson(10, 10).high == pytest.approx(100)
    assert wilson(10, 10).low == pytest.approx(72.25, abs=0.01)
    assert wilson(0, 0).value is None


def test_an_interval_of_s2_covers_the_truth() -> None:
    """Sensitivity .7 and specificity .6 of 60 positive and 60 negative images, in a hundred data sets."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(100):
        tp, tn = rng.binomial(60, 0.7), rng.binomial(60, 0.6)
        sums = np.repeat(np.eye(4), [tp, 60 - tp, tn, 60 - tn], axis=0)
        drawn = agreement._resampled(sums[:, None], [str(k) for k in range(120)])
        row = agreement._row("x", sums, drawn[:, 0])
        inside += row.s2.low <= 100 * 2 * 0.7 * 0.6 / 1.3 <= row.s2.high
    assert 88 <= inside <= 100


def test_the_paper_means_the_same_by_s2_and_average() -> None:
    for side in (0, 1):
        rows = [numbers[side] for name, numbers in PAPER.items() if name != "average"]
        for sensitivity, specificity, s2 in rows:
            assert 2 * sensitivity * specificity / (sensitivity + specificity) == pytest.approx(s2, abs=0.1)
        assert np.mean(rows, axis=0) == pytest.approx(PAPER["average"][side], abs=0.11)
    assert findings.vocabulary()["CFP"] >= tuple(PAPER)[:1]
    assert set(PAPER) - {"average"} <= set(findings.vocabulary()["CFP"]), "all of them are voted on"


def test_the_average_is_that_of_the_columns() -> None:
    one, said = cells(8, 2, 45, 45)
    pairs = [
        (image(k, *(e.findings or ()), *(["microaneurysm"] if k < 50 else [])),
         votes(e.id, *f.present, *(["microaneurysm"] if k % 4 == 0 else [])))
        for k, (e, f) in enumerate(zip(one, said, strict=True))
    ]  # fmt: skip
    made = table([e for e, _ in pairs], *(f for _, f in pairs))
    assert [row.finding for row in made.rows] == ["microaneurysm", "haemorrhage"]
    for column in ("sensitivity", "specificity", "s2"):
        values = [getattr(row, column).value for row in made.rows]
        assert getattr(made.average, column).value == pytest.approx(np.mean(values))


def test_nothing_right_is_zero_and_nothing_to_compare_is_nothing() -> None:
    examples, found = cells(0, 5, 0, 5)
    [row] = table(examples, *found).rows
    assert (row.sensitivity.value, row.specificity.value, row.s2.value) == (0, 0, 0)
    examples, found = cells(4, 1, 0, 0)
    made = table(examples, *found)
    assert made.left_out == {"haemorrhage": "every image shows it"}
    assert (made.rows[0].sensitivity.value, made.rows[0].specificity.value, made.rows[0].s2.value) == (
        80,
        None,
        None,
    )
    assert made.average.s2.value is None


def test_an_image_whose_masks_are_not_about_a_finding_is_no_negative() -> None:
    examples = [
        image(0, "haemorrhage"),
        image(1, "microaneurysm", searched=("microaneurysm",)),
        image(2, searched=("haemorrhage", "microaneurysm")),
    ]
    made = table(examples, votes("e0", "haemorrhage"), votes("e1", "haemorrhage"), votes("e2"))
    counted = {row.finding: (row.positives, row.negatives, row.specificity.value) for row in made.rows}
    assert counted == {"haemorrhage": (1, 1, 100.0), "microaneurysm": (1, 2, 100.0)}
    made = table(examples[:2], votes("e0", "haemorrhage"), votes("e1", "haemorrhage"))
    assert made.left_out["haemorrhage"] == "every image shows it"


def test_what_is_compared() -> None:
    """Images with masks and votes, each once; findings that some mask shows and that were voted on."""
    examples = [
        image(0, "haemorrhage"),
        image(0, "haemorrhage", id="e0 again"),  # a second question about the same picture
        image(1),
        image(2, "irma"),
        image(3, "haemorrhage"),  # quarantined: no votes
        image(4, "haemorrhage"),  # findings by masks: no votes either
        image(5, id="e5", findings=None),
    ]
    masks = Findings(example="e4", present=("haemorrhage",), votes={}, n=0, origin="pixels")
    found = [
        votes("e0", "haemorrhage"),
        votes("e0 again"),
        votes("e1"),
        votes("e2"),
        votes("e5", "hard exudate"),
    ]
    made = table(examples, *found, masks)
    assert (made.images, made.unanswered) == (3, 2)
    assert [(row.finding, row.positives, row.negatives) for row in made.rows] == [("haemorrhage", 1, 2)]
    assert made.rows[0].sensitivity.value == 100
    assert made.left_out == {"irma": "not voted on"}


def test_data_sets_and_modalities_are_apart() -> None:
    examples = [
        image(0, "haemorrhage"),
        image(1, "subretinal fluid", modality="OCT"),
        image(2, "haemorrhage", dataset="other"),
    ]
    made = tables(examples, {one.id: votes(one.id) for one in examples})
    assert [(one.dataset, one.modality, one.images) for one in made] == [
        ("made", "CFP", 1),
        ("made", "OCT", 1),
        ("other", "CFP", 1),
    ]


def test_patients_are_drawn_not_images() -> None:
    """Ten images of one patient say no more than one does; so the interval is wider."""
    examples, found = cells(40, 10, 40, 10)
    [alone] = table(examples, *found).rows
    grouped = [image(k, *(one.findings or ()), patient=f"p{k // 10}") for k, one in enumerate(examples)]
    [together] = table(grouped, *found).rows
    assert together.s2.value == alone.s2.value
    assert together.s2.high - together.s2.low > 1.3 * (alone.s2.high - alone.s2.low)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return voters.idrid(tmp_path_factory.mktemp("agreement"))


def seeing(body: Body, number: int) -> Reply:
    """All findings but drusen: soft exudates too, which one of the three images with masks does not show."""
    _, fields = voters.schema(body)
    return Reply(texts=voters.ballots(body, {name: 3 for name in fields if name != "drusen"}))


def test_the_command(examples: Path, tmp_path: Path) -> None:
    out = tmp_path / "votes"
    with Server(seeing) as server:
        words = [
            sys.executable,
            "-m",
            "data_pipeline.findings",
            "--quality",
            f"--examples={examples}",
            f"--out={out}",
        ]
        words += [f"--votes.server.address={server.address}", "--votes.server.model=stand-in", "--votes.n=3"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        again = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert len(server.bodies) == 3, "only images with masks, each once, and not again"
    assert again.stdout == done.stdout
    ours, paper = done.stdout.split("For comparison, the paper's Table 6")
    assert "Votes against masks: idrid, CFP; 3 votes an image by the model 'stand-in'.\n3 images of" in ours
    line = next(line for line in ours.splitlines() if line.startswith("cotton-wool spot"))
    assert line.split()[2:3] == ["100.0"]
    assert line.split()[-2:] == ["2", "1"]
    assert "not in the average: microaneurysm (every image shows it)" in ours
    assert [line.split()[-7:] for line in paper.splitlines() if line.startswith("average")] == [
        ["66.2", "64.7", "62.6", "|", "42.6", "63.1", "46.8"]
    ]
    report = json.loads((out / "quality.json").read_text())
    assert (report["model"], report["n"]) == ("stand-in", 3)
    [made] = report["tables"]
    row = next(row for row in made["rows"] if row["finding"] == "cotton-wool spot")
    assert (row["sensitivity"]["value"], row["specificity"]["value"], row["s2"]["value"]) == (100, 0, 0)
    assert (row["positives"], row["negatives"]) == (2, 1)
    assert report["paper"]["average"] == [[66.2, 64.7, 62.6], [42.6, 63.1, 46.8]]


def test_without_masks_there_is_nothing_to_measure(tmp_path: Path) -> None:
    examples = write_examples(tmp_path / "examples", {"a": [example(id="1", findings=None, boxes=())]})
    with Server(seeing) as server:
        config = VotesConfig(server=voters.chat(server.address))
        source = findings.make_source("votes", config, only_masked=True)
        findings.run(examples, tmp_path / "out", source=source)
    assert list(jobs.read(tmp_path / "out", Findings)) == []
    with pytest.raises(DataError, match="take a data set with masks"):
        agreement.measure(examples, tmp_path / "out", source.ways[-1])
