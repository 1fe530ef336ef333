"""A user's reward functions: loaded from their file or refused, and never the end of a run."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fundus_jax import stop
from fundus_jax.data import open_pool
from fundus_jax.evaluation.items import Item
from fundus_jax.evaluation.report import Prediction
from fundus_jax.grpo import own_rewards
from fundus_jax.grpo import train as grpo
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.judge import RulesJudge
from fundus_jax.grpo.own_rewards import Part, facts_of
from fundus_jax.grpo.rewards import Score, from_dict, reward_metrics
from fundus_jax.records import ConfigError, Example, Findings
from fundus_jax.workdir import Workdir
from launch import evaluate
from launch.config import as_json
from tests import small

EXAMPLE = Example(
    id="e", dataset="toy", split="train", patient="p", eye="", modality="CFP", image="toy.array_record#0",
    labels=("Moderate NPDR",), task="disease", question="Which disease?", options=("Moderate NPDR", "PDR"),
    answer="Moderate NPDR", findings=("haemorrhage",), boxes=(),
)  # fmt: skip
FOUND = Findings(example="e", present=("haemorrhage",), votes={}, n=0, origin="pixels")
TEXT = "<think>A haemorrhage.</think> <answer>Moderate NPDR.</answer>"
FACTS = facts_of(TEXT, EXAMPLE, FOUND, {}, finished=True, tokens=12)
GOOD = Score(answer=1.0, format=1.0, process=1.0, total=3.0)


def written(path: Path, text: str) -> str:
    """A file of rewards; its path."""
    path.write_text(text)
    return str(path)


def said(tmp_path: Path, body: str) -> Part:
    """What a function with this body says."""
    path = written(tmp_path / "mine.py", f"import numpy as np\nimport math\ndef mine(facts):\n    {body}\n")
    (one,) = own_rewards.load(f"{path}:mine*2")
    return one(FACTS)


def test_the_facts_of_a_rollout() -> None:
    assert (FACTS.think, FACTS.answer, FACTS.well_formed, FACTS.right) == (
        "A haemorrhage.", "Moderate NPDR.", True, True
    )  # fmt: skip
    assert (FACTS.text, FACTS.tokens, FACTS.finished, FACTS.example, FACTS.findings) == (
        TEXT, 12, True, EXAMPLE, FOUND
    )  # fmt: skip
    with pytest.raises(FrozenInstanceError):
        FACTS.right = False  # type: ignore[misc]
    with pytest.raises(TypeError):
        FACTS.knowledge["PDR", "CFP"] = None  # type: ignore[index]


@pytest.mark.parametrize(
    ("body", "value"),
    [
        ("return facts.tokens / 4", 3.0),
        ("return facts.right", 1.0),
        ("return np.float32(0.5)", 0.5),
        ("return np.asarray(2)", 2.0),
        ("return -1e9", -1e9),
    ],
)
def test_numbers_of_any_kind_count(tmp_path: Path, body: str, value: float) -> None:
    assert said(tmp_path, body) == Part("mine", 2.0, value)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("return None", "returned NoneType, which is no number"),
        ("return 'high'", "returned str, which is no number"),
        ("return math.nan", "returned nan"),
        ("return np.inf", "returned inf"),
        ("return np.ones(2)", "returned ndarray, which is no number"),
        ("return 1j", "returned complex, which is no number"),
        ("return 10 ** 400", "OverflowError: int too large to convert to float"),
        ("return facts.colour", "AttributeError: 'Facts' object has no attribute 'colour'"),
        ("raise KeyError('x' * 9999)", "KeyError: 'xxx"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("return mine(facts)", "RecursionError: maximum recursion"),
    ],
)
def test_anything_else_is_an_abstention_with_its_reason(tmp_path: Path, body: str, why: str) -> None:
    part = said(tmp_path, body)
    assert part.value is None
    assert part.why.startswith(why)
    assert len(part.why) <= own_rewards.LONGEST
    assert GOOD.plus([part]).total is None


def test_a_run_that_is_to_stop_stops_within_a_function(tmp_path: Path) -> None:
    def stopped(_: Any) -> float:
        raise stop.Stopped(143)

    with pytest.raises(stop.Stopped):
        own_rewards.OwnReward("mine", 1.0, stopped)(FACTS)


def test_parts_join_the_total_with_their_weights() -> None:
    parts = [Part("a", 0.2, 5.0), Part("b", -1.0, 0.5)]
    assert GOOD.plus(parts).total == pytest.approx(3.5)
    assert GOOD.plus([]) == GOOD
    assert replace(GOOD, total=None).plus(parts).total is None, "the judge abstained"
    score = GOOD.plus([*parts, Part("c", 1.0, None, "returned None")])
    assert score.total is None
    assert not score.valid
    through = json.loads(json.dumps(asdict(score)))
    assert from_dict(through) == score
    metrics = reward_metrics([[GOOD.plus(parts[:1]), GOOD.plus([Part("a", 0.2, None, "x")])]])
    assert (metrics["a"], metrics["a_abstained"], metrics["total"]) == (5.0, 1, 4.0)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("mine.py", "write FILE.py:FUNCTION"),
        ("mine.py:brief*", "write FILE.py:FUNCTION"),
        ("mine.py:brief*nan", "write FILE.py:FUNCTION"),
        ("mine.py:brief*0", "any number but 0"),
        ("mine.py:brief*2*3", "write FILE.py:FUNCTION"),
        ("mine.txt:brief", "write FILE.py:FUNCTION"),
        ("none.py:brief", r"none.py, which can not be read \(No such file.*working directory"),
        ("mine.py:brief,mine.py:brief*2", "'brief' already; rename"),
        ("mine.py:total", "'total' already; rename"),
        ("mine.py:rated_x", "'rated_x' already; rename"),
        ("mine.py:missing", r"'missing' of mine.py, which has no .* \(it has brief, later, two, yields\)"),
        ("mine.py:NUMBER", "no such function"),
        ("mine.py:two", "can not be called so .*one argument, the Facts"),
        ("mine.py:later", "asynchronous or a generator"),
        ("mine.py:yields", "asynchronous or a generator"),
        ("bad.py:brief", "bad.py can not be imported: NameError: name 'nothing'"),
        ("worse.py:brief", "worse.py can not be imported: SyntaxError"),
    ],
)  # fmt: skip
def test_what_can_not_work_is_refused_before_any_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    written(
        tmp_path / "mine.py",
        "NUMBER = 3\ndef brief(facts): return 1\ndef two(a, b): return 1\n"
        "async def later(facts): return 1\ndef yields(facts): yield 1\n",
    )
    written(tmp_path / "bad.py", "nothing\n")
    written(tmp_path / "worse.py", "def brief(:\n")
    with pytest.raises(ConfigError, match=message):
        GrpoConfig(rewards=entry).validate()


def test_several_functions_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a.py", "def one(facts): return 1\ndef two(facts, scale=2): return scale\n")
    (tmp_path / "sub").mkdir()
    written(
        tmp_path / "sub" / "b.py",
        "from dataclasses import dataclass\n@dataclass\nclass Three:\n    by: int = 3\n"
        "    def __call__(self, facts): return self.by\nthree = Three()\n",
    )
    text = "a.py:one*0.5, sub/b.py:three*-1e-1,a.py:two"
    loaded = own_rewards.load(text)
    assert [(one.name, one.weight, one(FACTS).value) for one in loaded] == [
        ("one", 0.5, 1.0), ("three", -0.1, 3.0), ("two", 1.0, 2.0)
    ]  # fmt: skip
    assert own_rewards.load("") == ()
    assert list(own_rewards.digests(text)) == ["a.py", "sub/b.py"]
    assert not (tmp_path / "__pycache__").exists()


def test_what_runs_is_what_was_hashed(tmp_path: Path) -> None:
    for value in (1, 2):  # of one size, within one second: bytecode of old would go unnoticed
        path = written(tmp_path / "mine.py", f"def mine(facts): return {value}\n")
        (one,) = own_rewards.load(f"{path}:mine")
        assert one(FACTS).value == value


def test_a_workdir_knows_the_file_by_its_hash(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.py", "def mine(facts): return 1\n")
    config = small.config(grpo=replace(small.config().grpo, rewards=f"{path}:mine"))
    Workdir(tmp_path / "run", as_json(config)).close()
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert stored["reward_files"] == {path: hashlib.sha256(Path(path).read_bytes()).hexdigest()}
    Workdir(tmp_path / "run", as_json(config)).close()
    written(Path(path), "def mine(facts): return 2\n")
    with pytest.raises(ConfigError, match=r"another configuration \(reward_files.*mine\.py"):
        Workdir(tmp_path / "run", as_json(config))
    assert "reward_files" not in as_json(small.config())


def readme() -> tuple[str, str, str]:
    """The file's name, the function and the --config.grpo.rewards of the README's section."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Your own reward\n(.*?)^## ", text, flags=re.M | re.S)
    assert section
    code = re.search(r"`(\w+\.py)`:\n\n```python\n(.*?)```", section[1], flags=re.S)
    command = re.search(r"```bash\n(.*?)\n```", section[1], flags=re.S)
    assert code
    assert command
    (flag,) = [word for word in shlex.split(command[1]) if word.startswith("--config.grpo.rewards=")]
    return code[1], code[2], flag.partition("=")[2]


def test_the_example_of_the_readme_trains(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    source = small.data(tmp_path_factory)
    monkeypatch.chdir(tmp_path)
    name, code, rewards = readme()
    written(tmp_path / name, code + "\n\ndef odd(facts):\n    return [1.0, None][facts.tokens % 2]\n")
    (brief,) = own_rewards.load(rewards)
    assert brief(FACTS) == Part("brief", 0.2, 1.0)
    long = facts_of("<think>" + "word " * 60 + "</think>", EXAMPLE, None, {}, finished=True, tokens=70)
    assert brief(long).value == 0.5

    config = replace(small.config().grpo, steps=2, rewards=f"{rewards},{name}:odd", show_every=1)
    trainer = small.open_run(tmp_path / "run", source, small.config(grpo=config))
    trainer.plan = trainer.work.stages = {"grpo": config.steps}
    prompts = grpo.Prompts(trainer.grpo_pool(), trainer.processor, trainer.config.prompt, 512)
    grpo.train(trainer.work, small.bigram(trainer), prompts, RulesJudge(), config, trainer.mesh)
    trainer.work.close()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["reward/brief_abstained"] == 0
        assert line["reward/odd_abstained"] == round(8 * line["abstain"])
    lost = sum(line["reward/odd_abstained"] for line in lines)
    assert (lost > 0) == ("reward odd abstained on" in caplog.text)
    groups = [
        json.loads(line)
        for step in (1, 2)
        for line in (tmp_path / "run" / "rollouts" / f"{step:06d}.jsonl").read_text().splitlines()
    ]
    assert groups[0]["weights"] == {"answer": 1.0, "format": 1.0, "process": 1.0, "brief": 0.2, "odd": 1.0}
    shown = [one for group in groups for one in group["rollouts"]]
    assert sum(one["own"]["odd"] is None for one in shown) == lost
    for one in shown:
        assert (one["total"] is None) == bool(one["why"])
        if one["total"] is not None:
            total = (
                one["answer"] + one["format"] + one["process"] + 0.2 * one["own"]["brief"] + one["own"]["odd"]
            )
            assert one["total"] == pytest.approx(total)
        else:
            assert one["why"] == {"odd": "returned NoneType, which is no number"}
            assert one["advantage"] == 0


def test_of_several_processes_each_grades_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two processes grades rows 1 and 3, and puts what all say into the rows' order."""
    path = written(tmp_path / "mine.py", "def mine(facts): return facts.tokens\n")
    own = own_rewards.load(f"{path}:mine")
    asked: list[Any] = []

    class Prompts:
        rows = [(replace(EXAMPLE, id=str(i)), "") for i in range(4)]
        pool = type("Pool", (), {"findings": {}, "knowledge": {}})
        processor = type("Processor", (), {"eos_ids": (9,)})
        form: dict[str, Any] = {"think": True}

    def gather(share: Any) -> list[Any]:
        asked.append(share)
        return [[[[["mine", 1.0, -float(row), ""]]] for row in (0, 2)], json.loads(json.dumps(share))]

    monkeypatch.setattr(own_rewards.jax, "process_count", lambda: 2)
    monkeypatch.setattr(own_rewards.jax, "process_index", lambda: 1)
    monkeypatch.setattr(own_rewards.hosts, "gather", gather)
    monkeypatch.setattr(own_rewards.stop, "interruptible", lambda action: action())
    mask = np.tril(np.ones((4, 4), bool))[:, None]  # lengths 1 to 4
    rollout = grpo.Rollout(np.ones((4, 1, 4), int), mask, mask)  # type: ignore[arg-type]
    found = own_rewards.grade(own, Prompts, np.arange(4), [["x"]] * 4, rollout, [[GOOD]] * 4)
    assert [group[0].own[0].value for group in found] == [0.0, 2.0, -2.0, 4.0]
    assert len(asked[0]) == 2


def test_the_evaluation_scores_with_them_too(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pool = open_pool(small.data(tmp_path_factory) / "data", "train")
    example = next(one for one in pool.examples if one.task == "disease")
    reply = f"<think>So it is.</think> <answer>{example.answer}</answer>"
    item = Item(
        id=example.id, images=(), messages=(), options=(), answers=(), level="L4", task="disease", part="",
        modality=example.modality, unit="p", lettered=False,
    )  # fmt: skip
    answers = [Prediction(item=item, response=reply, tokens=tokens) for tokens in (7, 8)]
    path = written(tmp_path / "mine.py", "def mine(facts): return [None, facts.tokens][facts.tokens > 7]\n")
    config = small.config(grpo=replace(small.config().grpo, process_weight=0.0, rewards=f"{path}:mine*0.5"))
    parts = evaluate._rewards(answers, pool, config)
    np.testing.assert_array_equal(parts, [[np.nan, 1, 1, 0, np.nan], [6, 1, 1, 0, np.nan]])
