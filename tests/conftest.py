"""Settings shared by all tests."""

from __future__ import annotations

import torch

# test models are so small that a second thread only adds waiting, the more so on a busy machine
torch.set_num_threads(1)
