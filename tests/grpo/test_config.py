"""The configuration of the GRPO stage: its defaults, the errors of bad values, what a flag can set."""

import ast
import dataclasses
from pathlib import Path

import pytest
from absl import flags as absl_flags
from ml_collections import config_flags

from fundus_jax import grpo
from fundus_jax.grpo.alarms import AlarmConfig
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.loss import LossConfig
from fundus_jax.records import ConfigError

BAD = [
    ("group_size", 1),
    ("group_size", 4.0),
    ("group_size", True),
    ("temperature", 0.0),
    ("temperature", float("nan")),
    ("temperature", "1.0"),
    ("prompts_per_step", 0),
    ("buckets", 0),
    ("steps", -1),
    ("epochs", 0.0),
    ("max_new_tokens", 0),
    ("mu", 0),
    ("micro_batch", 0),
    ("micro_batch", 7),
    ("micro_batch", 2),  # half a group
    ("micro_batch", 12),  # whole groups, but 64 / 12 is not whole
    ("save_every", -1),
    ("seed", -1),
    ("optim", None),
    ("clip_low", 0.0),
    ("clip_low", 1.0),
    ("clip_low", 0.1),  # with mu 1 nothing is clipped
    ("clip_high", 0.28),
    ("clip_high", 0.0),
    ("clip_high", float("inf")),
    ("kl", "k4"),
    ("kl_coef", -0.1),
    ("aggregate", "mean"),
    ("aggregate", "constant"),
    ("constant_norm", 512),
    ("constant_norm", -1),
    ("ratio", "row"),
    ("ratio", "sequence"),  # with mu 1 it is "token"
    ("dual_clip", -1.0),
    ("dual_clip", 3.0),  # with mu 1 nothing is clipped
    ("kl_in", "both"),
    ("kl_clamp", -1.0),
    ("sampler_correction", -1.0),
    ("sampler_correction", 0.5),
    ("sampler_ratio", "row"),
    ("sampler_ratio", "sequence"),  # of nothing
    ("baseline", "median"),
    ("uncertainty", -0.1),
    ("uncertainty", 1.5),
    ("extra_draws", -1),
    ("extra_draws", 1.0),
    ("overlong_cache", -1),
    ("overlong_cache", 513),
    ("overlong_weight", -1.0),
    ("overlong_weight", 1.0),  # over no tokens
    ("scale", "batch"),
    ("answer_weight", -1.0),
    ("tenuous", 1.5),
    ("flawed", -0.5),
    ("flawed", 0.75),
    ("plausible", 0.25),
    ("knowledge_implausible", 0.75),
    ("max_abstain", 1.0),
]


def test_the_defaults_are_valid():
    config = GrpoConfig()
    config.validate()
    assert (config.group_size, config.temperature) == (4, 1.0)  # the paper's
    config.kl_coef = 1  # an int is a number too
    config.validate()


def test_steps_come_from_epochs_where_none_are_given():
    assert GrpoConfig(steps=7).total_steps(1000) == 7
    assert GrpoConfig(prompts_per_step=16).total_steps(1000) == 500, "the paper's 8 epochs"
    assert GrpoConfig(epochs=1.5, prompts_per_step=16).total_steps(1000) == 93
    assert GrpoConfig(epochs=1, prompts_per_step=16).total_steps(3) == 1


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_named(name, value):
    config = GrpoConfig(**{name: value})
    with pytest.raises(ConfigError, match=r"^grpo\.\w+ is .*; it "):
        config.validate()


@pytest.mark.parametrize(
    ("name", "value"), [case for case in BAD if case[0] not in ("flawed", "aggregate", "plausible")]
)
def test_the_message_names_the_field_and_the_value(name, value):
    with pytest.raises(ConfigError) as caught:
        GrpoConfig(**{name: value}).validate()
    message = str(caught.value)
    # Two fields that contradict each other are reported under one of their names.
    assert f"grpo.{name} is {value!r}" in message or name == "knowledge_implausible"


def test_errors_give_the_arithmetic_and_the_remedy():
    with pytest.raises(
        ConfigError, match=r"micro_batch is 7; it must divide the 64 rollouts .*16 prompts x 4.*multiple of 4"
    ):
        GrpoConfig(micro_batch=7).validate()
    with pytest.raises(
        ConfigError, match='constant_norm is 0; it must be above 0 .*max_new_tokens.* "constant"'
    ):
        GrpoConfig(aggregate="constant").validate()
    GrpoConfig(aggregate="constant", constant_norm=512).validate()
    with pytest.raises(ConfigError, match="nothing is rewarded"):
        GrpoConfig(answer_weight=0.0, format_weight=0.0, process_weight=0.0).validate()
    with pytest.raises(ConfigError, match=r"clip_high is 0\.28; it must be 0\.2 with mu 1, .*: raise mu"):
        GrpoConfig(clip_high=0.28).validate()


def test_one_reward_of_any_kind_is_enough(tmp_path):
    (tmp_path / "mine.py").write_text("def brief(rollout):\n    return 1.0\n")
    nothing = dict.fromkeys(("answer_weight", "format_weight", "process_weight"), 0.0)
    for one in (*nothing, "localisation_weight"):
        GrpoConfig(**nothing | {one: 1.0}).validate()
    GrpoConfig(**nothing, rewards=f"{tmp_path / 'mine.py'}:brief*1").validate()


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("ratio", {"ratio": "sequence"}),
        ("dual_clip", {"dual_clip": 3.0}),
        ("dual_clip", {"dual_clip": 1.2, "mu": 2}),
        ("dual_clip", {"dual_clip": 3.0, "clip_high": 2.5, "mu": 2}),
        ("clip_low", {"clip_low": 3e-4}),
        ("clip_high", {"clip_high": 0.28, "sampler_correction": 2.0, "micro_batch": 4}),  # no ratio leaves 1
        ("kl", {"kl": "k1", "kl_coef": 0.0}),
        ("kl_in", {"kl_in": "reward", "kl_coef": 0.0}),
        ("kl_clamp", {"kl_clamp": 10.0, "kl_coef": 0.0}),
        ("flat_groups", {"flat_groups": "drop", "kl_in": "reward"}),
        ("scale", {"baseline": "leave-one-out"}),
        ("overlong_cache", {"overlong_cache": 64, "overlong_weight": 1.0, "max_new_tokens": 32}),
        ("overlong_weight", {"overlong_cache": 64}),
        ("process", {"process": "sum", "process_weight": 0.0}),
        ("tenuous", {"tenuous": 0.25, "process_weight": 0.0}),
        ("max_abstain", {"max_abstain": 0.5, "process_weight": 0.0}),
        ("knowledge_plausible", {"knowledge_plausible": 1.0, "process": "findings"}),
        ("plausible", {"plausible": 0.9, "process": "knowledge"}),
    ],
)
def test_choices_that_make_no_sense_together_are_refused(field, changes):
    with pytest.raises(ConfigError, match=rf"^grpo\.{field} is .*; it must be "):
        GrpoConfig(**changes).validate()


RECIPES = {
    "GRPO": {"aggregate": "sequence-mean"},
    "Dr. GRPO": {"scale": "none", "aggregate": "constant", "constant_norm": 512},
    "RLOO": {
        **{"baseline": "leave-one-out", "scale": "none", "kl": "k1", "kl_in": "reward"},
        **{"aggregate": "constant", "constant_norm": 1},
    },
    "DAPO": {
        **{"clip_high": 0.28, "extra_draws": 4, "kl_coef": 0.0, "mu": 2},
        **{"overlong_cache": 128, "overlong_weight": 1.0},
    },
    "GSPO": {
        **{"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
        **{"aggregate": "sequence-mean", "mu": 4},
    },
    "PPO's dual clip, a sampler of its own": {"dual_clip": 3.0, "mu": 2, "sampler_correction": 2.0},
    "UADT": {"uncertainty": 0.5},
}


@pytest.mark.parametrize("name", RECIPES)
def test_published_objectives_are_values_of_fields(name):
    GrpoConfig(**RECIPES[name]).validate()


def test_every_field_is_read_somewhere_else():
    """A field that only `config.py` knows would be a promise that nobody keeps."""
    root = Path(grpo.__file__).parents[2]
    read = {
        node.attr
        for folder in ("fundus_jax", "launch")
        for path in (root / folder).rglob("*.py")
        if path != root / "fundus_jax" / "grpo" / "config.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and ast.unparse(node.value) in ("config", "self.config", "config.grpo")
    }
    counted = {"epochs"}  # by `total_steps`, which `launch.stages` asks
    assert {item.name for item in dataclasses.fields(GrpoConfig)} - counted <= read


def test_the_optimizer_is_checked_too():
    config = GrpoConfig()
    config.optim.lr = -1.0
    with pytest.raises(ConfigError, match="lr is -1.0"):
        config.validate()
    assert GrpoConfig().optim.lr != -1.0  # not shared between configs


def test_flags_can_parse_every_field():
    """ml_collections reads the annotation itself: a string or a Literal there makes the override crash."""
    for item in dataclasses.fields(GrpoConfig):
        assert item.type in (int, float, str) or dataclasses.is_dataclass(item.type), item.name


def test_a_mistyped_field_is_refused():
    with pytest.raises(TypeError):
        GrpoConfig(clip_hihg=0.3)
    with pytest.raises(AttributeError):
        GrpoConfig().clip_hihg = 0.3


def test_it_has_what_the_loss_reads():
    fields = {item.name: item.type for item in dataclasses.fields(GrpoConfig)}
    for name, kind in LossConfig.__annotations__.items():
        assert fields[name] is kind


def test_every_field_can_be_set_from_the_command_line() -> None:
    """ml_collections parses `--config.grpo.alarms.kl=1` by annotations, which must not be strings."""
    values = absl_flags.FlagValues()
    given = {
        "alarms.window": "5", "alarms.kl": "1", "alarms.stop": "true", "show_every": "20",
        "rewards": "mine.py:brief*0.2,other.py:long*-1",
    }  # fmt: skip
    words = ["program", *(f"--config.{name}={value}" for name, value in given.items())]
    config_flags.DEFINE_config_dataclass("config", GrpoConfig(), flag_values=values, sys_argv=words)
    values(words)
    assert values.config.alarms == AlarmConfig(window=5, kl=1.0, stop=True)
    assert (values.config.show_every, values.config.rewards) == (20, given["rewards"])
