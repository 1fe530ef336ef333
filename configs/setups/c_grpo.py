"""Set-up C of the paper's Table 5: GRPO on the base model, without SFT and without reasoning traces.

    python launch/run.py --config=configs/setups/c_grpo.py:3b --config.model=DIR \
        --config.data.dataset=idrid --config.data.source=DIR

`:7b`, `:phantom` and `:quick` as in configs/setups/g_fundus_r1.py. On phantoms the base policy has no
language, so next to no rollout is rewarded, and GRPO has nothing to start from.
"""

from configs.setups.d_sft_grpo import get_config as neighbour
from launch.config import RunConfig


def get_config(arg: str = "3b") -> RunConfig:
    """D without its SFT."""
    config = neighbour(arg)
    config.name = f"setup_c_{arg}"
    config.stages = "grpo"
    return config
