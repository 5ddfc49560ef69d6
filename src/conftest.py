"""Doctests of modules whose library is an extra are left out where it is not installed."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = [] if find_spec("gradio") else ["afa/explore/page.py"]
