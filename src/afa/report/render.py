"""Fills templates. A page is one HTML file that loads nothing: pictures are data URIs, charts inline SVG."""

from __future__ import annotations

import base64
import io
import json
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image


def render_page(name: str, /, **values: Any) -> str:
    """Fill `templates/NAME.html.j2` with values, whose texts are escaped: a whole HTML document."""
    return _environment().get_template(f"{name}.html.j2").render(**values)


def data_uri(picture: Image.Image, form: str = "JPEG", **settings: Any) -> str:
    """A picture as text for an `<img>`.

    Args:
        picture: Of any mode that Pillow turns into RGB, or for `PNG` saves as it is.
        form: `PNG`, or `JPEG`: a sixth of it, and a page holds dozens.
        settings: How Pillow saves it; none saves a JPEG without visible loss.
    """
    buffer = io.BytesIO()
    saved = picture.convert("RGB") if form == "JPEG" else picture
    saved.save(buffer, format=form, **(settings or {"quality": 90, "subsampling": 0}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def fixed(value: float | None, form: str = "{:.1f}") -> str:
    """A figure with its digits; a dash where there is none."""
    return "–" if value is None else form.format(value)


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(0.4), duration(42), duration(307), duration(33240)
    ('0.4 s', '42 s', '5:07 min', '9:14 h')
    """
    whole = round(seconds)
    if whole < 10:
        return f"{seconds:.2g} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600:,}:{whole % 3600 // 60:02d} h"


def gibibytes(size: float) -> str:
    """Bytes in words.

    >>> gibibytes(3 * 2**29), gibibytes(2**20)
    ('1.5 GiB', '1 MiB')
    """
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "image"), counted(1200, "image")
    ('1 image', '1,200 images')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("afa.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(fixed=fixed, duration=duration, gibibytes=gibibytes, counted=counted, json=json.dumps)
    return environment
