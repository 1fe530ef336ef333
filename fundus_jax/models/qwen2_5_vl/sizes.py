"""The published sizes of Qwen2.5-VL-Instruct, so that memory and meshes can be planned without a checkpoint.

From the config.json of each model on the hub (3B and 7B are compared with it in the tests).
"""

from fundus_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig, VisionConfig
from fundus_jax.records import ConfigError

# hidden_size, intermediate_size, layers, heads, kv heads, vocabulary, tied head, vision intermediate_size
SIZES = {
    "3B": (2048, 11008, 36, 16, 2, 151936, True, 3420),
    "7B": (3584, 18944, 28, 28, 4, 152064, False, 3420),
    "32B": (5120, 27648, 64, 40, 8, 152064, False, 3456),
    "72B": (8192, 29568, 80, 64, 8, 152064, False, 3456),
}


def published(name: str) -> Qwen2_5_VLConfig:
    """The configuration of a model by its name on the hub, e.g. "Qwen2.5-VL-7B-Instruct", or its size alone.

    Raises ConfigError for a name without one of the published sizes.
    """
    size = next((size for size in SIZES if size in name.upper().replace("_", "-").split("-")), None)
    if size is None:
        raise ConfigError(f"{name!r} names no published size of Qwen2.5-VL; there are {', '.join(SIZES)}")
    width, mlp, layers, heads, kv_heads, vocab, tied, vision_mlp = SIZES[size]
    return Qwen2_5_VLConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        vision=VisionConfig(intermediate_size=vision_mlp, out_hidden_size=width),
    )
