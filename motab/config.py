"""The settings of each command."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from transformers import PreTrainedTokenizerBase

from motab.data import ANSWER_COLUMNS, QUESTION_COLUMNS, Problem, load_problems
from motab.engine import SETTINGS
from motab.models import DTYPES, dtype_name
from motab.parsing import load_yaml, require, require_file
from motab.policies import POLICIES, Policy
from motab.prompts import Prompt, PromptFormat, short_enough
from motab.rollouts import Rollouts

#: Settings of policies whose names as flags are others: top_k is of the sampling.
_FLAG = {"top_k": "teacher_top_k"}
_ATTENTION = "Of the models: sdpa, flash_attention_2, eager, ... (what transformers chooses)."


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _first(columns: Sequence[str]) -> str:
    return "the first there is of " + ", ".join(columns)


@dataclass
class GenerationArguments:
    """How models write."""

    max_new_tokens: int = _setting(1024, "Budget in tokens after the prompt.")
    batch_size: int = _setting(8, "Trajectories in progress at a time.")
    block_size: int = _setting(16, "Tokens that the student drafts before the teacher looks.")
    temperature: float = _setting(0.6, "0 is greedy.")
    top_k: int | None = _setting(None, "Sample among so many likeliest tokens (all).")
    top_p: float = _setting(1.0, "Sample among the fewest likeliest tokens that hold this probability.")
    min_p: float | None = _setting(None, "Sample among tokens at least so many times as likely as the likeliest (0).")
    seed: int = _setting(0, "Of all sampling.")
    torch_compile: bool = _setting(False, "Write with compiled models: faster, after a minute or more at first.")
    max_cached_tokens: int | None = _setting(
        None, "Tokens that the key-value caches hold for all trajectories together (what free memory holds)."
    )
    dtype: str = _setting("auto", f"Of the weights: {', '.join(DTYPES)}.")
    attn_implementation: str | None = _setting(None, _ATTENTION)

    def __post_init__(self) -> None:
        self.dtype = dtype_name(self.dtype)

    def generation(self) -> dict[str, Any]:
        """The keyword arguments of `motab.synthesize`."""
        return {name: getattr(self, name) for name in SETTINGS}


@dataclass
class PolicyArguments:
    """Who writes and who watches."""

    policy: (
        Literal["motab", "on_policy", "teacher_only", "step_skd", "token_skd", "adaswitch", "relay_opd", "truncated"]
        | None
    ) = _setting(None, "Who writes and who watches (motab).")
    epsilon0: float | None = _setting(None, "Of motab: boundary at zero teacher entropy (0.2).")
    theta: float | None = _setting(None, "Of motab: how much the teacher's entropy relaxes the boundary (1).")
    entropy_top_k: int | None = _setting(None, "Of motab: entropy of the renormalised top k; exact when not given.")
    backtrack: str | None = _setting(None, "Of motab: the teacher starts where td (this), breach or none says.")
    stitch: str | None = _setting(
        None,
        "Of motab: phrase before the teacher's text ('However,'); '' (null in a file) leaves the flawed steps out.",
    )
    delimiter: str | None = _setting(None, "Ends a step ('.\\n\\n', of relay_opd '\\n\\n').")
    max_interventions: int | None = _setting(None, "Of motab (1) and relay_opd (2).")
    gamma: float | None = _setting(None, "Of step_skd: the least ratio of the teacher's value to the student's.")
    teacher_top_k: int | None = _setting(None, "Of token_skd: a token must be among the teacher's k likeliest (25).")
    factor: float | None = _setting(None, "Of adaswitch: how much of the recent mean divergence is too much.")
    window: int | None = _setting(None, "Of adaswitch: tokens of that mean.")
    words: list[str] | None = field(
        default=None, metadata={"help": "Of relay_opd: those that a teacher reflects with."}
    )
    student_top_k: int | None = _setting(None, "Of relay_opd: the student's likeliest tokens that lack the word (5).")
    paragraphs: int | None = _setting(None, "Of relay_opd: the most that the teacher writes at a time (3).")
    relay_tokens: int | None = _setting(None, "Of relay_opd: the same in tokens (256).")
    n: int | None = _setting(None, "Of truncated: tokens to stop after.")

    def make_policy(self) -> Policy:
        """The policy that these settings describe.

        Raises:
            ValueError: an unknown policy; a setting that it needs is missing, one of another policy's is there, or out
                of range.
        """
        policy = self.policy or "motab"
        if policy not in list(POLICIES):  # a name that only the command line looks at
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        kind = POLICIES[policy]
        own = {_FLAG.get(entry.name, entry.name): entry for entry in dataclasses.fields(kind)}
        names = {entry.name for each in POLICIES.values() for entry in dataclasses.fields(each)}
        settings = {_FLAG.get(name, name) for name in names}
        given: dict[str, Any] = {name: value for name, value in vars(self).items() if name in settings}
        given = {name: value for name, value in given.items() if value is not None}
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
    """How problems are loaded and put to the models."""

    dataset_config: str | None = _setting(None, "Of a hub dataset: the name of its configuration.")
    question_column: str | None = _setting(
        None,
        f"Holds a text, or messages, of which the assistant's at the end are dropped ({_first(QUESTION_COLUMNS)}).",
    )
    answer_column: str | None = _setting(None, f"Holds what evaluate compares with ({_first(ANSWER_COLUMNS)}).")
    max_prompt_length: int | None = _setting(
        None, "Leave out problems whose prompts have more tokens; the others are counted without them."
    )
    system_prompt: str | None = _setting(None, "The system's message.")
    prompt_suffix: str | None = _setting(None, "What each problem ends with, as how to state the answer.")
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "What the chat template is given besides, in JSON or YAML: '{\"enable_thinking\": false}'."},
    )

    def load(self, dataset_name: str, split: str) -> list[Problem]:
        """The problems of a dataset, long ones too."""
        columns = {"question_column": self.question_column, "answer_column": self.answer_column}
        return load_problems(dataset_name, split, self.dataset_config, **columns)

    def short_enough(self, problems: list[Problem], tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
        """Those of the problems that are not left out."""
        if self.max_prompt_length is None:
            return problems
        return short_enough(problems, tokenizer, self.prompt_format(), self.max_prompt_length)

    def prompt_format(self) -> PromptFormat:
        """What these settings describe.

        Raises:
            ValueError: `chat_template_kwargs` that are no mapping from names.
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
    """motab synthesize: write trajectories to OUTPUT_DIR/trajectories.jsonl; run again to go on."""

    model_name_or_path: str = _setting("", "The student.")
    teacher_model_name_or_path: str = _setting("", "The teacher.")
    dataset_name: str = _setting("", "Hub name, JSONL or parquet file, or reasoning-gym:TASK?size=N&seed=S.")
    dataset_split: str = _setting("train", "Of a hub dataset.")
    output_dir: str = _setting("runs/synthesize", "Where trajectories.jsonl goes.")
    num_samples: int = _setting(1, "Trajectories a question.")
    share_teacher: bool = _setting(False, "One teacher for all processes, tensor-parallel; they write together.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < 1:
            raise ValueError(f"--num_samples must be at least 1, got {self.num_samples}")


@dataclass
class EvaluateArguments(PromptArguments, GenerationArguments):
    """motab evaluate: accuracy of a model on problems with answers."""

    model_name_or_path: str = _setting("", "The model.")
    dataset_name: str = _setting("", "Hub name, JSONL or parquet file, or reasoning-gym:TASK?size=N&seed=S.")
    dataset_split: str = _setting("test", "Of a hub dataset.")
    num_samples: int = _setting(1, "Answers to each problem.")
    output_file: str | None = _setting(None, "Write the figures to this JSON file as well.")
    answers_file: str | None = _setting(None, "Write the answers to this JSONL file.")


#: By flag of `motab train`, the settings of `Rollouts`; some names without a prefix are settings of the training.
_ROLLOUT_FLAGS = {
    f"rollout_{name}" if name in ("batch_size", "temperature", "torch_compile") else name: name
    for name in SETTINGS
    if name != "seed"
}


@dataclass
class TrainArguments(PolicyArguments, PromptArguments):
    """motab train: on the trajectories of a synthesis, or on those that the student writes as it trains."""

    model_name_or_path: str = _setting("", "The student.")
    teacher_model_name_or_path: str = _setting("", "The teacher, for a divergence and for what the policy needs.")
    train_file: str = _setting("", "trajectories.jsonl of a synthesis.")
    eval_file: str = _setting("", "Held-out trajectories: their loss at the end, and when --eval_strategy says.")
    dataset_name: str = _setting("", "In place of train_file: problems, as of synthesize, to write on at every step.")
    dataset_split: str | None = _setting(None, "Of a hub dataset (train).")
    max_new_tokens: int | None = _setting(None, "Of what is written as it trains: budget after the prompt (1024).")
    rollout_batch_size: int | None = _setting(None, "The same: trajectories in progress at a time (8).")
    block_size: int | None = _setting(None, "The same: tokens that the student drafts before the teacher looks (16).")
    rollout_temperature: float | None = _setting(None, "The same: 0 is greedy (0.6).")
    top_k: int | None = _setting(None, "The same: among so many likeliest tokens (all).")
    top_p: float | None = _setting(None, "The same: among the fewest likeliest tokens of this probability (1).")
    min_p: float | None = _setting(None, "The same: among tokens so many times as likely as the likeliest (0).")
    rollout_torch_compile: bool | None = _setting(None, "The same: with compiled models (False).")
    max_cached_tokens: int | None = _setting(None, "The same: tokens that the key-value caches hold (what fits).")
    dtype: str = _setting("float32", f"Of the student's weights: {', '.join(DTYPES)}.")
    teacher_dtype: str = _setting("auto", "Of the teacher's: auto is as they were saved.")
    attn_implementation: str | None = _setting(None, _ATTENTION)

    def __post_init__(self) -> None:
        self.dtype, self.teacher_dtype = dtype_name(self.dtype), dtype_name(self.teacher_dtype)

    def check_source(self) -> None:
        """Refuse none or two of the sources, one that is not there, and settings of the writing where nothing is.

        Raises:
            ValueError: names the settings, and the way out.
        """
        if bool(self.train_file) == bool(self.dataset_name):
            got = f"{self.train_file!r} and {self.dataset_name!r}"
            raise ValueError(f"give --train_file, or --dataset_name to write on as it trains: one of them, got {got}")
        kinds = (PolicyArguments, PromptArguments)
        writing = [entry.name for kind in kinds for entry in dataclasses.fields(kind)]
        writing += ["dataset_split", *_ROLLOUT_FLAGS]
        given = [f"--{name}" for name in writing if getattr(self, name) is not None]
        if self.train_file and given:
            raise ValueError(
                f"--train_file is trained on as it was written, got {', '.join(given)} besides: leave them out, or "
                "give --dataset_name in place of --train_file to write as it trains"
            )
        for name in ("train_file", "eval_file"):
            if path := getattr(self, name):
                require_file(path, name, "motab synthesize writes OUTPUT_DIR/trajectories.jsonl")

    def rollouts(self, prompts: Sequence[Prompt]) -> Rollouts:
        """What these settings have the student write on."""
        given = {name: getattr(self, flag) for flag, name in _ROLLOUT_FLAGS.items() if getattr(self, flag) is not None}
        return Rollouts(prompts, self.make_policy(), **given)
