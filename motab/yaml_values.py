"""Values written in YAML."""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also reads 1e-9 as a number; PyYAML itself expects 1.0e-9."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(text: str) -> Any:
    """The value of a text in YAML (or JSON).

    Raises:
        yaml.YAMLError: the text is not YAML.
    """
    return yaml.load(text, _Loader)
