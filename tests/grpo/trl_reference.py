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


def _trainer(**fields: Any) -> GRPOTrainer:
    trainer = object.__new__(GRPOTrainer)
    trainer.accelerator = _accelerator()
    trainer.args = SimpleNamespace(
        delta=None,
        gradient_accumulation_steps=1,
        gradient_checkpointing_kwargs=None,
        per_device_train_batch_size=8,
        report_to=[],
        steps_per_generation=1,
        use_bias_correction_kl=False,
    )
    trainer.state = SimpleNamespace(global_step=0)
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    fields = {
        "_entropy_bonus_enabled": False,
        "aux_loss_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "importance_sampling_level": "token",
        "max_completion_length": MAX_COMPLETION_LENGTH,
        "model": _Model(),
        "off_policy_mask_threshold": None,
        "top_entropy_quantile": 1.0,
        "use_vllm": False,
    } | fields
    for name, value in fields.items():
        setattr(trainer, name, value)
    return trainer


def trl_loss(
    case: dict[str, np.ndarray],
    loss_type: str,
    *,
    beta: float,
    low: float,
    high: float,
    total_tokens: int | None = None,
) -> tuple[float, np.ndarray, dict[str, float]]:
    """Returns (loss, its gradient by logprobs [N,T], metrics) of `GRPOTrainer.compute_loss` for a case."""
    tensors = {name: torch.tensor(value) for name, value in case.items()}
    logprobs = tensors["logprobs"].requires_grad_()
    trainer = _trainer(loss_type=loss_type, beta=beta, epsilon_low=low, epsilon_high=high)
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
    }
    loss = trainer.compute_loss(_Model(logprobs), inputs)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), logprobs.grad.numpy(), metrics


def trl_advantages(rewards: np.ndarray, valid: np.ndarray, scale: str) -> tuple[np.ndarray, dict[str, float]]:
    """Returns (advantages [B,G], metrics) of TRL's scoring step; what is not valid is its NaN reward."""
    groups, size = rewards.shape
    count = groups * size
    table = torch.tensor(np.where(valid, rewards, np.nan), dtype=torch.float32).reshape(count, 1)
    ids = [[1, 2]] * count
    trainer = _trainer(
        _generate=lambda prompts: (ids, ids, None, ["text"] * count, None, {}, None, []),
        _calculate_rewards=lambda *unused: table,
        _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
        _tokenizer=SimpleNamespace(pad_token_id=0),
        beta=0.0,
        environment_factories=None,
        environments=None,
        mask_truncated_completions=False,
        multi_objective_aggregation="sum_then_normalize",
        num_generations=size,
        num_iterations=1,
        pad_to_multiple_of=None,
        reward_func_names=["reward"],
        reward_weights=torch.ones(1),
        scale_rewards={"std": "group", "none": "none"}[scale],
        tools=None,
    )
    output = trainer._generate_and_score_completions([{"prompt": "question"}] * count)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return output["advantages"].reshape(groups, size).numpy(), metrics
