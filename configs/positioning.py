"""Positioning with diagnosis on phantoms, as in FundusExpert (region, finding, diagnosis): traces say where a
finding lies, GRPO rewards boxes that agree with the masks, the evaluation scores them, the report draws them.

    python launch/run.py --config=configs/positioning.py --workdir=runs/positioning
    python launch/run.py --config=configs/positioning.py:quick --workdir=runs/quick   minutes, learns little

Everything but the boxes is configs/demo.py. Hardware: 2 CPU cores, 6 GiB; some hours (not timed yet), since a
reply has up to 350 tokens where the demo's has 45. Two fields switch any recipe to such traces, here 3B's:

    python launch/run.py --config=configs/fundus_r1_3b.py --config.prompt.boxes=4 \
        --config.grpo.localisation_weight=1 ...

Only images with masks have boxes (81 of IDRiD's 516); the others keep plain traces and no reward for boxes.
"""

from configs.demo import get_config as demo
from fundus_jax.records import ConfigError
from launch.config import RunConfig


def get_config(arg: str = "") -> RunConfig:
    """The recipe; `arg` "quick" cuts every budget. Raises ConfigError for another argument."""
    if arg not in ("", "quick"):
        raise ConfigError(f"the recipe takes no argument, or quick, not {arg!r}")
    config = demo(arg)
    config.name = "positioning"
    config.prompt.boxes = 2
    config.sft.max_length = config.sft.row_length = 384  # packed
    config.sft.batch = 6
    config.grpo.max_new_tokens = 352  # the longest right reply of a prompt has 350
    config.grpo.slots = 8
    config.grpo.localisation_weight = 1.0
    config.grpo.flat_groups = "keep"  # boxes differ within nearly every group
    if arg == "quick":
        config.sft.batch, config.base.steps, config.sft.steps, config.grpo.slots = 2, 20, 20, 0
        config.base.optim.warmup = config.sft.optim.warmup = 5
        config.data.train, config.data.test, config.evaluate.before = 120, 30, 10
        config.grpo.steps, config.grpo.prompts_per_step, config.grpo.micro_batch = 2, 4, 16
    return config
