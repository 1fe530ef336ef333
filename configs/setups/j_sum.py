"""Set-up J of the paper's Table 5: the process reward is the sum of what a trace is worth by the image's
findings and by the knowledge of the given answer.

    python launch/run.py --config=configs/setups/j_sum.py:3b --config.model=DIR \
        --config.data.dataset=idrid --config.data.source=DIR

`:7b`, `:phantom` and `:quick` as in configs/setups/g_fundus_r1.py. That the ratings are worth what they are
worth in G is our reading.
"""

from configs.setups.g_fundus_r1 import get_config as neighbour
from launch.config import RunConfig


def get_config(arg: str = "3b") -> RunConfig:
    """G with both references for the judge."""
    config = neighbour(arg)
    config.name = f"setup_j_{arg}"
    config.grpo.process = "sum"
    return config
