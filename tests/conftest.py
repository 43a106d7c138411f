"""One core for every test: results do not depend on the machine, and tests may run beside each other. Triton's kernels
are interpreted where there is no device."""

import os

import torch

torch.set_num_threads(1)
os.environ.setdefault(
    "THINKSTACK_KERNELS", "1"
)  # all that they can do, so that they are tested where others are faster
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
