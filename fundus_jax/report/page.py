"""Puts the report together: what each section shows, in words and views, and the template that lays it out.

Autoescape is on for everything, and the page forbids itself scripts and requests (Content-Security-Policy):
what a policy under training wrote is shown on it. Neighbours: `collect` reads; `cases`, `figures` and
`curves` prepare.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2

from fundus_jax import dialog
from fundus_jax.findings import clean
from fundus_jax.records import GRID, Example
from fundus_jax.report import charts, curves, figures, rollouts
from fundus_jax.report.cases import asks_for_trace, boxes_asked, sample_cases
from fundus_jax.report.collect import Run
from fundus_jax.report.exams import exams

TEMPLATES = resources.files("fundus_jax.report") / "templates"
DATASETS = {"phantom": "phantoms (drawn)", "idrid": "IDRiD"}
PROCESS = {  # what grpo.process says
    "selective": "by findings or knowledge, as the answer is right or wrong",
    "findings": "by findings alone",
    "knowledge": "by knowledge alone",
    "sum": "by findings and knowledge, added",
}
OPENING = {"base": "The base policy", "sft": "After SFT the policy", "grpo": "After GRPO the policy"}


def templates() -> jinja2.Environment:
    """The templates, everything in braces escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (TEMPLATES / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": lambda value: f"{value:,}", "duration": curves.duration, "clean": clean,
        "unboxed": dialog.without_boxes,
        "number": figures.number, "signed": figures.signed,
        "short": charts.short,
    }  # fmt: skip
    return environment


def render_rollouts(run: Run, step: int, examples: Mapping[str, Example]) -> str:
    """The page of the rollouts of one step, as one HTML document."""
    weights = rollouts.weights_of(run)
    before = [page for page in run.pages if page < step]
    context = {
        "run": run,
        "step": step,
        "groups": rollouts.rollout_groups(run, examples),
        "weights": weights,
        "most_reward": rollouts.most(run, weights),
        "alarms": [alarm for alarm in run.alarms if alarm.get("step") == step],
        "before": before[-1] if before else None,
    }
    return templates().get_template("rollouts.html.jinja").render(context)


def render(run: Run) -> str:
    """The report of a run as one HTML document."""
    weights = rollouts.weights_of(run)
    most = rollouts.most(run, weights)
    context = {
        "run": run,
        "stage_names": figures.STAGE_NAMES,
        "facts": facts(run),
        "statements": statements(run),
        "verdict": verdict(run),
        "cards": figures.cards(run.summary, run.shown, weights, most),
        "cases": sample_cases(run),
        "boxes": boxes_asked(run),
        "rollouts": [
            (step, list(groups))
            for step, groups in itertools.groupby(rollouts.rollout_groups(run), lambda one: one.step)
        ],
        "weights": weights,
        "most_reward": most,
        "watched": any(name.startswith("alarm/") for line in run.metrics.get("grpo", ()) for name in line),
        "grid": GRID,
        "curves": curves.panels(run.metrics),
        "exams": exams(run.metrics),
        "best_used": run.config.get("exam", {}).get("use") == "best",
        "tables": {mode: figures.tables(run.summary, mode) for mode in ("greedy", "sampled")},
        "timeline": curves.timeline(run.timeline),
        "phases": curves.phases(run.metrics),
        "settings": settings(run.config),
        "commands": commands(run),
    }
    return templates().get_template("report.html.jinja").render(context)


def facts(run: Run) -> list[tuple[str, str]]:
    """(name, value) of what ran, as far as it is known."""
    config, data = run.config, run.config.get("data", {})
    found = [("Policy", _policy(run))]
    dataset = str(data.get("dataset", "")) or "unknown"
    images = {
        split: sum(n for (_, s), n in run.census.images.items() if s == split)
        for split in ("train", "val", "test")
    }
    counts = ", ".join(f"{n:,} {split}" for split, n in images.items() if n)
    found.append(("Data", f"{DATASETS.get(dataset, dataset)}{': ' + counts + ' images' if counts else ''}"))
    steps = [
        f"{stage} {_last_step(run, stage):,}" for stage in ("base", "sft", "grpo") if run.metrics.get(stage)
    ]
    found.append(("Steps", ", ".join(steps) or "none yet"))
    if config:
        found.append(("Training", training(run)))
    found.append(("Arithmetic", str(config.get("compute", "unknown"))))
    for key, name in (("device", "Device"), ("mesh", "Mesh")):  # where the entry writes them beside its times
        known = dict.fromkeys(str(line[key]) for line in run.timeline if line.get(key))
        known = known or ([str(config[key])] if config.get(key) else [])
        if known:
            found.append((name, ", then ".join(known)))
    if run.timeline:
        total = sum(float(line.get("seconds") or 0) for line in run.timeline)
        found.append(("Started", curves.moment(run.timeline[0].get("started"))))
        found.append(("Took", curves.duration(total)))
    if run.config_hash:
        found.append(("Configuration", run.config_hash[:12]))
    return found


def training(run: Run) -> str:
    """What the configuration trains after the base: stages, traces or none, the process reward."""
    grpo, stages = run.config.get("grpo", {}), [name for name in run.planned if name != "base"]
    if not stages:
        return "none"
    parts = [" + ".join(name.upper() for name in stages)]
    parts.append("with traces" if asks_for_trace(run) else "without traces")
    if "grpo" in stages:
        judged = PROCESS.get(str(grpo.get("process", "selective")), str(grpo.get("process")))
        parts.append(f"process reward {judged if grpo.get('process_weight', 1.0) else 'off'}")
    return ", ".join(parts)


def statements(run: Run) -> list[str]:
    """What a reader must know before believing a number."""
    found = []
    if run.config.get("data", {}).get("dataset") == "phantom":
        found.append(
            "The images are phantoms: drawn by a program, no patient's. They test the method as a "
            "physicist's test object does; no number here has a clinical meaning."
        )
    elif run.census.images:
        found.append(
            "The images come from the user's own copy of a public data set, under its licence. Numbers on "
            "them are no clinical validation."
        )
    if run.config and not run.config.get("model"):
        found.append(
            "The policy is small and was made in this run. Its vision tower was first warmed up under a "
            "head that is told the findings and labels directly; that head was then discarded. This base "
            "stage stands in for Qwen2.5-VL's pre-training: real configurations start from real weights and "
            "skip it."
        )
    data = run.config.get("data", {})
    if data.get("findings", "masks") != "masks":
        whose = "Findings of images without masks are" if data["findings"] == "both" else "Findings are"
        model = data.get("votes", {}).get("server", {}).get("model", "")
        found.append(f"{whose} the votes of a model, “{model}”, and have the errors that these have.")
    writer = str(run.traces.get("writer", "rules"))
    judge = str(run.config.get("judge", {}).get("kind", "rules"))
    passages = [passage for record in run.knowledge.values() for passage in record.passages]
    own = all(passage.source.startswith("notes") for passage in passages)
    judged = "grpo" in run.planned and run.config.get("grpo", {}).get("process_weight", 1.0)
    measured = "" if judge == "rules" else " in training and “rules” in the figures below"
    text = (
        f"Traces were written by “{writer}”, "
        f"{f'the judge of the process reward is “{judge}”{measured}, ' if judged else ''}the knowledge is "
        f"{'“notes” of this project’s own wording' if own else 'quoted from public sources'}."
    )
    found.append(text + (" No language model wrote or judged them." if writer == judge == "rules" else ""))
    found.append("For research. This is not a medical device and gives no diagnosis.")
    return found


def verdict(run: Run) -> str:
    """One sentence: where the policy stands, and whether GRPO changed it."""
    found = {stage: figures.figure(run.stages, stage, "greedy", "accuracy") for stage in run.shown}
    known = [(stage, one) for stage, one in found.items() if one is not None]
    if not known:
        return "The policy has not been measured yet."
    stage, before = known[0]
    opening = OPENING.get(stage, f"After {stage} the policy")
    text = f"{opening} answers {before.text} % of {before.n:,} held-out questions correctly."
    if len(known) == 1:
        return text
    after = known[-1][1]
    gains: dict[str, list[str]] = {"up": [], "down": [], "noise": []}
    for key, name, unit, look in (
        ("greedy_accuracy", "greedy accuracy", " points", {}),
        ("sampled_accuracy", "sampled accuracy", " points", {}),
        ("reward_total", "the sampled reward", "", {"scale": 1.0, "digits": 3}),
    ):
        gain = figures.figure(run.summary, "differences", key, **look)
        if gain is not None:
            gains[gain.verdict].append(f"{name} ({gain.signed}{unit})")
    words = {"up": "raised {}", "down": "lowered {}", "noise": "left {} within noise"}
    parts = [words[kind].format(_listed(names)) for kind, names in gains.items() if names]
    return f"{text} GRPO {_listed(parts)}." if parts else f"{text} After GRPO: {after.text} %."


def settings(config: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The configuration in groups: (part, [(field, value)])."""
    plain = [
        (name, json.dumps(value, ensure_ascii=False))
        for name, value in config.items()
        if not isinstance(value, dict)
    ]
    groups = [("run", sorted(plain))] if plain else []
    return groups + [
        (name, _flat(value)) for name, value in sorted(config.items()) if isinstance(value, dict)
    ]


def commands(run: Run) -> list[tuple[str, str]]:
    """(what for, command) to run this again and to use what came out."""
    name = str(run.config.get("name", "NAME"))
    workdir = f"runs/{run.path.name}"
    given = [str(line["command"]) for line in run.timeline if line.get("command")]
    again = given[0] if given else f"python launch/run.py --config=configs/{name}.py --workdir={workdir}"
    chat = (
        "from fundus_jax.models import load_pretrained\n"
        f'model, processor = load_pretrained("{workdir}/hf")   # transformers loads it too:\n'
        f'# Qwen2_5_VLForConditionalGeneration.from_pretrained("{workdir}/hf")'
    )
    prompt = run.config.get("prompt", {})
    options = [f"--style={prompt.get('style', 'options')}"]
    options += [f"--boxes={prompt['boxes']}"] if prompt.get("boxes") else []
    options += [f"--no{name}" for name in ("think", "instruct") if not prompt.get(name, True)]
    measure = (
        f"python -m fundus_jax.evaluation.run --model={workdir}/hf --benchmark=phantom \\\n"
        f"    --source={workdir}/data/examples --out={workdir}/again {' '.join(options)}"
    )
    what = "Run it again: the same workdir resumes, and refuses another configuration than the one below"
    found = [(what, again)]
    if (run.path / "hf").is_dir():
        found += [("Load the export", chat), ("Measure the export", measure)]
        found.append(
            ("Serve it with vLLM on a GPU; meant for policies of real size", f"vllm serve {workdir}/hf")
        )
    return found


def _policy(run: Run) -> str:
    model = run.config.get("model")
    size = f"{_rounded(run.parameters)} parameters" if run.parameters else "size unknown"
    return f"{str(model).rstrip('/').rsplit('/', 1)[-1]}, {size}" if model else f"small Qwen2.5-VL, {size}"


def _rounded(count: int) -> str:
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.1f} {word}"
    return f"{count:,}"


def _last_step(run: Run, stage: str) -> int:
    return max(int(line.get("step") or 0) for line in run.metrics[stage])


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, one in sorted(value.items()):
        found += (
            _flat(one, f"{prefix}{name}.")
            if isinstance(one, dict)
            else [(prefix + name, json.dumps(one, ensure_ascii=False))]
        )
    return found
