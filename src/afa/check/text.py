"""The check as text for a terminal."""

from __future__ import annotations

from typing import Any, Final

_WIDTH: Final = 100
_MATRIX_CLASSES: Final = 8  # with more, only the pairs that meet most often are shown
_PAIRS: Final = 6
_MESSAGES: Final = 12


def render_text(report: dict[str, Any]) -> str:
    """Lay out a check as text.

    Args:
        report: What `check_data` gives.

    Returns:
        Lines, the problems last.
    """
    lines = [report["layout"] or report["root"]]
    parts = (_classes(report), _together(report), _facts(report), _problems(report))
    return "\n".join([*lines, *(line for part in parts if part for line in ("", *part))]) + "\n"


def image_facts(images: dict[str, Any]) -> dict[str, str]:
    """The figures of `images` of a check in words, by what they are of."""
    read, total = images["read"], images["total"]
    of = "" if read == total else f" of {total:,}, evenly spread"
    facts = {"images read": f"{read:,}{of}, in {duration(images['seconds'])}"}
    if images["width"] is not None:
        width, height, aspect = (
            {key: round(value, 2) for key, value in images[name].items()} for name in ("width", "height", "aspect")
        )
        facts["width"] = f"{width['minimum']:g} to {width['maximum']:g} pixels, median {width['median']:g}"
        facts["height"] = f"{height['minimum']:g} to {height['maximum']:g} pixels, median {height['median']:g}"
        facts["width / height"] = f"{aspect['minimum']:g} to {aspect['maximum']:g}, median {aspect['median']:g}"
    facts["broken"] = f"{len(images['broken']):,}"
    if images["broken_masks"]:
        facts["broken masks"] = f"{len(images['broken_masks']):,}"
    facts["gray"] = f"{images['gray']:,}"
    facts["exact copies"] = f"{images['num_identical']:,}"
    facts["near copies"] = f"{images['num_similar']:,}"
    return facts


def cost_facts(report: dict[str, Any]) -> dict[str, str]:
    """What training would cost in words, by what it is."""
    training, cache = report["training"], report["cache"]
    facts = {}
    if training is not None:
        facts["training"] = (
            f"about {duration(training['seconds'])} for {training['steps']:,} steps ({training['epochs']:.3g} epochs) "
            f"on {training['device']}, evaluation not counted"
        )
        if training["decode_seconds"] >= training["seconds"]:
            facts["training"] += "; reading images sets the pace"
        steps = (f"{p['name']} {p['steps']:,} x {_seconds(p['step_seconds'])}" for p in training["phases"])
        facts["steps"] = ", ".join(steps)
        if training["measured_batch"] < training["batch_size"]:
            facts["steps"] += f" (in proportion, from steps of {training['measured_batch']} images)"
        if training["memory"]:
            facts["memory"] = f"about {gibibytes(training['memory'])}"
    if cache is not None:
        share = min(1.0, cache["given"] / max(1, cache["needed"]))
        facts["decoded images"] = (
            f"{gibibytes(cache['needed'])}, of which the cache keeps {100 * share:.0f} % (data.cache_gib)"
            + (f"; {gibibytes(cache['free'])} of memory free" if cache["free"] else "")
        )
    return facts


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


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 1 else f"{1000 * seconds:.2g} ms" if seconds < 0.1 else f"{seconds:.2f} s"


def _classes(report: dict[str, Any]) -> list[str]:
    classes = report["classes"]
    if not report["num_train"]:
        return []
    name_width = max(len("class"), *(len(entry["name"]) for entry in classes))
    rows = [("class", "train", "val"), *((c["name"], f"{c['train']:,}", f"{c['validation']:,}") for c in classes)]
    head, *cells = [f"{name:{name_width}} {train:>7} {val:>6}" for name, train, val in rows]
    columns = max(1, min(_WIDTH // (len(head) + 3), -(-len(cells) // 10)))
    height = -(-len(cells) // columns)
    blocks = [[head, *cells[start : start + height]] for start in range(0, len(cells), height)]
    return ["   ".join(block[row] for block in blocks if row < len(block)).rstrip() for row in range(height + 1)]


def _together(report: dict[str, Any]) -> list[str]:
    """Which classes meet in training images."""
    names = [entry["name"] for entry in report["classes"]]
    counts = report["together"]
    pairs = [(counts[i][j], i, j) for i in range(len(names)) for j in range(i) if counts[i][j]]
    if not pairs:
        return []
    if len(names) <= _MATRIX_CLASSES:
        width = max(7, *(len(name) for name in names)) + 1
        head = " " * max(len(name) for name in names) + "".join(f"{name:>{width}}" for name in names)
        rows = (
            f"{name:{len(head) - width * len(names)}}" + "".join(f"{count:>{width},}" for count in row)
            for name, row in zip(names, counts, strict=True)
        )
        return ["together in a training image:", head, *rows]
    lines = ["together most often, in training images:"]
    for count, i, j in sorted(pairs, reverse=True)[:_PAIRS]:
        rare, other = (i, j) if counts[i][i] <= counts[j][j] else (j, i)
        share = 100 * count / counts[rare][rare]
        lines.append(f"{names[rare]} and {names[other]}: {count:,}, {share:.0f} % of the images of {names[rare]}")
    return lines


def _facts(report: dict[str, Any]) -> list[str]:
    facts = image_facts(report["images"]) if report["images"] is not None else {}
    facts |= cost_facts(report)
    width = max((len(key) for key in facts), default=0)
    return [f"{key:{width}}  {value}" for key, value in facts.items()]


def _problems(report: dict[str, Any]) -> list[str]:
    lines = []
    for severity in ("error", "warning", "note"):
        messages = [problem["message"] for problem in report["problems"] if problem["severity"] == severity]
        lines += [f"{severity}: {message}" for message in messages[:_MESSAGES]]
        if len(messages) > _MESSAGES:
            lines.append(f"{severity}: and {len(messages) - _MESSAGES:,} more; --json and --out have all")
    return lines or ["no problem found"]
