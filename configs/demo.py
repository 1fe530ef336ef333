"""The whole paper on a laptop: phantoms -> traces -> SFT -> GRPO -> evaluation -> Hugging Face export ->
report.html.

    make demo            (= python launch/run.py --config=configs/demo.py --workdir=runs/demo)
    python launch/run.py --config=configs/demo.py:quick --workdir=runs/quick     every stage in a few minutes,
    learning little

Hardware: 2 CPU cores, 6 GiB. All budgets are in steps. The policy is a 2-million-parameter Qwen2.5-VL that a
`base` stage makes from nothing (a vision warm-up under a findings head that is then discarded), standing in
for pre-training.
"""

from fundus_jax.base.policy import PolicyConfig
from fundus_jax.base.warmup import BaseConfig
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.optim import OptimConfig
from fundus_jax.sft import PromptConfig, SftConfig
from launch.config import DataConfig, EvaluateConfig, RunConfig

# Questions an image: every image is diagnosed; the other tasks take a small share each.
TASKS = "disease:1,modality:0.1,laterality:0.2,lesion_presence:0.15"


def get_config(arg: str = "") -> RunConfig:
    """The demo; `arg` "quick" cuts every budget."""
    config = RunConfig(
        name="demo",
        unroll=4,
        data=DataConfig(
            dataset="phantom",
            train=13000,
            test=900,
            seed=7,
            size=112,
            tasks=TASKS,
            sft_part=0.8,
            grpo_tasks="disease",
        ),
        prompt=PromptConfig(style="open", think=True, instruct=False),
        policy=PolicyConfig(),
        base=BaseConfig(
            steps=800,
            batch=16,
            save_every=400,
            optim=OptimConfig(name="muon", lr=5e-3, warmup=30, final_fraction=0.15, b2=0.98),
        ),
        sft=SftConfig(
            steps=800,
            batch=16,
            save_every=400,
            max_length=256,
            optim=OptimConfig(name="muon", lr=3e-3, warmup=50, final_fraction=0.02, b2=0.98),
        ),
        grpo=GrpoConfig(
            steps=120,
            prompts_per_step=32,
            group_size=4,
            micro_batch=32,
            max_new_tokens=48,
            scale="none",
            flat_groups="drop",  # half of them, once SFT is done: their computing is saved
            kl_coef=0.02,
            save_every=60,
            optim=OptimConfig(name="muon", lr=3e-4, warmup=20, b2=0.98),
        ),
        evaluate=EvaluateConfig(questions=0, before=100, sampled=900, samples=3, batch=100),
    )
    if arg == "quick":
        config.data.train, config.data.test, config.data.workers = 600, 60, 1
        config.base.steps = config.sft.steps = 60
        config.grpo.steps, config.grpo.prompts_per_step, config.grpo.micro_batch = 4, 8, 32
        config.base.save_every = config.sft.save_every = config.grpo.save_every = 0
        config.evaluate.before, config.evaluate.batch = 20, 20
        config.grpo.optim.warmup = 1
    return config
