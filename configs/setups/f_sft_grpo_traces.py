"""Set-up F of the paper's Table 5: SFT on reasoning traces, then GRPO with answer and format reward.

    python launch/run.py --config=configs/setups/f_sft_grpo_traces.py:3b --config.model=DIR \
        --config.data.dataset=idrid --config.data.source=DIR

`:7b`, `:phantom` and `:quick` as in configs/setups/g_fundus_r1.py.
"""

from configs.setups.g_fundus_r1 import get_config as neighbour
from launch.config import RunConfig


def get_config(arg: str = "3b") -> RunConfig:
    """G without the process reward; no judge is asked."""
    config = neighbour(arg)
    config.name = f"setup_f_{arg}"
    config.grpo.process_weight = 0.0
    return config
