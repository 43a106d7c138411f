"""The table of layers: a module imports from lower rows or from its own folder."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "thinkstack"
ROWS = (
    {"types"},
    {"files", "stopping"},
    {"config", "log", "machine"},
    {"quant"},
    {"kernels"},
    {"models", "text"},
    {"checkpoint", "data", "tasks", "endpoint"},
    {"parallel"},
    {"train", "engine"},
    {"evals"},
    {"rl"},
    {"stages"},
    {"pipeline", "server"},
    {"claims", "planner", "catalog"},
    {"cli"},
    {"__main__"},
)
"""Lowest first. types stands below its row in the design: config and log raise its errors."""
ROW = {name: number for number, row in enumerate(ROWS) for name in row}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def dotted(path):
    parts = ["thinkstack", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {dotted(path) for path in MODULES}


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree, with_annotations=True):
    """Dotted names a module imports, anywhere in it; relative imports keep their dots."""
    waiting, found = [tree], []
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            members = [f"{base}.{alias.name}" for alias in node.names]
            found += [member if member in NAMES else base for member in members]
        elif is_type_checking(node) and not with_annotations:
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)
    return found


def parse(source, with_annotations=True):
    return imports(ast.parse(source), with_annotations)


def folder_of(name):
    """The entry of the table that a dotted name of the package belongs to; None for names outside the package."""
    parts = name.split(".")
    return parts[1] if parts[0] == "thinkstack" and len(parts) > 1 else None


def offences(importer, imported):
    """Imports of `importer` (a folder or module of the package) that the table forbids."""
    folders = {folder_of(name) for name in imported} - {None, importer}
    return sorted(folder for folder in folders if folder not in ROW or ROW[folder] >= ROW[importer])


def cycles(graph):
    """Modules from which one can come back to themselves."""
    reach = {name: set(targets) for name, targets in graph.items()}
    for middle in reach:
        for targets in reach.values():
            if middle in targets:
                targets |= reach[middle]
    return sorted(name for name, targets in reach.items() if name in targets)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_come_from_lower_rows_or_the_own_folder(path):
    importer = folder_of(dotted(path))
    assert importer in ROW, f"{importer} is in no row of the table; add it to the design and to this test"
    assert offences(importer, parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_are_absolute(path):
    assert [name for name in parse(path.read_text(encoding="utf-8")) if name.startswith(".")] == []


def test_no_module_imports_itself_in_a_circle():
    graph = {dotted(path): parse(path.read_text(encoding="utf-8"), with_annotations=False) for path in MODULES}
    assert cycles(graph) == []


@pytest.mark.parametrize(("one", "other"), [("train", "engine"), ("models", "text"), ("pipeline", "server")])
def test_neighbors_never_import_each_other(one, other):
    for name, stranger in ((one, other), (other, one)):
        for path in MODULES:
            if folder_of(dotted(path)) == name:
                assert stranger not in {folder_of(found) for found in parse(path.read_text(encoding="utf-8"))}


def test_types_needs_torch_for_annotations_only():
    source = (PACKAGE / "types.py").read_text(encoding="utf-8")
    assert "torch" in parse(source)
    assert "torch" not in parse(source, with_annotations=False)


def test_this_test_notices_upward_sideways_and_unknown_imports():
    assert offences("train", parse("def f():\n    from thinkstack.engine.engine import Engine")) == ["engine"]
    assert offences("models", parse("import thinkstack.train.loss")) == ["train"]
    assert offences("models", parse("from thinkstack import nowhere")) == []  # resolved only for modules that exist
    assert offences("models", parse("from thinkstack import data")) == ["data"]
    assert offences("models", parse("import thinkstack.helpers")) == ["helpers"]
    assert offences("stages", parse("from thinkstack.engine.engine import Engine\nimport torch")) == []


def test_this_test_notices_cycles():
    assert cycles({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["a"]}) == ["a", "b", "c"]
