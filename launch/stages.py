"""The stages of a run: data through the pipeline's jobs, training through the loops, export to Hugging Face's
layout.

A policy "after" a stage is always rebuilt from what is on disk, so that any stage can be run by itself and a
resumed run computes what an uninterrupted one would have.
"""

import dataclasses
import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import jax
from absl import logging
from flax import nnx
from jax.sharding import Mesh

from data_pipeline import decisions, decontaminate, ingest, knowledge_base, reviewed, traces
from data_pipeline import findings as findings_job
from data_pipeline.datasets import heldout, registry
from data_pipeline.datasets.phantom_source import PhantomConfig
from fundus_jax import hosts, sft, training
from fundus_jax.base import policy, warmup
from fundus_jax.data import Pool, open_pool
from fundus_jax.evaluation.benchmarks import item_of
from fundus_jax.evaluation.card import Card, Source, render, scores_of
from fundus_jax.evaluation.engines import Asking
from fundus_jax.evaluation.exam import Exam
from fundus_jax.evaluation.items import Selection
from fundus_jax.evaluation.pictures import Stage
from fundus_jax.files import write_atomic
from fundus_jax.grpo import train as grpo
from fundus_jax.grpo.judge_server import make_judge
from fundus_jax.models import load_pretrained, read_config, save_adapter, save_pretrained
from fundus_jax.models.attention import backend_for
from fundus_jax.models.freeze import freeze, narrow
from fundus_jax.models.lora import attach
from fundus_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from fundus_jax.models.qwen2_5_vl.processor import Processor
from fundus_jax.records import ConfigError
from fundus_jax.workdir import Workdir
from launch.config import RunConfig, check_warmup, names, rates


def prepare_data(config: RunConfig, work: Workdir) -> None:
    """Ingest -> knowledge -> findings -> traces with the quality check -> what reviewers decided about them,
    where they did -> decontaminate, in workdir/data."""
    data, folder = config.data, work.path / "data"
    examples, knowledge, found = (folder / name for name in ("examples", "knowledge", "findings"))
    phantom = PhantomConfig(seed=data.seed, size=data.size, train=data.train, val=0, test=data.test)
    ingest.run(
        data.dataset,
        Path(data.source) if data.source else None,
        examples,
        tasks=rates(data.tasks),
        max_side=data.max_side,
        partial_copy=data.partial,
        benchmarks=heldout.folders(names(data.benchmarks)),
        phantom=phantom if data.dataset == "phantom" else None,
        workers=data.workers,
    )
    knowledge_base.run(knowledge, examples=examples, config=data.knowledge)
    source = findings_job.make_source(data.findings, data.votes, knowledge)
    findings_job.run(examples, found, source=source, limit=data.limit)
    writer = traces.make_writer(data.traces, data.writer, config.prompt.boxes)
    traces.run(examples, found, knowledge, folder / "traces", writer=writer, limit=data.limit)
    held = folder / "reviewed" if data.decisions else None
    if held:
        book = decisions.read(decisions.paths(data.decisions))
        reviewed.run(examples, found, knowledge, folder / "traces", held, book, workers=data.workers)
    decontaminate.run(
        examples,
        folder / "clean",
        against=[Path(one) for one in names(data.against)],
        reviewed=held,
        alike=data.near and (data.dataset != "phantom" or bool(data.against)),  # no phantom is drawn twice
        workers=data.workers,
    )


def _set_aside(pool: Pool, config: RunConfig) -> tuple[Pool, Pool | None]:
    """The examples to train on, and those of the patients that the exam asks about, if there is one."""
    if not config.exam.every:
        return pool, None
    part = config.exam.part
    held = pool.choose(tasks=names(config.data.probe_tasks), part=(0.0, part), salt="exam")
    return pool.choose(part=(part, 1.0), salt="exam"), held


def chosen(config: RunConfig, model: Qwen2_5_VL) -> Qwen2_5_VL:
    """`model`, marked with what SFT and GRPO train of it: adapters, which it gets, or what `freeze`
    leaves."""
    if config.lora.rank:
        attach(model, config.lora)
    else:
        freeze(model, names(config.freeze))
    return model


class Trainer:
    """The training stages of a run: the plan (stage -> steps, without those that the run leaves out), and the
    policy after any of them."""

    def __init__(self, config: RunConfig, work: Workdir, mesh: Mesh) -> None:
        self.config, self.work, self.mesh = config, work, mesh
        if not (work.path / "data" / "clean").is_dir():
            raise ConfigError(f"{work.path} has no data yet; run --stage=data first, or --stage=all")
        self.judge = make_judge(config.judge)  # here, and not after hours of SFT: its key may be missing
        if config.judge.kind == "server" and not config.grpo.process_weight:
            logging.warning("judge.server is never asked, since grpo.process_weight is 0")
        self.pool, self.held = _set_aside(open_pool(work.path / "data", "train"), config)
        self.hf_dir = Path(config.model) if config.model else self._policy_directory()
        bounds = {"min_pixels": config.min_pixels or None, "max_pixels": config.max_pixels or None}
        self.processor = Processor.from_pretrained(self.hf_dir, **bounds)
        self.plan = {stage: self._steps(stage) for stage in config.trained}
        check_warmup(config, self.plan)
        logging.info("plan: %s", ", ".join(f"{stage} {count} steps" for stage, count in self.plan.items()))
        work.stages = self.plan

    def _steps(self, stage: str) -> int:
        steps: int = getattr(self.config, stage).steps
        if steps:
            return steps
        if stage == "sft":  # the data decide
            return self.config.sft.total_steps(len(self.rows.packs))
        return self.config.grpo.total_steps(len(self.prompts.rows))

    @functools.cached_property
    def rows(self) -> sft.Rows:
        """What SFT learns from."""
        pool = self.pool.choose(part=(0.0, self.config.data.sft_part))
        return sft.make_rows(pool, self.processor, self.config.prompt, self.config.sft)

    @functools.cached_property
    def prompts(self) -> grpo.Prompts:
        """What GRPO draws from."""
        config = self.config
        sizes = {"buckets": config.grpo.buckets, "batch": config.grpo.prompts_per_step}
        return grpo.Prompts(self.grpo_pool(), self.processor, config.prompt, config.max_prompt, **sizes)

    @property
    def reached(self) -> list[str]:
        """The stages with a policy to measure: the finished ones of the plan; where it is empty, `base`."""
        return [stage for stage in self.plan if self.work.finished(stage)] if self.plan else ["base"]

    @property
    def last(self) -> str:
        """The stage whose policy the run is for."""
        return list(self.plan)[-1] if self.plan else "base"

    def _policy_directory(self) -> Path:
        """workdir/policy: configuration and tokenizer of the small policy, learned from the training
        texts."""
        directory = self.work.path / "policy"

        def write() -> None:
            kept = [self.pool.traces.get(example.id) for example in self.pool.examples]
            texts = [trace.think + "\n" + trace.answer for trace in kept if trace is not None and trace.think]
            texts += [example.question for example in self.pool.examples]
            texts += [
                f"<think></think> <answer>{option}</answer>"
                for e in self.pool.examples
                for option in e.options
            ]
            policy.write_policy(directory, self.config.policy, sorted(texts))

        if not hosts.of_first(directory.exists()):
            hosts.on_first(write)
        return directory

    def run(self, stage: str) -> None:
        """Run one training stage, unless it has finished. Raises ConfigError when the stage before it has
        not."""
        if self.work.finished(stage):
            logging.info("%s has finished already", stage)
            return
        config = self.config
        common: dict[str, Any] = {"compute": config.compute, "remat": config.remat}
        if stage == "base":
            warmup.warm_up(self.work, self.start(), self.processor, self.pool, config.base, self.mesh)
        elif stage == "sft":
            common["exam"] = self.exam()
            sft.train(
                self.work, self.before(stage), self.rows, self.processor, config.sft, self.mesh, **common
            )
        else:
            common["exam"] = self.exam()
            grpo.train(
                self.work, self.before(stage), self.prompts, self.judge, config.grpo, self.mesh, **common
            )
        self.work.checkpoints.wait()

    def exam(self) -> Exam | None:
        """What measures the policy while it is trained; None where nothing does."""
        if self.held is None:
            return None
        config, examples = self.config, self.work.path / "data" / "examples"
        selection = Selection(limit=config.exam.questions, **dataclasses.asdict(config.prompt))
        items = selection.choose([item_of(example, selection) for example in self.held.examples])
        return Exam(
            items,
            Stage(examples),
            self.processor,
            self.mesh,
            every=config.exam.every,
            asking=Asking(max_new_tokens=config.grpo.max_new_tokens),
            slots=config.evaluate.batch,
        )

    def grpo_pool(self) -> Pool:
        """GRPO's examples: of patients that SFT has not seen, or of all where SFT saw all."""
        part = self.config.data.sft_part
        return self.pool.choose(
            tasks=names(self.config.data.grpo_tasks), part=(part, 1.0) if part < 1 else (0.0, 1.0)
        )

    def start(self) -> Qwen2_5_VL:
        """The policy before any stage."""
        if self.config.model:
            return self._with_options(load_pretrained(self.hf_dir, "float32", self.mesh)[0])
        model = policy.fresh(read_config(self.hf_dir), self.config.policy.seed)
        skeleton, params = training.split(model)
        return self._with_options(skeleton.merge(training.spread(params, skeleton.shardings(self.mesh))))

    def before(self, stage: str) -> Qwen2_5_VL:
        """The policy that `stage` starts from; what it does not train is marked, and in the compute dtype."""
        order = list(self.plan)
        earlier = order[: order.index(stage)]
        model = self.after(earlier[-1]) if earlier else self.start()
        if stage != "base" and earlier in ([], ["base"]):
            chosen(self.config, model)
        narrow(model, self.config.compute)
        if stage != "base":
            skeleton, params = training.split(model)
            trained, frozen = (
                sum(leaf.size for leaf in jax.tree.leaves(part)) / 1e6 for part in skeleton.divide(params)
            )
            logging.info("%s: %.1f M parameters are trained, %.1f M frozen", stage, trained, frozen)
        return model

    def after(self, stage: str) -> Qwen2_5_VL:
        """The policy that `stage` ended with, or with `exam.use` "best" its best one, in float32: what the
        bundle holds, and where parts were frozen the rest from the policy before all stages that freeze.
        After `base` it is the given model where there is one. Raises ConfigError if the stage has not
        finished."""
        if stage == "base" and stage not in self.plan:
            return self.start()
        if not self.work.finished(stage):
            raise ConfigError(
                f"stage {stage} of {self.work.path} has not finished; run it first, or use --stage=all"
            )
        if stage == "base":
            model = self.start()
            skeleton, params = training.split(model)
            wanted = {"visual": params["visual"]}
            return self._with_options(skeleton.merge(params | self.work.params(stage, wanted)))
        config = read_config(self.hf_dir)
        if not config.eos_ids:  # as `load_pretrained`: then both know the end from the tokenizer
            config = config.ending_with(self.processor.eos_ids)
        skeleton = training.Skeleton(
            nnx.eval_shape(lambda: chosen(self.config, Qwen2_5_VL(config, rngs=nnx.Rngs(0))))
        )
        places = skeleton.shardings(self.mesh)
        shapes = nnx.to_pure_dict(skeleton.abstract)
        wanted = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
        )
        trained, frozen = skeleton.divide(wanted)
        trained = self.work.params(stage, trained, best=self.config.exam.use == "best")
        if frozen:
            frozen = skeleton.divide(training.split(self.after("base"))[1])[1]
        return self._with_options(skeleton.merge(training.join(trained, frozen)))

    def _with_options(self, model: Qwen2_5_VL) -> Qwen2_5_VL:
        attention = self.config.attention
        if attention == "auto":
            attention = backend_for(self.mesh.devices.flat[0].platform)
        model.options = dataclasses.replace(model.options, unroll=self.config.unroll, attention=attention)
        return model


def write_card(target: Path, work: Workdir, trainer: Trainer, command: str) -> None:
    """Write README.md of an export: the model card, with the scores that were measured by now."""
    summary = work.path / "evaluation" / "summary.json"
    stages = json.loads(summary.read_text(encoding="utf-8"))["stages"] if summary.is_file() else {}
    report = stages.get(trainer.last, {}).get("greedy")
    config, pool = trainer.config, trainer.pool
    counts = Counter(example.dataset for example in pool.examples)
    rows = {name: registry.DATASETS[name] for name in sorted(counts)}
    sources = [
        Source(name=row.title, licence=row.licence, citation=row.citation, count=counts[name])
        for name, row in rows.items()
    ]
    passages = {one for record in pool.knowledge.values() for one in record.passages}
    for (source, licence), count in sorted(Counter((one.source, one.licence) for one in passages).items()):
        sources.append(Source(name=f"knowledge: {source}", licence=licence, count=count))
    card = Card(
        name=config.name,
        base=Path(config.model).name or "random weights and a vision tower warmed up on its own data",
        stages=tuple(trainer.plan),
        sources=tuple(sources),
        scores={f"held-out questions of {', '.join(rows)}": scores_of(report)} if report else {},
        drawn=set(rows) == {"phantom"},
        command=command,
    )
    write_atomic(target / "README.md", render(card))


def export(work: Workdir, trainer: Trainer, command: str = "") -> Path:
    """Write the policy after the last stage as a Hugging Face directory, workdir/hf, its adapters merged; and
    where they are adapters of a model that others have, these alone as PEFT's too, workdir/adapter. Without
    any training it is the policy that was given.

    A directory that is there stays as it is, but for its model card. command: what the card gives as the way
    to repeat the run.
    """
    target, adapter = work.path / "hf", work.path / "adapter"
    apart = bool(trainer.config.lora.rank and trainer.config.model and trainer.plan)
    missing = [path for path in (target, *([adapter] if apart else [])) if not path.exists()]
    if not hosts.of_first(len(missing)):
        logging.info("%s is there already", target)
        hosts.on_first(lambda: write_card(target, work, trainer, command))
        return target
    model = trainer.after(trainer.last)
    if jax.process_count() > 1:  # the first process writes, and needs what the others hold
        skeleton, params = training.split(model)
        model = skeleton.merge(jax.tree.map(hosts.fetch, params))

    def write() -> None:
        if adapter in missing:
            save_adapter(model, adapter, trainer.config.model)
        if target in missing:
            save_pretrained(model, trainer.processor, target)
        write_card(target, work, trainer, command)

    hosts.on_first(write)
    return target
