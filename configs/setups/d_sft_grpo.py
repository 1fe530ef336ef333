"""Set-up D of the paper's Table 5: SFT, then GRPO, without reasoning traces: SFT learns the answers, prompts
ask for the answer alone, and the format reward is for the answer block alone.

    python launch/run.py --config=configs/setups/d_sft_grpo.py:3b --config.model=DIR \
        --config.data.dataset=idrid --config.data.source=DIR

`:7b`, `:phantom` and `:quick` as in configs/setups/g_fundus_r1.py.

The paper does not say how its set-ups without traces prompt the model; that they ask for no trace is our
reading. SFT then learns from every example, also from those whose trace was rejected.
"""

from configs.setups.f_sft_grpo_traces import get_config as neighbour
from launch.config import RunConfig


def get_config(arg: str = "3b") -> RunConfig:
    """F without traces."""
    config = neighbour(arg)
    config.name = f"setup_d_{arg}"
    config.prompt.think = False
    return config
