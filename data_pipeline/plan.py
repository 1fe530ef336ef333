"""What a data set costs a server: requests, tokens, hours, GPU-hours by the number of replicas. A projection.

    python -m data_pipeline.plan
    python -m data_pipeline.plan --images=20000 --masked=0 --traces=20000 --tokens_a_second=4000 --replicas=2

Nothing is measured here: every number that it assumes is a flag, and is printed with the result. The defaults
are the paper's counts (its Table 2; 146,425 traces written, 80,115 kept) and guesses for the rest. Measure
the two rates of your model on your GPU, with `vllm bench serve`, before you trust the hours. Neighbours:
`asking.py` makes the requests, docs/data_jobs.md says how.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from absl import app, flags

from fundus_jax.records import ConfigError

MERGED, MIN_PIXELS = 28, 3136  # Qwen2.5-VL: pixels along a token's side; the least area of an image


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a stage asks of the server: requests, and tokens of all prompts and of all answers."""

    stage: str
    requests: int
    prompt: int
    answer: int


def image_tokens(width: int, height: int, max_pixels: int) -> int:
    """Tokens of an image of so many pixels, by Qwen2.5-VL's rule: both sides become multiples of 28, the area
    stays between 3136 and `max_pixels`, the shape nearly as it was; a token is 28 x 28 pixels.

    `fundus_jax.models.qwen2_5_vl.images.smart_resize` is the original, with its source; the pipeline does not
    import models.
    """
    tall, wide = (round(side / MERGED) * MERGED for side in (height, width))
    if tall * wide > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        tall, wide = (max(MERGED, math.floor(side / shrink / MERGED) * MERGED) for side in (height, width))
    elif tall * wide < MIN_PIXELS:
        grow = math.sqrt(MIN_PIXELS / (height * width))
        tall, wide = (math.ceil(side * grow / MERGED) * MERGED for side in (height, width))
    return tall * wide // MERGED**2


def mean_tokens(sizes: Sequence[str], max_pixels: int) -> float:
    """Tokens of an image on average over "WIDTHxHEIGHT:SHARE". Raises ConfigError for another form, or shares
    that do not add up to 1."""
    total = tokens = 0.0
    for text in sizes:
        size, _, share = text.partition(":")
        try:
            width, height = map(int, size.split("x"))
            part = float(share or 1)
        except ValueError as error:
            raise ConfigError(f"--sizes has {text!r}; write WIDTHxHEIGHT:SHARE, as 768x496:0.8") from error
        total, tokens = total + part, tokens + part * image_tokens(width, height, max_pixels)
    if abs(total - 1) > 1e-6:
        raise ConfigError(f"the shares of --sizes add up to {total:g}; they must add up to 1")
    return tokens


def work(args: Any) -> list[Work]:
    """The stages that ask a server, in their order."""
    voted = args.images - args.masked
    seen = mean_tokens(args.sizes, args.max_pixels) + args.vote_prompt
    # Each rejected trace is written again, and what is written is checked in a request of its own.
    written = round(args.traces * sum(args.rejected**again for again in range(args.rewrites + 1)))
    return [
        Work(
            stage="knowledge", requests=args.labels,
            prompt=args.labels * args.label_prompt, answer=args.labels * args.label_answer,
        ),
        Work(
            stage="findings", requests=voted,
            prompt=round(voted * seen), answer=voted * args.samples * args.vote_answer,
        ),
        Work(
            stage="traces: written", requests=written,
            prompt=written * args.trace_prompt, answer=written * args.trace_answer,
        ),
        Work(
            stage="traces: checked", requests=written,
            prompt=written * args.check_prompt, answer=written * args.check_answer,
        ),
    ]  # fmt: skip


def hours(stages: Sequence[Work], args: Any, replicas: int) -> tuple[float, float]:
    """(hours by the clock, GPU-hours): each replica reads prompts, then writes answers, at its two rates, and
    loads the model first."""
    reading = sum(one.prompt for one in stages) / args.prompt_tokens_a_second
    writing = sum(one.answer for one in stages) / args.tokens_a_second
    clock = (reading + writing) / args.share / replicas / 3600 + args.start_minutes / 60
    return clock, clock * replicas * args.gpus


def render(args: Any) -> str:
    """The plan as Markdown, with what it assumes."""
    stages = work(args)
    total = Work(
        stage="all",
        **{name: sum(getattr(one, name) for one in stages) for name in ("requests", "prompt", "answer")},
    )
    lines = ["**A projection, not a measurement.** It assumes:", ""]
    lines += [f"* `--{name}={_plain(getattr(args, name))}`: {words}" for name, (_, words) in ASSUMED.items()]
    lines += ["", "| stage | requests | tokens of prompts | tokens of answers |", "|---|---|---|---|"]
    lines += [
        f"| {one.stage} | {one.requests:,} | {one.prompt / 1e6:,.1f} M | {one.answer / 1e6:,.1f} M |"
        for one in (*stages, total)
    ]
    mean = mean_tokens(args.sizes, args.max_pixels)
    lines += ["", f"An image is {mean:.0f} tokens on average.", ""]
    lines += ["| replicas | hours | GPU-hours | requests a second |", "|---|---|---|---|"]
    for replicas in map(int, args.replicas):
        clock, gpus = hours(stages, args, replicas)
        rate = total.requests / (clock - args.start_minutes / 60) / 3600
        lines.append(f"| {replicas} | {clock:,.1f} | {gpus:,.0f} | {rate:,.1f} |")
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


# flag -> (default, what it is)
ASSUMED: dict[str, tuple[Any, str]] = {
    "images": (168_938, "images (Table 2)"),
    "masked": (0, "of these have masks of all that is voted on, so that nothing is asked about them"),
    "samples": (5, "answers to each request about an image"),
    "sizes": (["768x496:0.79", "2048x1536:0.15", "3900x3072:0.06"], "pixels of OCT, CFP, UWF; their shares"),
    "max_pixels": (1_003_520, "area to which the server reduces an image (--mm-processor-kwargs)"),
    "vote_prompt": (150, "tokens of a request about an image, beside the image"),
    "vote_answer": (110, "tokens of an answer: each finding with present or absent"),
    "labels": (140, "labels x modalities, each with one request for its knowledge"),
    "label_prompt": (4_000, "tokens of such a request, with its passages"),
    "label_answer": (600, "tokens of its answer"),
    "traces": (146_425, "traces (section 3.2.3)"),
    "rejected": (0.453, "share of traces that the check rejects (80,115 of 146,425 were kept)"),
    "rewrites": (2, "times that a rejected trace is written again"),
    "trace_prompt": (900, "tokens of a request to write one"),
    "trace_answer": (250, "tokens of a trace"),
    "check_prompt": (1_000, "tokens of a request to check one"),
    "check_answer": (40, "tokens of the verdict"),
    "prompt_tokens_a_second": (15_000.0, "tokens of prompts that a replica reads a second"),
    "tokens_a_second": (2_500.0, "tokens of answers that a replica writes a second"),
    "share": (0.9, "share of this that the jobs reach (docs/benchmarks.md)"),
    "gpus": (1, "GPUs of a replica"),
    "start_minutes": (10.0, "minutes until a replica serves"),
    "replicas": (["1", "8", "64"], "numbers of replicas to plan for"),
}  # fmt: skip


def define_flags() -> None:
    """Declares the command's flags: each assumption."""
    kinds = {list: flags.DEFINE_list, int: flags.DEFINE_integer, float: flags.DEFINE_float}
    for name, (default, words) in ASSUMED.items():
        kinds[type(default)](name, default, f"{words[0].upper()}{words[1:]}.")


def main(argv: Sequence[str]) -> None:
    """Print the plan."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every option begins with --")
    try:
        print(render(flags.FLAGS), end="")
    except ConfigError as error:
        raise SystemExit(f"plan: {error}") from error


if __name__ == "__main__":
    define_flags()
    app.run(main)
