"""Fundus-R1-32B: as configs/fundus_r1_3b.py, from Qwen2.5-VL-32B-Instruct. Not in the paper.

    python launch/run.py --config=configs/fundus_r1_32b.py --config.model=DIR --config.data.dataset=idrid \
        --config.data.source=DIR

Hardware: from 32 TPU v5p chips (v5p-64), see docs/scaling.md; with `:lora` adapters are trained instead of
the weights.
"""

from configs.fundus_r1_3b import get_config as smaller
from launch.config import RunConfig


def get_config(arg: str = "") -> RunConfig:
    """The 3B recipe with the larger model."""
    config = smaller(arg)
    config.name, config.model = config.name.replace("3b", "32b"), "Qwen2.5-VL-32B-Instruct"
    return config
