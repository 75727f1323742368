"""The typed configuration: TOML recipe, then `--section.key value`, then checks."""

import difflib
import inspect
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

import rlkern
from rlkern.rollout.environment import ENVIRONMENTS, Environment
from rlkern.rollout.strategies import STRATEGIES, Strategy
from rlkern.train import TrainError, load_function

RECIPES = Path(__file__).parent / "recipes"

ALONE = {  # what several processes cannot do, and why
    "fp8-unified": "its layers keep the codes of weights that are whole",
    "vllm": "it makes a process group of its own",
    "vllm-server": "each of them would hand it weights",
    "april": "its groups go on in the process that began them",
}

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # 0: no limit


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class Run(Section):
    dir: str = ""  # "": runs/<recipe>-seed<seed>, numbered when that is taken
    seed: Count = 0
    steps: Positive = 60  # RL steps, after the warm-up
    threads: Count = 0  # CPU threads; 0: torch's default. The bits of a run depend on it
    device: str = "auto"
    null: bool = False  # control: advantages shuffled over the batch
    deterministic: bool = True


class Model(Section):
    path: str = ""  # local folder or hub id; "": a Qwen3 model of the size below, from scratch
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: str = "sdpa"
    gradient_checkpointing: bool = False
    layers: Positive = 4
    hidden_size: Positive = 128
    intermediate_size: Positive = 384
    heads: Positive = 4
    kv_heads: Positive = 4
    positions: Positive = 64

    @model_validator(mode="after")
    def _shape(self) -> "Model":
        if self.hidden_size % self.heads or self.heads % self.kv_heads:
            shape = f"{self.hidden_size}, {self.heads} and {self.kv_heads}"
            raise ValueError(
                f"hidden_size must divide by heads, and heads by kv_heads; got {shape}"
            )
        return self


class Lora(Section):
    rank: Count = 0  # 0: every weight is trained
    alpha: Rate = 32.0  # what is added to a weight is alpha / rank B A
    targets: str | list[str] = "all-linear"  # names of linear layers; the head is never one


class Data(Section):
    task: Literal["", "sort", "sort_distinct", "addition", "countdown", "calculation"] = ""
    size: Positive = 5  # digits or numbers in a generated question
    train_size: Positive = 8192  # generated questions; a JSONL file is used whole
    heldout_size: Positive = 256  # generated, or cut from `train` where `heldout` is ""
    train: str = ""  # JSONL with `prompt` and `answer` (and `demonstration` for a warm-up)
    heldout: str = ""
    chat_template: Literal["auto", "on", "off"] = "auto"  # auto: where the tokenizer has one

    @model_validator(mode="after")
    def _source(self) -> "Data":
        if bool(self.task) == bool(self.train):
            raise ValueError("expected either task or train (a JSONL file), and not both")
        return self


class Warmup(Section):
    steps: Count = 0
    batch_size: Positive = 256
    lr: Rate = 1e-3


class Rollout(Section):
    prompts: Positive = 32  # per step
    group_size: Positive = 16
    explore: Positive = 1  # sample this many times group_size, keep the most contrastive
    max_new_tokens: Positive = 64
    temperature: Rate = 1.0
    max_sequences: Positive = 1024  # decoded at once
    max_staleness: Count = 0  # steps that sampling runs ahead of training, on older weights
    timeout: Seconds = 0.0  # of a step's rollouts; then the run begins again at the checkpoint
    chunk: Positive | None = None  # tokens that attention shares or does not; None: the engine's
    engine: Literal["native", "vllm", "vllm-server"] = "native"
    engine_options: dict[str, Any] = {}  # vLLM's: max_model_len, ...; of VllmServer: url, ...
    strategy: str = "groups"  # of rlkern.rollout.strategies: latr, cure, ...
    strategy_options: dict[str, Any] = {}  # arguments of its class
    save: bool = False  # to <run>/rollouts
    replay: str = ""  # such a folder: train from it, without an engine
    environment: str = ""  # that answers the policy's turns: calculator, or module:class
    environment_options: dict[str, Any] = {}  # its arguments beside the tokenizer

    def build_strategy(self, reward: Callable[[int, Tensor], float]) -> Strategy:
        """reward: of a response to a prompt, by its number, for strategies that look at it."""
        if self.strategy not in STRATEGIES:
            known = ", ".join(STRATEGIES)
            raise ValueError(f"strategy: expected one of {known}, got {self.strategy!r}")
        kind, options = STRATEGIES[self.strategy], dict(self.strategy_options)
        if "reward" in inspect.signature(kind).parameters:
            options["reward"] = reward
        for name in options.keys() & {"quality", "traces", "potential"}:
            options[name] = load_function(f"rollout.strategy_options.{name}", options[name])
        return kind(**options)

    def build_environment(self, tokenizer: Any) -> Environment | None:
        if not self.environment:
            return None
        kind = ENVIRONMENTS.get(self.environment)
        kind = kind or load_function("rollout.environment", self.environment)
        try:
            return kind(tokenizer, **self.environment_options)
        except TypeError as error:
            raise TrainError(f"rollout.environment_options: {error}") from error

    @model_validator(mode="after")
    def _known(self) -> "Rollout":
        try:
            strategy = self.build_strategy(lambda number, tokens: 0.0)
        except TypeError as error:
            raise ValueError(f"strategy_options: {error}") from error
        if self.strategy == "april" and self.max_staleness:
            raise ValueError("max_staleness does not go with april, whose groups span steps")
        if self.strategy != "groups" and self.explore > 1:
            raise ValueError(f"explore = {self.explore} is for plain groups, not {self.strategy}")
        if self.engine != "native" and self.strategy != "groups":
            raise ValueError(
                f"engine = {self.engine!r} does not go with strategy = {self.strategy!r}: vLLM "
                "neither forks nor prunes branches while it decodes"
            )
        if self.environment and (self.engine != "native" or not strategy.multi_turn):
            raise ValueError(
                f"environment does not go with engine = {self.engine!r}, strategy = "
                f"{self.strategy!r}: expected native, and a strategy that neither forks responses "
                "nor heats them by their length"
            )
        if self.engine != "native" and self.chunk is not None:
            raise ValueError(f"engine = {self.engine!r} does not go with chunk, which is rlkern's")
        if self.engine == "native" and self.engine_options:
            raise ValueError("engine_options are vLLM's: expected engine = 'vllm'")
        return self


class Algorithm(Section):
    objective: str = "grpo"
    options: dict[str, Any] = {}  # fields of rlkern.PolicyObjective that differ from the preset
    # answers of at least this reward are the correct ones, whose likelihood nll_coef raises
    nll_reward: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    # the kinds of rlkern.group_advantage that need nothing but rewards
    advantage: Literal[
        "grpo",
        "dr_grpo",
        "rloo",
        "batch_std",
        "maxrl",
        "passk",
        "grpo_passk",
        "reinforce_plus_plus",
        "reinforce_plus_plus_baseline",
        "gpg",
        "w_reinforce",
        "spiral",
    ] = "grpo"
    credit: Literal["sequence", "turn"] = "sequence"  # what has an advantage of its own
    agents: Positive = 1  # of the environment: turns are compared with those of the same agent

    def build(self) -> rlkern.PolicyObjective:
        return rlkern.PolicyObjective.preset(self.objective, **self.options)

    @model_validator(mode="after")
    def _known(self) -> "Algorithm":
        try:
            self.build()
        except TypeError as error:  # pydantic turns a ValueError into its own, but not this one
            raise ValueError(f"options: {error}") from error
        return self


class Optim(Section):
    lr: Rate = 5e-4
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: Count = 10
    updates: Positive = 2  # minibatches per rollout batch and epoch
    epochs: Positive = 1
    micro_batch: Count = 0  # sequences per forward; 0: the whole minibatch
    micro_tokens: Count = 0  # tokens per forward, without padding; 0: by micro_batch
    share_prefix: bool = False  # compute a prompt once for its group; minibatches are whole groups
    beta1: Share = 0.9
    beta2: Share = 0.95
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    grad_clip: Rate = 1.0


class Eval(Section):
    every: Count = 10  # RL steps; 0: only before and after
    samples: Positive = 8  # per held-out prompt, for pass@k
    k: list[Positive] = [1, 8]
    max_prompts: Positive = 256
    min_accuracy: Share = 0.0  # greedy; below it at the end the exit code is 1

    @model_validator(mode="after")
    def _enough(self) -> "Eval":
        if max(self.k, default=1) > self.samples:
            raise ValueError(f"k = {self.k} asks for more than samples = {self.samples}")
        return self


class Guard(Section):
    """Limits on a step's metrics (diagnose.GUARDS); beyond one the run has diverged, and stops."""

    kl: Rate | None = None
    mismatch: Rate | None = None
    ratio: Rate | None = None
    grad_norm: Rate | None = None
    max_entropy: Rate | None = None
    min_entropy: Rate | None = None


class Checkpoint(Section):
    every: Count = 20  # steps, the warm-up's included; 0: only at the end and on Ctrl-C
    keep: Positive = 2


class Log(Section):
    every: Positive = 5  # steps between lines when the output is no terminal
    samples: Positive = 2  # best and worst completions logged per step
    tensorboard: bool = True
    wandb: str = ""  # project of Weights & Biases


class Config(Section):
    run: Run = Run()
    model: Model = Model()
    lora: Lora = Lora()
    data: Data
    # of the linear layers: bf16 leaves model.dtype, *-rollout quantises what samples alone
    precision: Literal["bf16", "fp8-unified", "fp8-rollout", "nvfp4-rollout"] = "bf16"
    reward: str = "exact"  # exact | numeric | math | countdown | module:function
    reward_timeout: Seconds = 0.0  # of a call, which then runs in a process of its own
    reward_policy: Literal["fail", "zero", "skip"] = "fail"  # where there is no number
    warmup: Warmup = Warmup()
    rollout: Rollout = Rollout()
    algorithm: Algorithm = Algorithm()
    optim: Optim = Optim()
    eval: Eval = Eval()
    guard: Guard = Guard()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    @model_validator(mode="after")
    def _together(self) -> "Config":
        group, sequences = self.rollout.group_size, self.rollout.prompts * self.rollout.group_size
        if group == 1 and self.algorithm.advantage != "batch_std":
            raise ValueError("rollout.group_size = 1 leaves nothing to compare: expected >= 2")
        if self.reward_policy == "skip" and self.rollout.explore > 1:
            raise ValueError("reward_policy = skip does not go with rollout.explore: use zero")
        if (self.algorithm.agents > 1) > (self.algorithm.credit == "turn"):
            raise ValueError("algorithm.agents > 1 needs algorithm.credit = 'turn'")
        if (self.algorithm.credit == "turn") > bool(self.rollout.environment):
            raise ValueError("algorithm.credit = 'turn' needs a rollout.environment")
        if self.optim.updates > sequences:
            raise ValueError(
                f"optim.updates = {self.optim.updates} is more than the {sequences} sequences of a "
                "step (rollout.prompts * rollout.group_size)"
            )
        if self.trains_on_trees and self.model.attention != "sdpa":
            raise ValueError(
                f"model.attention = {self.model.attention} goes neither with optim.share_prefix or "
                "optim.micro_tokens nor with precision = fp8-unified: packed rows have their own"
            )
        if self.optim.micro_tokens and self.optim.micro_batch:
            raise ValueError("optim.micro_tokens and optim.micro_batch: expected one of them")
        if self.lora.rank and self.precision == "fp8-unified":
            raise ValueError("lora.rank and precision = fp8-unified both replace the linear layers")
        if self.lora.rank and self.warmup.steps and self.algorithm.build().needs_reference:
            raise ValueError("lora.rank: the reference of a KL term would lack the warm-up")
        if self.rollout.engine != "native" and self.precision != "bf16":
            raise ValueError(
                f"rollout.engine = {self.rollout.engine!r} does not go with precision = "
                f"{self.precision}: its codes are those of the native engine, vLLM samples at "
                "model.dtype"
            )
        if self.optim.share_prefix and self.optim.updates > self.rollout.prompts:
            raise ValueError(
                f"optim.share_prefix does not go with optim.updates = {self.optim.updates}: "
                f"minibatches are whole groups, and there are {self.rollout.prompts}"
            )
        return self

    @property
    def trains_on_trees(self) -> bool:
        """Whether sequences go through the model in one packed row, those of a prompt together."""
        packed = self.optim.share_prefix or self.optim.micro_tokens > 0
        return packed or self.precision == "fp8-unified"

    @property
    def samples_the_trained_policy(self) -> bool:
        apart = self.precision.endswith("-rollout") or self.rollout.engine != "native"
        apart |= self.lora.rank > 0 and self.model.dtype == "bfloat16"  # merged weights are rounded
        return not (apart or self.rollout.max_staleness)

    def objective(self) -> rlkern.PolicyObjective:
        """With weights for the mismatch where the engine samples from another policy."""
        objective = self.algorithm.build()
        corrected = objective.rollout_is or objective.rollout_rs or objective.ratio_anchor != "old"
        if self.samples_the_trained_policy or corrected:
            return objective
        options = {"rollout_is": "token", "rollout_is_threshold": 2.0} | self.algorithm.options
        return rlkern.PolicyObjective.preset(self.algorithm.objective, **options)

    def check_processes(self, count: int, heldout: int) -> None:
        """Refuses what several processes cannot do."""
        for name in (self.precision, self.rollout.engine, self.rollout.strategy):
            if count > 1 and name in ALONE:
                raise TrainError(f"{name} does not go with {count} processes: {ALONE[name]}")
        least = min(self.rollout.prompts, self.warmup.batch_size, heldout)
        if least < count:
            raise TrainError(
                f"expected rollout.prompts, warmup.batch_size and held-out questions for each of "
                f"{count} processes, got {least}"
            )

    @property
    def total_steps(self) -> int:
        return self.warmup.steps + self.run.steps


def find_recipe(name: str) -> Path:
    """A path, or the name of a shipped recipe with or without `.toml`."""
    for path in (Path(name), RECIPES / name, RECIPES / f"{name}.toml"):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
    raise TrainError(f"recipe: {name!r} is neither a file nor a shipped recipe ({shipped})")


def load_config(path: Path, overrides: dict[str, str]) -> Config:
    return build_config(read_recipe(path), overrides, str(path))


def read_recipe(path: Path) -> dict[str, Any]:
    """Its values over those of the recipe that `base` names, section by section."""
    try:
        text = path.read_text()
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise TrainError(f"{path}: cannot be read: {error}") from error
    base = read_recipe(find_recipe(values.pop("base"))) if "base" in values else {}
    for name, value in values.items():
        both = isinstance(value, dict) and isinstance(base.get(name), dict)
        base[name] = base[name] | value if both else value
    return base


def build_config(values: dict[str, Any], overrides: dict[str, str], origin: str) -> Config:
    for key, text in overrides.items():
        *sections, last = key.split(".")
        table = values
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise TrainError(f"--{key}: {section} is a value, not a section")
        try:  # a TOML value where it is one (1e-4, true, [1, 2]), otherwise the text itself
            table[last] = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            table[last] = text
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise TrainError(f"{origin}: " + "\n  ".join(lines)) from error


def _explain(item: Any) -> str:
    key, message = ".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.5)
        return f"{key} is not a setting" + (f"; did you mean {near[0]}?" if near else "")
    if item["type"] in ("value_error", "missing"):  # the message says what there was
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, got {item['input']!r}"


def known_keys() -> list[str]:
    """Every section, and every `section.key`."""
    keys = list(Config.model_fields)
    for name, field in Config.model_fields.items():
        keys += [f"{name}.{key}" for key in getattr(field.annotation, "model_fields", ())]
    return keys
