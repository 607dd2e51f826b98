"""What is asked of prompts and models before anything is generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    models: Sequence[PreTrainedModel],
    max_new_tokens: int,
) -> list[list[int]]:
    """The token ids of each prompt, which every model can read and write on.

    Raises:
        ValueError: an empty prompt, a prompt and budget longer than a model's context, or a tokenizer larger than a
            model's vocabulary.
    """
    encoded = [_encode(tokenizer, prompt, index) for index, prompt in enumerate(prompts)]
    for model in models:
        _check_vocabulary(model, tokenizer)
        _check_context(model, encoded, max_new_tokens)
    return encoded


def end_tokens(models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text, by the tokenizer or by any of the models."""
    ids = {tokenizer.eos_token_id}
    for model in models:
        own = model.generation_config.eos_token_id if model.generation_config is not None else None
        ids.update(own if isinstance(own, list) else [own])
    return sorted(token for token in ids if token is not None)


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, index: int) -> list[int]:
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    elif prompt and isinstance(prompt[0], Mapping):
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    else:
        ids = [int(token) for token in prompt]  # type: ignore[arg-type]
    if not ids:
        raise ValueError(f"prompt {index} is empty: a prompt must hold at least one token, got {prompt!r}")
    return list(ids)


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    size = model.config.get_text_config().vocab_size
    if len(tokenizer) > size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but {type(model).__name__} knows only {size}; student and "
            "teacher must share the tokenizer that both were trained with"
        )


def _check_context(model: PreTrainedModel, prompts: Sequence[list[int]], max_new_tokens: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for index, ids in enumerate(prompts):
        if limit is not None and len(ids) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens and max_new_tokens is {max_new_tokens}, but "
                f"{type(model).__name__} reads at most {limit}; shorten the prompt or lower max_new_tokens"
            )
