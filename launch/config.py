"""The configuration of a whole run: one typed tree, built by a file in configs/, overridden by
`--config.field=value`.

Each stage's own dataclass stands with its code; here they are put together, with what belongs to none of
them. `validate` is called before anything else happens.
"""

import dataclasses
import difflib
import re
import sys
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from jax.sharding import Mesh

from data_pipeline import decisions, findings, traces
from data_pipeline.knowledge.config import KnowledgeConfig
from data_pipeline.trace_server import WriterConfig
from data_pipeline.votes import VotesConfig
from fundus_jax import hosts, training
from fundus_jax.base.policy import PolicyConfig
from fundus_jax.base.warmup import BaseConfig
from fundus_jax.grpo import own_rewards
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.judge_server import JudgeConfig
from fundus_jax.grpo.update import pieces_of
from fundus_jax.models import read_config
from fundus_jax.models.layers import REMAT
from fundus_jax.models.lora import LoraConfig
from fundus_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from fundus_jax.models.qwen2_5_vl.sizes import published
from fundus_jax.records import ConfigError, DataError
from fundus_jax.sft import PromptConfig, SftConfig

COMPUTE = ("float32", "bfloat16")
ATTENTION = ("auto", "xla", "splash", "cudnn")
STAGES = ("sft,grpo", "sft", "grpo", "")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where examples come from and which stage learns from which.

    dataset, source: a row of data_pipeline's table and the publisher's folder ("" for phantoms). tasks:
    questions an image, e.g. "disease:1,modality:0.2" ("" takes ingest's own). max_side: larger images are
    reduced at ingest. partial: accept another number of images than published. benchmarks: folders of
    FunBench and OmniMedVQA, comma-separated: the images that their files name, and all others of these
    patients, go to the test split; a data set that they draw on is refused without, or "none". against:
    benchmarks whose pictures are kept out of training, folders of images or directories of Examples,
    comma-separated. near: pictures are known again by what they show (some CPU-minutes a thousand), and not
    by their bytes and pixels alone. train, test, seed, size: phantoms to draw. sft_part: share of the
    patients that SFT learns from; GRPO draws its prompts from the rest, or from all where it is 1.
    grpo_tasks, probe_tasks: tasks of GRPO's prompts and of the evaluation ("" takes all), comma-separated.
    knowledge: what is known of the labels, and from where (docs/knowledge.md). findings: where they come
    from, "masks", "votes" of a model at votes.server, or "both", votes where there are no masks. traces: who
    writes them, "rules", or a model at writer.server ("server"). limit: share of what these two may
    quarantine before they stop (docs/data.md).
    decisions: what reviewers decided about traces, files and folders of them (docs/review.md); "" for none.
    """

    dataset: str = "phantom"
    source: str = ""
    tasks: str = ""
    max_side: int = 0
    partial: bool = False
    benchmarks: str = ""
    against: str = ""
    near: bool = True
    train: int = 15000
    test: int = 900
    seed: int = 0
    size: int = 112
    workers: int = 2
    sft_part: float = 1.0
    grpo_tasks: str = ""
    probe_tasks: str = ""
    knowledge: KnowledgeConfig = field(default_factory=KnowledgeConfig)
    findings: str = "masks"
    votes: VotesConfig = field(default_factory=VotesConfig)
    traces: str = "rules"
    writer: WriterConfig = field(default_factory=WriterConfig)
    limit: float = 0.02
    decisions: str = ""

    def validate(self) -> None:
        """Raises ConfigError for the first field that does not make sense."""
        if not 0 < self.sft_part <= 1:
            raise ConfigError(f"data.sft_part is {self.sft_part}; it must be above 0 and at most 1")
        if not 0 <= self.limit <= 1:
            raise ConfigError(f"data.limit is {self.limit}; it must be from 0 to 1")
        rates(self.tasks)
        self.knowledge.validate("data.knowledge")
        if self.workers < 1:
            raise ConfigError(f"data.workers is {self.workers}; it must be at least 1")
        for name, known, parts in (
            ("findings", findings.KINDS, {"votes": self.votes, "both": self.votes}),
            ("traces", traces.KINDS, {"server": self.writer}),
        ):
            kind = getattr(self, name)
            if kind not in known:
                raise ConfigError(f"data.{name} is {kind!r}; it must be one of {', '.join(known)}")
            if kind in parts:
                parts[kind].validate()


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """How the policy is measured after each stage, on the test split.

    questions: at most so many greedy questions (0: all). sampled: questions (0: all) that are also answered
    `samples` times at temperature 1, among `data.grpo_tasks`. batch: prompts decoded together; they take as
    much memory as as many of a GRPO step, with `samples` in the place of `grpo.group_size`, and where
    --mesh=auto plans the memory they are not more than it decodes together there. before: greedy questions
    for the policy before all training, where it is trained then.
    """

    questions: int = 0
    before: int = 200
    sampled: int = 900
    samples: int = 3
    batch: int = 64

    def validate(self) -> None:
        """Raises ConfigError for the first field that makes no sense."""
        for name, low in {"questions": 0, "before": 1, "sampled": 0, "samples": 1, "batch": 1}.items():
            if getattr(self, name) < low:
                raise ConfigError(f"evaluate.{name} is {getattr(self, name)}; it must be at least {low}")


@dataclass(kw_only=True, slots=True)
class ExamConfig:
    """A small fixed measurement while SFT and GRPO train, by which each stage's best bundle is kept.

    every: steps from one to the next; one more follows the last step (0: none at all). part: share of the
    training patients set aside for it, on whom nothing is trained; the test split stays untouched.
    questions: at most so many of them, greedy. use: what GRPO starts from and what is measured and exported
    in the end, the "last" bundle of a stage or the "best".
    """

    every: int = 0
    part: float = 0.05
    questions: int = 100
    use: str = "last"

    def validate(self) -> None:
        """Raises ConfigError for the first field that makes no sense."""
        for name, low in {"every": 0, "questions": 1}.items():
            if getattr(self, name) < low:
                raise ConfigError(f"exam.{name} is {getattr(self, name)}; it must be at least {low}")
        if not 0 < self.part < 1:
            raise ConfigError(f"exam.part is {self.part}; it must lie between 0 and 1")
        if self.use not in ("last", "best"):
            raise ConfigError(f"exam.use is {self.use!r}; it must be last or best")
        if self.use == "best" and not self.every:
            raise ConfigError("exam.use is best, but exam.every is 0: nothing is measured; set exam.every")


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """A run from data to export.

    model: Hugging Face directory to start from; "" makes the small policy in a `base` stage that stands in
    for pre-training. stages: what the policy then goes through, "sft,grpo", or one of them, or "" for
    neither; the plan, the evaluation, the export and the report follow from it.
    compute: dtype of forward and backward passes; what is trained is a float32 master. remat: what a block
    keeps for its backward pass, a name of `models.layers.REMAT`.
    lora: adapters to train in the place of the weights, in SFT and GRPO. freeze: parts of the model that
    these leave as they are, comma-separated: vision (the tower), projector (its merger), text (the decoder),
    embedding, head.
    unroll: layers laid out per scan step. attention: its back end; "auto" is that of the mesh's devices (TPU:
    splash, NVIDIA: cudnn, others: xla). max_prompt: longer prompts are left out of GRPO. min_pixels,
    max_pixels: bounds of an image after resizing (0: the checkpoint's).
    """

    name: str = "run"
    model: str = ""
    stages: str = "sft,grpo"
    compute: str = "float32"
    remat: str = "none"
    freeze: str = ""
    unroll: int = 1
    attention: str = "auto"
    max_prompt: int = 2048
    min_pixels: int = 0
    max_pixels: int = 0
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    exam: ExamConfig = field(default_factory=ExamConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    @property
    def trained(self) -> tuple[str, ...]:
        """The training stages, in order."""
        return (*(() if self.model else ("base",)), *names(self.stages))

    def validate(self) -> None:
        """Raises ConfigError for the first thing that does not make sense, in any stage."""
        if self.compute not in COMPUTE:
            raise ConfigError(f"compute is {self.compute!r}; it must be one of {', '.join(COMPUTE)}")
        if ",".join(names(self.stages)) not in STAGES:
            raise ConfigError(
                f"stages is {self.stages!r}; it must be one of {', '.join(map(repr, STAGES))}: "
                "a stage may be left out, not moved"
            )
        if self.remat not in REMAT:
            raise ConfigError(f"remat is {self.remat!r}; it must be one of {', '.join(REMAT)}")
        if self.unroll < 1:
            raise ConfigError(
                f"unroll is {self.unroll}; it must be at least 1, the layers of a turn of the loop"
            )
        self.lora.validate()
        if self.lora.rank and self.freeze:
            raise ConfigError(
                f"freeze is {self.freeze!r} and lora.rank {self.lora.rank}: adapters freeze everything else "
                "already; clear one of the two"
            )
        if self.attention not in ATTENTION:
            raise ConfigError(f"attention is {self.attention!r}; it must be one of {', '.join(ATTENTION)}")
        self.data.validate()
        self.prompt.validate()
        if self.grpo.localisation_weight and not self.prompt.boxes:
            raise ConfigError(
                f"grpo.localisation_weight is {self.grpo.localisation_weight}, but traces say no boxes; set "
                "prompt.boxes to how many they say of a finding"
            )
        self.policy.validate()
        for stage in (self.base, self.sft, self.grpo, self.judge, self.exam, self.evaluate):
            stage.validate()
        steps = {name: getattr(self, name).steps for name in ("base", "sft", "grpo")}
        check_warmup(self, {name: count for name, count in steps.items() if count})  # 0: the data decide


def check_warmup(config: RunConfig, steps: Mapping[str, int]) -> None:
    """Raises ConfigError for a warm-up that is longer than its stage. steps: of each stage. Called as soon
    as they are known, and not when the stage begins."""
    for name, count in steps.items():
        updates = count * (config.grpo.mu if name == "grpo" else 1)
        warmup = getattr(config, name).optim.warmup_of(updates)
        if warmup >= updates:
            raise ConfigError(f"{name}.optim.warmup is {warmup} of {updates} updates; it must be less")


def check_mesh(config: RunConfig, mesh: Mesh, stages: Collection[str]) -> None:
    """Raises ConfigError where the mesh does not divide the rows of a piece of a batch, or the slots, of one
    of the training `stages`, or the model's widths. Called before anything runs, and not when the stage
    begins."""
    grpo = config.grpo
    if stages and config.model and (narrow := undivided(model_config(config), mesh.shape["fsdp"])):
        raise ConfigError(
            f"fsdp:{mesh.shape['fsdp']} of the mesh does not divide {narrow} of the model, and every device "
            "would hold all of its weights; change the mesh, or leave it to --mesh=auto"
        )
    cut = {
        "base": [("base.batch", config.base.batch, 1)],
        "sft": [("sft.batch", config.sft.batch, config.sft.micro_batches)],
        "grpo": [
            ("grpo.prompts_per_step", grpo.prompts_per_step, pieces_of(grpo)),
            ("grpo.slots", min(grpo.slots, grpo.prompts_per_step), 1),
        ],
    }
    for stage in stages:
        for name, count, pieces in cut[stage]:
            training.check_rows(name, count, mesh, pieces)


def undivided(model: Qwen2_5_VLConfig, fsdp: int) -> str:
    """The widths that an fsdp axis cuts and does not divide, in words; "" where it divides them."""
    widths = {"hidden_size": model.hidden_size, "vision hidden_size": model.vision.hidden_size}
    return " and ".join(f"{name} {width}" for name, width in widths.items() if width % fsdp)


def model_config(config: RunConfig) -> Qwen2_5_VLConfig:
    """The model of a run: that of its directory, or where there is none the published size of its name.

    Raises ConfigError where the run makes its policy itself: it is not there before the data is.
    """
    if not config.model:
        raise ConfigError(
            f"{config.name} names no model: such a run makes a small policy itself, from its data, and there "
            "is nothing to plan; give --config.model=DIR, or a published size, as Qwen2.5-VL-3B-Instruct"
        )
    return read_config(config.model) if Path(config.model).is_dir() else published(config.model)


def names(text: str) -> tuple[str, ...]:
    """A comma-separated list as a tuple."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def rates(text: str) -> dict[str, float] | None:
    """ "disease:1,modality:0.2" as a dictionary; None for "". Raises ConfigError for anything else."""
    found: dict[str, float] = {}
    for part in names(text):
        task, colon, number = part.partition(":")
        try:
            found[task] = float(number) if colon else 1.0
        except ValueError:
            raise ConfigError(
                f"data.tasks has {part!r}; write TASK:NUMBER, e.g. disease:1,modality:0.2"
            ) from None
    return found or None


def read_flags(argv: list[str]) -> list[str]:
    """`argv` without the flags, as `absl.app` reads it; what is wrong with them ends the program with a line
    or two. Of a --config that is not there ml_collections says so only when it is first used."""
    try:
        rest = app.parse_flags_with_usage(argv)
        getattr(flags.FLAGS.config, "name", None)
        return rest
    except OSError as error:
        reason = str(error.__cause__ or error).splitlines()[-1].strip()
        refuse(ConfigError(f"--config: {reason}; give a file of configs/"))
    except KeyError:
        if unknown := unknown_field(argv):
            refuse(ConfigError(unknown))
        raise  # the file's own
    except SystemExit as error:  # absl has said what it is
        raise SystemExit(hosts.REFUSED) from error


def unknown_field(argv: Sequence[str]) -> str:
    """What is wrong with the first `--config.FIELD` that is none of RunConfig, and which is nearest; "" where
    all are there."""
    known = _fields(RunConfig)
    given = [re.match(r"--?(?:no)?config\.([\w.]+)", word) for word in argv]
    for name in (found[1] for found in given if found):
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)
            return f"--config.{name}: there is no such field; the nearest is {nearest[0]}"
    return ""


def _fields(kind: Any) -> list[str]:
    """The fields of a dataclass and of those within, with dots between."""
    found: list[str] = []
    for name, hint in typing.get_type_hints(kind).items():
        within = _fields(hint) if dataclasses.is_dataclass(hint) else []
        found += [name, *(f"{name}.{one}" for one in within)]
    return found


def refuse(error: ConfigError | DataError) -> NoReturn:
    """End the program with one line and the exit code that says: something has to be changed first."""
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    raise SystemExit(hosts.REFUSED) from error


def as_json(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as JSON values, for config.json and its hash; with the sha256 of the user's
    files of rewards and of what reviewers decided, so that a workdir refuses to go on with others."""
    files = own_rewards.digests(config.grpo.rewards)
    found: dict[str, Any] = {"reward_files": files} if files else {}
    if config.data.decisions:
        found["decided"] = decisions.digest(decisions.read(decisions.paths(config.data.decisions)))
    return dataclasses.asdict(config) | found
