"""Set-up I of the paper's Table 5: the process reward by the domain knowledge of the given answer only,
whether it is right or wrong.

    python launch/run.py --config=configs/setups/i_knowledge_only.py:3b --config.model=DIR \
        --config.data.dataset=idrid --config.data.source=DIR

`:7b`, `:phantom` and `:quick` as in configs/setups/g_fundus_r1.py. That the ratings are worth what they are
worth in G is our reading.
"""

from configs.setups.g_fundus_r1 import get_config as neighbour
from launch.config import RunConfig


def get_config(arg: str = "3b") -> RunConfig:
    """G with another reference for the judge."""
    config = neighbour(arg)
    config.name = f"setup_i_{arg}"
    config.grpo.process = "knowledge"
    return config
