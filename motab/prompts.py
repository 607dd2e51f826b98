"""Problems as prompts, and the checks of prompts and models before generation."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from jinja2 import Environment, TemplateError
from jinja2.meta import find_undeclared_variables
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from motab.data import Problem
from motab.processes import process_state
from motab_kernels.arguments import is_integer

# What apply_chat_template itself gives to a template.
_GIVEN = ("messages", "add_generation_prompt", "continue_final_message", "raise_exception", "strftime_now")

Prompt = str | Sequence[Mapping[str, str]] | Sequence[int] | Tensor | np.ndarray


def refuse_alone(prompts: object) -> None:
    """Refuse a prompt that is not in a list: a text would be taken for as many prompts as it has letters."""
    if isinstance(prompts, str | Mapping):
        raise ValueError(f"prompts must be a list of prompts, got {_short(prompts)} alone; put it into a list")


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    models: Sequence[PreTrainedModel] = (),
    max_new_tokens: int = 0,
) -> list[list[int]]:
    """The token ids of each prompt, checked against every model's vocabulary and context.

    Raises:
        ValueError: a string or a mapping instead of a list, an empty or invalid prompt, token ids that the tokenizer
            does not have, a prompt and budget longer than a model's context, or a tokenizer larger than a model's
            vocabulary.
    """
    refuse_alone(prompts)
    size = vocabulary_size(tokenizer)
    encoded = [_encode(tokenizer, size, prompt, index) for index, prompt in enumerate(prompts)]
    for model in models:
        check_vocabulary(model, tokenizer)
        _check_context(model, encoded, max_new_tokens)
    return encoded


@dataclass(frozen=True)
class PromptFormat:
    """How a problem is put to the models: as messages if the tokenizer has a chat template, else as plain text.

    Attributes:
        system_prompt: the system's message, in place of the problem's own if it has one.
        prompt_suffix: text after the user's last message, such as how to state the answer.
        chat_template_kwargs: variables of the chat template, such as ``{"enable_thinking": False}``, ``tools`` and
            ``documents``.
    """

    system_prompt: str | None = None
    prompt_suffix: str = ""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def render(self, tokenizer: PreTrainedTokenizerBase, problem: Problem) -> Prompt:
        """The prompt as `synthesize` takes it.

        Raises:
            ValueError: a system prompt or settings of a template for a tokenizer without one; settings or messages that
                the template refuses; settings that are not its own; a suffix without a message of the user.
        """
        messages = list(problem.messages())
        if self.prompt_suffix:
            places = [place for place, message in enumerate(messages) if message["role"] == "user"]
            if not places:
                raise ValueError(f"prompt_suffix needs a message by the user, got {messages!r}")
            last = messages[places[-1]]
            messages[places[-1]] = {**last, "content": last["content"] + self.prompt_suffix}
        if tokenizer.chat_template is None:
            if self.system_prompt is not None or self.chat_template_kwargs:
                raise ValueError(
                    "system_prompt and chat_template_kwargs need a chat template, got a tokenizer without one; put "
                    "the text into the problems or into prompt_suffix"
                )
            return "\n".join(message["content"] for message in messages)
        if self.system_prompt is not None:
            others = [message for message in messages if message["role"] != "system"]
            messages = [{"role": "system", "content": self.system_prompt}, *others]
        if self.chat_template_kwargs:
            return _from_template(tokenizer, messages, self.chat_template_kwargs)
        return messages


def short_enough(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    max_prompt_length: int,
) -> list[Problem]:
    """The problems whose prompts have at most `max_prompt_length` tokens; one warning counts the others.

    Raises:
        ValueError: no problem is left.
    """
    prompts = encode_prompts([prompt_format.render(tokenizer, problem) for problem in problems], tokenizer)
    kept = [problem for problem, ids in zip(problems, prompts, strict=True) if len(ids) <= max_prompt_length]
    longer = len(problems) - len(kept)
    if longer and not kept:
        raise ValueError(
            f"all {longer} prompts have more than max_prompt_length {max_prompt_length} tokens, the shortest "
            f"{min(map(len, prompts))}; raise it"
        )
    if longer and process_state().is_main_process:
        warnings.warn(
            f"{longer} of {len(problems)} problems have prompts of more than max_prompt_length {max_prompt_length} "
            "tokens and are left out",
            stacklevel=2,
        )
    return kept


def end_tokens(models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text according to the tokenizer or any of the models."""
    ids = {tokenizer.eos_token_id}
    for model in models:
        own = model.generation_config.eos_token_id if model.generation_config is not None else None
        ids.update(own if isinstance(own, list) else [own])
    return sorted(token for token in ids if token is not None)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest token id; smaller ids may be unused."""
    return max(tokenizer.get_vocab().values()) + 1


def _encode(tokenizer: PreTrainedTokenizerBase, size: int, prompt: Prompt, index: int) -> list[int]:
    parts: Any = prompt.tolist() if isinstance(prompt, Tensor | np.ndarray) else prompt
    is_list = isinstance(parts, list | tuple)
    if isinstance(parts, str):
        ids = tokenizer.encode(parts)
    elif is_list and parts and all(isinstance(part, Mapping) for part in parts):
        ids = _from_template(tokenizer, parts)
    elif is_list and all(map(is_integer, parts)):
        ids = [int(token) for token in parts]
        if foreign := [token for token in ids if not 0 <= token < size]:
            raise ValueError(
                f"prompt {index} must hold token ids of the tokenizer, 0 to {size - 1}, got {foreign[0]}; encode its "
                "text with this tokenizer, or give the text"
            )
    else:
        raise ValueError(
            f"prompt {index} must be a string, a list of messages or a list of token ids, got {_short(prompt)}; a "
            "single message stands in a list, as token ids do"
        )
    if not ids:
        raise ValueError(f"prompt {index} is empty: a prompt must hold at least one token, got {prompt!r}")
    return list(ids)


def _short(value: object) -> str:
    """A value's type and the beginning of its repr."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '...'}"


def _from_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], settings: Mapping[str, Any] = {}
) -> list[int]:
    """The token ids of messages, up to where the answer begins."""
    try:
        known = _variables(tokenizer.get_chat_template(tools=settings.get("tools"))) if settings else ()
        if unknown := [name for name in settings if name not in known]:
            raise ValueError(
                f"chat_template_kwargs must be variables of the template, here {', '.join(known)}, got "
                + ", ".join(unknown)
            )
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **settings)
    except (TemplateError, TypeError) as error:  # TypeError: as of a content that is no text
        roles = ", ".join(str(message.get("role")) for message in messages)
        given = f" with {dict(settings)}" if settings else ""
        raise ValueError(f"the tokenizer's chat template refuses messages of {roles}{given}: {error}") from error
    return list(ids)


@cache
def _variables(template: str) -> list[str]:
    """The variables that a chat template reads, but for those that it is always given, and what every one may read."""
    source = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)  # transformers' own tag
    found = find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source))
    return sorted({*found, "tools", "documents"}.difference(_GIVEN))


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model that does not know all of the tokenizer's tokens."""
    own, needed = model.config.get_text_config().vocab_size, vocabulary_size(tokenizer)
    if needed > own:
        raise ValueError(
            f"the tokenizer has {needed} tokens, but {type(model).__name__} knows only {own}; student and teacher must "
            "share the tokenizer that both were trained with"
        )


def _check_context(model: PreTrainedModel, prompts: Sequence[list[int]], max_new_tokens: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for index, ids in enumerate(prompts):
        if limit is not None and len(ids) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens and max_new_tokens is {max_new_tokens}, but "
                f"{type(model).__name__} reads at most {limit}; lower max_new_tokens, or leave long prompts out "
                "(--max_prompt_length, or --max_length of a train_file)"
            )
