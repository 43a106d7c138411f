"""One core for every test: results do not depend on the machine, and tests may run beside each other."""

import torch

torch.set_num_threads(1)
