"""Dataclasses filled from a YAML file and from flags that override it."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
import re
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentError, ArgumentTypeError
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from motab.yaml_values import load_yaml

T = TypeVar("T")
#: By names that TRL and transformers have, or had, for a setting, those that it has here.
_ELSEWHERE = {
    "max_completion_length": "max_new_tokens",
    "max_seq_length": "max_length",
    "torch_dtype": "dtype",
    "no_cuda": "use_cpu",
    "dataset": "dataset_name",
    "dataset_train_split": "dataset_split",
    "lr": "learning_rate",
    "warmup_ratio": "warmup_steps",
    "group_by_length": "train_sampling_strategy",
}
_EXPECTED = {int: "a whole number", float: "a number", str: "a text"}


def setting(default: Any, text: str) -> Any:
    """A field of a command's dataclass, with the help of its flag."""
    return dataclasses.field(default=default, metadata={"help": text})


class _Formatter(ArgumentDefaultsHelpFormatter):
    """Names each flag once, and the defaults that are not empty."""

    def _format_action_invocation(self, action: Action) -> str:
        action = copy.copy(action)
        action.option_strings = [flag for flag in action.option_strings if "-" not in flag.lstrip("-")]
        return super()._format_action_invocation(action)

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default in (None, "", []) else super()._get_help_string(action)


def _group(parser: HfArgumentParser, kinds: tuple[type, ...]) -> None:
    """Group the flags: the command's own, those of each dataclass that it inherits, those of transformers."""
    classes = [each for kind in kinds for each in kind.__mro__ if dataclasses.is_dataclass(each)]
    groups: dict[str, Any] = {}
    for each in sorted(classes, key=lambda each: each.__module__.startswith("transformers.")):
        doc = str(each.__doc__).partition("\n")[0]
        title = "Settings" if each in kinds or doc.startswith("motab ") else doc.rstrip(".")
        if each.__module__.startswith("transformers."):
            title = f"{each.__name__} of transformers"
        group = groups[title] = groups.get(title) or parser.add_argument_group(title)
        own = [action for action in parser._optionals._group_actions if action.dest in inspect.get_annotations(each)]
        for action in own:
            parser._optionals._group_actions.remove(action)
            group._group_actions.append(action)


def parse(kinds: type[T] | tuple[type, ...], arguments: list[str], command: str) -> Any:
    """Instances of the dataclasses, from ``--config FILE`` and from flags, which override it.

    Raises:
        ValueError: a missing file, or one that is not a mapping of known settings; an unknown flag; an invalid value.
    """
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    parser = HfArgumentParser(
        kinds,
        prog=f"motab {command}",
        usage=f"motab {command} [--config FILE] [flags]",
        description=kinds[0].__doc__,
        formatter_class=_Formatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of these settings; flags override it.")
    _group(parser, kinds)
    known = [entry.name for kind in kinds for entry in dataclasses.fields(kind) if entry.init]
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    flags = {name: parser._option_string_actions[f"--{name}"] for name in known}
    for name in known:
        if hints[name] == bool | None and flags[name].default is None:  # as a flag of type bool: without a value, true
            flags[name].nargs, flags[name].const = "?", True
    config = _config_file(arguments)
    if config:
        values = _settings_in(config, known, command)
        null = {name: value for kind in kinds for name, value in getattr(kind, "NULL", {}).items()}
        values = {name: null.get(name) if value is None else value for name, value in values.items()}
        parser.set_defaults(**{name: _of_file(config, flags[name], hints[name], values[name]) for name in values})
    try:
        _, rest = parser.parse_known_args(arguments)
    except ArgumentError as error:
        raise ValueError(f"{error}; see motab {command} --help") from error
    if rest:
        raise ValueError(_unknown_flags(rest, known, command))
    parsed = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    filled = parsed[: len(kinds)]
    return filled[0] if len(filled) == 1 else filled


def _config_file(arguments: list[str]) -> str | None:
    for place, argument in reversed([*enumerate(arguments)]):  # argparse too takes the last
        if argument == "--config" and place + 1 < len(arguments):
            return arguments[place + 1]
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
    return None


def _settings_in(config: str, known: list[str], command: str) -> dict[str, Any]:
    require_file(config, "config", "it holds settings in YAML")
    try:
        values = load_yaml(Path(config).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{config} must hold settings in YAML, got invalid YAML: {error}") from error
    unknown = [name for name in values if name not in known] if isinstance(values, dict) else []
    if unknown or not isinstance(values, dict):
        got = ", ".join(_with_nearest(str(name), known) for name in unknown) or type(values).__name__
        raise ValueError(f"{config} must hold settings of motab {command}, got {got}; see motab {command} --help")
    return values


def _of_file(config: str, flag: Action, hint: Any, value: Any) -> Any:
    """A value of the file, converted as its flag's would be."""
    kinds = {get_origin(kind) or kind for kind in (hint, *get_args(hint))}
    several = flag.nargs == "+"
    if value is None and type(None) in kinds:
        return None
    if type(value) in kinds and not several and flag.choices is None:
        return value
    if flag.const is True and isinstance(value, bool):  # --fsdp without a value, which is declared as a text
        return value or flag.default
    try:
        if several:
            return [_converted(flag, each) for each in (value if isinstance(value, list) else [value])]
        return _converted(flag, value)
    except (ValueError, ArgumentTypeError) as error:
        expected = _EXPECTED.get(flag.type, "true or false")  # type: ignore[call-overload]
        if flag.choices is not None:
            expected = f"one of {', '.join(map(str, flag.choices))}"
        if several:
            expected += " or a list of it"
        if dict in kinds:
            expected += " or a mapping"
        got = "null" if value is None else repr(value)
        raise ValueError(f"{config}: {flag.dest} must be {expected}, got {got}") from error


def _converted(flag: Action, value: Any) -> Any:
    is_text = flag.type is str and flag.choices is None
    if value is None or isinstance(value, dict | list) or (is_text and isinstance(value, bool)):
        raise ValueError
    assert callable(flag.type)
    converted = flag.type(str(value))
    if flag.choices is not None and converted not in flag.choices:
        raise ValueError
    return converted


def _unknown_flags(rest: list[str], known: list[str], command: str) -> str:
    flags = [argument.partition("=")[0] for argument in rest if re.match(r"--?[A-Za-z]", argument)]
    if not flags:
        return f"no flag takes {', '.join(map(repr, rest))}; quote a text with spaces, or see motab {command} --help"
    names = ", ".join(_with_nearest(flag, [f"--{name}" for name in known]) for flag in flags)
    return f"unknown flag {names}; see motab {command} --help"


def _with_nearest(name: str, known: Iterable[str]) -> str:
    """A name, and the known one that is meant: by its name in TRL or transformers, its beginning, or its letters."""
    bare = name.lstrip("-")
    names = {each.lstrip("-"): each for each in known}
    meant = [each for each in names if each == _ELSEWHERE.get(bare)]
    meant += [each for each in names if each.startswith(f"{bare}_")]
    meant += difflib.get_close_matches(bare, names, 1, 0.7)
    return f"{name} (did you mean {names[meant[0]]}?)" if meant else name


def require(**settings: str) -> None:
    """Refuse required settings that were not given."""
    if missing := [f"--{name}" for name, value in settings.items() if not value]:
        raise ValueError(f"give {' and '.join(missing)}, as a flag or in the file of --config")


def require_file(path: str, name: str, source: str) -> None:
    """Refuse a missing file, and say where such a file comes from."""
    if not Path(path).is_file():
        raise ValueError(f"--{name} must name an existing file, got {path!r}; {source}")
