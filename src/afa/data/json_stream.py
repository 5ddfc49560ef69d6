"""JSON files larger than memory: the parts of the outermost value, one at a time.

What the parts mean is left to the readers of tags; nothing that was handed out is kept here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TextIO

from afa.errors import AfaError

_CHUNK: Final = 1 << 20  # characters
_LARGEST_PART: Final = 1 << 26  # characters; one annotation, image or task is never as long


def iterate_json(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the parts of the list or object that a JSON file holds, without ever holding all of it.

    Args:
        path: File in UTF-8, with or without a byte order mark.

    Returns:
        Iterator of (key, value). Of a list: the key "" and each element. Of an object: each key and its value, but a
        value that is a list of objects comes as its elements one by one, each with that key.

    Raises:
        AfaError: During iteration: the file cannot be read, is not JSON in UTF-8, has another outermost value, or one
            part of it has more than 64 million characters.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _Parts(file, path).parts()
    except UnicodeDecodeError as error:
        raise AfaError(f"{path}: not a text file in UTF-8 ({error.reason}); save it as JSON in UTF-8") from None
    except OSError as error:
        raise AfaError(f"{path}: cannot be read ({error.strerror})") from None


class _Parts:
    """A window that moves over the text of the file; what lies before `place` is dropped as the window moves."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self.file, self.path = file, path
        self.window, self.place, self.dropped, self.ended = "", 0, 0, False
        self.decode = json.JSONDecoder().raw_decode

    def parts(self) -> Iterator[tuple[str, Any]]:
        opening = self._next()
        if opening == "[":
            yield from (("", element) for element in self._elements())
        elif opening == "{":
            yield from self._members()
        else:
            raise self._broken("starts with neither a list nor an object")
        if self._next():
            raise self._broken("goes on after its end")

    def _members(self) -> Iterator[tuple[str, Any]]:
        self._take("{")
        if self._next() == "}":
            self.place += 1
            return
        while True:
            key = self._value()
            if not isinstance(key, str):
                raise self._broken("has a key that is no text")
            self._take(":")
            if self._next() == "[":
                yield from ((key, value) for value in self._objects_or_whole())
            else:
                yield key, self._value()
            if self._take(",}") == "}":
                return

    def _elements(self) -> Iterator[Any]:
        self._take("[")
        if self._next() == "]":
            self.place += 1
            return
        yield from self._rest()

    def _objects_or_whole(self) -> Iterator[Any]:
        """The elements of a list of objects one by one; any other list as one value."""
        self._take("[")
        if self._next() == "{":
            yield from self._rest()
        elif self._next() == "]":
            self.place += 1
            yield []
        else:
            yield list(self._rest())

    def _rest(self) -> Iterator[Any]:
        while True:
            yield self._value()
            if self._take(",]") == "]":
                return

    def _next(self) -> str:
        """The next character that is no space, which is left; "" at the end."""
        while True:
            while self.place < len(self.window) and self.window[self.place] in " \t\r\n":
                self.place += 1
            if self.place < len(self.window):
                return self.window[self.place]
            if self.ended:
                return ""
            self._read()

    def _take(self, allowed: str) -> str:
        found = self._next()
        if not found or found not in allowed:
            raise self._broken(f"has {found!r} where {' or '.join(allowed)} must be")
        self.place += 1
        return found

    def _value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = self.decode(self.window, self.place)
            except json.JSONDecodeError as error:  # perhaps only cut off by the end of the window
                if self.ended:
                    self.place = error.pos
                    raise self._broken(error.msg) from None
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists in lists
                raise self._broken(f"cannot be decoded: {error}") from None
            else:
                # A number may go on: 0 could be the beginning of 0.5.
                if self.ended or self.window[end : end + 1] in tuple(" \t\r\n,:]}"):
                    self.place = end
                    return value
            if len(self.window) - self.place > _LARGEST_PART:
                raise self._broken(f"has a part of more than {_LARGEST_PART:,} characters, or is broken")
            self._read()

    def _read(self) -> None:
        """Drop what is done, and read at least as much as is left."""
        done = self.place
        more = self.file.read(max(_CHUNK, len(self.window) - done))
        self.window, self.place, self.dropped = self.window[done:] + more, 0, self.dropped + done
        self.ended = not more

    def _broken(self, what: str) -> AfaError:
        return AfaError(f"{self.path}: not valid JSON near character {self.dropped + self.place}: {what}")
