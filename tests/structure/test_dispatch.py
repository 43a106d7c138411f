"""One dispatch: what computes an operation is decided in kernels/ and engine/fused/ alone.

Looked for elsewhere, by syntax:
- imports of `thinkstack.kernels.cpu`, `thinkstack.kernels.triton` and `thinkstack.kernels.conditions`, whose functions
  run on some machines only;
- functions of `thinkstack.kernels.choice` that say which code is used or faster;
- calls and definitions of functions whose names ask what a machine takes: takes*, supports*, can_*, uses*;
- `.is_cuda`, `.is_cpu`, comparisons with a device's `.type`, and questions for a device, its capability or a library.

Not looked for: `.is_meta` (a tensor without values has nothing to initialize), and dtypes that a user chose.
"""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "thinkstack"
INSIDE = ("kernels/", "engine/fused/")
EXEMPT = {
    "machine.py": "finds the devices and instruction sets",
    "stages/measure_kernels.py": "compares the implementations and shows the result",
}
"""Files that ask for machines because that is their task."""
MACHINE_MODULES = re.compile(r"thinkstack\.kernels\.(cpu|triton|conditions)\b")
PREDICATE = re.compile(r"_?(takes|supports|can_run|fits|uses)(_|$)")
CHOICES = {"uses", "emulates_bf16", "using_kernel", "fast_threads"}
QUESTIONS = re.compile(
    r"(torch\.)?(cuda\.(is_available|get_device_capability|get_device_properties)|backends\.\w+\.is_available)"
)


def predicates(source):
    """What decides by machine, as written."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            found += [name for name in names if MACHINE_MODULES.match(name)][:1]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if MACHINE_MODULES.match(alias.name)]
        elif isinstance(node, ast.FunctionDef) and PREDICATE.match(node.name):
            found.append(node.name)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if PREDICATE.match(name.split(".")[-1]) or QUESTIONS.fullmatch(name):
                found.append(name)
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if node.attr in ("is_cuda", "is_cpu") or (name.startswith("choice.") and node.attr in CHOICES):
                found.append(name)
        elif isinstance(node, ast.Compare):
            sides = map(ast.unparse, (node.left, *node.comparators))
            found += [side for side in sides if re.search(r"device\)?\.type$", side)]
    return found


MODULES = sorted(
    str(path.relative_to(PACKAGE))
    for path in PACKAGE.rglob("*.py")
    if not str(path.relative_to(PACKAGE)).startswith(INSIDE)
)


@pytest.mark.parametrize("name", [name for name in MODULES if name not in EXEMPT])
def test_nothing_outside_the_kernels_decides_by_machine(name):
    assert predicates((PACKAGE / name).read_text(encoding="utf-8")) == []


def test_this_test_notices_what_it_forbids():
    assert predicates("if kernels.takes_rows(x): pass") == ["kernels.takes_rows"]
    assert predicates("from thinkstack.kernels.cpu.calls import LANES") == ["thinkstack.kernels.cpu.calls"]
    assert predicates("from thinkstack.kernels import triton") == ["thinkstack.kernels.triton"]
    assert predicates("compile(x) if x.is_cuda else x") == ["x.is_cuda"]
    assert predicates("x.device.type != 'cpu' or torch.device(d).type == 'cuda'") == ["x.device.type"] or predicates(
        "x.device.type != 'cpu'"
    ) == ["x.device.type"]
    assert predicates("choice.uses('attend', x.dtype)") == ["choice.uses", "choice.uses"]
    assert predicates("torch.cuda.is_available()") == ["torch.cuda.is_available"]
    assert predicates("from thinkstack.kernels import ops\nops.linear(x, w)\nx.to(device)") == []


def test_every_exemption_is_needed():
    assert all(predicates((PACKAGE / name).read_text(encoding="utf-8")) for name in EXEMPT)
