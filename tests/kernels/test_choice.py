"""The choice of kernels and precision: by table and measurement, recorded with a run."""

import logging

import pytest
import torch

from tests.tiny import GQA_TINY, tiny_model
from thinkstack.kernels import choice
from thinkstack.kernels.choice import Measurements
from thinkstack.kernels.cpu import build, calls
from thinkstack.kernels.precision import resolve_precision
from thinkstack.train.passes import working_model
from thinkstack.train.trainer_config import TrainerConfig


@pytest.fixture
def here(monkeypatch):
    """Decide as on a machine with the given instruction set, table and measurements."""

    def decide(isa="x86-64-v3", table=None, gflops=(100.0, 20.0), **factors):
        found = Measurements(gflops=dict(zip(("fp32", "bf16"), gflops, strict=True)), threads=1, factors=factors)
        monkeypatch.setattr(choice, "_MEASURED", found)
        monkeypatch.setattr(choice, "_CHOICES", None)
        monkeypatch.setattr(choice, "table", lambda: {isa: table or {}})
        named = type("Named", (), {"name": isa})()
        monkeypatch.setattr(choice, "instruction_set", lambda: named)
        monkeypatch.delenv(build.SWITCH, raising=False)
        return choice.choices()

    return decide


@pytest.mark.parametrize(
    ("listed", "measured", "is_kernel"),
    [
        (1.0, None, True),
        (0.99, None, False),
        (1.5, 0.9, True),  # within OVERRIDE_FACTOR
        (1.5, 0.8, False),
        (0.8, 1.1, False),
        (0.8, 1.25, True),
    ],
)
def test_the_table_decides_unless_the_machine_clearly_differs(listed, measured, is_kernel, here):
    measurements = {} if measured is None else {"attend.fp32": measured}
    found = here(table={"attend.fp32": listed}, **measurements)
    assert found.kernels["attend.fp32"] == is_kernel
    if calls.available():
        assert choice.uses("attend", torch.float32) == is_kernel


def test_the_switch_forces_and_what_no_table_names_is_computed_by_its_kernel(here, monkeypatch):
    here(table={"attend.fp32": 0.5})
    if not calls.available():
        pytest.skip("no C++ compiler")
    assert not choice.uses("attend", torch.float32) and choice.uses("attend", torch.bfloat16)
    monkeypatch.setenv(build.SWITCH, "1")
    assert choice.uses("attend", torch.float32)
    monkeypatch.setenv(build.SWITCH, "0")
    assert not choice.uses("attend", torch.bfloat16)


@pytest.mark.parametrize(
    ("isa", "gflops", "precision", "emulates"),
    [
        ("x86-64-v3", (100.0, 2.6), "fp32", True),
        ("x86-64-v3", (100.0, 300.0), "fp32", False),  # a measurement alone is not enough
        ("avx512-bf16", (200.0, 400.0), "bf16", False),
        ("avx512-bf16", (200.0, 90.0), "fp32", True),  # nor is the instruction set alone
        ("amx", (200.0, 700.0), "bf16", False),
    ],
)
def test_auto_is_bf16_where_instruction_set_and_measurement_agree(isa, gflops, precision, emulates, here):
    found = here(isa=isa, gflops=gflops)
    assert (found.auto_dtype, found.emulates_bf16) == (precision, emulates)
    assert f"{gflops[1]:.4g} GFLOP/s" in found.reason
    assert resolve_precision("auto") == precision
    assert resolve_precision("auto", "cuda") == "bf16"
    running = working_model(tiny_model(GQA_TINY), TrainerConfig(), always_copy=True)
    assert running.embed.weight.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


def test_bf16_on_a_processor_that_emulates_it_is_warned_about_once(here, caplog):
    here(gflops=(123.0, 2.5))
    with caplog.at_level(logging.WARNING):
        assert [resolve_precision("bf16") for _ in range(2)] == ["bf16", "bf16"]
    [line] = caplog.messages
    assert "2.5 GFLOP/s" in line and "123" in line and "dtype=auto" in line


def test_recorded_choices_apply_on_another_machine_with_a_warning(here, caplog):
    here(isa="avx512-bf16", table={"attend.fp32": 2.0, "rope.fp32": 0.5}, gflops=(200.0, 400.0))
    recorded = choice.record()
    here(table={"attend.fp32": 0.5, "rope.fp32": 2.0})
    with caplog.at_level(logging.WARNING):
        choice.restore(recorded)
    assert choice.choices().kernels == {"attend.fp32": True, "rope.fp32": False}
    assert resolve_precision("auto") == "bf16"
    assert "started on avx512-bf16 and resumed on x86-64-v3" in caplog.text
    choice.restore(None)
    assert resolve_precision("auto") == "fp32"


def test_a_run_started_without_kernels_resumes_without(here, monkeypatch):
    here(table={"attend.fp32": 2.0})
    monkeypatch.setenv(build.SWITCH, "0")
    recorded = choice.record()
    monkeypatch.delenv(build.SWITCH)
    choice.restore(recorded)
    assert not choice.uses("attend", torch.float32) and not choice.uses("fused_mla", torch.float32)
    choice.restore(None)


def test_measurements_are_stored_per_limit_on_instruction_sets(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "_MEASURED", None)
    monkeypatch.setattr(choice, "_CHOICES", None)
    choice.store_measurements(Measurements(gflops={"fp32": 1.0, "bf16": 2.0}, threads=1, factors={"attend.fp32": 3.0}))
    monkeypatch.setattr(choice, "_MEASURED", None)
    assert choice.measurements().factors == {"attend.fp32": 3.0}
    path = choice.measurements_path()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert choice.measurements_path() != path
    path.write_text('{"gflops": 3')  # cut off
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr(choice, "_MEASURED", None)
    assert choice.measurements().gflops["fp32"] > 0
