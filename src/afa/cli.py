"""The command line: each subcommand parses, calls one function, and prints one-line errors.

Only this module reads argv. Imports that take time happen inside the subcommands, so that help answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from afa import __version__
from afa.errors import AfaError

_FORMAT_HELP = (
    "also write the masks for other tools, names separated by commas: "
    "coco, cvat, hf, labelme, labelstudio, mmseg, panoptic, voc, voc_test, yolo"
)
_MIOU = ("mIoU", "miou", "no labeled pixel")
_SHORTHANDS = ("device", "seed", "precision")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name; None = those of the process.

    Returns:
        Exit status: 0 done, 1 done with failures, 2 a mistake in what was given.
    """
    try:
        words, overrides = _take_keys(sys.argv[1:] if argv is None else argv)
        arguments, rest = build_parser().parse_known_args(words)
        if rest:
            raise AfaError(f"unknown argument {rest[0]!r}; afa COMMAND --help lists them, keys are --SECTION.KEY VALUE")
        for name in _SHORTHANDS:
            if getattr(arguments, name, None) is not None:
                overrides[f"train.{name}"] = getattr(arguments, name)
        run: Callable[[argparse.Namespace, dict[str, Any]], int] = arguments.run
        return run(arguments, overrides)
    except AfaError as error:
        print(f"afa: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("afa: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone, so the rest of the output has no reader.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"afa: error: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise AfaError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """Parser of everything but `--SECTION.KEY VALUE`, which `main` takes out before."""
    parser = _Parser(
        prog="afa",
        description="Image-level tags in, segmentation masks out.",
        epilog="Any key of the configuration is a flag: --SECTION.KEY VALUE, such as --schedule.max_steps 1000.",
    )
    parser.add_argument("--version", action="version", version=f"afa {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = _add(commands, "demo", _demo, "train on generated images and write a report; a few minutes on a laptop")
    demo.add_argument("--out", default="runs/demo", metavar="RUN", help="run folder (default: %(default)s)")
    demo.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    demo.add_argument("--resume", action="store_true", help="go on with the run in RUN")

    check = _add(commands, "check", _check, "look a data set over: tags, every image, what training would cost here")
    check.add_argument("data", metavar="DIR", help="folder of the data set, in any layout of docs/data.md")
    check.add_argument("--config", metavar="FILE", help="TOML configuration of the training to come")
    check.add_argument("--preset", metavar="NAME", help="starting values: paper, paper_coco or demo")
    check.add_argument("--out", metavar="OUT", help="also write check.html and check.json there")
    check.add_argument("--json", metavar="FILE", help="also write the figures here; - is standard output")
    check.add_argument("--fast", action="store_true", help="tags and counts only: read no image, try no training step")
    check.add_argument("--limit", type=_positive, metavar="N", help="read only N images, evenly spread")

    train = _add(commands, "train", _train, "train from tags, evaluate, report")
    train.add_argument(
        "folder", nargs="?", metavar="DIR", help="folder of the data set; alone, it decides all settings"
    )
    train.add_argument("--config", metavar="FILE", help="TOML configuration")
    train.add_argument("--preset", metavar="NAME", help="starting values: paper, paper_coco or demo")
    train.add_argument("--out", required=True, metavar="RUN", help="run folder")
    train.add_argument("--resume", action="store_true", help="go on with the run in RUN, exactly")

    evaluate = _add(commands, "evaluate", _evaluate, "score a run against masks")
    evaluate.add_argument("folder", metavar="RUN", help="run folder")
    evaluate.add_argument("--data", required=True, metavar="DIR", help="folder of the data set")
    evaluate.add_argument("--list", metavar="FILE", help="image names, one a line (default: those for validation)")
    protocols = ("single", "multiscale", "single+crf", "multiscale+crf")
    evaluate.add_argument("--protocol", choices=protocols, help="default: that of the run")
    evaluate.add_argument(
        "--labels",
        choices=("seg", "cam", "propagated", "initial", "refined"),
        default="seg",
        help="what is scored; all but seg use the images' true tags (default: %(default)s)",
    )
    evaluate.add_argument("--refine", action="store_true", help="refine cam or propagated scores by the image first")
    evaluate.add_argument("--boundary", action="store_true", help="also score the boundary IoU")
    evaluate.add_argument("--limit", type=_positive, metavar="N", help="only the first N images")
    evaluate.add_argument("--json", metavar="FILE", help="also write the figures here; - is standard output")

    predict = _add(commands, "predict", _predict, "segment images")
    predict.add_argument("folder", metavar="RUN", help="run folder")
    predict.add_argument("images", nargs="+", metavar="IMAGES", help="image files or folders")
    predict.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
    predict.add_argument("--tags", metavar="FILE", help="tags of the images: only tagged classes are predicted")
    predict.add_argument("--scores", action="store_true", help="also write class scores")
    predict.add_argument("--crf", action="store_true", help="refine the masks by the dense CRF")
    predict.add_argument("--resume", action="store_true", help="go on with the masks that are in --out already")
    predict.add_argument("--no-overlay", action="store_true", help="write no color overlays")
    predict.add_argument("--format", metavar="NAMES", help=_FORMAT_HELP)

    pseudo = _add(commands, "pseudo", _pseudo, "write pseudo labels of tagged images")
    pseudo.add_argument("folder", metavar="RUN", help="run folder")
    pseudo.add_argument("--data", required=True, metavar="DIR", help="folder of the data set")
    pseudo.add_argument("--out", required=True, metavar="DIR", help="folder of the labels")
    pseudo.add_argument("--list", metavar="FILE", help="image names, one a line (default: those to train on)")
    pseudo.add_argument("--kind", choices=("refined", "initial", "propagated", "cam"), default="refined")
    pseudo.add_argument("--format", metavar="NAMES", help=_FORMAT_HELP)

    check_voc = _add(commands, "check-voc", _check_voc, "check an archive for PASCAL VOC's test server", network=False)
    check_voc.add_argument("archive", metavar="ARCHIVE", help="what --format voc_test wrote, or any other")
    check_voc.add_argument("--list", metavar="FILE", help="names of the test images, one a line")
    check_voc.add_argument("--images", metavar="DIR", help="folder of the test images, for their sizes")

    export = _add(commands, "export", _export, "write the network as a file for other programs", network=False)
    export.add_argument("folder", metavar="RUN", help="run folder, or a folder or hub id of save_pretrained")
    export.add_argument("--format", required=True, choices=("onnx", "torch", "hf"), help="hf is a folder")
    export.add_argument("--out", required=True, metavar="PATH", help="file .onnx or .pt2, or folder (hf)")
    export.add_argument("--check", metavar="DIR", help="images to compare with PyTorch on (default: generated ones)")
    export.add_argument("--opset", type=_positive, metavar="N", help="version of ONNX's operators, 18 or newer")

    report = _add(commands, "report", _report, "write report.html and report.json anew", network=False)
    report.add_argument("folders", nargs="+", metavar="RUN", help="run folder; several with --compare")
    report.add_argument("--compare", action="store_true", help="tables of the runs' figures beside the paper's")
    report.add_argument("--out", metavar="DIR", help="--compare: also write compare.html and compare.json there")
    report.add_argument("--figures", action="store_true", help="also draw the paper's figures, as RUN/figures/*.png")
    report.add_argument("--data", metavar="DIR", help="--figures: folder of the data set (default: that of the run)")
    return parser


def _add(commands: Any, name: str, run: Any, text: str, *, network: bool = True) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    if network:
        parser.add_argument("--device", metavar="auto|cpu|cuda|mps", help="where to compute (default: auto)")
        parser.add_argument("--seed", metavar="N", help="seed of everything random")
        parser.add_argument("--precision", metavar="auto|fp32|bf16|fp16", help="arithmetic of the network")
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


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _demo(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from afa.api import run_demo

    run_demo(arguments.out, smoke=arguments.smoke, resume=arguments.resume, overrides=overrides)
    return 0


def _check(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from pathlib import Path

    from afa.api import check_data
    from afa.check.page import write_check
    from afa.check.text import render_text

    report = check_data(
        arguments.data,
        file=arguments.config,
        preset=arguments.preset,
        fast=arguments.fast,
        limit=arguments.limit,
        **overrides,
    )
    if not _write_json(report, arguments.json):
        sys.stdout.write(render_text(report))
    if arguments.out:
        print(write_check(report, Path(arguments.out)), file=sys.stderr)
    return 1 if report["errors"] else 0


def _train(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from afa.api import train_and_report, training_config
    from afa.config import config_to_toml

    config, choices, data = training_config(
        arguments.folder,
        file=arguments.config,
        preset=arguments.preset,
        overrides=overrides,
        run=arguments.out if arguments.resume else None,
    )
    if _is_main():
        for line in choices:
            print(line, file=sys.stderr)
        print(config_to_toml(config), flush=True)
    train_and_report(config, arguments.out, data=data, resume=arguments.resume)
    return 0


def _evaluate(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from afa.api import evaluate

    result = evaluate(
        arguments.folder,
        arguments.data,
        labels=arguments.labels,
        protocol=arguments.protocol,
        refine=arguments.refine,
        boundary=arguments.boundary,
        list_file=arguments.list,
        limit=arguments.limit,
        **overrides,
    )
    if not _is_main():
        return 0
    figures = result.to_json()
    if arguments.list:
        figures["list"] = arguments.list
    if _write_json(figures, arguments.json):
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


def _predict(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from afa.api import predict

    summary = predict(
        arguments.folder,
        arguments.images,
        arguments.out,
        tags=arguments.tags,
        scores=arguments.scores,
        crf=arguments.crf,
        overlay=not arguments.no_overlay,
        formats=arguments.format or "",
        resume=arguments.resume,
        **overrides,
    )
    for line in (summary, *summary.formats):
        print(line)
    return 1 if summary.failed else 0


def _pseudo(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from afa.api import pseudo_labels

    summary = pseudo_labels(
        arguments.folder,
        arguments.data,
        arguments.out,
        kind=arguments.kind,
        list_file=arguments.list,
        formats=arguments.format or "",
        **overrides,
    )
    for line in (summary, *summary.formats):
        print(line)
    return 1 if summary.failed else 0


def _check_voc(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    _refuse_keys("check-voc", overrides)
    from afa.api import check_voc

    found = check_voc(arguments.archive, list_file=arguments.list, images=arguments.images)
    print(found)
    return 1 if found.problems else 0


def _export(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    _refuse_keys("export", overrides)
    from afa.api import export

    words = {"format": arguments.format, "check": arguments.check, "opset": arguments.opset}
    print(export(arguments.folder, arguments.out, **words))
    return 0


def _report(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    _refuse_keys("report", overrides)
    runs = arguments.folders
    if arguments.compare and (arguments.figures or arguments.data):
        raise AfaError("--figures and --data are for a single run; leave them out with --compare")
    if not arguments.compare and (len(runs) > 1 or arguments.out):
        raise AfaError(f"{'several runs are' if len(runs) > 1 else '--out is'} for --compare; add it")
    if arguments.data and not arguments.figures:
        raise AfaError("--data is for --figures; add it")
    from afa.api import compare, report

    if arguments.compare:
        sys.stdout.write(compare(runs, out=arguments.out))
        return 0
    for path in report(runs[0], figures=arguments.figures, data=arguments.data):
        print(path)
    return 0


def _refuse_keys(command: str, overrides: dict[str, Any]) -> None:
    if overrides:
        raise AfaError(f"--{next(iter(overrides))}: afa {command} takes no configuration keys")


def _is_main() -> bool:
    """Whether this process prints, of those that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


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
