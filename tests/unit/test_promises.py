"""docs/promises.md names tests and modules that exist: what is renamed or removed can't go on being promised there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

Row = tuple[str, str, str]


def rows() -> list[Row]:
    """Return promise, places and proofs of each line of the page's tables."""
    found: list[Row] = []
    for line in (ROOT / "docs" / "promises.md").read_text(encoding="utf-8").splitlines():
        # A bar within a cell is written with a backslash before it.
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and cells[0] not in ("promise", "---"):
            assert len(cells) == 3, line
            found.append((cells[0], cells[1], cells[2]))
    return found


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def path_of(name: str, below: str) -> Path:
    """Return the path that a name stands for: of the project's root, or else below the usual directory."""
    return ROOT / name if (ROOT / name).exists() else ROOT / below / name


def functions(path: Path) -> list[str]:
    """Return the names of a module's tests, and of the tests of its test machines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return [name for name in names if name.startswith(("test_", "Test"))] + [
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id.startswith(("test_", "Test"))
    ]


def test_there_are_promises() -> None:
    assert len(rows()) > 60


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:60])
def test_what_a_promise_names_exists(row: Row) -> None:
    _promise, places, proofs = row
    assert quoted(places), "no module is named"
    assert quoted(proofs), "no test is named"
    for place in quoted(places):
        assert path_of(place, "lxc_pool").exists(), f"there is no {place}"
    for proof in quoted(proofs):
        file, separator, words = proof.partition("::")
        path = path_of(file, "tests")
        assert path.is_file(), f"there is no {file}"
        if separator:
            assert words, proof
            assert any(words in name for name in functions(path)), f"{file} has no test with {words} in its name"
        else:
            assert not path.is_relative_to(ROOT / "tests"), f"{proof} names no test, only a file"
