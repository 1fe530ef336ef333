"""The whole report.html: every section, nothing loaded, hostile text as text, unfinished workdirs."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import jax
import pytest
from flax import nnx

from fundus_jax.data import open_pool
from fundus_jax.models import read_config
from fundus_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from fundus_jax.records import ConfigError
from fundus_jax.report import cases, curves, write_report, write_rollouts
from tests.report.made import make_answers, make_rollouts, make_run

# What a page may point to: pictures within it, places on it, and the pages of the same run.
OWN = re.compile(r"data:image/jpeg;base64,|#|(rollouts/)?\d{6}\.html$|\.\./report\.html$")
SECTIONS = ("results", "pipeline", "cases", "rollouts", "curves", "evaluation", "time", "setup")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests that change it copy it first."""
    return make_run(tmp_path_factory.mktemp("report") / "demo")


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(
        shutil.copytree(finished, tmp_path / "demo", ignore=shutil.ignore_patterns("checkpoints", "tb"))
    )


class Page(HTMLParser):
    """What a browser would make of the page: its tags with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag."""
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Note a text."""
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every tag of one name."""
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def missing(self) -> int:
        """How many lines say that something is missing."""
        return sum(attributes.get("class") == "missing" for attributes in self.named("p"))


def page_of(workdir: Path) -> Page:
    """The report of a workdir, parsed."""
    return Page(write_report(workdir).read_text(encoding="utf-8"))


def loads_nothing(page: Page) -> bool:
    """Whether the page asks for nothing, runs nothing, and forbids itself both."""
    names = {name for name, _ in page.tags}
    attributes = [(key, value or "") for _, found in page.tags for key, value in found.items()]
    addresses = [value for key, value in attributes if key in ("src", "href", "srcset", "action", "data")]
    policies = [one.get("content") or "" for one in page.named("meta") if one.get("http-equiv")]
    return (
        not names & {"script", "link", "iframe", "object", "embed", "form", "base"}
        and all(OWN.match(one) for one in addresses)
        and not any(key.startswith("on") or "url(" in value for key, value in attributes)
        and not re.search(r"url\(|@import", page.text)
        and any("default-src 'none'" in one for one in policies)
    )


def test_a_finished_run_has_every_section(finished: Path) -> None:
    page = page_of(finished)
    assert [one["id"] for one in page.named("section")] == list(SECTIONS)
    assert page.missing == 0
    for text in (
        "phantoms: drawn", "then discarded", "gives no diagnosis", "Moderate NPDR", "microaneurysm",
        "Judge, by the findings: plausible", "advantage", "Sampler against trainer", "FunBench", "kl_coef",
        "4 min 40 s", "SFT + GRPO, with traces, process reward by findings or knowledge",
    ):  # fmt: skip
        assert text in page.text, text
    config = read_config(finished / "policy")
    model = nnx.eval_shape(lambda: Qwen2_5_VL(config, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert f"{count / 1e6:.1f} million parameters" in page.text
    assert len(page.named("img")) == cases.CASES + 6
    assert page.text.count("after GRPO") > cases.CASES
    curves_drawn = [one for one in page.named("svg") if one.get("class") == "curve"]
    panels = [spec for rows in curves.PANELS.values() for spec in rows]
    assert len(curves_drawn) == len(panels) - 1, "all but that of the localisation reward"


def test_it_is_one_small_file_that_loads_nothing(finished: Path) -> None:
    path = write_report(finished)
    assert path == finished / "report.html"
    assert path.stat().st_size < 6_000_000
    assert loads_nothing(Page(path.read_text(encoding="utf-8")))
    first = path.read_bytes()
    assert write_report(finished).read_bytes() == first  # nothing in it depends on when it was written
    assert not list(finished.glob(".report*"))


@pytest.mark.parametrize(
    "markup",
    [
        '<script src="data:,x"></script>',
        '<img src="https://a.example/x.png">',
        '<p style="background:url(x)">',
        '<p onclick="x">',
    ],
)
def test_the_check_of_what_is_loaded_can_fail(finished: Path, markup: str) -> None:
    text = write_report(finished).read_text(encoding="utf-8")
    assert not loads_nothing(Page(text.replace("</main>", f"{markup}</main>")))


def test_what_a_model_writes_never_becomes_markup(copied: Path) -> None:
    make_answers(copied, 30, hostile=True)
    config = json.loads((copied / "config.json").read_text())
    config["config"]["name"] = "</title><script>alert(2)</script>"
    (copied / "config.json").write_text(json.dumps(config))
    text = write_report(copied).read_text(encoding="utf-8")
    page = Page(text)
    assert loads_nothing(page)
    assert 'alert("x")' in page.text  # as text it is there
    assert "</article>PDR" in page.text
    assert text.count("<article") == text.count("</article>")
    assert not re.search("[\x00\u202e]", text)


def test_the_headline_is_the_summary(finished: Path) -> None:
    summary = json.loads((finished / "evaluation" / "summary.json").read_text())
    text = page_of(finished).text
    for stage in ("sft", "grpo"):
        entry = summary["stages"][stage]
        for found in (
            entry["greedy"]["accuracy"],
            entry["sampled"]["accuracy"],
            entry["greedy"]["findings"]["f1"],
        ):
            assert f"{100 * found['value']:.1f} %" in text
            assert f"[{100 * found['low']:.1f}, {100 * found['high']:.1f}]" in text
    gain = summary["differences"]["reward_total"]
    assert f"{gain['value']:+.3f}" in text


def drop(folder: Path, *names: str) -> None:
    """Delete files or folders of a workdir."""
    for name in names:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_an_empty_workdir_says_what_is_missing(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert [one["id"] for one in page.named("section")] == list(SECTIONS)
    assert page.missing >= len(SECTIONS)
    assert "not been measured yet" in page.text


def test_only_data(copied: Path) -> None:
    drop(copied, "metrics.jsonl", "timeline.jsonl", "rollouts", "evaluation")
    page = page_of(copied)
    assert len(page.named("img")) == cases.CASES
    assert "Questions by task" in page.text
    for text in (
        "run the stages base, sft, grpo",
        "No answers to show",
        "run the stage grpo",
        "No stage has finished",
    ):
        assert text in page.text


def test_no_grpo_yet(copied: Path) -> None:
    path = copied / "evaluation" / "summary.json"
    summary = json.loads(path.read_text())
    del summary["stages"]["grpo"]
    path.write_text(json.dumps({**summary, "differences": {}}))
    drop(copied, "rollouts")
    page = page_of(copied)
    assert "GRPO has not been measured." in page.text
    assert "run the stage grpo" in page.text
    assert "after SFT" in page.text
    assert "GRPO raised" not in page.text


@pytest.mark.parametrize(
    ("stages", "think", "kept", "verdict", "training"),
    [
        ("", False, ["base"], "The base policy answers", "none"),
        ("sft", False, ["base", "sft"], "After SFT the policy answers", "SFT, without traces"),
        (
            "grpo",
            True,
            ["base", "grpo"],
            "After GRPO the policy answers",
            "GRPO, with traces, process reward off",
        ),
    ],
)
def test_a_run_that_leaves_stages_out(
    copied: Path, stages: str, think: bool, kept: list[str], verdict: str, training: str
) -> None:
    stored = json.loads((copied / "config.json").read_text())
    stored["config"]["stages"], stored["config"]["prompt"]["think"] = stages, think
    stored["config"]["grpo"]["process_weight"] = 0.0
    (copied / "config.json").write_text(json.dumps(stored))
    path = copied / "evaluation" / "summary.json"
    summary = json.loads(path.read_text())
    summary = {"stages": {name: summary["stages"][name] for name in kept}, "differences": {}}
    path.write_text(json.dumps(summary))
    lines = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(line) + "\n" for line in lines if line["stage"] in kept)
    (copied / "metrics.jsonl").write_text(text)
    if "grpo" not in kept:
        drop(copied, "rollouts")
    page = page_of(copied)
    assert verdict in page.text
    assert training in page.text
    assert page.missing == 0
    assert "GRPO has not been measured" not in page.text
    assert ("This run has no GRPO" in page.text) == ("grpo" not in kept)
    assert "judge of the process reward" not in page.text
    assert len(page.named("img")) >= cases.CASES


def test_who_wrote_and_judged_is_told(copied: Path) -> None:
    assert "No language model wrote or judged them." in page_of(copied).text
    stored = json.loads((copied / "config.json").read_text())
    stored["config"]["judge"]["kind"] = "server"
    stored["config"]["data"]["findings"] = "both"
    stored["config"]["data"]["votes"]["server"]["model"] = "some-vlm"
    (copied / "config.json").write_text(json.dumps(stored))
    text = page_of(copied).text
    assert "the judge of the process reward is “server” in training and “rules” in the figures below" in text
    assert "answer + format + process, at most 3, process by rules" in text
    row = text[text.index("Reward: total") :]
    assert "not per cent, process by rules" in row[:100]
    assert "Findings of images without masks are the votes of a model, “some-vlm”" in text
    assert "No language model wrote" not in text


def test_damage_is_reported_and_nothing_else_is_lost(copied: Path) -> None:
    (copied / "evaluation" / "summary.json").write_text("{")
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "grpo", "st')
    drop(
        copied, *(str(path.relative_to(copied)) for path in copied.glob("data/examples/test-*.array_record"))
    )
    text = page_of(copied).text
    assert "evaluation/summary.json could not be read" in text
    assert "metrics.jsonl: 1 lines are damaged" in text
    assert "the picture could not be read" in text
    assert "Sampler against trainer" in text


def test_no_workdir_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no directory"):
        write_report(tmp_path / "nothing")


def rollout_page(workdir: Path, step: int = 30) -> Page:
    """A page of rollouts, parsed."""
    return Page((workdir / "rollouts" / f"{step:06d}.html").read_text(encoding="utf-8"))


def test_a_step_has_a_page_of_its_own(finished: Path) -> None:
    page = rollout_page(finished)
    assert loads_nothing(page)
    groups = [json.loads(line) for line in (finished / "rollouts" / "000030.jsonl").read_text().splitlines()]
    assert len(page.named("article")) == len(page.named("img")) == len(groups) == 3
    marks = {one["class"] for one in page.named("mark")}
    assert {"supported", "unsupported"} <= marks <= {"supported", "unsupported", "contradicted"}
    for text in (
        "Rollouts of step 30",
        "Which disease",
        "advantage",
        "answer 1 · format 1 · process 1",
        "Judge, by the ",
    ):
        assert text in page.text, text
    links = [one["href"] for one in page.named("a")]
    assert links == ["000010.html", "../report.html"]
    report = [one["href"] or "" for one in page_of(finished).named("a")]
    assert [one for one in report if ".html" in one] == ["rollouts/000010.html", "rollouts/000030.html"]


def test_alarms_are_told(copied: Path) -> None:
    assert "No alarm was raised" in page_of(copied).text
    alarms = [
        {"name": "kl", "step": 30, "reason": "the policy is 0.71 nats a token from the reference"},
        {"name": "<b>", "step": 12, "reason": "<script>alert(3)</script>"},
    ]
    (copied / "alarms.jsonl").write_text("".join(json.dumps(one) + "\n" for one in alarms))
    report = page_of(copied)
    assert "2 alarms during GRPO: kl, <b>" in report.text
    assert "0.71 nats" in report.text
    assert loads_nothing(report)
    make_rollouts(copied, 30, 0.8, False)
    page = rollout_page(copied)
    assert "Alarms that began here" in page.text
    assert "0.71 nats" in page.text
    assert "alert(3)" not in page.text, "an alarm of another step"


def test_a_page_of_hostile_rollouts(copied: Path) -> None:
    make_rollouts(copied, 30, 0.8, True)
    path = copied / "rollouts" / "000030.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["weights"]['"><script>x</script>'] = 2
        for one in line["rollouts"]:
            one["own"] = {'"><script>x</script>': 3e9}
            one["why"] = {"format": "<img src=x onerror=alert(4)>"}
            reasons = ["</article><script>alert(5)</script>"]
            one["verdicts"] = [{"rating": "<i>", "reference": "<u>", "reasons": reasons}, "no verdict"]
    lines.append({"example": "<a href=x>", "rollouts": [{}, {"text": "\ud800", "own": [], "total": "x"}]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    examples = {one.id: one for one in open_pool(copied / "data", "train").examples}
    text = write_rollouts(copied, 30, examples).read_text(encoding="utf-8")
    page = Page(text)
    assert loads_nothing(page)
    assert text.count("<article") == text.count("</article>") == 4
    for said in ('alert("x")', "alert(4)", "alert(5)", "<i>", "<u>", "<a href=x>"):
        assert said in page.text, said
    assert not re.search("[\x00\u202e]", text)
    widths = [float(one) for one in re.findall(r"width:([\d.]+)%", text)]
    assert widths
    assert max(widths) <= 100
