"""What the README shows runs as it stands there, but for the number of problems."""

import os
import re
import shlex
from pathlib import Path

import pytest

from motab.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
EXAMPLES = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [line for language, text in BLOCKS if not language for line in text.replace("\\\n", "").splitlines()]


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """A folder to write to, with the tiny pair at its place."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_examples(capsys):
    assert len(EXAMPLES) == 2
    for example in EXAMPLES:
        exec(compile(example, "README.md", "exec"), {})
    assert "boxed" in capsys.readouterr().out


def test_commands(monkeypatch, capsys):
    lines = [line.replace("size=500", "size=4") for line in COMMANDS]
    task = next(line for line in lines if line.startswith("TASK="))
    monkeypatch.setenv("TASK", shlex.split(task)[0].removeprefix("TASK="))
    commands = [shlex.split(os.path.expandvars(line))[1:] for line in lines if line.startswith("motab ")]
    assert [command[0] for command in commands] == ["synthesize", "train", "evaluate"]
    for command in commands:
        assert main(command) == 0
    assert "accuracy" in capsys.readouterr().out


def test_links():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_structure_names_each_file():
    page = (ROOT / "docs" / "structure.md").read_text()
    names = {path.name for package in ("motab", "motab_kernels") for path in (ROOT / package).glob("*.py")}
    assert {name for name in names if name not in page and not name.endswith(("__init__.py", "_checks.py"))} == set()
