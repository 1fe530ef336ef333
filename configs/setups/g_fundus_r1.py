"""Set-up G of the paper's Table 5, Fundus-R1: SFT on reasoning traces, then GRPO with answer, format and
process reward. The other nine differ from it, or from a neighbour, by the fields that their files name.

    python launch/run.py --config=configs/setups/g_fundus_r1.py:3b --config.model=DIR \
        --config.data.dataset=idrid --config.data.source=DIR

Every set-up takes `:3b` (configs/fundus_r1_3b.py, the default), `:7b`, `:phantom` (configs/demo.py: two CPU
cores, drawn images, a small policy) and `:quick` (the same in seconds, which learns nothing, for the tests).
`python launch/setups.py` runs all ten on phantoms and prints the table.
"""

from configs import demo, fundus_r1_3b, fundus_r1_7b
from fundus_jax.base.policy import PolicyConfig
from fundus_jax.records import ConfigError
from launch.config import EvaluateConfig, RunConfig

RECIPES = {
    "3b": fundus_r1_3b.get_config,
    "7b": fundus_r1_7b.get_config,
    "phantom": demo.get_config,
    "quick": lambda: tiny(demo.get_config("quick")),
}


def get_config(arg: str = "3b") -> RunConfig:
    """G at the size `arg`. Raises ConfigError for one that is not among RECIPES."""
    if arg not in RECIPES:
        raise ConfigError(f"a set-up comes in the sizes {', '.join(RECIPES)}, not {arg!r}")
    config = RECIPES[arg]()
    config.name = f"setup_g_{arg}"
    return config


def tiny(config: RunConfig) -> RunConfig:
    """The least that still goes through every stage."""
    config.unroll = 1
    config.data.train, config.data.test = 64, 24
    config.policy = PolicyConfig(
        width=64, layers=2, mlp=96, vision_width=64, vision_layers=2, vision_mlp=96, pixels=112
    )
    for stage, steps in ((config.base, 4), (config.sft, 40), (config.grpo, 3)):
        stage.steps, stage.optim.warmup = steps, 1
    config.base.batch = config.sft.batch = 8
    config.grpo.prompts_per_step, config.grpo.micro_batch, config.grpo.max_new_tokens = 4, 16, 24
    config.evaluate = EvaluateConfig(before=8, sampled=8, samples=2, batch=24)
    return config
