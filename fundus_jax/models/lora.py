"""Low-rank adapters (LoRA: Hu et al. 2021, arXiv:2106.09685) on any linear layers of a model.

A chosen layer's weight W stays as it is, and the layer computes with W + alpha / rank * B A, where A
[rank, in] and B [out, rank] are what is trained. A starts as in PEFT (Kaiming-uniform), B at zero, so an
adapted model starts as the model it was. Neighbours: `layers.Linear` does the arithmetic, `freeze` marks the
rest, a family's `params.save` writes the weights with the adapters `merged` into them.

Annotations are types and not strings: ml_collections parses `--config.lora.rank=8` by them.
"""

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fundus_jax.models.freeze import freeze_all
from fundus_jax.models.layers import Linear
from fundus_jax.records import ConfigError
from fundus_jax.sharding import param_axes


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Adapters of `rank` (0: none, the weights themselves are trained), scaled by alpha / rank.

    targets: which linear layers get one, as names or regular expressions, comma-separated. Each has to match
    the end of a layer's path in our module tree: "q_proj,v_proj", "text.*" (all of the decoder's),
    "visual.*qkv", "visual.merger.fc1" (transformers calls it visual.merger.mlp.0). The output projection
    takes none, as PEFT's "all-linear" leaves it out. seed: of A.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: str = "text.*"
    seed: int = 0

    def validate(self) -> None:
        """Raises ConfigError for the first field that makes no sense."""
        if self.rank < 0:
            raise ConfigError(f"lora.rank is {self.rank}; it must be at least 0 (0: no adapters)")
        if not 0 < self.alpha < float("inf"):
            raise ConfigError(f"lora.alpha is {self.alpha}; it must be a number above 0")
        self.patterns()

    def patterns(self) -> dict[str, re.Pattern[str]]:
        """Each target, compiled. Raises ConfigError for what is no regular expression."""
        texts = [text.strip() for text in self.targets.split(",") if text.strip()]
        try:
            found = {text: re.compile(rf"(?:.*\.)?(?:{text})") for text in texts}
        except re.error as error:
            raise ConfigError(
                f"lora.targets is {self.targets!r}, of which a part is no regular expression ({error}); "
                "write names or expressions with a comma between them, e.g. q_proj,v_proj"
            ) from error
        if not found:
            raise ConfigError("lora.targets is empty; name the layers, or set lora.rank to 0 for no adapters")
        return found


def linears(model: nnx.Module) -> dict[str, Linear]:
    """Every linear layer of `model` by its dotted path; a stack of L layers is one."""
    found = {
        ".".join(map(str, path)): node for path, node in nnx.iter_graph(model) if isinstance(node, Linear)
    }
    return dict(sorted(found.items()))


def attach(model: nnx.Module, config: LoraConfig) -> None:
    """Give the chosen layers of `model` adapters, and freeze everything else, in place.

    Adapters are float32 at least, whatever the weights are. Raises ConfigError for a target that matches no
    layer, listing the layers.
    """
    config.validate()
    layers = linears(model)
    matched = {
        text: [name for name in layers if pattern.fullmatch(name)]
        for text, pattern in config.patterns().items()
    }
    unknown = [text for text, names in matched.items() if not names]
    if unknown:
        raise ConfigError(
            f"lora.targets: no layer that takes an adapter is called {', '.join(unknown)}; "
            f"there are {', '.join(layers)}. These are our names, not transformers', and the output "
            "projection (lm_head) takes none, as PEFT's all-linear leaves it out"
        )
    freeze_all(model)
    chosen = sorted({name for names in matched.values() for name in names})
    for number, name in enumerate(chosen):
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        _adapt(layers[name], config, key)


def _adapt(linear: Linear, config: LoraConfig, key: jax.Array) -> None:
    """A uniform in +-1/sqrt(in), which is Kaiming's with a = sqrt(5); B zero."""
    weight = linear.weight.get_value()
    *stack, n_out, n_in = weight.shape
    *layers, out_axis, in_axis = param_axes(linear.weight)
    dtype = jnp.promote_types(weight.dtype, jnp.float32)
    bound = n_in**-0.5
    a = jax.random.uniform(key, (*stack, config.rank, n_in), dtype, -bound, bound)
    b = jnp.zeros((*stack, n_out, config.rank), dtype)
    linear.lora_a = nnx.Param(a, axes=(*layers, "rank", in_axis))
    linear.lora_b = nnx.Param(b, axes=(*layers, out_axis, "rank"))
    linear.lora_scale = config.alpha / config.rank


def adapted(model: nnx.Module) -> dict[str, Linear]:
    """The layers of `model` that have an adapter, by path."""
    return {name: linear for name, linear in linears(model).items() if linear.lora_a is not None}


def halves(linear: Linear, layer: int | None) -> tuple[jax.Array, jax.Array]:
    """A [rank, in] and B [out, rank] of an adapted layer, or of one layer of a stack."""
    if linear.lora_a is None or linear.lora_b is None:
        raise ConfigError("this layer has no adapter; see lora.attach")
    a, b = linear.lora_a.get_value(), linear.lora_b.get_value()
    return (a, b) if layer is None else (a[layer], b[layer])


def merged(weight: Any, linear: Linear, layer: int | None) -> np.ndarray:
    """weight + scale * B A, [out, in], in float32 at least: what the adapted layer computes with."""
    wide = np.promote_types(np.asarray(weight).dtype, np.float32)
    weight, a, b = (np.asarray(part).astype(wide) for part in (weight, *halves(linear, layer)))
    return weight + wide.type(linear.lora_scale) * (b @ a)
