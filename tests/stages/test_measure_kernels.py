"""The machine measured: every operation, once, and shown."""

import pytest
import torch

from thinkstack.kernels import choice
from thinkstack.kernels.cpu import build, calls
from thinkstack.stages import measure_kernels as measure

pytestmark = pytest.mark.skipif(not calls.available(), reason="no C++ compiler")


def test_a_machine_is_measured_once_and_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "_MEASURED", None)
    monkeypatch.setattr(choice, "_CHOICES", None)
    monkeypatch.delenv(build.SWITCH, raising=False)
    monkeypatch.setattr(measure, "SECONDS", 0.01)
    threads = torch.get_num_threads()
    measure.measure_machine()
    assert torch.get_num_threads() == threads
    found = choice.measurements()
    assert found.factors.keys() == measure.CASES.keys() and all(speedup > 0 for speedup in found.factors.values())
    monkeypatch.setattr(measure, "speedup", None)  # not again
    measure.measure_machine()
    shown = measure.describe_speed()
    assert all(name in shown for name in measure.CASES) and choice.choices().reason in shown


@pytest.mark.parametrize("name", measure.CASES)
def test_a_case_runs_by_its_kernel_and_without(name, monkeypatch):
    """The kernel was compared with itself where the operation's name is not the one that the model asks for."""
    monkeypatch.delenv(build.SWITCH, raising=False)
    operations = []
    uses = choice.uses
    monkeypatch.setattr(choice, "uses", lambda operation, dtype: operations.append(operation) or uses(operation, dtype))
    measure.CASES[name]()()
    assert name.partition(".")[0] in operations
