"""What users are told when something fails: one exception, of one line that names what to change."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


class AfaError(ValueError):
    """A mistake in what the user gave: a file, a key, a value.

    The message is one line and names the file or key, the value found and what to do. The command line
    prints it without a traceback and exits with status 2. Broken invariants of our own are `assert`s.
    """


class BrokenImageError(AfaError):
    """An image is there but cannot be read; `data.skip_broken` leaves such images out."""


class GoneError(AfaError):
    """Another process of the run has ended or cannot be reached: nobody's mistake, and starting again may help."""


class LongNameError(AfaError):
    """A file cannot be written because its name is too long for the disk: other files can."""


def shown(value: object) -> str:
    """A value as messages show it: one line, cut where it is long."""
    quoted = repr(value)
    return quoted if len(quoted) <= 120 else f"{quoted[:100]}... ({len(quoted)} characters)"


def first_line(error: Exception) -> str:
    """Message of a foreign exception, cut to one line; its class if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Keep libraries from printing messages about their internals; their exceptions become ours.

    Args:
        loggers: Names of loggers of which only errors are let through.
    """
    found = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(logging.ERROR)
    try:
        talk = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(talk), contextlib.redirect_stderr(talk):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(found, levels, strict=True):
            logger.setLevel(level)
