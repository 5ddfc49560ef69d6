"""The check in words: its figures by name, and the whole of it as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from afa.check.scale import scale_figures
from afa.report.render import duration, gibibytes

_WIDTH: Final = 100
_ROWS: Final = 10  # of classes, before a second column begins
_MATRIX_CLASSES: Final = 8  # with more, only the pairs that meet most often are shown
_PAIRS: Final = 6
_MESSAGES: Final = 12
_SPREADS: Final = {"width": ("width", " pixels"), "height": ("height", " pixels"), "aspect": ("width / height", "")}


def render_text(report: dict[str, Any]) -> str:
    """Lay out what `check_data` gives as text, the problems last."""
    facts = describe_figures(report)
    width = max(map(len, facts), default=0)
    parts = [
        [report["layout"] or report["root"]],
        _classes(report["classes"]) if report["num_train"] else [],
        _together([entry["name"] for entry in report["classes"]], report["together"]),
        [f"{key:{width}}  {value}" for key, value in facts.items()],
        [*_problems(report["problems"])] or ["no problem found"],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def describe_figures(report: dict[str, Any]) -> dict[str, str]:
    """What was read and what training would cost, in words, by name; `report` is what `check_data` gives."""
    images, training, cache = report["images"], report["training"], report["cache"]
    facts = {}
    if images is not None:
        read, total = images["read"], images["total"]
        of = "" if read == total else f" of {total:,}, evenly spread"
        facts["images read"] = f"{read:,}{of}, in {duration(images['seconds'])}"
        for name, key, unit in (
            ("width",) * 2 + (" pixels",),
            ("height",) * 2 + (" pixels",),
            ("width / height", "aspect", ""),
        ):
            if images[key] is not None:
                low, median, high = (round(images[key][part], 2) for part in ("minimum", "median", "maximum"))
                facts[name] = f"{low:g} to {high:g}{unit}, median {median:g}"
        facts["broken"] = f"{len(images['broken']):,}"
        if images["broken_masks"]:
            facts["broken masks"] = f"{len(images['broken_masks']):,}"
        facts["gray"] = f"{images['gray']:,}"
        facts["exact copies"] = f"{images['num_identical']:,}"
        facts["near copies"] = f"{images['num_similar']:,}"
    if training is not None:
        pace = "; reading images sets the pace" if training["decode_seconds"] >= training["seconds"] else ""
        facts["training"] = (
            f"about {duration(training['seconds'])} for {training['steps']:,} steps ({training['epochs']:.3g} epochs) "
            f"on {training['device']}, evaluation not counted{pace}"
        )
        facts["steps"] = ", ".join(
            f"{p['name']} {p['steps']:,} x {_short(p['step_seconds'])}" for p in training["phases"]
        )
        if training["cache_seconds"]:
            facts["steps"] += f"; before them {duration(training['cache_seconds'])} for the feature cache"
        if training["measured_batch"] < training["batch_size"]:
            facts["steps"] += f" (in proportion, from steps of {training['measured_batch']} images)"
        if training["memory"]:
            facts["memory"] = f"about {gibibytes(training['memory'])}"
    if report.get("at_scale"):
        facts |= scale_figures(report["at_scale"])
    if cache is not None:
        share = min(1.0, cache["given"] / max(1, cache["needed"]))
        free = f"; {gibibytes(cache['free'])} of memory free" if cache["free"] else ""
        kept = f"of which the cache keeps {100 * share:.0f} % (data.cache_gib)"
        facts["decoded images"] = f"{gibibytes(cache['needed'])}, {kept}{free}"
    return facts


def _short(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 1 else f"{1000 * seconds:.2g} ms" if seconds < 0.1 else f"{seconds:.2f} s"


def _classes(classes: list[dict[str, Any]]) -> list[str]:
    """Images by class, in as many columns as there is room for."""
    width = max(len("class"), *(len(entry["name"]) for entry in classes))
    rows = [("class", "train", "val"), *((c["name"], f"{c['train']:,}", f"{c['validation']:,}") for c in classes)]
    head, *cells = [f"{name:{width}} {train:>7} {val:>6}" for name, train, val in rows]
    columns = max(1, min(_WIDTH // (len(head) + 3), -(-len(cells) // _ROWS)))
    height = -(-len(cells) // columns)
    blocks = [[head, *cells[start : start + height]] for start in range(0, len(cells), height)]
    return ["   ".join(block[row] for block in blocks if row < len(block)).rstrip() for row in range(height + 1)]


def _together(names: list[str], counts: list[list[int]]) -> list[str]:
    """Which classes meet in training images."""
    pairs = [(counts[i][j], i, j) for i in range(len(names)) for j in range(i) if counts[i][j]]
    if not pairs:
        return []
    if len(names) <= _MATRIX_CLASSES:
        first = max(map(len, names))
        width = max(7, first) + 1
        rows = [("", names), *zip(names, ([f"{count:,}" for count in row] for row in counts), strict=True)]
        table = [f"{name:{first}}" + "".join(f"{cell:>{width}}" for cell in cells) for name, cells in rows]
        return ["together in a training image:", *table]
    lines = ["together most often, in training images:"]
    for count, i, j in sorted(pairs, reverse=True)[:_PAIRS]:
        rare, other = (i, j) if counts[i][i] <= counts[j][j] else (j, i)
        share = 100 * count / counts[rare][rare]
        lines.append(f"{names[rare]} and {names[other]}: {count:,}, {share:.0f} % of the images of {names[rare]}")
    return lines


def _problems(problems: list[dict[str, Any]]) -> Iterator[str]:
    for severity in ("error", "warning", "note"):
        messages = [problem["message"] for problem in problems if problem["severity"] == severity]
        yield from (f"{severity}: {message}" for message in messages[:_MESSAGES])
        if len(messages) > _MESSAGES:
            yield f"{severity}: and {len(messages) - _MESSAGES:,} more; --json and --out have all"
