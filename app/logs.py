"""The log of both processes: one line an event on standard error, for people or (``log_json``) for machines.

Nothing that a user wrote is in it. Of an exception its class and where it was raised are logged, and its message only
where that is known to quote nothing: a KeyError's is the key. ``request_id`` is the request's over HTTP, ``job``
its id in the messages to the worker; the line of each request in the API has both.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import structlog

from app.errors import ServiceError, TenantQuarantined
from app.settings import Settings

_MOST_FRAMES = 50
# what these say are words of ours, of the system's, or of torch's about shapes and memory
_QUOTE_NOTHING = (ServiceError, OSError, RuntimeError, MemoryError)


def configure(settings: Settings) -> None:
    """Sets structlog up for the process, and the lines of libraries, from warnings on, to look the same."""
    if settings.log_json:
        renderer: structlog.types.Processor = structlog.processors.JSONRenderer()
    else:
        # the default formatter prints local variables; ours has been there before
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    common: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.ExceptionRenderer(_told),
    ]
    structlog.configure(
        processors=[*common, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[settings.log_level.upper()]
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    libraries = logging.StreamHandler(sys.stderr)
    libraries.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *common],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(handlers=[libraries], level=logging.WARNING)


def own_process() -> None:
    """What nobody catches in this process is logged too, as everything else is."""
    log = structlog.get_logger("process")

    def crashed(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error or kind(), trace)
        else:
            log.critical("crashed", exc_info=error or kind())

    def thread_crashed(crash: threading.ExceptHookArgs) -> None:
        crashed(crash.exc_type, crash.exc_value, crash.exc_traceback)

    sys.excepthook = crashed
    threading.excepthook = thread_crashed
    logging.captureWarnings(True)


def loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An event loop's exception handler: asyncio's own prints the exception's message."""
    structlog.get_logger("api").error(
        "error in the event loop", what=context["message"], exc_info=context.get("exception")
    )


def of_error(error: ServiceError) -> dict[str, str]:
    """What a line says of an error: its ``code``, its ``reason``, and the ``file`` that is damaged."""
    file = error.file if isinstance(error, TenantQuarantined) else None
    told = {"code": error.code, "reason": error.message}
    return told if file is None else {**told, "file": file}


def about(job: str) -> AbstractContextManager[None]:
    """What is logged inside, and in work that is begun inside, is about this job."""
    return structlog.contextvars.bound_contextvars(job=job)


def _told(exc_info: structlog.typing.ExcInfo) -> str:
    """Like Python's traceback, without what may have been quoted."""
    return "".join(_chain(exc_info[1])).rstrip("\n")


def _chain(error: BaseException) -> Iterator[str]:
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        yield from _chain(before)
        word = "the cause of" if error.__cause__ else "when this came on top of it,"
        yield f"\nThat was {word} what follows:\n\n"
    yield "Traceback (most recent call last):\n"
    yield from traceback.format_tb(error.__traceback__, limit=-_MOST_FRAMES)
    kind = type(error)
    said = f": {error}" if isinstance(error, _QUOTE_NOTHING) else ""
    yield f"{kind.__module__}.{kind.__qualname__}{said}\n"
    if isinstance(error, BaseExceptionGroup):
        for number, part in enumerate(error.exceptions, 1):
            yield f"\nPart {number} of {len(error.exceptions)}:\n\n"
            yield from _chain(part)
