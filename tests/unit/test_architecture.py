# SPDX-License-Identifier: Apache-2.0
"""Which package may import which: the plugin, which runs once per pod, imports no compiler."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("bpf", "cni_plugin", "install")
# Modules by their beginning, and the beginnings of those of ours that they may import.
ALLOWED = {
    "bpf": ("bpf",),
    "cni_plugin": ("cni_plugin", "bpf.abi", "bpf.bpfsys", "bpf.pins"),
    "install": PACKAGES,
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    module_of(path): path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")
}


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def statements(node: ast.AST, *, everywhere: bool) -> Iterator[ast.AST]:
    """Those below a node that run when it is imported; with `everywhere` all."""
    for child in ast.iter_child_nodes(node):
        if not everywhere and (is_for_types_only(child) or isinstance(child, ast.FunctionDef)):
            continue
        yield child
        yield from statements(child, everywhere=everywhere)


def imported(path: Path, *, everywhere: bool) -> set[str]:
    """The modules of ours that a module imports; `from package import module` is the module."""
    found = set()
    for node in statements(ast.parse(path.read_text()), everywhere=everywhere):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys() or {node.module}
    return found & MODULES.keys()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    wrong = {
        (module, other)
        for module, path in MODULES.items()
        if module.partition(".")[0] == package
        for other in imported(path, everywhere=True)
        if not any(f"{other}.".startswith(f"{start}.") for start in ALLOWED[package])
    }
    assert wrong == set()


def test_no_modules_import_each_other() -> None:
    graph = {
        module: imported(path, everywhere=False) - {module} for module, path in MODULES.items()
    }
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)  # or CycleError
