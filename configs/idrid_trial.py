"""Every stage on real images: IDRiD (516 graded colour photographs, 81 with lesion masks), small policy, two
CPU cores.

    python launch/run.py --config=configs/idrid_trial.py --config.data.source=DIR

DIR holds the publisher's folders "A. Segmentation" and "B. Disease Grading". This shows that the whole path
works on real data, and what it gives; a few minutes of two cores on a few hundred images do not make the
small policy a grader. Some of these minutes go into knowing photographs again that stand in both halves
(data.near). For real results start from real weights: configs/fundus_r1_3b.py with
--config.data.dataset=idrid.
"""

from fundus_jax.base.policy import PolicyConfig
from fundus_jax.base.warmup import BaseConfig
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.optim import OptimConfig
from fundus_jax.sft import PromptConfig, SftConfig
from launch.config import DataConfig, EvaluateConfig, RunConfig


def get_config(arg: str = "") -> RunConfig:
    """The trial; `arg` "quick" cuts every budget."""
    config = RunConfig(
        name="idrid_trial",
        unroll=4,
        data=DataConfig(
            dataset="idrid", max_side=224, tasks="disease:1,dr_grade:0.5,modality:0.25,lesion_presence:1"
        ),
        prompt=PromptConfig(style="open", think=True, instruct=False),
        policy=PolicyConfig(pixels=224),
        base=BaseConfig(
            steps=200,
            batch=8,
            optim=OptimConfig(name="muon", lr=5e-3, warmup=20, final_fraction=0.15, b2=0.98),
        ),
        sft=SftConfig(
            steps=200,
            batch=8,
            max_length=512,
            without_trace="answer",
            optim=OptimConfig(name="muon", lr=3e-3, warmup=20, final_fraction=0.02, b2=0.98),
        ),
        grpo=GrpoConfig(
            steps=20,
            prompts_per_step=8,
            group_size=4,
            micro_batch=32,
            max_new_tokens=64,
            scale="none",
            optim=OptimConfig(name="muon", lr=3e-4, warmup=5, b2=0.98),
        ),
        evaluate=EvaluateConfig(before=50, sampled=100, samples=3, batch=50),
    )
    if arg == "quick":
        config.data.near = False
        config.base.steps = config.sft.steps = 4
        config.grpo.steps, config.grpo.prompts_per_step, config.grpo.micro_batch = 2, 4, 16
        config.base.optim.warmup = config.sft.optim.warmup = config.grpo.optim.warmup = 1
        config.evaluate = EvaluateConfig(questions=20, before=10, sampled=10, samples=2, batch=10)
    return config
