"""Groups of settings that commands share: of generation, of policies, of problems and prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import yaml
from transformers import PreTrainedTokenizerBase

from motab.data import ANSWER_COLUMNS, QUESTION_COLUMNS, Problem, load_problems
from motab.generation import SETTINGS
from motab.models import DTYPES, dtype_name
from motab.parsing import require, setting
from motab.policies import POLICIES, MotabPolicy, Policy, RelayOPD, TokenSKD
from motab.prompts import PromptFormat, short_enough
from motab.quantization import BITS
from motab.yaml_values import load_yaml

#: Settings of policies with another name as a flag: --top_k is a setting of sampling.
_FLAG = {"top_k": "teacher_top_k"}
DATASET = "Hub name, JSONL, JSON or parquet file, or reasoning-gym:TASK?size=N&seed=S."
SPLIT = "Split of the hub dataset, or a part of it or of a file: train[:100]."
ATTENTION = "Attention of the models: sdpa, flash_attention_2, eager, ... (default: transformers' choice)"


def unset(text: str, default: Any) -> Any:
    """A setting that is None unless given, so that giving it can be noticed; the help names the default it stands
    for."""
    return setting(None, f"{text} (default: {default})")


def first_of(columns: Sequence[str]) -> str:
    return "first found of " + ", ".join(columns)


@dataclass
class GenerationArguments:
    """Generation."""

    max_new_tokens: int = setting(1024, "Tokens to write after the prompt, at most.")
    batch_size: int = setting(8, "Trajectories in progress at a time.")
    block_size: int = setting(16, "The most tokens that the student drafts before the teacher scores them.")
    temperature: float = setting(0.6, "Sampling temperature; 0 is greedy.")
    top_k: int | None = unset("Sample among the k likeliest tokens.", "all")
    top_p: float = setting(1.0, "Sample among the fewest likeliest tokens with this total probability.")
    min_p: float | None = unset("Sample among tokens with at least this share of the likeliest one's probability.", 0)
    seed: int = setting(0, "Random seed for sampling.")
    torch_compile: bool = setting(False, "Compile the models; takes a minute or more at the start.")
    max_cached_tokens: int | None = unset(
        "Tokens that the key-value cache of each model holds for all trajectories together.", "what free memory holds"
    )
    dtype: str = setting("auto", f"Weight dtype: {', '.join(DTYPES)}.")
    attn_implementation: str | None = setting(None, ATTENTION)

    def __post_init__(self) -> None:
        self.dtype = dtype_name(self.dtype)

    def generation(self) -> dict[str, Any]:
        """The keyword arguments of `motab.synthesize`."""
        return {name: getattr(self, name) for name in SETTINGS}


@dataclass
class BitsArguments:
    """Weights in 4 or 8 bits, by bitsandbytes."""

    load_in_4bit: bool = setting(False, "Load the linear layers of the model, but not its head, in 4 bits (nf4).")
    load_in_8bit: bool = setting(False, "The same in 8 bits.")

    def bits(self, of: str = "") -> int | None:
        """Those of the model, or of the ``teacher_``; None for weights as they are saved.

        Raises:
            ValueError: 4 and 8.
        """
        given = [bits for bits in BITS if getattr(self, f"{of}load_in_{bits}bit")]
        if len(given) > 1:
            raise ValueError(f"give one of {' and '.join(f'--{of}load_in_{bits}bit' for bits in given)}, got both")
        return given[0] if given else None


@dataclass
class TeacherBitsArguments(BitsArguments):
    """Weights of the teacher in 4 or 8 bits, by bitsandbytes."""

    teacher_load_in_4bit: bool = setting(False, "Load the teacher's linear layers, but not its head, in 4 bits (nf4).")
    teacher_load_in_8bit: bool = setting(False, "The same in 8 bits.")


@dataclass
class PolicyArguments:
    """Policy: who writes and who monitors; "motab:" marks a setting of that policy."""

    #: The flag's value that null in a file stands for, where None means "not given".
    NULL: ClassVar = {"stitch": ""}

    policy: (
        Literal["motab", "on_policy", "teacher_only", "step_skd", "token_skd", "adaswitch", "relay_opd", "truncated"]
        | None
    ) = unset("Policy of generation.", "motab")
    epsilon0: float | None = unset("motab: boundary at zero teacher entropy.", MotabPolicy.epsilon0)
    theta: float | None = unset("motab: how much the teacher's entropy relaxes the boundary.", MotabPolicy.theta)
    entropy_top_k: int | None = unset("motab: take the entropy of the renormalised k likeliest tokens.", "all")
    backtrack: str | None = unset(
        "motab: where the teacher starts after a breach: before the step whose value fell most (td), before the "
        "breaching step (breach) or after it (none).",
        MotabPolicy.backtrack,
    )
    stitch: str | None = unset(
        "motab: phrase between the flawed steps and the teacher's text; '' (null in a file) leaves these steps out.",
        repr(MotabPolicy.stitch),
    )
    delimiter: str | None = unset(
        "Text that ends a step.", f"{MotabPolicy.delimiter!r}, relay_opd: {RelayOPD.delimiter!r}"
    )
    max_interventions: int | None = unset(
        "motab, relay_opd: how often the teacher may take over.",
        f"motab: {MotabPolicy.max_interventions}, relay_opd: {RelayOPD.max_interventions}",
    )
    gamma: float | None = setting(None, "step_skd: least ratio of the teacher's value to the student's. (required)")
    teacher_top_k: int | None = unset("token_skd: accept the teacher's k likeliest tokens.", TokenSKD.top_k)
    factor: float | None = setting(
        None, "adaswitch: the teacher takes over above this multiple of the recent mean divergence. (required)"
    )
    window: int | None = setting(None, "adaswitch: tokens averaged over. (required)")
    words: list[str] | None = setting(
        None, f"relay_opd: words with which a teacher reflects. (default: {' '.join(RelayOPD.words)})"
    )
    student_top_k: int | None = unset(
        "relay_opd: the teacher takes over if the word is not among the student's k likeliest tokens.",
        RelayOPD.student_top_k,
    )
    paragraphs: int | None = unset(
        "relay_opd: paragraphs that the teacher writes at a time, at most.", RelayOPD.paragraphs
    )
    relay_tokens: int | None = unset(
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
    question_column: str | None = unset(
        "Column of the question: a text, or messages (the assistant's at the end are dropped).",
        first_of(QUESTION_COLUMNS),
    )
    answer_column: str | None = unset("Column of the answer, for evaluate and --grade.", first_of(ANSWER_COLUMNS))
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
