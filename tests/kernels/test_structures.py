"""Structures shared by Python and C++, and the compiler's warnings."""

import ctypes
import platform
import subprocess

import pytest

import thinkstack.engine.fused  # noqa: F401 - defines structures
from thinkstack.kernels.cpu import build, calls, structures
from thinkstack.machine import INSTRUCTION_SETS, instruction_set

pytestmark = pytest.mark.skipif(build.binary() is None, reason="no C++ compiler")


def changed(name: str, rename=lambda field: field, drop=(), kind=None):
    """The structure `name` with other fields."""
    fields = [
        (rename(field), kind if kind and field == "scale" else own)
        for field, own in structures.STRUCTURES[name]._fields_
        if field not in drop
    ]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def test_every_structure_is_that_of_the_library():
    assert {"Attention", "Experts", "PagedAttention", "Sample", "GQAPass", "MLAPass"} <= set(structures.STRUCTURES)
    for kind in structures.STRUCTURES.values():
        structures.check_layout(build.binary(), kind)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rename=lambda field: "factor" if field == "scale" else field), "field factor at byte .* field scale"),
        (dict(drop=("last",)), "Python has field out at byte 32 .* C\\+\\+ has field last at byte 32"),
        (dict(drop=("scale",)), "Python has field .size of the structure. .* C\\+\\+ has field scale"),
        (dict(kind=ctypes.c_float), "field scale at byte 144 with 4 bytes, C\\+\\+ has field scale at byte 144 with 8"),
    ],
    ids=["name", "missing", "end", "size"],
)
def test_a_structure_that_differs_is_refused_by_name(change, message):
    with pytest.raises(RuntimeError, match=f"structure PagedAttention: .*{message}"):
        structures.check_layout(build.binary(), changed("PagedAttention", **change))


def test_a_structure_without_a_layout_is_refused_by_name():
    with pytest.raises(RuntimeError, match=r"no layout of structure Unheard; add LAYOUT\(Unheard"):
        structures.check_layout(build.binary(), type("Unheard", (ctypes.Structure,), {"_fields_": ()}))


def test_structures_are_checked_when_the_library_is_loaded_and_when_they_are_defined_later(monkeypatch):
    monkeypatch.setattr(structures, "STRUCTURES", structures.STRUCTURES | {"Sample": changed("Sample", drop=("B",))})
    monkeypatch.setattr(build, "STRUCTURES", structures.STRUCTURES)
    with pytest.raises(RuntimeError, match="structure Sample"):
        build.load.__wrapped__()
    with pytest.raises(RuntimeError, match="structure MLALayer"):
        calls.structure("MLALayer", "wq", "I")


def compile_strictly(name: str, *flags: str) -> str:
    compiler = ["g++", *build.INCLUDE, *build.FLAGS, "-Werror", "-fopenmp", *flags, "-o", "/dev/null"]
    return subprocess.run([*compiler, str(build.PACKAGE / name)], capture_output=True, text=True).stderr


@pytest.mark.parametrize("name", build.SOURCES)
def test_the_compiler_has_no_warnings(name):
    assert compile_strictly(name, *instruction_set().flags, "-fsyntax-only") == ""


@pytest.mark.slow
@pytest.mark.parametrize("isa", [isa for isa in INSTRUCTION_SETS[platform.machine()] if isa.has_kernels])
@pytest.mark.parametrize("name", build.SOURCES)
def test_the_optimizer_has_no_warnings_on_any_instruction_set(name, isa):
    assert compile_strictly(name, *isa.flags, "-c") == ""


def test_a_warning_is_an_error_there(monkeypatch, tmp_path):
    (tmp_path / "unused.cpp").write_text("int f(int unused) { return 1; }\n")
    monkeypatch.setattr(build, "PACKAGE", tmp_path)
    assert "unused-parameter" in compile_strictly("unused.cpp", "-fsyntax-only")
