"""How problems are put to the models."""

import copy

import numpy as np
import pytest
import torch

from motab.arguments import EvaluateArguments, TrainArguments
from motab.data import Problem
from motab.parsing import parse
from motab.prompts import PromptFormat, encode_prompts, short_enough

CONVERSATION = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}.{% endfor %}{% if not quiet %}c{% endif %}"


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_without_a_template(tokenizer):
    assert PromptFormat().render(tokenizer, Problem(CONVERSATION, None, {})) == "a\nb"
    assert PromptFormat(prompt_suffix=",").render(tokenizer, Problem("c", None, {})) == "c,"
    for wrong in ({"system_prompt": "a"}, {"chat_template_kwargs": {"quiet": True}}):
        with pytest.raises(ValueError, match=r"need a chat template, got a tokenizer without .* prompt_suffix"):
            PromptFormat(**wrong).render(tokenizer, Problem("c", None, {}))


def test_messages(chat_tokenizer):
    render = lambda problem, **settings: PromptFormat(**settings).render(chat_tokenizer, Problem(problem, None, {}))  # noqa: E731
    assert render(CONVERSATION) == CONVERSATION
    assert render("b", prompt_suffix=",") == [{"role": "user", "content": "b,"}]
    assert render(CONVERSATION, system_prompt="c") == [{"role": "system", "content": "c"}, CONVERSATION[1]]
    assert CONVERSATION[1]["content"] == "b"  # as it was


def test_settings_of_the_template(chat_tokenizer):
    """Token ids then, in which nothing is left to be said."""
    problem = Problem("b", None, {})
    ids = [
        PromptFormat(chat_template_kwargs={"quiet": quiet}).render(chat_tokenizer, problem) for quiet in (True, False)
    ]
    assert ids[0] == chat_tokenizer.encode("ub.")
    assert ids[1] == chat_tokenizer.encode("ub.c")


@pytest.mark.parametrize(
    "name",
    ["messages", "add_generation_prompt", "tokenize", "truncation", "strftime_now", "range", "later", "m", "qiuet"],
)
def test_settings_that_are_not_of_the_template(chat_tokenizer, name):
    """Among them those of transformers, such as one that would shorten the prompt, and mistyped ones."""
    chat_tokenizer.chat_template = TEMPLATE + (
        "{% if not date is defined %}{% set date = strftime_now('%d') %}{% endif %}{% set later = range(3) %}"
        "{% if add_generation_prompt %}{% for m in later %}{% break %}{% endfor %}{% endif %}"
        "{%- generation -%}{{ date }}{% endgeneration %}"
    )
    render = lambda **given: PromptFormat(chat_template_kwargs=given).render(chat_tokenizer, Problem("b", None, {}))  # noqa: E731
    assert render(date="a", quiet=True, documents=[]) == chat_tokenizer.encode("ub.a")
    with pytest.raises(ValueError, match=f"of the template, here date, documents, quiet, tools, got {name}$"):
        render(**{"quiet": True, name: 3})


def test_what_a_template_cannot_take(chat_tokenizer):
    """Of which jinja says only that Python could not do it."""
    with pytest.raises(ValueError, match=r"refuses messages of user with {'tools': 5}: 'int' object is not iterable"):
        PromptFormat(chat_template_kwargs={"tools": 5}).render(chat_tokenizer, Problem("b", None, {}))
    chat_tokenizer.chat_template = "{{ messages[0].content + 'c' }}"
    parts = [{"role": "user", "content": [{"type": "text", "text": "b"}]}]
    with pytest.raises(ValueError, match="chat template refuses messages of user: can only concatenate list"):
        encode_prompts([parts], chat_tokenizer)


@pytest.mark.parametrize("settings", [{}, {"chat_template_kwargs": {"quiet": True}}])
def test_a_template_that_refuses(chat_tokenizer, settings):
    """As Gemma's does a system's message; with and without settings of the template."""
    chat_tokenizer.chat_template = "{{ quiet }}{{ raise_exception('System role not supported') }}"
    settings = {"system_prompt": "a", **settings}
    render = lambda: [PromptFormat(**settings).render(chat_tokenizer, Problem("b", None, {}))]  # noqa: E731
    with pytest.raises(ValueError, match=r"template refuses messages of system, user.*: System role not supported"):
        encode_prompts(render(), chat_tokenizer)


def test_the_suffix_ends_what_the_user_says(tokenizer):
    messages = [CONVERSATION[1], CONVERSATION[0]]
    assert PromptFormat(prompt_suffix=",").render(tokenizer, Problem(messages, None, {})) == "b,\na"
    assert messages == [CONVERSATION[1], CONVERSATION[0]]  # as they were, for the next time
    with pytest.raises(ValueError, match=r"prompt_suffix needs a message by the user, got \[\{'role': 'system'"):
        PromptFormat(prompt_suffix=",").render(tokenizer, Problem(CONVERSATION[:1], None, {}))


def test_prompts_that_are_too_long(chat_tokenizer):
    """As they are put: with the system's message, suffix and template."""
    problems = [Problem(text, None, {}) for text in ("b", "b,b", "c")]
    put = PromptFormat("a", prompt_suffix=",")  # of "sa.ub,.c" the tokenizer knows six letters
    assert short_enough(problems, chat_tokenizer, put, 8) == problems
    message = "1 of 3 problems have prompts of more than max_prompt_length 7 tokens and are left out"
    with pytest.warns(UserWarning, match=message):
        assert short_enough(problems, chat_tokenizer, put, 7) == [problems[0], problems[2]]
    with pytest.raises(
        ValueError, match="all 3 prompts have more than max_prompt_length 5 tokens, the shortest 6; raise"
    ):
        short_enough(problems, chat_tokenizer, put, 5)


@pytest.mark.parametrize("given", ['{"quiet": true}', "{quiet: true}", "file"])
def test_from_the_command_line(given, tmp_path):
    flags = ["--system_prompt", "a", "--prompt_suffix", "b", "--chat_template_kwargs", given]
    if given == "file":
        (tmp_path / "c.yaml").write_text("chat_template_kwargs: {quiet: true}\nsystem_prompt: a\nprompt_suffix: b\n")
        flags = ["--config", str(tmp_path / "c.yaml")]
    args = parse(EvaluateArguments, flags, "evaluate")
    assert args.prompt_format() == PromptFormat("a", "b", {"quiet": True})
    assert parse(EvaluateArguments, [], "evaluate").prompt_format() == PromptFormat()


@pytest.mark.parametrize("given", ["", "true", "false", "[1]", "{1: 2}", "{a", "enable_thinking"])
def test_what_is_no_mapping(given):
    args = parse(EvaluateArguments, ["--chat_template_kwargs", given], "evaluate")
    with pytest.raises(ValueError, match="--chat_template_kwargs must be a mapping"):
        args.prompt_format()


def test_nothing_is_put_where_nothing_is_written():
    args = parse(TrainArguments, ["--train_file", "t.jsonl", "--prompt_suffix", "b"], "train")
    with pytest.raises(ValueError, match="--train_file takes no settings of writing, got --prompt_suffix"):
        args.check_source()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            [3, 12],
            "prompt 1 must hold token ids of the tokenizer, 0 to 11, got 12; encode its text with this tokenizer",
        ),
        ([3, -1], "prompt 1 must hold token ids of the tokenizer, 0 to 11, got -1"),
        (torch.tensor([3, 12]), "0 to 11, got 12"),
        (None, "prompt 1 must be a string, a list of messages or a list of token ids, got NoneType None"),
        (
            {"role": "user", "content": "a"},
            r"prompt 1 must be .*, got dict \{'role': .*; a single message stands in",
        ),
        ([{"role": "user", "content": "a"}, 3], r"prompt 1 must be .*, got list \[\{'role'"),
        ([3.0, 4.5], r"prompt 1 must be .*, got list \[3.0, 4.5\]"),
        ([True], r"prompt 1 must be .*, got list \[True\]"),
        (b"ab", "prompt 1 must be .*, got bytes b'ab'"),
        (7, "prompt 1 must be .*, got int 7"),
        (torch.tensor([3.0]), "prompt 1 must be .*, got Tensor tensor"),
        (torch.tensor([[3]]), "prompt 1 must be .*, got Tensor tensor"),
        (np.array(3), "prompt 1 must be .*, got ndarray array"),
        (np.array([], dtype=int), "prompt 1 is empty"),
    ],
)
def test_what_is_no_prompt(tokenizer, prompt, message):
    with pytest.raises(ValueError, match=message):
        encode_prompts(["a", prompt], tokenizer)


@pytest.mark.parametrize("prompts", ["hello", {"prompt": "hello"}])
def test_one_prompt_is_no_list(tokenizer, prompts):
    """A string would be five prompts of a letter each."""
    with pytest.raises(ValueError, match=r"prompts must be a list of prompts, got .*hello.* alone; put it into a list"):
        encode_prompts(prompts, tokenizer)


def test_token_ids_in_any_array(tokenizer):
    ids = [3, 0, 11]
    for prompt in (ids, tuple(ids), torch.tensor(ids), np.array(ids, dtype=np.int32), list(np.array(ids))):
        assert encode_prompts([prompt], tokenizer) == [ids]
