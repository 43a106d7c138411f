"""Compiling and caching the kernels: one library per instruction set."""

import logging
import os
import shutil
import subprocess
import sys

import pytest

from thinkstack import machine
from thinkstack.kernels.cpu import build
from thinkstack.machine import INSTRUCTION_SETS, instruction_set, instruction_sets
from thinkstack.types import ConfigError

pytestmark = pytest.mark.skipif(build.binary() is None, reason="no C++ compiler")

COMPILER = """#!/bin/sh
# Compiles nothing: notes each call, refuses what it is told to, and gives the library that is already there.
[ "$1" = --version ] && echo quick 1.0 && exit 0
for last; do :; done
case "$*" in *{refused}*) echo "unknown option {refused}" >&2; exit 1;; esac
echo "$*" >> "{log}"
case "$*" in *-shared*) cp "{library}" "$last";; *) touch "$last";; esac
"""


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A compiler that takes no time, and an empty cache. Returns (the file of its calls, the cache folder)."""

    def make(refused="nothing"):
        path, log = tmp_path / "quick", tmp_path / "calls"
        path.write_text(COMPILER.format(refused=refused, log=log, library=build.binary()._name))
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return log, tmp_path / "cache" / "thinkstack"

    return make


def linked(log):
    return sum("-shared" in line for line in log.read_text().splitlines())


def test_a_library_is_named_after_its_instruction_set_and_cached(quick):
    log, cache = quick()
    assert build.load.__wrapped__() is not None
    assert build.load.__wrapped__() is not None
    assert linked(log) == 1
    [library] = cache.glob("*.so")
    assert library.name.startswith(f"kernels-{instruction_set().name}-")


def test_a_damaged_library_is_compiled_again(quick, monkeypatch, tmp_path):
    log, cache = quick()
    build.load.__wrapped__()
    [library] = cache.glob("*.so")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "damaged"))
    (build.cache_folder() / library.name).write_bytes(b"\x7fELF and nothing more")
    assert build.load.__wrapped__() is not None
    assert linked(log) == 2


def test_two_processes_compile_once(quick):
    log, _ = quick()
    command = [sys.executable, "-c", "from thinkstack.kernels.cpu import build; assert build.binary() is not None"]
    processes = [subprocess.Popen(command, env=os.environ) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert linked(log) == 1


def test_a_compiler_without_openmp_is_used_on_one_core_and_the_log_says_so(quick, caplog):
    log, _ = quick(refused="-fopenmp")
    with caplog.at_level(logging.WARNING):
        assert build.load.__wrapped__() is not None
    assert "not support OpenMP" in caplog.text and "unknown option -fopenmp" in caplog.text
    assert "-fopenmp" not in log.read_text()


def test_a_folder_that_others_can_write_is_not_trusted(quick, caplog):
    _, cache = quick()
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    build.private_folder.cache_clear()
    with caplog.at_level(logging.WARNING):
        folder = build.cache_folder()
    assert folder != cache and folder.stat().st_mode & 0o077 == 0
    assert "can be written by others" in caplog.text and "XDG_CACHE_HOME" in caplog.text


def test_an_instruction_set_can_be_requested_by_name(monkeypatch):
    plain = instruction_sets()[-1].name
    monkeypatch.setenv("THINKSTACK_ISA", plain)
    assert instruction_set.__wrapped__().name == plain
    monkeypatch.setenv("THINKSTACK_ISA", "x86-64-v9")
    with pytest.raises(ConfigError, match=rf"THINKSTACK_ISA=x86-64-v9 .*use one of .*{plain}"):
        instruction_set.__wrapped__()


@pytest.mark.parametrize(
    ("features", "name"),
    [
        ("sse2", "x86-64"),
        ("avx2 fma f16c bmi1", "x86-64"),
        ("avx2 fma f16c bmi1 bmi2 avx_vnni", "x86-64-v3"),
        ("avx2 fma f16c bmi1 bmi2 avx512f avx512bw avx512cd avx512dq avx512vl", "x86-64-v4"),
        ("avx2 fma f16c bmi1 bmi2 avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni avx512_bf16", "avx512-bf16"),
    ],
)
def test_the_best_that_a_processor_has_is_chosen(features, name, monkeypatch):
    monkeypatch.delenv("THINKSTACK_ISA", raising=False)
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine, "cpu_features", lambda: frozenset(features.split()))
    assert instruction_set.__wrapped__().name == name


@pytest.mark.parametrize("isa", INSTRUCTION_SETS["x86_64"], ids=lambda isa: isa.name)
def test_no_flag_asks_for_more_than_the_instruction_set_has(isa):
    """A library crashed on an illegal instruction when different processors shared a cache folder."""
    if machine.platform.machine() != "x86_64" or not shutil.which("g++"):
        pytest.skip("needs g++ on x86-64")
    macros = subprocess.run(
        ["g++", *isa.flags, "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, text=True, check=True
    ).stdout
    found = {line.split()[1].strip("_") for line in macros.splitlines()}
    for feature in ("AVX2", "FMA", "AVX512F", "AVX512VNNI", "AVX512BF16", "AMXTILE", "AVXVNNI"):
        has = feature.lower() in {need.replace("_", "") for need in isa.needs}
        assert (feature in found) <= has, feature
