"""Tests run with the C++ kernels and on torch's operators."""

import pytest

from thinkstack.kernels.cpu import calls


@pytest.fixture(params=["kernels", "torch"])
def path(request, monkeypatch):
    """With the C++ kernels, and on torch's operators alone."""
    if request.param == "torch":
        monkeypatch.setattr(calls, "available", lambda: False)
    elif not calls.available():
        pytest.skip("no C++ compiler")
