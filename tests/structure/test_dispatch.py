"""One dispatch: what computes an operation is decided in kernels/ and engine/fused/ alone.

Looked for elsewhere, by syntax:
- imports of `thinkstack.kernels.choice`, `.conditions`, `.cpu` and `.triton`, which know the machine;
- calls and definitions of functions whose names say what a machine or a kernel takes: takes*, supports*, fits*, uses*,
  can_run*, can_prepack*;
- `.is_cuda`, `.is_cpu`, `.is_meta`, and comparisons with a device's `.type`;
- questions for devices, their capability and libraries: `torch.cuda.is_available()`, `device_count`,
  `get_device_capability`, `get_device_properties`, `torch.backends.*.is_available()`;
- private operators of torch's libraries: `torch.ops.mkldnn` and the like.

Not looked for: constants of `thinkstack.kernels.sizes`; a device or dtype that a user chose, and work on that device
(`torch.cuda.Stream`); the questions that kernels/ answers (`ops.never_synchronizes`, `ops.row_padding`,
`resolve_precision`).
"""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "thinkstack"
INSIDE = ("kernels/", "engine/fused/")
EXEMPT = {
    "machine.py": "finds devices, cores and instruction sets",
    "stages/measure_kernels.py": "compares the implementations and shows the results",
    "pipeline/run.py": "records the choices of a run, and restores them when it is resumed",
    "cli/training.py": "restores the choices of a run that it replays",
}
"""Files that know the machine because that is their task."""
MACHINE_MODULES = re.compile(r"thinkstack\.kernels\.(choice|conditions|cpu|triton)\b")
PREDICATE = re.compile(r"_?(takes|supports|fits|uses|can_run|can_prepack)(_|$)")
QUESTIONS = re.compile(
    r"(torch\.)?(cuda\.(is_available|device_count|get_device_capability|get_device_properties)"
    r"|backends\.\w+\.is_available)"
)
PRIVATE = re.compile(r"torch\.ops\.(mkldnn|quantized|onednn)")


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
            if node.attr in ("is_cuda", "is_cpu", "is_meta") or PRIVATE.fullmatch(name):
                found.append(name)
        elif isinstance(node, ast.Compare):
            sides = map(ast.unparse, (node.left, *node.comparators))
            found += [side for side in sides if re.search(r"device(\(\w+\))?\.type$", side)]
    return found


MODULES = sorted(
    str(path.relative_to(PACKAGE))
    for path in PACKAGE.rglob("*.py")
    if not str(path.relative_to(PACKAGE)).startswith(INSIDE)
)


@pytest.mark.parametrize("name", [name for name in MODULES if name not in EXEMPT])
def test_nothing_outside_the_kernels_decides_by_machine(name):
    assert predicates((PACKAGE / name).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("if kernels.takes_rows(x): pass", ["kernels.takes_rows"]),
        ("def fits_linear(x): pass", ["fits_linear"]),
        ("from thinkstack.kernels.cpu.calls import LANES", ["thinkstack.kernels.cpu.calls"]),
        ("from thinkstack.kernels import triton", ["thinkstack.kernels.triton"]),
        ("import thinkstack.kernels.choice", ["thinkstack.kernels.choice"]),
        ("compile(x) if x.is_cuda else x", ["x.is_cuda"]),
        ("skip = weight.is_meta", ["weight.is_meta"]),
        ("x.device.type != 'cpu'", ["x.device.type"]),
        ("torch.device(d).type == 'cuda'", ["torch.device(d).type"]),
        ("torch.cuda.is_available()", ["torch.cuda.is_available"]),
        ("torch.ops.mkldnn._linear_pointwise(x)", ["torch.ops.mkldnn"]),
        ("from thinkstack.kernels import ops\nops.linear(x, w)\nx.to(device)", []),
    ],
)
def test_this_test_notices_what_it_forbids(source, found):
    assert predicates(source) == found


def test_every_exemption_is_needed():
    assert all(predicates((PACKAGE / name).read_text(encoding="utf-8")) for name in EXEMPT)


def test_private_operators_are_called_in_one_module():
    calling = [path for path in PACKAGE.rglob("*.py") if PRIVATE.search(path.read_text(encoding="utf-8"))]
    assert [str(path.relative_to(PACKAGE)) for path in calling] == ["kernels/cpu/mkldnn.py"]
