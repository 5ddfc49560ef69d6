"""What the user's mistakes must say."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager

import pytest

from afa.errors import AfaError


def refused(*parts: object) -> AbstractContextManager[pytest.ExceptionInfo[AfaError]]:
    """Expect an `AfaError` of one line with these parts in this order: the file or key, the value, the remedy."""
    line = r"[^\n]*"
    return pytest.raises(AfaError, match=rf"\A{line}{line.join(re.escape(str(part)) for part in parts)}{line}\Z")
