"""The OpenMP threads of a thread."""

import os
import time

import pytest
import torch

from tests import HANG_SECONDS
from thinkstack.kernels.cpu import calls
from thinkstack.kernels.threads import release_threads

TASKS = "/proc/self/task"


@pytest.mark.skipif(not calls.available() or not os.path.isdir(TASKS), reason="no C++ compiler, or not Linux")
def test_released_threads_end_and_come_back():
    before, values = torch.get_num_threads(), torch.ones(2**22)
    torch.set_num_threads(4)
    try:
        release_threads()
        num_tasks = len(os.listdir(TASKS))
        assert float(values.sum()) == 2**22 and len(os.listdir(TASKS)) == num_tasks + 3
        release_threads()
        until = time.monotonic() + HANG_SECONDS
        while len(os.listdir(TASKS)) > num_tasks and time.monotonic() < until:
            time.sleep(0.001)
        assert len(os.listdir(TASKS)) == num_tasks and float(values.sum()) == 2**22
    finally:
        torch.set_num_threads(before)
