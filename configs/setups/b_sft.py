"""Set-up B of the paper's Table 5: SFT on the answers alone, without reasoning traces.

    python launch/run.py --config=configs/setups/b_sft.py:3b --config.model=DIR \
        --config.data.dataset=idrid --config.data.source=DIR

`:7b`, `:phantom` and `:quick` as in configs/setups/g_fundus_r1.py.
"""

from configs.setups.d_sft_grpo import get_config as neighbour
from launch.config import RunConfig


def get_config(arg: str = "3b") -> RunConfig:
    """D without its GRPO."""
    config = neighbour(arg)
    config.name = f"setup_b_{arg}"
    config.stages = "sft"
    return config
