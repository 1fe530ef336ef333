"""TRL's own GRPO trainer, called on tensors of a test: the second implementation that ours is compared with.

A trainer is made without its constructor. What is replaced stands for the model (it returns the
log-probabilities of the test), for generation and the reward functions (they return the rewards of the test),
or for the accelerator of one process; the arithmetic between is TRL's, unchanged.
"""

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the comparison with TRL needs torch")
pytest.importorskip("trl", reason="the comparison with TRL needs trl")

from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.rloo_trainer import RLOOTrainer  # noqa: E402

MAX_COMPLETION_LENGTH = 17


class _Model:
    """Stands for the policy: returns given log-probabilities of the last positions."""

    training = True
    is_gradient_checkpointing = False

    def __init__(self, logprobs: Any = None) -> None:
        self.logprobs = logprobs

    def __call__(self, input_ids: Any, **unused: Any) -> Any:
        return SimpleNamespace(log_probs=self.logprobs, entropy=torch.zeros_like(self.logprobs))


def _accelerator() -> Any:
    return SimpleNamespace(
        autocast=nullcontext,
        device=torch.device("cpu"),
        gather=lambda tensor: tensor,
        gather_for_metrics=lambda tensor: tensor,
        is_main_process=True,
        num_processes=1,
        process_index=0,
        reduce=lambda tensor, reduction: tensor,
    )


def _trainer(kind: Any = GRPOTrainer, **fields: Any) -> Any:
    """A trainer with attributes `fields`; those named in ARGS are its arguments'."""
    args = {name: fields.pop(name, value) for name, value in ARGS.items()}
    trainer = object.__new__(kind)
    trainer.accelerator = _accelerator()
    trainer.args = SimpleNamespace(**args)
    trainer.state = SimpleNamespace(global_step=0)
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    for name, value in (FIELDS | fields).items():
        setattr(trainer, name, value)
    return trainer


ARGS = {
    "delta": None,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing_kwargs": None,
    "per_device_train_batch_size": 8,
    "report_to": [],
    "steps_per_generation": 1,
    "use_bias_correction_kl": False,
}
FIELDS = {
    "_entropy_bonus_enabled": False,
    "aux_loss_enabled": False,
    "current_gradient_accumulation_steps": 1,
    "importance_sampling_level": "token",
    "max_completion_length": MAX_COMPLETION_LENGTH,
    "model": _Model(),
    "off_policy_mask_threshold": None,
    "top_entropy_quantile": 1.0,
    "use_vllm": False,
}


def trl_loss(
    case: dict[str, np.ndarray],
    loss_type: str,
    *,
    beta: float,
    low: float,
    high: float,
    level: str = "token",
    delta: float | None = None,
    correction: Any = None,
    total_tokens: int | None = None,
) -> tuple[float, np.ndarray, dict[str, float]]:
    """Returns (loss, its gradient by logprobs [N,T], metrics) of `GRPOTrainer.compute_loss` for a case.

    correction: what `trl_correction` gave.
    """
    tensors = {name: torch.tensor(value) for name, value in case.items()}
    logprobs = tensors["logprobs"].requires_grad_()
    trainer = _trainer(
        loss_type=loss_type, beta=beta, epsilon_low=low, epsilon_high=high, delta=delta,
        importance_sampling_level=level, use_vllm=correction is not None,
        vllm_importance_sampling_correction=correction is not None,
    )  # fmt: skip
    mask = tensors["mask"].long()
    rows, length = mask.shape
    inputs = {
        "prompt_ids": torch.ones((rows, 2), dtype=torch.long),
        "prompt_mask": torch.ones((rows, 2), dtype=torch.long),
        "completion_ids": torch.ones((rows, length), dtype=torch.long),
        "completion_mask": mask,
        "advantages": tensors["advantages"],
        "old_per_token_logps": tensors["old_logprobs"],
        "ref_per_token_logps": tensors["ref_logprobs"],
        "num_items_in_batch": mask.sum() if total_tokens is None else torch.tensor(total_tokens),
        "importance_sampling_ratio": correction,
    }
    loss = trainer.compute_loss(_Model(logprobs), inputs)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), logprobs.grad.numpy(), metrics


def trl_correction(case: dict[str, np.ndarray], sampled: np.ndarray, mode: str, cap: float) -> Any:
    """Returns TRL's importance weights of the trainer's old_logprobs to a sampler's [N,T]: [N,T] or [N,1].

    One row of the case must be full: TRL pads to the longest.
    """
    lengths = case["mask"].sum(axis=1)
    ids = [[1] * length for length in lengths]
    told = [row[:length].tolist() for row, length in zip(sampled, lengths, strict=True)]
    count = len(ids)
    output = _scored(
        GRPOTrainer,
        lambda prompts: ([[1, 2]] * count, ids, None, ["text"] * count, told, {}, None, []),
        np.zeros((count // 2, 2)),
        model=_Model(torch.tensor(case["old_logprobs"])),
        scale_rewards="none",
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=None,
        vllm_importance_sampling_clip_max=cap,
    )[0]
    return output["importance_sampling_ratio"]


def trl_advantages(rewards: np.ndarray, valid: np.ndarray, scale: str) -> tuple[np.ndarray, dict[str, float]]:
    """Returns (advantages [B,G], metrics) of TRL's scoring step; what is not valid is its NaN reward."""
    count = rewards.size
    ids = [[1, 2]] * count
    scales = {"std": "group", "none": "none"}
    output, metrics = _scored(
        GRPOTrainer,
        lambda prompts: (ids, ids, None, ["text"] * count, None, {}, None, []),
        np.where(valid, rewards, np.nan),
        scale_rewards=scales[scale],
    )
    return output["advantages"].reshape(rewards.shape).numpy(), metrics


def trl_rloo(
    rewards: np.ndarray, valid: np.ndarray, old: np.ndarray, ref: np.ndarray, mask: np.ndarray, beta: float
) -> np.ndarray:
    """Returns the advantages [B,G] of TRL's RLOO, which takes `beta` times the sum of k1 off the rewards.

    old, ref: log-probs [B*G,T] of the policy and of the reference at the tokens of mask [B*G,T], of which one
    row must be full.
    """
    ids = [[1] * int(length) for length in mask.sum(axis=1)]
    output, _ = _scored(
        RLOOTrainer,
        lambda prompts: ([[1, 2]] * len(ids), ids, ["text"] * len(ids)),
        np.where(valid, rewards, np.nan),
        beta=beta,
        model=_Model(torch.tensor(old)),
        normalize_advantages=False,
        ref_model=_Model(torch.tensor(ref)),
        reward_clip_range=None,
    )
    return output["advantages"].reshape(rewards.shape).numpy()


def _scored(kind: Any, generate: Any, rewards: np.ndarray, **fields: Any) -> tuple[dict, dict[str, float]]:
    """What a trainer makes of the completions of `generate` and their rewards [B,G], and its metrics."""
    table = torch.tensor(rewards, dtype=torch.float32).reshape(-1, 1)
    settings = {
        "_generate": generate,
        "_calculate_rewards": lambda *unused: table,
        "_get_per_token_logps_and_entropies": lambda model, *unused, **more: (model.logprobs, None, None),
        "_logs": defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        "_pending_extra_logs": {},
        "_pending_metrics": {},
        "_tokenizer": SimpleNamespace(pad_token_id=0),
        "beta": 0.0,
        "environment_factories": None,
        "environments": None,
        "mask_truncated_completions": False,
        "multi_objective_aggregation": "sum_then_normalize",
        "num_generations": rewards.shape[1],
        "num_iterations": 1,
        "pad_to_multiple_of": None,
        "reward_func_names": ["reward"],
        "reward_weights": torch.ones(1),
        "tools": None,
    }
    trainer = _trainer(kind, **(settings | fields))
    output = trainer._generate_and_score_completions([{"prompt": "question"}] * len(table))
    return output, {name: values[-1] for name, values in trainer._metrics["train"].items()}
