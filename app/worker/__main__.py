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
    # os._exit: neither threads of libraries nor work that waits for one of ours may keep a worker alive that has
    # drained, or has failed: whoever started it waits for its end to start another
    try:
        code = _main()
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stderr.flush()
    os._exit(code)
