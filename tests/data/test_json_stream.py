from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afa.data import json_stream
from afa.data.json_stream import iterate_json
from afa.errors import AfaError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def joined(path: Path, whole: Any) -> Any:
    """What the parts make up together, in the form of the whole."""
    parts = list(iterate_json(path))
    if isinstance(whole, list):
        assert all(key == "" for key, _ in parts)
        return [value for _, value in parts]
    found: dict[str, Any] = {}
    for key, value in parts:
        in_parts = isinstance(whole[key], list) and whole[key] and isinstance(whole[key][0], dict)
        if in_parts:
            found.setdefault(key, []).append(value)
        else:
            found[key] = value
    return found


@settings(max_examples=80, deadline=None)
@given(whole=st.lists(JSON, max_size=6) | st.dictionaries(st.text(), JSON, max_size=6), chunk=st.integers(1, 40))
def test_parts_make_the_whole(tmp_path_factory: pytest.TempPathFactory, whole: Any, chunk: int) -> None:
    path = tmp_path_factory.getbasetemp() / "parts.json"
    path.write_text(json.dumps(whole, ensure_ascii=False, indent=1), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_CHUNK", chunk)
        assert joined(path, whole) == json.loads(path.read_text(encoding="utf-8"))


def test_a_part_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK", 10)
    monkeypatch.setattr(json_stream, "_LARGEST_PART", 1000)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(["x" * 900] * 50))
    assert len(list(iterate_json(path))) == 50
    path.write_text(json.dumps(["x" * 5000]))
    with pytest.raises(AfaError, match=r"a\.json: .*1,000 characters.*broken"):
        list(iterate_json(path))


def test_what_was_handed_out_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows: list[int] = []
    monkeypatch.setattr(json_stream, "_CHUNK", 4096)
    read = json_stream._Parts._read

    def counted(parts: json_stream._Parts) -> None:
        read(parts)
        windows.append(len(parts.window))

    monkeypatch.setattr(json_stream._Parts, "_read", counted)
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": [{"id": i, "name": "x" * 50} for i in range(20_000)]}))
    assert sum(1 for _ in iterate_json(path)) == 20_000
    assert max(windows) < 10_000 < path.stat().st_size


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(AfaError, match="cannot be read"):
        list(iterate_json(tmp_path / "none.json"))
