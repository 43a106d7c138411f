"""One core for every test: results do not depend on the machine, and tests may run beside each other. Triton's kernels
are interpreted where there is no device."""

import os

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("THINKSTACK_KERNELS", "1")  # tested where torch is faster, too
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    """For commands too, which take all there are: one took them for every test that came after it, and where cores are
    shared, threads that wait for each other by spinning took minutes for seconds."""
    if request.module.__name__ != "tests.test_machine":  # which counts cores
        monkeypatch.setattr("thinkstack.machine.bound_cores", lambda: 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def on_torch(monkeypatch: pytest.MonkeyPatch):
    """Call a function on torch's operators."""

    def run(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr("thinkstack.kernels.cpu.calls.available", lambda: False)
            return function(*arguments)

    return run
