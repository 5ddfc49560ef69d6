"""The command line: each subcommand parses, calls one function, and prints one-line errors.

Only this module reads argv. Imports that take time happen inside the subcommands, so that help answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from afa import __version__, elastic
from afa.cli import flags
from afa.elastic import is_main, is_restarted
from afa.errors import AfaError, GoneError

_MIOU = ("mIoU", "miou", "no pixel of a class")
_Command = Callable[[dict[str, Any], dict[str, Any]], int]
"""(flags by the parameters that they are for, keys) -> exit status."""
_SHORTHANDS = {
    "device": "train.device",
    "seed": "train.seed",
    "precision": "train.precision",
    "skip_missing": "data.skip_missing",
    "skip_broken": "data.skip_broken",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name; None = those of the process.

    Returns:
        Exit status: 0 done, 1 done with failures, 2 a mistake in what was given.
    """
    if (status := elastic.ended_with()) is not None:
        return status  # what failed would fail again
    try:
        words, overrides = _take_keys(sys.argv[1:] if argv is None else argv)
        arguments, rest = build_parser().parse_known_args(words)
        if rest:
            raise AfaError(f"unknown argument {rest[0]!r}; afa COMMAND --help lists them, keys are --SECTION.KEY VALUE")
        named = vars(arguments)
        command: tuple[str, _Command, bool] = named.pop("command")
        name, run, takes_keys = command
        for flag, key in _SHORTHANDS.items() if takes_keys else ():
            if (value := named.pop(flag, None)) is not None:
                overrides[key] = value
        if overrides and not takes_keys:
            raise AfaError(f"--{next(iter(overrides))}: afa {name} takes no configuration keys")
        return elastic.end_job(run(named, overrides))
    except AfaError as error:
        elastic.say_once(f"afa: error: {error}")
        return 2 if isinstance(error, GoneError) else elastic.end_job(2)
    except KeyboardInterrupt:
        elastic.say_once("afa: stopped")
        return 130
    except BrokenPipeError:
        # The reader of our output has gone, so the rest of the output has no reader.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        elastic.say_once(f"afa: error: {error.filename or 'output'}: {error.strerror or error}")
        return 2


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise AfaError(f"{message}; see {self.prog} --help")

    def format_help(self) -> str:
        text = super().format_help()
        if self.prog != "afa train":
            return text
        from afa.config.keys import common_text

        return f"{text}\n{common_text()}\n"


def build_parser() -> argparse.ArgumentParser:
    """Parser of everything but `--SECTION.KEY VALUE`, which `main` takes out before."""
    parser = _Parser(
        prog="afa",
        description="Image-level tags in, segmentation masks out.",
        epilog="Any key of the configuration is a flag: --SECTION.KEY VALUE, such as --schedule.max_steps 1000; "
        "afa keys lists them.",
    )
    parser.add_argument("--version", action="version", version=f"afa {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, run, text, arguments in (
        ("demo", _demo, "train on generated images and write a report; a few minutes on a laptop", flags.DEMO),
        ("check", _check, "look a data set over: tags, every image, what training would cost here", flags.CHECK),
        ("train", _train, "train from tags, evaluate, report", flags.TRAIN),
        ("masks", _masks, "masks of tagged images without training, by the class names", flags.MASKS),
        ("evaluate", _evaluate, "score a run against masks", flags.EVALUATE),
        ("predict", _call("predict"), "segment images", flags.PREDICT),
        ("pseudo", _call("pseudo_labels"), "write pseudo labels of tagged images", flags.PSEUDO),
        ("check-voc", _call("check_voc"), "check an archive for PASCAL VOC's test server", flags.CHECK_VOC),
        ("export", _call("export"), "write the network as a file for other programs", flags.EXPORT),
        ("report", _report, "write report.html and report.json anew", flags.REPORT),
        ("explore", _call("explore"), "look at a run in the browser: why is a mask as it is?", flags.EXPLORE),
        ("keys", _keys, "list the keys of the configuration: default, range, unit, source", flags.KEYS),
    ):
        takes_keys = flags.NETWORK[1] in arguments
        more = "Any key is a flag, such as --model.weights FOLDER: afa keys lists them." if takes_keys else None
        command = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}{'' if text.endswith('?') else '.'}", epilog=more
        )
        command.set_defaults(command=(name, run, takes_keys))
        for names, settings in arguments:
            command.add_argument(*names, **settings)
    return parser


def _take_keys(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Take `--section.key value` out of the arguments: what is left, and the values by dotted key.

    This comes first, because argparse does not know these flags and would take their values for its own arguments.
    """
    left: list[str] = []
    overrides: dict[str, Any] = {}
    words = iter(argv)
    for word in words:
        key, has_value, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in key:
            left.append(word)
            continue
        if not has_value:
            value = next(words, "--")
            if value.startswith("--"):
                raise AfaError(f"--{key} has no value; write --{key} VALUE")
        overrides[key] = value
    return left, overrides


def _call(function: str) -> _Command:
    """A command that calls a function of `afa.api` and prints what it returned; status 1 if a part of it failed."""

    def run(named: dict[str, Any], overrides: dict[str, Any]) -> int:
        from afa import api

        result = getattr(api, function)(**named, **overrides)
        lines = [] if result is None else [result, *getattr(result, "formats", ())]
        return _told(lines, failed=bool(getattr(result, "failed", ()) or getattr(result, "problems", ())))

    return run


def _told(lines: Iterable[object], *, failed: bool) -> int:
    """Let the first process print what was done; the exit status."""
    if not is_main():
        return 0
    for line in lines:
        print(line)
    return int(failed)


def _demo(named: dict[str, Any], overrides: dict[str, Any]) -> int:
    from afa.api import run_demo

    run_demo(**named, overrides=overrides)
    return 0


def _check(named: dict[str, Any], overrides: dict[str, Any]) -> int:
    from pathlib import Path

    from afa.api import check_data
    from afa.check.page import write_check
    from afa.check.scale import MACHINES
    from afa.check.text import render_text

    out, place = named.pop("out"), named.pop("json")
    if named["at_scale"] and str(overrides.get("train.device", "auto")).upper() in MACHINES:
        named["machine"] = overrides.pop("train.device").upper()
    report = check_data(**named, **overrides)
    if not is_main():
        return 0
    if not _write_json(report, place):
        sys.stdout.write(render_text(report))
    if out:
        print(write_check(report, Path(out)), file=sys.stderr)
    return 1 if report["errors"] else 0


def _train(named: dict[str, Any], overrides: dict[str, Any]) -> int:
    from afa.api import train_and_report, training_config
    from afa.config import config_to_toml

    out, resume = named.pop("out"), named.pop("resume")
    named["run"] = out if resume or is_restarted() else None
    config, choices, data = training_config(**named, overrides=overrides)
    if is_main():
        for line in choices:
            print(line, file=sys.stderr)
        print(config_to_toml(config), flush=True)
    train_and_report(config, out, data=data, resume=resume)
    return 0


def _evaluate(named: dict[str, Any], overrides: dict[str, Any]) -> int:
    from afa.api import evaluate

    place = named.pop("json")
    result = evaluate(**named, **overrides)
    if not is_main():
        return 0
    figures = result.to_json()
    if named["list_file"]:
        figures["list"] = named["list_file"]
    if _write_json(figures, place):
        return 0
    width = max(len(name) for name in figures["per_class"])
    outlines = figures.get("boundary_per_class", {})
    if outlines:
        print(f"{'':{width}}    IoU  boundary IoU")
    for name, score in figures["per_class"].items():
        columns = [score, outlines[name]] if outlines else [score]
        print("  ".join([f"{name:{width}}", *("  -  " if each is None else f"{each:5.1f}" for each in columns)]))
    name, key, nothing = ("tag F1", "tag_f1", "no tag") if figures["labels"] == "tags" else _MIOU
    score = nothing if figures[key] is None else f"{figures[key]:5.2f}"
    print(f"{name:{width}}  {score}  ({figures['labels']}, {figures['protocol']}, "
          f"{figures['num_images']} images, {figures['seconds']:.0f} s)")  # fmt: skip
    if "fully" in figures.get("supervision", ""):
        print(f"{'':{width}}  {figures['supervision']}")
    if figures.get("boundary_iou") is not None:
        print(f"{'boundary IoU':{width}}  {figures['boundary_iou']:5.2f}")
    return 0


def _masks(named: dict[str, Any], overrides: dict[str, Any]) -> int:
    from afa.api import masks

    summary, page = masks(**named, **overrides), f"{named['out']}/masks.html"
    pages = [f"open {page}"] if os.path.isfile(page) else []
    return _told([summary, *summary.written.formats, *pages], failed=bool(summary.written.failed))


def _report(named: dict[str, Any], overrides: dict[str, Any]) -> int:
    runs, out, data, figures = (named[name] for name in ("runs", "out", "data", "figures"))
    if named["compare"] and (figures or data):
        raise AfaError("--figures and --data are for a single run; leave them out with --compare")
    if not named["compare"] and (len(runs) > 1 or out):
        raise AfaError(f"{'several runs are' if len(runs) > 1 else '--out is'} for --compare; add it")
    if data and not figures:
        raise AfaError("--data is for --figures; add it")
    from afa.api import compare, report

    if named["compare"]:
        sys.stdout.write(compare(runs, out=out))
        return 0
    return _told(report(runs[0], figures=figures, data=data), failed=False)


def _keys(named: dict[str, Any], overrides: dict[str, Any]) -> int:
    from afa.config.keys import all_keys, find_keys, keys_markdown, keys_text

    if named["markdown"]:
        sys.stdout.write(keys_markdown())
    else:
        sys.stdout.write(keys_text(find_keys(named["word"]) if named["word"] else all_keys()))
    return 0


def _write_json(figures: dict[str, Any], place: str | None) -> bool:
    """Write figures where `--json` says; tells whether that is standard output."""
    import json
    from pathlib import Path

    from afa.runs.files import write_whole

    text = json.dumps(figures, indent=2) + "\n"
    if place == "-":
        sys.stdout.write(text)
    elif place:
        write_whole(Path(place), text)
    return place == "-"
