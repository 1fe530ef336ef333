"""The evaluation command.

    python -m fundus_jax.evaluation.run --model=DIR --benchmark=phantom --source=WORKDIR/data/examples
    --out=DIR

asks our sampler, or with --server=ADDRESS --served_model=NAME a server, and writes report.json, report.txt,
predictions.jsonl and more (results.py) under --out; docs/evaluation.md has the command for each benchmark.
Stopped, the same command goes on; --shard=i/n deals the questions out to n hosts. Neighbours: journal.py
(what was answered), predict.py and served.py (the engines), report.py (what answers are worth).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from jax.sharding import Mesh

from fundus_jax import __version__, dialog
from fundus_jax.chat import Chat, ChatConfig, ChatError
from fundus_jax.data import THREADS, read_stage
from fundus_jax.evaluation import by_server, minilm
from fundus_jax.evaluation.benchmarks import BENCHMARKS, open_benchmark
from fundus_jax.evaluation.complete import listed
from fundus_jax.evaluation.consistency import evaluate_reports
from fundus_jax.evaluation.engines import Asking, Engine, identity
from fundus_jax.evaluation.extract import MODES, Mode
from fundus_jax.evaluation.items import Benchmark, Selection
from fundus_jax.evaluation.journal import Journal
from fundus_jax.evaluation.predict import Sampler
from fundus_jax.evaluation.report import Prediction, Report, evaluate, outcome_of
from fundus_jax.evaluation.results import text_of, write
from fundus_jax.evaluation.served import PLAIN, Served
from fundus_jax.models import exact, load_pretrained, read_config
from fundus_jax.models.attention import backend_for
from fundus_jax.models.qwen2_5_vl.processor import Processor
from fundus_jax.records import SPLITS, ConfigError, DataError, Findings
from fundus_jax.sharding import parse_mesh


def define_flags() -> None:
    """Declares the command's flags; not at import, as programs with flags of their own import this module."""
    flags.DEFINE_string("model", None, "Hugging Face directory of the model.", required=True)
    flags.DEFINE_enum("benchmark", None, list(BENCHMARKS), "What is asked.", required=True)
    flags.DEFINE_string("source", None, "Its folder: data/examples, or FunBench's tree.", required=True)
    flags.DEFINE_string("out", None, "Folder for the report and the predictions.", required=True)
    flags.DEFINE_string("images", "", "The folder that image paths start from, if it is not the source.")
    flags.DEFINE_bool("allow_partial", False, "Go on without what is missing; every score says so.")
    flags.DEFINE_list("modalities", [], "OmniMedVQA, GMAI-MMBench: these, in the publisher's words.")
    flags.DEFINE_integer("emode", 3, "FunBench: 3 shows the image, 2 describes it in words as well.")
    flags.DEFINE_string("preprocess", "", "FunBench: its preprocess_info.json, for images as published.")
    flags.DEFINE_integer(
        "side", 0, "FunBench: resize images to so many pixels; its script: 224.", lower_bound=0
    )
    flags.DEFINE_enum("style", "options", dialog.STYLES, "Examples: lettered options, or the question alone.")
    flags.DEFINE_bool("think", True, "Ask for a trace before the answer.")
    flags.DEFINE_bool("instruct", True, "Say in the prompt how to answer.")
    flags.DEFINE_integer("boxes", 0, "Examples: traces say at most so many boxes a finding.", lower_bound=0)
    flags.DEFINE_string("findings", "", "Examples: data/findings, to judge traces where there are no masks.")
    flags.DEFINE_list("tasks", [], "Ask these tasks only.")
    flags.DEFINE_enum("split", "test", SPLITS, "Examples: the split.")
    flags.DEFINE_integer("limit", 0, "Ask at most this many items; 0 asks all.", lower_bound=0)
    flags.DEFINE_enum("extraction", "tail", MODES, "Rules that find the option in an answer.")
    flags.DEFINE_string("reader", "", "A language model that reads the answers as well: its /v1 address.")
    flags.DEFINE_string("reader_model", "", "The name that it is served under.")
    flags.DEFINE_integer("max_new_tokens", 1024, "Longest response.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.", lower_bound=0)
    flags.DEFINE_integer("group_size", 1, "Responses to each item.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the sampling and of the intervals.", lower_bound=0)
    flags.DEFINE_string("shard", "0/1", "i/n: of n hosts this is number i, from 0; all have the same --out.")
    _define_engines()


def _define_engines() -> None:
    flags.DEFINE_integer("batch_size", 16, "Prompts that are decoded at a time.", lower_bound=1)
    flags.DEFINE_integer("groups", 4, "Padded lengths: more pad less and compile longer.", lower_bound=1)
    flags.DEFINE_integer("threads", THREADS, "Threads that read images.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the weights.")
    flags.DEFINE_string("mesh", "data:-1,fsdp:1,tensor:1", "Devices by axis, as for launch/run.py.")
    flags.DEFINE_string("server", "", "Ask this server, which serves --model: its /v1, several with commas.")
    flags.DEFINE_string("served_model", "", "The name that it serves the model under.")
    flags.DEFINE_string("server_key", "", "The environment variable that holds its key.")
    flags.DEFINE_integer("server_concurrency", 16, "Requests under way at a time.", lower_bound=1)
    flags.DEFINE_string("server_fields", json.dumps(PLAIN), "What else a request says; {} for none.")
    flags.DEFINE_bool("server_logprobs", True, "Ask the server for log-probabilities.")


_PROMPT = ("style", "think", "instruct", "boxes", "emode", "preprocess", "side")
_SELECTION = (*_PROMPT, "limit", "split", "images", "allow_partial")
_SAMPLING = ("max_new_tokens", "temperature", "group_size", "seed")
_LISTS = ("tasks", "modalities")
_OTHERS = ("model", "benchmark", "source", *_LISTS, "extraction", "reader", "reader_model", "findings")
_ENGINES = ("batch_size", "dtype", "mesh", "groups", "server", "served_model", "server_fields")


def main(argv: Sequence[str]) -> None:
    """The command. What the user has to change ends it with one line instead of a traceback."""
    if len(argv) > 1:
        raise app.UsageError(f"arguments without a name: {' '.join(argv[1:])}")
    try:
        _ask_and_write()
    except (ConfigError, DataError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _ask_and_write() -> None:
    args = flags.FLAGS
    given = {name: getattr(args, name) for name in (*_SELECTION, *_SAMPLING, *_OTHERS, *_ENGINES)}
    lists = {name: tuple(given[name]) for name in _LISTS}
    selection = Selection(**lists, **{name: given[name] for name in _SELECTION})
    benchmark = open_benchmark(args.benchmark, args.source, selection)
    for note in (*benchmark.notes, *(f"PARTIAL: {reason}" for reason in benchmark.partial)):
        logging.info("%s", note)
    reader = ChatConfig(address=args.reader, model=args.reader_model) if args.reader else None
    if reader is not None:
        Chat(reader, "reader")  # a wrong address is said before hours of asking
    if args.extraction == "funbench":
        minilm.model()
    asking = Asking(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        samples=args.group_size,
        seed=args.seed,
    )
    mesh = parse_mesh(args.mesh)
    with jax.set_mesh(mesh):
        engine = _engine(args, mesh)
        facts = engine.facts | {"pictures": _shown(selection)}
        journal = Journal(Path(args.out), benchmark.items, facts, asking, _shard(args.shard))
        found = journal.ask(engine, benchmark)
    if len(found) < len(benchmark.items) and not _settled(journal, engine, found, args.allow_partial):
        return
    predictions = [one for index in sorted(found) for one in found[index]]
    votes = _votes(args.findings) if args.findings else None
    failures = {benchmark.items[index].id: reason for index, reason in engine.failures.items()}
    notes, missing = list(benchmark.notes), list(benchmark.missing)
    told = {"name": benchmark.name, "notes": notes, "missing_images": missing, "unanswered": failures}
    unlike = [f"--{name}={given[name]}" for name in (*_PROMPT, *_LISTS) if given[name] != args[name].default]
    told |= {"unlike": unlike, "flags": given}
    run = {"config": journal.hash, **engine.facts, "work": engine.work()}
    # the rules' report is there before a reader is asked, which may stay away or take hours
    for readers in (None, reader) if reader else (None,):
        scoring = {"mode": args.extraction, "seed": args.seed, "reader": readers, "votes": votes}
        report = report_of(benchmark, predictions, **scoring)
        report["benchmark"], report["run"] = told, run
        if failures:
            report["partial"].append(
                f"{len(failures)} of {len(benchmark.items)} questions have no answer: {listed([*failures])}"
            )
        write(Path(args.out), predictions, report, args.extraction)
    print(f"{text_of(report)}written to {args.out}")  # the command's result; progress goes to the log


def _engine(args: Any, mesh: Mesh) -> Engine:
    """The engine that the flags name."""
    facts = {"model": identity(args.model), "versions": {"fundus_jax": __version__, "jax": jax.__version__}}
    if not args.server:
        exact(args.dtype)
        model, processor = load_pretrained(args.model, dtype=args.dtype, mesh=mesh)
        attention = backend_for(mesh.devices.flat[0].platform)
        model.options = dataclasses.replace(model.options, attention=attention)
        facts |= {"dtype": args.dtype, "device": jax.devices()[0].device_kind}
        sizes = {"slots": args.batch_size, "groups": args.groups, "threads": args.threads}
        return Sampler(model, processor, mesh=mesh, facts=facts, **sizes)
    config = ChatConfig(
        address=args.server,
        model=args.served_model,
        key=args.server_key,
        concurrency=args.server_concurrency,
        timeout=600.0,
        deadline=1800.0,
    )
    try:
        fields = json.loads(args.server_fields)
    except ValueError as error:
        raise ConfigError(f"--server_fields={args.server_fields!r} is no JSON object: {error}") from None
    ours = {"model", "messages", "n"}
    if not isinstance(fields, dict) or ours & fields.keys():
        raise ConfigError(
            f"--server_fields={args.server_fields!r} must be a JSON object ({{}} says nothing) without "
            f"{', '.join(sorted(ours))}"
        )
    return Served(
        config,
        Processor.from_pretrained(args.model),
        banned=read_config(args.model).banned_ids,
        fields=fields,
        logprobs=args.server_logprobs,
        facts=facts,
    )


def _shown(selection: Selection) -> dict[str, Any]:
    """In what size and from where in the originals the pictures are shown."""
    crops = Path(selection.preprocess)
    digest = hashlib.sha256(crops.read_bytes()).hexdigest() if crops.is_file() else ""
    return {"side": selection.side, "preprocess": digest}


def _votes(folder: str) -> dict[str, Findings]:
    """The findings of a stage directory that a model voted for, by example."""
    return {one.example: one for one in read_stage(folder, Findings) if one.origin == "votes"}


def _shard(text: str) -> tuple[int, int]:
    """ "1/4" as (1, 4). Raises ConfigError for anything else."""
    first, slash, last = text.partition("/")
    if not (slash and first.isdecimal() and last.isdecimal()):
        raise ConfigError(f"--shard={text!r}; write i/n, e.g. 0/4 on the first of four hosts")
    return int(first), int(last)


def _settled(journal: Journal, engine: Engine, found: Mapping[int, Any], allow_partial: bool) -> bool:
    """Whether a report can be made though answers are missing. Raises ConfigError where the engine has none
    to some questions, and nobody has allowed that."""
    lacking = len(journal.items) - len(found) - len(engine.failures)
    if engine.failures and not allow_partial:
        index, reason = next(iter(engine.failures.items()))
        raise ConfigError(
            f"there is no answer to {len(engine.failures)} of {len(journal.items)} questions, such as "
            f"{journal.items[index].id}: {reason}; mend that and run it again, which asks these "
            "alone, or go on without with --allow_partial"
        )
    if lacking:
        print(
            f"{len(found)} of {len(journal.items)} questions are answered; the report is written by whoever "
            "finds all: when the other shards have ended, give the command once more, without --shard"
        )
    return not lacking


def report_of(
    benchmark: Benchmark,
    predictions: Sequence[Prediction],
    *,
    mode: Mode = "tail",
    seed: int = 0,
    reader: ChatConfig | None = None,
    votes: Mapping[str, Findings] | None = None,
) -> Report:
    """The report of answers to a benchmark, by the measure that it is made for.

    With a `reader` also what a language model reads in the answers, apart, under "server". `votes` are for
    `evaluate_more`.

    Raises:
        ConfigError: no answers; the server can not be used.
    """
    items = [one.item for one in predictions]
    texts = [one.response for one in predictions]
    common: dict[str, Any] = {"seed": seed, "partial": benchmark.partial}
    if benchmark.name == "reports":
        report = evaluate_reports(predictions, **common)
        if reader is not None:
            said = by_server.mentions(reader, items, texts)
            read = [None if isinstance(one, ChatError) else one for one in said]
            report["server"] = evaluate_reports(predictions, read, reader=reader.model, **common)
        return report
    report = evaluate(predictions, mode=mode, published=benchmark.published, votes=votes, **common)
    chosen = [i for i, item in enumerate(items) if item.options]
    if reader is not None and chosen:
        asked = [items[i] for i in chosen]
        found = by_server.choose(reader, asked, [texts[i] for i in chosen])
        by_rules = [outcome_of(predictions[i], mode).extracted for i in chosen]
        report["server"] = by_server.evaluate_choices(asked, found, by_rules, seed=seed)
    return report


if __name__ == "__main__":
    define_flags()
    app.run(main)
