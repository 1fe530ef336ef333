"""Models: `load_pretrained` and `save_pretrained` for any Hugging Face directory of a known family."""

from fundus_jax.models.registry import exact, load_pretrained, read_config, save_adapter, save_pretrained

__all__ = ["exact", "load_pretrained", "read_config", "save_adapter", "save_pretrained"]
