"""The settings of each command."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from transformers import PreTrainedTokenizerBase

from motab.data import ANSWER_COLUMNS, QUESTION_COLUMNS, Problem, load_problems
from motab.engine import SETTINGS
from motab.models import DTYPES, dtype_name
from motab.parsing import require, require_file, setting
from motab.policies import POLICIES, MotabPolicy, Policy, RelayOPD, TokenSKD
from motab.prompts import Prompt, PromptFormat, short_enough
from motab.rollouts import Rollouts
from motab.trajectory import AUTHORS, Grade
from motab.yaml_values import load_yaml

#: Settings of policies with another name as a flag: --top_k is a setting of sampling.
_FLAG = {"top_k": "teacher_top_k"}
_DATASET = "Hub name, JSONL, JSON or parquet file, or reasoning-gym:TASK?size=N&seed=S."
_ATTENTION = "Attention of the models: sdpa, flash_attention_2, eager, ... (default: transformers' choice)"


def _unset(text: str, default: Any) -> Any:
    """A setting that is None unless given, so that giving it can be noticed; the help names the default it stands
    for."""
    return setting(None, f"{text} (default: {default})")


def _first(columns: Sequence[str]) -> str:
    return "first found of " + ", ".join(columns)


@dataclass
class GenerationArguments:
    """Generation."""

    max_new_tokens: int = setting(1024, "Tokens to write after the prompt, at most.")
    batch_size: int = setting(8, "Trajectories in progress at a time.")
    block_size: int = setting(16, "Tokens that the student drafts before the teacher scores them.")
    temperature: float = setting(0.6, "Sampling temperature; 0 is greedy.")
    top_k: int | None = _unset("Sample among the k likeliest tokens.", "all")
    top_p: float = setting(1.0, "Sample among the fewest likeliest tokens with this total probability.")
    min_p: float | None = _unset("Sample among tokens with at least this share of the likeliest one's probability.", 0)
    seed: int = setting(0, "Random seed for sampling.")
    torch_compile: bool = setting(False, "Compile the models; takes a minute or more at the start.")
    max_cached_tokens: int | None = _unset(
        "Tokens that the key-value cache of each model holds for all trajectories together.", "what free memory holds"
    )
    dtype: str = setting("auto", f"Weight dtype: {', '.join(DTYPES)}.")
    attn_implementation: str | None = setting(None, _ATTENTION)

    def __post_init__(self) -> None:
        self.dtype = dtype_name(self.dtype)

    def generation(self) -> dict[str, Any]:
        """The keyword arguments of `motab.synthesize`."""
        return {name: getattr(self, name) for name in SETTINGS}


@dataclass
class PolicyArguments:
    """Policy: who writes and who monitors; "motab:" marks a setting of that policy."""

    #: The flag's value that null in a file stands for, where None means "not given".
    NULL: ClassVar = {"stitch": ""}

    policy: (
        Literal["motab", "on_policy", "teacher_only", "step_skd", "token_skd", "adaswitch", "relay_opd", "truncated"]
        | None
    ) = _unset("Policy of generation.", "motab")
    epsilon0: float | None = _unset("motab: boundary at zero teacher entropy.", MotabPolicy.epsilon0)
    theta: float | None = _unset("motab: how much the teacher's entropy relaxes the boundary.", MotabPolicy.theta)
    entropy_top_k: int | None = _unset("motab: take the entropy of the renormalised k likeliest tokens.", "all")
    backtrack: str | None = _unset(
        "motab: where the teacher starts after a breach: before the step whose value fell most (td), before the "
        "breaching step (breach) or after it (none).",
        MotabPolicy.backtrack,
    )
    stitch: str | None = _unset(
        "motab: phrase between the flawed steps and the teacher's text; '' (null in a file) leaves these steps out.",
        repr(MotabPolicy.stitch),
    )
    delimiter: str | None = _unset(
        "Text that ends a step.", f"{MotabPolicy.delimiter!r}, relay_opd: {RelayOPD.delimiter!r}"
    )
    max_interventions: int | None = _unset(
        "motab, relay_opd: how often the teacher may take over.",
        f"motab: {MotabPolicy.max_interventions}, relay_opd: {RelayOPD.max_interventions}",
    )
    gamma: float | None = setting(None, "step_skd: least ratio of the teacher's value to the student's. (required)")
    teacher_top_k: int | None = _unset("token_skd: accept the teacher's k likeliest tokens.", TokenSKD.top_k)
    factor: float | None = setting(
        None, "adaswitch: the teacher takes over above this multiple of the recent mean divergence. (required)"
    )
    window: int | None = setting(None, "adaswitch: tokens averaged over. (required)")
    words: list[str] | None = setting(
        None, f"relay_opd: words with which a teacher reflects. (default: {' '.join(RelayOPD.words)})"
    )
    student_top_k: int | None = _unset(
        "relay_opd: the teacher takes over if the word is not among the student's k likeliest tokens.",
        RelayOPD.student_top_k,
    )
    paragraphs: int | None = _unset(
        "relay_opd: paragraphs that the teacher writes at a time, at most.", RelayOPD.paragraphs
    )
    relay_tokens: int | None = _unset(
        "relay_opd: tokens that the teacher writes at a time, at most.", RelayOPD.relay_tokens
    )
    n: int | None = setting(None, "truncated: stop after this many tokens. (required)")

    def make_policy(self) -> Policy:
        """The policy that these settings describe.

        Raises:
            ValueError: an unknown policy, a missing setting, a setting of another policy, or one out of range.
        """
        policy = self.policy or "motab"
        if policy not in list(POLICIES):  # flags are checked by the parser, other values are not
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        kind = POLICIES[policy]
        own = {_FLAG.get(entry.name, entry.name): entry for entry in dataclasses.fields(kind)}
        settings = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(PolicyArguments)}
        given = {name: value for name, value in settings.items() if name != "policy" and value is not None}
        if foreign := [name for name in given if name not in own]:
            raise ValueError(
                f"--policy {policy} has no {', '.join(foreign)}; it takes {', '.join(own) or 'no settings'}"
            )
        missing = (name for name, entry in own.items() if entry.default is dataclasses.MISSING and name not in given)
        require(**dict.fromkeys(missing, ""))
        if "stitch" in given:
            given["stitch"] = given["stitch"] or None
        if "words" in given:
            given["words"] = tuple(given["words"])
        return kind(**{own[name].name: value for name, value in given.items()})


@dataclass
class PromptArguments:
    """Problems and prompts."""

    dataset_config: str | None = setting(None, "Configuration of the hub dataset.")
    question_column: str | None = _unset(
        "Column of the question: a text, or messages (the assistant's at the end are dropped).",
        _first(QUESTION_COLUMNS),
    )
    answer_column: str | None = _unset("Column of the answer, for evaluate.", _first(ANSWER_COLUMNS))
    max_prompt_length: int | None = setting(
        None, "Leave out problems whose prompts have more tokens, before the others are numbered."
    )
    system_prompt: str | None = setting(None, "System message.")
    prompt_suffix: str | None = setting(None, "Text after each question, for example how to state the answer.")
    chat_template_kwargs: dict[str, Any] | str | None = setting(
        None, "Arguments of the chat template, in JSON or YAML: '{\"enable_thinking\": false}'."
    )

    def load(self, dataset_name: str, split: str) -> list[Problem]:
        """All problems of a dataset, including those with long prompts."""
        columns = {"question_column": self.question_column, "answer_column": self.answer_column}
        return load_problems(dataset_name, split, self.dataset_config, **columns)

    def short_enough(self, problems: list[Problem], tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
        """The problems whose prompts have at most `max_prompt_length` tokens."""
        if self.max_prompt_length is None:
            return problems
        return short_enough(problems, tokenizer, self.prompt_format(), self.max_prompt_length)

    def prompt_format(self) -> PromptFormat:
        """The prompt format of these settings.

        Raises:
            ValueError: `chat_template_kwargs` is not a mapping from names.
        """
        kwargs: Any = self.chat_template_kwargs
        try:
            kwargs = load_yaml(kwargs) if isinstance(kwargs, str) else kwargs
        except yaml.YAMLError:
            kwargs = None
        named = isinstance(kwargs, dict) and all(isinstance(name, str) for name in kwargs)
        if not named and self.chat_template_kwargs is not None:
            raise ValueError(
                "--chat_template_kwargs must be a mapping from names, as '{\"enable_thinking\": false}', got "
                f"{self.chat_template_kwargs!r}"
            )
        return PromptFormat(self.system_prompt, self.prompt_suffix or "", kwargs or {})


@dataclass
class SynthesizeArguments(PolicyArguments, PromptArguments, GenerationArguments):
    """motab synthesize: write trajectories to OUTPUT_DIR/trajectories.jsonl; run again to continue."""

    model_name_or_path: str = setting("", "The student.")
    teacher_model_name_or_path: str = setting("", "The teacher.")
    dataset_name: str = setting("", _DATASET)
    dataset_split: str = setting("train", "Split of the hub dataset.")
    output_dir: str = setting("runs/synthesize", "Folder for trajectories.jsonl.")
    num_samples: int = setting(1, "Trajectories per question.")
    grade: bool = setting(
        False, "Grade each trajectory by the answer to its problem, for motab report and motab train --only_correct."
    )
    share_teacher: bool = setting(
        False, "Split one teacher among all processes (tensor parallel), which then write together."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < 1 or (self.num_samples > 1 and self.temperature == 0):
            raise ValueError(
                f"--num_samples must be at least 1, and 1 at --temperature 0, where all are equal, got "
                f"{self.num_samples} at {self.temperature}"
            )


@dataclass
class EvaluateArguments(PromptArguments, GenerationArguments):
    """motab evaluate: accuracy of a model on problems with answers."""

    model_name_or_path: str = setting("", "The model.")
    dataset_name: str = setting("", _DATASET)
    dataset_split: str = setting("test", "Split of the hub dataset.")
    num_samples: int = setting(1, "Answers per problem.")
    output_file: str | None = setting(None, "JSON file for the results and these settings.")
    answers_file: str | None = setting(None, "JSONL file for the answers; with it an interrupted evaluation resumes.")


#: By flag of `motab train`, the settings of `Rollouts`; some names without a prefix are settings of the training.
_ROLLOUT_FLAGS = {
    f"rollout_{name}" if name in ("batch_size", "temperature", "torch_compile") else name: name
    for name in SETTINGS
    if name != "seed"
}


@dataclass
class TrainArguments(PolicyArguments, PromptArguments):
    """motab train: train on the trajectories of a synthesis, or on those that the student writes during training."""

    model_name_or_path: str = setting("", "The student.")
    teacher_model_name_or_path: str = setting("", "The teacher, if loss_type is a divergence or the policy needs one.")
    train_file: str = setting("", "trajectories.jsonl of motab synthesize.")
    eval_file: str = setting("", "Held-out trajectories; their loss is measured at the end and by --eval_strategy.")
    dataset_name: str = setting(
        "", "Instead of train_file: problems on which the student writes at every step. " + _DATASET
    )
    dataset_split: str | None = _unset("Split of the hub dataset.", "train")
    max_new_tokens: int | None = _unset("Rollouts: tokens to write after the prompt, at most.", Rollouts.max_new_tokens)
    rollout_batch_size: int | None = _unset("Rollouts: trajectories in progress at a time.", Rollouts.batch_size)
    block_size: int | None = _unset(
        "Rollouts: tokens that the student drafts before the teacher scores them.", Rollouts.block_size
    )
    rollout_temperature: float | None = _unset("Rollouts: sampling temperature; 0 is greedy.", Rollouts.temperature)
    top_k: int | None = _unset("Rollouts: sample among the k likeliest tokens.", "all")
    top_p: float | None = _unset(
        "Rollouts: sample among the fewest likeliest tokens with this total probability.", Rollouts.top_p
    )
    min_p: float | None = _unset(
        "Rollouts: sample among tokens with at least this share of the likeliest one's probability.", 0
    )
    rollout_torch_compile: bool | None = _unset("Rollouts: compile the models.", Rollouts.torch_compile)
    max_cached_tokens: int | None = _unset(
        "Rollouts: tokens that the key-value cache of each model holds.", "what free memory holds"
    )
    grade: bool | None = _unset("Rollouts: grade each by the answer to its problem; the log has the share.", False)
    dtype: str = setting("float32", f"Weight dtype of the student: {', '.join(DTYPES)}.")
    teacher_dtype: str = setting("auto", "Weight dtype of the teacher; auto: as saved.")
    use_peft: bool = setting(False, "Train low-rank adapters (LoRA) instead of the weights; needs the package peft.")
    lora_r: int = setting(16, "LoRA: rank.")
    lora_alpha: int = setting(32, "LoRA: scale of the adapters, over the rank.")
    lora_dropout: float = setting(0.05, "LoRA: dropout.")
    lora_target_modules: list[str] | None = setting(
        None, "LoRA: names of the modules to adapt. (default: all linear layers but the head)"
    )
    attn_implementation: str | None = setting(None, _ATTENTION)

    def __post_init__(self) -> None:
        self.dtype, self.teacher_dtype = dtype_name(self.dtype), dtype_name(self.teacher_dtype)

    def check_source(self) -> None:
        """Refuse no source or two, a missing file, and settings of generation with --train_file.

        Raises:
            ValueError: names the settings, and what to give instead.
        """
        if bool(self.train_file) == bool(self.dataset_name):
            got = f"{self.train_file!r} and {self.dataset_name!r}"
            raise ValueError(f"give either --train_file or --dataset_name (to write during training), got {got}")
        defaults = {entry.name: entry.default for entry in dataclasses.fields(self) if entry.name.startswith("lora_")}
        if not self.use_peft and (
            of_lora := [f"--{name}" for name in defaults if getattr(self, name) != defaults[name]]
        ):
            raise ValueError(f"{', '.join(of_lora)} set adapters, which --use_peft trains; give it, or leave them out")
        kinds = (PolicyArguments, PromptArguments)
        writing = [entry.name for kind in kinds for entry in dataclasses.fields(kind)]
        writing += ["dataset_split", "grade", *_ROLLOUT_FLAGS]
        given = [f"--{name}" for name in writing if getattr(self, name) is not None]
        if self.train_file and given:
            raise ValueError(
                f"--train_file takes no settings of writing, got {', '.join(given)}: leave them out, or "
                "give --dataset_name instead of --train_file to write during training"
            )
        for name in ("train_file", "eval_file"):
            if path := getattr(self, name):
                require_file(path, name, "motab synthesize writes OUTPUT_DIR/trajectories.jsonl")

    def lora(self) -> dict[str, Any] | None:
        """The settings of `motab.models.with_lora`, None without."""
        if not self.use_peft:
            return None
        modules = self.lora_target_modules or ["all-linear"]
        return {
            "r": self.lora_r,
            "alpha": self.lora_alpha,
            "dropout": self.lora_dropout,
            "target_modules": "all-linear" if modules == ["all-linear"] else modules,  # a name that peft knows
        }

    def rollouts(self, prompts: Sequence[Prompt], grade: Grade | None = None) -> Rollouts:
        """The `Rollouts` of these settings."""
        given = {name: getattr(self, flag) for flag, name in _ROLLOUT_FLAGS.items() if getattr(self, flag) is not None}
        return Rollouts(prompts, self.make_policy(), grade=grade, **given)


@dataclass
class FileArguments:
    """motab verify | report: look at the trajectories of a synthesis."""

    output_dir: str = setting("runs/synthesize", "Folder of the synthesis.")

    @property
    def file(self) -> Path:
        """The trajectories.

        Raises:
            ValueError: there is no such file.
        """
        path = Path(self.output_dir) / "trajectories.jsonl"
        if not path.is_file():
            raise ValueError(f"{path} does not exist; motab synthesize --output_dir {self.output_dir} makes it")
        return path


@dataclass
class ShowArguments(FileArguments):
    """motab show: print one trajectory of a synthesis."""

    index: int = setting(0, "Index of the trajectory.")


@dataclass
class ExportArguments(FileArguments):
    """motab export: write the trajectories of a synthesis as token ids and labels, for TRL's SFTTrainer or axolotl."""

    output_file: str = setting("", "File to write; ends in .parquet or .jsonl.")
    ignore_authors: list[str] = field(
        default_factory=list, metadata={"help": "Authors whose tokens get label -100: " + ", ".join(AUTHORS)}
    )
    max_length: int | None = setting(None, "Leave out trajectories of more tokens than this.")
    only_correct: bool = setting(False, "Leave out trajectories with a wrong answer; needs motab synthesize --grade.")
