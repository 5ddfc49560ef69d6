"""What the user's mistakes must say."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from afa.errors import AfaError


def refused(*parts: object) -> AbstractContextManager[pytest.ExceptionInfo[AfaError]]:
    """Expect an `AfaError` of one line with these parts in this order: the file or key, the value, the remedy."""
    line = r"[^\n]*"
    return pytest.raises(AfaError, match=rf"\A{line}{line.join(re.escape(str(part)) for part in parts)}{line}\Z")


def said(call: Callable[..., object], *arguments: object, **named: object) -> str:
    """The text of the `AfaError` that a call raises: one line that can be printed."""
    with pytest.raises(AfaError) as caught:
        call(*arguments, **named)
    text = str(caught.value)
    assert_one_line(text)
    return text


def assert_one_line(text: str) -> None:
    assert len(text.splitlines()) == 1, text
    assert len(text) < 2000
    text.encode("utf-8")
