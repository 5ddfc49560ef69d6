"""Which encoding a text file has: UTF-8, UTF-16, or the one of Windows in the West, as far as its bytes tell."""

from __future__ import annotations

import codecs
import io
import re
from pathlib import Path
from typing import BinaryIO, Final, TextIO

from afa.errors import AfaError

_KINDS: Final = (
    (b"PK", "an Excel workbook or another archive"),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook of the old kind"),
    (b"%PDF", "a PDF"),
    (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"),
    (b"PAR1", "a Parquet file"),
    (b"\x1f\x8b", "compressed"),
)
_WESTERN: Final = "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜßàáâãäåæçèéêëìíîïñòóôõöøùúûüÿœŒ"


def open_text(path: Path) -> TextIO:
    """Open a text file in the encoding that its first bytes state, UTF-8 where they state none."""
    file = path.open("rb")
    encoding = _marked_encoding(file.read(64))
    file.seek(0)
    return io.TextIOWrapper(file, encoding=encoding, newline="")


def decoded(content: bytes) -> str:
    """A text in the encoding that its first bytes state, UTF-8 where they state none; U+FFFD where it is broken."""
    return content.decode(_marked_encoding(content[:64]), errors="replace")


def _marked_encoding(start: bytes) -> str:
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-32" if start.startswith(codecs.BOM_UTF32_LE) else "utf-16"
    for bytes_of_zero, others, name in ((start[1::2], start[::2], "utf-16-le"), (start[::2], start[1::2], "utf-16-be")):
        if len(bytes_of_zero) > 4 and not any(bytes_of_zero) and all(others):
            return name
    return "utf-8-sig"


def open_guessed(path: Path) -> tuple[TextIO, str]:
    """Open a text file in its encoding, and tell a text to show where that is a guess.

    Files of single bytes are taken for Windows' cp1252 where all that is not ASCII are letters of Western Europe, never
    three in a row: other encodings give other characters, or whole words of such letters.

    Returns:
        The file; the first word that the guess changed, empty where the encoding is certain.

    Raises:
        AfaError: The file is no text, or of an unknown encoding.
    """
    file = path.open("rb")
    try:
        encoding, guessed = _guess_encoding(path, file)
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return io.TextIOWrapper(file, encoding=encoding, newline=""), guessed


def _guess_encoding(path: Path, file: BinaryIO) -> tuple[str, str]:
    encoding = _marked_encoding(file.read(64))
    decoder = codecs.getincrementaldecoder(encoding)()
    file.seek(0)
    try:
        while block := file.read(2**20):
            decoder.decode(block)
        decoder.decode(b"", final=True)
        return encoding, ""
    except UnicodeDecodeError as error:
        if not encoding.startswith("utf-8"):
            raise AfaError(f"{path}: not a text in {encoding} ({error.reason}); save it in UTF-8") from None
        reason = error.reason
    file.seek(0)
    raw = file.read()
    for start, kind in _KINDS:
        if raw.startswith(start):
            raise AfaError(f"{path}: is {kind}, not a text; save it as CSV in UTF-8")
    text = raw.decode("cp1252", errors="replace")
    odd = re.findall(r"[^\x00-\x7f]+", text)
    if "\0" in text or any(len(run) > 2 or run.strip(_WESTERN) for run in odd):
        raise AfaError(f"{path}: not a text in UTF-8 ({reason}); save it in UTF-8")
    word = re.search(r"\w*[^\x00-\x7f]\w*", text)
    return "cp1252", word[0] if word else ""
