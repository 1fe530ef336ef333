"""Set-up E of the paper's Table 5: SFT on reasoning traces.

    python launch/run.py --config=configs/setups/e_sft_traces.py:3b --config.model=DIR \
        --config.data.dataset=idrid --config.data.source=DIR

`:7b`, `:phantom` and `:quick` as in configs/setups/g_fundus_r1.py.
"""

from configs.setups.f_sft_grpo_traces import get_config as neighbour
from launch.config import RunConfig


def get_config(arg: str = "3b") -> RunConfig:
    """F without its GRPO."""
    config = neighbour(arg)
    config.name = f"setup_e_{arg}"
    config.stages = "sft"
    return config
