"""The log of both processes: one line an event on standard error, for people or (``log_json``) for machines."""

from __future__ import annotations

import logging
import sys

import structlog

from app.settings import Settings


def configure(settings: Settings) -> None:
    """Sets structlog up for the process, and quiets uvicorn's own lines to warnings."""
    if settings.log_json:
        chain: list[structlog.types.Processor] = [structlog.processors.format_exc_info]
        chain.append(structlog.processors.JSONRenderer())
    else:
        chain = [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                # the default prints local variables, and with them what users wrote
                exception_formatter=structlog.dev.plain_traceback,
            )
        ]
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *chain,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
