"""The evaluation command, and what a training run measures itself with.

    python -m fundus_jax.evaluation.run --model=DIR --benchmark=phantom --source=WORKDIR/data/examples
    --out=DIR

writes report.json, report.txt and predictions.jsonl under --out; docs/evaluation.md has the command for each
benchmark. `predict` (items to responses) and
`evaluate` (responses to a report) are handed on from their modules, for callers that have a model at hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from fundus_jax import dialog
from fundus_jax.chat import Chat, ChatConfig, ChatError
from fundus_jax.evaluation import by_server, minilm
from fundus_jax.evaluation.benchmarks import BENCHMARKS, open_benchmark
from fundus_jax.evaluation.consistency import consistency_table, evaluate_reports
from fundus_jax.evaluation.extract import MODES, Mode
from fundus_jax.evaluation.items import Benchmark, Selection
from fundus_jax.evaluation.predict import predict
from fundus_jax.evaluation.report import (
    Prediction,
    Report,
    compare,
    compare_places,
    evaluate,
    outcome_of,
)
from fundus_jax.evaluation.table import table
from fundus_jax.files import write_atomic
from fundus_jax.models import load_pretrained
from fundus_jax.records import SPLITS, ConfigError, DataError
from fundus_jax.sharding import parse_mesh

__all__ = ["Prediction", "Report", "compare", "compare_places", "evaluate", "predict", "table", "write"]


def write(out: Path, predictions: Sequence[Prediction], report: Report, mode: Mode = "tail") -> None:
    """Writes report.json, report.txt, and predictions.jsonl: every prompt, response, extraction and score."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_as_json(one, mode), ensure_ascii=False) + "\n" for one in predictions]
    write_atomic(out / "predictions.jsonl", "".join(lines))
    write_atomic(out / "report.txt", _text(report))
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(out / "report.json", text + "\n")


def _text(report: Report) -> str:
    return consistency_table(report) if "pooled" in report else table(report)


def _as_json(prediction: Prediction, mode: Mode) -> dict[str, Any]:
    item, outcome = prediction.item, outcome_of(prediction, mode)
    return {
        "id": item.id,
        "images": item.images,
        "level": item.level,
        "task": item.task,
        "part": item.part,
        "modality": item.modality,
        "unit": item.unit,
        "sample": prediction.sample,
        "prompt": item.prompt,
        "options": item.options,
        "answers": item.answers,
        "response": prediction.response,
        "tokens": prediction.tokens,
        "finished": prediction.finished,
        "extracted": outcome.extracted,
        "correct": outcome.correct,
        "well_formed": outcome.well_formed,
        "findings": item.findings,
        "claimed": outcome.claimed,
    }


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
    flags.DEFINE_list("tasks", [], "Ask these tasks only.")
    flags.DEFINE_enum("split", "test", SPLITS, "Examples: the split.")
    flags.DEFINE_integer("limit", 0, "Ask at most this many items; 0 asks all.", lower_bound=0)
    flags.DEFINE_enum("extraction", "tail", MODES, "Rules that find the option in an answer.")
    flags.DEFINE_string("reader", "", "A language model that reads the answers as well: its /v1 address.")
    flags.DEFINE_string("reader_model", "", "The name that it is served under.")
    flags.DEFINE_integer("batch_size", 16, "Rows of a batch.", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", 1024, "Longest response.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.", lower_bound=0)
    flags.DEFINE_integer("group_size", 1, "Responses to each item.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the sampling and of the intervals.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the weights.")
    flags.DEFINE_string("mesh", "data:-1,fsdp:1,tensor:1", "Devices by axis, as for launch/run.py.")


_PROMPT = ("style", "think", "instruct", "boxes", "emode", "preprocess", "side")
_SELECTION = (*_PROMPT, "limit", "split", "images", "allow_partial")
_SAMPLING = ("batch_size", "max_new_tokens", "temperature", "group_size", "seed")
_LISTS = ("tasks", "modalities")
_OTHERS = ("model", "benchmark", "source", *_LISTS, "extraction", "reader", "reader_model", "dtype", "mesh")


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
    given = {name: getattr(args, name) for name in (*_SELECTION, *_SAMPLING, *_OTHERS)}
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
    sampling = {name: given[name] for name in _SAMPLING}
    mesh = parse_mesh(args.mesh)
    with jax.set_mesh(mesh):
        model, processor = load_pretrained(args.model, dtype=args.dtype, mesh=mesh)
        predictions = predict(
            model, processor, benchmark.items, load_image=benchmark.load_image, mesh=mesh, **sampling
        )
    report = report_of(benchmark, predictions, mode=args.extraction, seed=args.seed, reader=reader)
    notes, missing = list(benchmark.notes), list(benchmark.missing)
    report["benchmark"] = {"name": benchmark.name, "notes": notes, "missing_images": missing, "flags": given}
    write(Path(args.out), predictions, report, args.extraction)
    print(f"{_text(report)}written to {args.out}")  # the command's result; progress goes to the log


def report_of(
    benchmark: Benchmark,
    predictions: Sequence[Prediction],
    *,
    mode: Mode = "tail",
    seed: int = 0,
    reader: ChatConfig | None = None,
) -> Report:
    """The report of answers to a benchmark, by the measure that it is made for.

    With a `reader` also what a language model reads in the answers, apart, under "server".

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
    report = evaluate(predictions, mode=mode, published=benchmark.published, **common)
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
