"""What computes without the kernels."""

import pytest

from thinkstack.models.kernels import calls


@pytest.fixture
def on_torch(monkeypatch):
    """Call a function on torch's operators."""

    def run(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(calls, "available", lambda: False)
            return function(*arguments)

    return run
