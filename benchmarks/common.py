"""What the benchmarks share: a random Qwen2.5-VL, the same one in transformers, its inputs, timing in turns.

Both sides have the same weights (written in the hub's layout, read by transformers) and the same inputs, and
run in one process, in turns. Torch has what it takes by itself: its own number of threads, SDPA attention,
float32 or bfloat16 as asked. Nothing else should run on the machine; the load is recorded with the figures.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory of the same accelerator

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax import nnx
from PIL import Image

from fundus_jax.files import write_atomic
from fundus_jax.models import exact, weights
from fundus_jax.models.attention import backend_for
from fundus_jax.models.batch import Batch
from fundus_jax.models.layers import REMAT, Options
from fundus_jax.models.qwen2_5_vl import params
from fundus_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from fundus_jax.models.qwen2_5_vl.images import ImageConfig, image_patches
from fundus_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from fundus_jax.models.qwen2_5_vl.rows import collate, expand
from fundus_jax.records import ConfigError, DataError
from launch.chips import CHIPS, DEVICE_KINDS, Chip

IMAGE, VIDEO, START, END, PAD, FIRST = (
    0,
    1,
    2,
    3,
    4,
    6,
)  # ids: of vision, padding, other text
PAUSE = 0.1  # seconds between turns, in which the threads of the other side cease to spin
MODEL = ("width", "layers", "heads", "kv_heads", "mlp", "vocab")
VISION = ("vision_width", "vision_layers", "vision_heads", "vision_mlp")
SIZES = (*MODEL, *VISION, "dtype")
_DEFAULTS = (768, 12, 12, 4, 2048, 16384, 384, 8, 6, 1024, "float32")  # 106 M parameters


def define_model_flags(changes: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Declares the sizes of the model; those of Qwen2.5-VL 3B are 2048, 36, 16, 2, 11008, 151936, 1280, 32,
    16, 3420."""
    values: dict[str, Any] = {**dict(zip(SIZES, _DEFAULTS, strict=True)), **changes}
    for name in (*MODEL, *VISION):
        least = FIRST + 1 if name == "vocab" else 1
        flags.DEFINE_integer(name, values[name], f"The model's {name.replace('_', ' ')}.", lower_bound=least)
    flags.DEFINE_enum("dtype", values["dtype"], ["float32", "bfloat16"], "Type of the weights.")


def define_row_flags(prompts: int) -> None:
    """Declares the sizes of rows with an image, and of rows without one."""
    flags.DEFINE_integer("prompts", prompts, "Rows of a batch.", lower_bound=1)
    flags.DEFINE_integer("image_side", 32, "Patches along a side of the image; even, 4 to 70.", lower_bound=4)
    flags.DEFINE_integer("text_tokens", 128, "Tokens after an image.", lower_bound=2)
    flags.DEFINE_integer("text_length", 384, "Tokens of a row without an image.", lower_bound=2)


def define_remat_flag() -> None:
    """Declares what the backward pass computes again."""
    flags.DEFINE_enum("remat", "none", sorted(REMAT), "What our backward pass computes again.")


def define_report_flags(repeats: int = 5) -> None:
    """Declares how often things are measured, and where the figures go."""
    flags.DEFINE_integer("repeats", repeats, "Runs of each, after one that compiles.", lower_bound=1)
    flags.DEFINE_bool("hf", True, "Measure transformers too; needs torch.")
    flags.DEFINE_string("out", "", "JSON file to write.")


def make_config(args: Any) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL with the sizes of the flags, tied, and no end token; of the vision blocks the middle and the
    last attend over the whole image."""
    half = args.width // args.heads // 2
    side = round(half * 3 / 8)
    full = sorted({args.vision_layers // 2 - 1, args.vision_layers - 1} - {-1})
    ids = dict(zip(("image", "video", "vision_start", "vision_end"), (IMAGE, VIDEO, START, END), strict=True))
    raw = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **{"vocab_size": args.vocab, "hidden_size": args.width, "intermediate_size": args.mlp},
        **{"num_hidden_layers": args.layers, "num_attention_heads": args.heads},
        **{"num_key_value_heads": args.kv_heads, "rms_norm_eps": 1e-6, "hidden_act": "silu"},
        **{"max_position_embeddings": 32768, "bos_token_id": PAD, "eos_token_id": 5, "rope_theta": 1e6},
        "rope_scaling": {"type": "mrope", "mrope_section": [half - 2 * side, side, side]},
        **{f"{name}_token_id": number for name, number in ids.items()},
        **{"tie_word_embeddings": True, "torch_dtype": args.dtype, "initializer_range": 0.02},
        "use_sliding_window": False,
        "vision_config": {
            **{"depth": args.vision_layers, "hidden_size": args.vision_width, "in_chans": 3},
            **{"intermediate_size": args.vision_mlp, "num_heads": args.vision_heads},
            **{"out_hidden_size": args.width, "patch_size": 14, "spatial_merge_size": 2},
            **{"spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": full},
            **{"temporal_patch_size": 2, "tokens_per_second": 2, "hidden_act": "silu"},
        },
    }
    return Qwen2_5_VLConfig.from_hf(raw).ending_with(())


def make_model(args: Any) -> Qwen2_5_VL:
    """The model of the flags with random weights, and with the attention of the devices here. Its float32 is
    torch's: on an accelerator JAX would multiply in less."""
    exact(args.dtype)
    model = Qwen2_5_VL(make_config(args), rngs=nnx.Rngs(0), dtype=jnp.dtype(args.dtype))
    model.options = options()
    return model


def options() -> Options:
    """How a run of `launch` computes on the devices here."""
    return Options(attention=backend_for(jax.devices()[0].platform))


def chip() -> Chip | None:
    """What the maker publishes of the devices here; None where `launch.chips` does not know them."""
    kind = jax.devices()[0].device_kind
    return next((CHIPS[name] for start, name in DEVICE_KINDS.items() if kind.startswith(start)), None)


def in_torch(model: Qwen2_5_VL) -> Any:
    """transformers' model with the same weights, which it reads from a directory that we wrote, on such a
    device as JAX has. Raises ConfigError where this torch has none."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    platform = jax.devices()[0].platform
    if platform != "cpu" and not torch.cuda.is_available():
        raise ConfigError(
            f"JAX is on a {platform} and torch {torch.__version__} on the CPU: they are not compared; "
            "install a torch for CUDA, or measure this side alone with --nohf"
        )
    with tempfile.TemporaryDirectory() as folder:
        write_hf(Path(folder) / "hf", model)
        loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            Path(folder) / "hf", dtype=getattr(torch, model.config.dtype), local_files_only=True
        ).eval()
    loaded = loaded.to(torch.device("cpu" if platform == "cpu" else "cuda"))
    if loaded.config._attn_implementation != "sdpa":
        raise RuntimeError(f"transformers took {loaded.config._attn_implementation} attention, not sdpa")
    return loaded


def write_hf(path: Path, model: Qwen2_5_VL, max_shard: int = weights.MAX_SHARD) -> None:
    """A Hugging Face directory of weights and configuration alone."""
    with weights.new_directory(path) as scratch:
        params.save(scratch, model, max_shard)
        weights.write_json(scratch / "config.json", model.config.to_hf())


@dataclass(frozen=True)
class Inputs:
    """The same rows for both sides: ours, with the mask of the tokens that are learned [B,T]; and by
    transformers' names, in numpy."""

    batch: Batch
    learned: np.ndarray
    named: Mapping[str, np.ndarray]

    def torch(self, device: Any) -> dict[str, Any]:
        """Tensors for transformers."""
        import torch

        return {name: torch.from_numpy(value).to(device) for name, value in self.named.items()}


def make_inputs(args: Any, rows: int, text: int, image: int, answer: int = 0) -> Inputs:
    """Rows of equal length: an image of image x image patches (0: none) between its two marks, then `text`
    random tokens, of which the last `answer` are learned. Raises ConfigError for an image that the processor
    would take in another size, and for more learned tokens than text."""
    if answer > text:
        raise ConfigError(f"--answer_tokens={answer} of {text} tokens of text; take at most so many")
    random = np.random.default_rng(0)
    settings = ImageConfig()
    side = image * settings.patch_size
    made, pixels, grids = [], [], []
    for number in range(rows):
        words = random.integers(FIRST, args.vocab, text, np.int32)
        marks, images = np.zeros(0, np.int32), []
        if image:
            marks = np.asarray([START, IMAGE, END], np.int32)
            images = [Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8))]
            patches, grid = image_patches(images[0], settings)
            if tuple(grid) != (1, image, image):
                raise ConfigError(
                    f"--image_side={image}: the processor makes {grid[1]} x {grid[2]} patches of such an "
                    "image; take an even number from 4 to 70"
                )
            pixels.append(patches)
            grids.append(grid)
        ids = np.concatenate([marks, words])
        made.append(expand(ids, np.arange(len(ids)) >= len(ids) - answer, images, settings, IMAGE, number))
    batch, learned = collate(made, settings, pad_id=PAD, length=None, patches=None)
    tokens = batch.tokens.astype(np.int64)
    named = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    named["mm_token_type_ids"] = (tokens == IMAGE).astype(np.int64)
    if image:
        named |= {"pixel_values": np.concatenate(pixels), "image_grid_thw": np.asarray(grids, np.int64)}
    return Inputs(batch, learned, named)


class Spent(NamedTuple):
    """Seconds by the clock, and those of the processor, all threads together."""

    clock: float
    processor: float


def now() -> Spent:
    """Where both clocks stand."""
    return Spent(time.perf_counter(), time.process_time())


def since(begun: Spent) -> Spent:
    """What was spent since `now` gave `begun`."""
    clock, processor = now()
    return Spent(clock - begun.clock, processor - begun.processor)


def in_turns(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of each call: the median, the least and the most of `repeats` runs in turns, after one that
    compiles, and the median of what the processor spent on it.

    A call returns None, when its work is done, or its phases by name, each what it `Spent` or its seconds
    alone, which then are called NAME/PHASE. On a busy machine time by the clock favours who waits best for a
    core that is taken; seconds of the processor, all threads together, are nearly the same as on one at rest.
    """
    times: dict[str, list[Spent]] = {}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            time.sleep(PAUSE)
            begun = now()
            phases = call()
            spent = {name: since(begun)}
            for phase, one in (phases or {}).items():
                spent[f"{name}/{phase}"] = one if isinstance(one, Spent) else Spent(one, math.nan)
            for key, one in spent.items() if repeat else ():
                times.setdefault(key, []).append(one)
    found = {key: spread([run.clock for run in runs]) for key, runs in times.items()}
    for key, runs in times.items():
        used = statistics.median(run.processor for run in runs)
        found[key] |= {} if math.isnan(used) else {"processor": used}
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """What a report says of repeated measurements."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def numbers(name: str, values: Sequence[str]) -> list[int]:
    """The whole numbers, from 1, of the list flag `name`. Raises ConfigError where they are none."""
    if not values or not all(value.isascii() and value.isdigit() and int(value) for value in values):
        raise ConfigError(f"--{name}={','.join(values)}: give whole numbers from 1, with commas between them")
    return [int(value) for value in values]


def silent(call: Callable[[], Any]) -> Callable[[], None]:
    """`call` for `in_turns`, whose results are not phases."""

    def quiet() -> None:
        call()

    return quiet


def cells(row: dict[str, Any]) -> str:
    """Seconds of both sides and their ratio, for a printed table."""
    seconds = [f"{row[side]['median']:8.3f}" if side in row else f"{'-':>8}" for side in ("ours", "hf")]
    return " ".join([*seconds, f"{row['ratio']:6.2f}" if "ratio" in row else f"{'-':>6}"])


def agree(what: str, ours: Any, theirs: Any, bound: float) -> float:
    """The largest difference between two arrays, relative to the largest value of either. Raises RuntimeError
    above `bound`: what computes something else is not compared."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    scale = max(np.abs(ours).max(), np.abs(theirs).max(), 1e-30)
    difference = float(np.abs(ours - theirs).max() / scale) if ours.shape == theirs.shape else float("inf")
    if not difference <= bound:
        raise RuntimeError(
            f"{what} differ by {difference:.2g} of the largest, more than {bound:.2g}; "
            f"shapes are {ours.shape} and {theirs.shape}"
        )
    return difference


def new_report(args: Any, model: Any, settings: Sequence[str]) -> dict[str, Any]:
    """The head of a report: machine, load, versions, settings; rows come later. model: None, or the one that
    is measured."""
    device = jax.devices()[0]
    report: dict[str, Any] = {
        "device": f"{device.platform}: {device.device_kind}; {os.cpu_count()} CPU cores",
        "load": os.getloadavg()[0],  # processes that wanted a core, on average of the last minute
        "settings": {name: getattr(args, name) for name in settings},
        "rows": [],
    }
    if model is not None:
        report["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
        report["attention"] = model.options.attention
    return report


def finish(report: dict[str, Any], out: str) -> None:
    """Add the versions of what was loaded, and write the report to `out`, if it names a file; floats to five
    digits."""
    libraries = ("jax", "torch", "transformers", "orbax.checkpoint", "safetensors", "PIL", "openai")
    report["versions"] = {name: sys.modules[name].__version__ for name in libraries if name in sys.modules}
    print(f"{report['device']}; load {report['load']:.2f}; {report['settings']}")
    if out:
        write_atomic(Path(out), json.dumps(short(report), indent=1) + "\n")


def short(value: Any) -> Any:
    """JSON values with floats to five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: short(one) for key, one in value.items()}
    return [short(one) for one in value] if isinstance(value, list | tuple) else value


def command(define_flags: Callable[[], None], run: Callable[[Any], dict[str, Any]]) -> None:
    """Parse the flags, run the benchmark, write its report; a ConfigError or a DataError is one line."""

    def main(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"arguments without a name: {' '.join(argv[1:])}")
        logging.set_verbosity(logging.WARNING)
        try:
            finish(run(flags.FLAGS), flags.FLAGS.out)
        except (ConfigError, DataError) as error:
            sys.exit(str(error))

    define_flags()
    app.run(main)
