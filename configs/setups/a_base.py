"""Set-up A of the paper's Table 5: the base model, measured as it is.

    python launch/run.py --config=configs/setups/a_base.py:3b --config.model=DIR \
        --config.data.dataset=idrid --config.data.source=DIR

`:7b`, `:phantom` and `:quick` as in configs/setups/g_fundus_r1.py. On phantoms the base is a small policy
whose vision tower was warmed up and which has no language: it answers next to nothing.
"""

from configs.setups.b_sft import get_config as neighbour
from launch.config import RunConfig


def get_config(arg: str = "3b") -> RunConfig:
    """B without its SFT."""
    config = neighbour(arg)
    config.name = f"setup_a_{arg}"
    config.stages = ""
    return config
