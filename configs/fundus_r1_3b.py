"""Fundus-R1-3B (the paper's set-up G): Qwen2.5-VL-3B, SFT on reasoning traces, then GRPO with the process
reward.

    python launch/run.py --config=configs/fundus_r1_3b.py --config.model=DIR --config.data.dataset=idrid \
        --config.data.source=DIR
    python launch/run.py --config=configs/fundus_r1_3b.py:lora ...     adapters of rank 16 in the decoder

--config.model is a Hugging Face directory of Qwen2.5-VL-3B-Instruct. Hardware in the paper: 8 x H800 80 GB,
bf16. Mesh, recomputing and micro-batches are chosen by the devices (--mesh=auto); docs/scaling.md says what
fits on which machine. From the paper: 2 epochs of SFT, 8 of GRPO, AdamW, 4 rollouts at temperature 1.0. Ours,
since its text lost them: learning rates, batch sizes, rating values; and that options are answered by letter,
as FunBench asks for them (the paper's figures show labels in words: --config.prompt.style=options).

Only images with findings have a process reward. Without a server that votes these are the ones with masks: of
IDRiD's 914 prompts 118, and 184 rows of SFT. configs/data_server.py has the others voted on, as in the paper.
"""

from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.models.lora import LoraConfig
from fundus_jax.optim import OptimConfig
from fundus_jax.records import ConfigError
from fundus_jax.sft import PromptConfig, SftConfig
from launch.config import DataConfig, EvaluateConfig, RunConfig


def get_config(arg: str = "") -> RunConfig:
    """The recipe; with `arg` "lora" adapters are trained in the place of the weights. Raises ConfigError for
    another argument."""
    if arg not in ("", "lora"):
        raise ConfigError(f"the recipe takes no argument, or lora, not {arg!r}")
    config = RunConfig(
        name="fundus_r1_3b",
        model="Qwen2.5-VL-3B-Instruct",
        compute="bfloat16",
        remat="block",
        max_pixels=448 * 448,
        max_prompt=1024,
        data=DataConfig(dataset="idrid", max_side=1024),
        prompt=PromptConfig(style="letters", think=True, instruct=True),
        sft=SftConfig(
            epochs=2,
            batch=64,
            micro_batches=4,
            max_length=2048,
            save_every=200,
            optim=OptimConfig(name="adamw", lr=1e-5, warmup=0.03, final_fraction=0.1, b2=0.999),
        ),
        grpo=GrpoConfig(
            epochs=8,
            prompts_per_step=128,
            group_size=4,
            micro_batch=64,
            max_new_tokens=512,
            save_every=50,
            optim=OptimConfig(name="adamw", lr=1e-6, warmup=0.03, decay="constant", b2=0.999),
        ),
        evaluate=EvaluateConfig(sampled=500, samples=4, batch=128),
    )
    if arg == "lora":  # PEFT's usual: a tenfold learning rate, alpha twice the rank
        config.name += "_lora"
        config.lora = LoraConfig(rank=16, alpha=32)
        config.sft.optim.lr, config.grpo.optim.lr = 1e-4, 1e-5
    return config
