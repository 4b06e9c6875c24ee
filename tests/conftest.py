"""Settings shared by all tests."""

from __future__ import annotations

import signal

import torch

# test models are so small that a second thread only adds waiting, the more so on a busy machine
torch.set_num_threads(1)

# a run that a shell put in the background ignores Ctrl-C, and all that the tests start would as well
signal.signal(signal.SIGINT, signal.default_int_handler)
