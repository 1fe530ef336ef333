"""Training data as in the paper, by models behind servers: findings by five votes where there are no masks,
traces that a model writes and checks. Everything else is configs/fundus_r1_3b.py.

    python launch/run.py --config=configs/data_server.py --stage=data --config.data.dataset=idrid \
        --config.data.source=DIR --config.data.votes.server.address=http://HOST:8000/v1 \
        --config.data.writer.server.address=http://HOST:8001/v1
    python launch/run.py --config=configs/data_server.py:lora ...     the same data, adapters

Two vLLM servers, of which each may be several (addresses with commas between): a vision-language model that
votes, and a language model that writes. In the paper these are Qwen2.5-VL-32B and Qwen3-Max. The fields
`server.model` below are the names that they are served under. docs/data.md explains the rest.
"""

from configs.fundus_r1_3b import get_config as recipe
from launch.config import RunConfig


def get_config(arg: str = "") -> RunConfig:
    """The recipe; `arg` as there."""
    config = recipe(arg)
    config.name = f"{config.name}_data_server"
    config.data.findings = "both"
    config.data.votes.server.model = "Qwen2.5-VL-32B-Instruct"
    config.data.traces = "server"
    config.data.writer.server.model = "Qwen3-32B"
    return config
