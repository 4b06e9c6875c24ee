"""Settings shared by all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
import torch

# test models are so small that a second thread only adds waiting, the more so on a busy machine
torch.set_num_threads(1)

# a run that a shell put in the background ignores Ctrl-C, and all that the tests start would as well
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What needs a GPU is run by itself (``make test-gpu``): elsewhere the kernels are Triton's interpreter's."""
    if collection_path.name == "gpu" and not any("gpu" in Path(given).parts for given in config.args):
        return True
    return None


@pytest.fixture(scope="session", autouse=True)
def _settings_are_the_tests_own() -> Iterator[None]:
    """What the shell has set for a server of its user's is no setting of these."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("MEMORYLLM_")]:
            patch.delenv(name)
        yield


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """No test leaves the process a log that goes to its own captured stream, which is closed behind it."""
    chosen = structlog.get_config()
    yield
    structlog.configure(**chosen)


@pytest.fixture
def all_logs() -> Iterator[None]:
    """Every line can be captured, whatever level and stream another test has chosen for the process."""
    chosen = structlog.get_config()
    structlog.reset_defaults()
    yield
    structlog.configure(**chosen)
