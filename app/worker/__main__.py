"""The worker process: ``python -m app.worker --endpoint ipc://…``, the settings as JSON on standard input."""

from __future__ import annotations

import gc
import os
import sys


def _main() -> int:
    # nothing of what imports and loading make is garbage: to look for some takes a tenth of the start
    gc.disable()
    from app.worker.process import main

    return main()


if __name__ == "__main__":
    # os._exit: threads of libraries must not keep a drained worker alive
    code = _main()
    sys.stderr.flush()
    os._exit(code)
