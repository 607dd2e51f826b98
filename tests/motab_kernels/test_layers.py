"""`reference/`, `cpu/` and `gpu/` never reach each other by imports, directly or through another file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("reference", "cpu", "gpu")


def imported(path):
    """The files of the package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            place = ROOT.joinpath(*name.split("."))
            yield from (x for x in (place.with_suffix(".py"), place / "__init__.py") if x.exists())


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_are_apart(folder):
    found = {}  # the files that are reached, each with the one that imports it
    left = [(path, None) for path in (ROOT / "motab_kernels" / folder).glob("*.py")]
    while left:
        path, importer = left.pop()
        if path not in found:
            found[path] = importer
            left += [(other, path) for other in imported(path)]
    assert len(found) > 1
    others = {path.relative_to(ROOT): importer for path, importer in found.items() if path.parent.name in FOLDERS}
    assert {path: importer for path, importer in others.items() if path.parent.name != folder} == {}
