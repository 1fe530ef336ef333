"""Fundus-R1-7B: as configs/fundus_r1_3b.py, from Qwen2.5-VL-7B-Instruct.

    python launch/run.py --config=configs/fundus_r1_7b.py --config.model=DIR --config.data.dataset=idrid \
        --config.data.source=DIR

`:lora` as there.
"""

from configs.fundus_r1_3b import get_config as smaller
from launch.config import RunConfig


def get_config(arg: str = "") -> RunConfig:
    """The 3B recipe with the larger model in smaller pieces."""
    config = smaller(arg)
    config.name, config.model = config.name.replace("3b", "7b"), "Qwen2.5-VL-7B-Instruct"
    config.sft.micro_batches, config.grpo.micro_batch = 8, 32
    return config
