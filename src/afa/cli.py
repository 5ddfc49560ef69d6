"""The command line: each subcommand parses, calls one function, and prints one-line errors.

Only this module reads argv. Imports that take time happen inside the subcommands, so that help answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from afa import __version__
from afa.errors import AfaError

if TYPE_CHECKING:
    from pathlib import Path

    from afa.config import Config

_RESERVED = {
    "check": "afa check is not available yet; afa train checks lists, tags and images before it starts",
}
_FORMAT_HELP = (
    "also write the masks for other tools, names separated by commas: "
    "coco, cvat, hf, labelme, labelstudio, mmseg, panoptic, voc, yolo"
)
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
        if rest and arguments.run is not _refuse:
            raise AfaError(f"unknown argument {rest[0]!r}; afa COMMAND --help lists them, keys are --SECTION.KEY VALUE")
        for name in _SHORTHANDS:
            if getattr(arguments, name, None) is not None:
                overrides[f"train.{name}"] = getattr(arguments, name)
        run: Callable[[argparse.Namespace, dict[str, str]], int] = arguments.run
        return run(arguments, overrides)
    except AfaError as error:
        print(f"afa: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("afa: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; what is left to say has no reader.
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

    train = _add(commands, "train", _train, "train from tags, evaluate, report")
    train.add_argument("--config", metavar="FILE", help="TOML configuration")
    train.add_argument("--preset", metavar="NAME", help="starting values: paper, paper_coco or demo")
    train.add_argument("--out", required=True, metavar="RUN", help="run folder")
    train.add_argument("--resume", action="store_true", help="go on with the run in RUN, exactly")

    evaluate = _add(commands, "evaluate", _evaluate, "score a run against masks")
    evaluate.add_argument("folder", metavar="RUN", help="run folder")
    evaluate.add_argument("--data", required=True, metavar="DIR", help="VOC-style folder with masks")
    evaluate.add_argument("--list", metavar="FILE", help="image names, one a line (default: data.val_list of the run)")
    evaluate.add_argument("--protocol", choices=("single", "multiscale"), help="default: that of the run")
    evaluate.add_argument(
        "--labels",
        choices=("seg", "cam", "propagated", "initial", "refined"),
        default="seg",
        help="what is scored; all but seg use the images' true tags (default: %(default)s)",
    )
    evaluate.add_argument("--refine", action="store_true", help="refine cam or propagated scores by the image first")
    evaluate.add_argument("--limit", type=_positive, metavar="N", help="only the first N images")
    evaluate.add_argument("--json", metavar="FILE", help="also write the figures here; - is standard output")

    predict = _add(commands, "predict", _predict, "segment images")
    predict.add_argument("folder", metavar="RUN", help="run folder")
    predict.add_argument("images", nargs="+", metavar="IMAGES", help="image files or folders")
    predict.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
    predict.add_argument("--tags", metavar="FILE", help="tags of the images: only tagged classes are predicted")
    predict.add_argument("--scores", action="store_true", help="also write class scores")
    predict.add_argument("--resume", action="store_true", help="go on with the masks that are in --out already")
    predict.add_argument("--no-overlay", action="store_true", help="write no color overlays")
    predict.add_argument("--format", metavar="NAMES", help=_FORMAT_HELP)

    pseudo = _add(commands, "pseudo", _pseudo, "write pseudo labels of tagged images")
    pseudo.add_argument("folder", metavar="RUN", help="run folder")
    pseudo.add_argument("--data", required=True, metavar="DIR", help="VOC-style folder with tags")
    pseudo.add_argument("--out", required=True, metavar="DIR", help="folder of the labels")
    pseudo.add_argument("--list", metavar="FILE", help="image names, one a line (default: data.train_list of the run)")
    pseudo.add_argument("--kind", choices=("refined", "initial", "propagated", "cam"), default="refined")

    pseudo.add_argument("--format", metavar="NAMES", help=_FORMAT_HELP)

    export = _add(commands, "export", _export, "write the network as a file for other programs", network=False)
    export.add_argument("folder", metavar="RUN", help="run folder, or a folder or hub id of save_pretrained")
    export.add_argument("--format", required=True, choices=("onnx", "torch", "hf"), help="hf is a folder")
    export.add_argument("--out", required=True, metavar="PATH", help="file .onnx or .pt2, or folder (hf)")
    export.add_argument("--check", metavar="DIR", help="images to compare with PyTorch on (default: generated ones)")
    export.add_argument("--opset", type=_positive, metavar="N", help="version of ONNX's operators, 18 or newer")

    report = _add(commands, "report", _report, "write report.html and report.json anew", network=False)
    report.add_argument("folder", metavar="RUN", help="run folder")

    for name, message in _RESERVED.items():
        reserved = commands.add_parser(name, help="(not available yet)", add_help=False)
        reserved.set_defaults(run=_refuse, message=message)
    return parser


def _add(commands: Any, name: str, run: Any, text: str, *, network: bool = True) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    if network:
        parser.add_argument("--device", metavar="auto|cpu|cuda|mps", help="where to compute (default: auto)")
        parser.add_argument("--seed", metavar="N", help="seed of everything random")
        parser.add_argument("--precision", metavar="fp32|bf16|fp16", help="arithmetic of the network")
    return parser


def _take_keys(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Take `--section.key value` out of the arguments: what is left, and the values by dotted key.

    First of all, because argparse, which does not know these flags, would take their values for its own arguments.
    """
    left: list[str] = []
    overrides: dict[str, str] = {}
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


def _demo(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    from pathlib import Path

    from afa.recipe import run_demo

    run_demo(Path(arguments.out), smoke=arguments.smoke, resume=arguments.resume, overrides=overrides)
    return 0


def _train(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    from pathlib import Path

    from afa.config import config_to_toml, load_config

    config = load_config(arguments.config, overrides, preset=arguments.preset)
    if not config.data.root:
        raise AfaError("data.root is not set; pass --data.root DIR, the folder of the data set")
    if int(os.environ.get("RANK", "0")) == 0:
        print(config_to_toml(config))
    from afa.recipe import train_and_report

    train_and_report(config, Path(arguments.out), resume=arguments.resume)
    return 0


def _evaluate(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    import json
    from pathlib import Path

    from afa.build import load_run
    from afa.data.layout import open_scored
    from afa.evaluation.evaluate import evaluate
    from afa.runtime import pick_device, process_group
    from afa.training.checkpoint import write_atomically

    config = _run_config(Path(arguments.folder), overrides, root=arguments.data)
    device = pick_device(config.train.device)
    with process_group(device) as processes:
        loaded = load_run(Path(arguments.folder), device)
        images = open_scored(config.data, list_file=arguments.list)
        result = evaluate(
            loaded.network,
            images,
            config=config,
            labels=arguments.labels,
            protocol=arguments.protocol,
            device=device,
            limit=arguments.limit,
            progress=processes.is_main,
            batch_size=config.evaluation.batch_size,
            refine=arguments.refine,
            precision=config.train.precision,
        )
        if not processes.is_main:
            return 0
    figures = result.to_json()
    text = json.dumps(figures, indent=2) + "\n"
    if arguments.json == "-":
        sys.stdout.write(text)
        return 0
    if arguments.json:
        path = Path(arguments.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    width = max(len(name) for name in figures["per_class"])
    for name, iou in figures["per_class"].items():
        print(f"{name:{width}}  {'  -  ' if iou is None else f'{iou:5.1f}'}")
    miou = "no labeled pixel" if figures["miou"] is None else f"{figures['miou']:5.2f}"
    print(f"{'mIoU':{width}}  {miou}  ({arguments.labels}, {figures['protocol']}, "
          f"{figures['num_images']} images, {figures['seconds']:.0f} s)")  # fmt: skip
    return 0


def _predict(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    from pathlib import Path

    from afa.build import load_run
    from afa.data.tags import read_tags
    from afa.formats.write import mask_items, parse_formats, write_format
    from afa.inference.predict import output_names, predict_files
    from afa.inference.predictor import Predictor
    from afa.runtime import pick_device

    formats = parse_formats(arguments.format) if arguments.format else ()
    paths, out = [Path(path) for path in arguments.images], Path(arguments.out)
    config = _run_config(Path(arguments.folder), overrides)
    loaded = load_run(Path(arguments.folder), pick_device(config.train.device))
    predictor = Predictor(
        loaded.network,
        loaded.classes,
        config=config.evaluation,
        precision=config.train.precision,
        batch_size=config.evaluation.batch_size,
    )
    tags = read_tags(Path(arguments.tags), predictor.classes) if arguments.tags else None
    summary = predict_files(
        predictor,
        paths,
        out,
        tags=tags,
        scores=arguments.scores,
        overlay=not arguments.no_overlay,
        resume=arguments.resume,
    )
    print(summary)
    items = mask_items(output_names(paths, out).items(), out) if formats else []
    for name in formats:
        print(write_format(name, items, predictor.classes, out))
    return 1 if summary.failed else 0


def _pseudo(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    from pathlib import Path

    from afa.build import load_run
    from afa.data.layout import open_tagged
    from afa.formats.write import mask_items, parse_formats, write_format
    from afa.inference.predict import pseudo_files
    from afa.runtime import pick_device

    formats = parse_formats(arguments.format) if arguments.format else ()
    out = Path(arguments.out)
    config = _run_config(Path(arguments.folder), overrides, root=arguments.data)
    device = pick_device(config.train.device)
    loaded = load_run(Path(arguments.folder), device)
    images = open_tagged(config.data, list_file=arguments.list)
    summary = pseudo_files(
        loaded.network,
        images,
        out,
        config=config,
        kind=arguments.kind,
        device=device,
        precision=config.train.precision,
        batch_size=config.evaluation.batch_size,
    )
    print(summary)
    items = mask_items(((name, images.image_path(index)) for index, name in enumerate(images.names)), out)
    for name in formats:
        print(write_format(name, items, images.classes, out))
    return 1 if summary.failed else 0


def _export(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    from pathlib import Path

    if overrides:
        raise AfaError(f"--{next(iter(overrides))}: afa export takes no configuration keys")
    if arguments.opset and arguments.format != "onnx":
        raise AfaError(f"--opset is {arguments.opset}, which --format {arguments.format} does not know; leave it out")
    if arguments.check and arguments.format == "hf":
        raise AfaError("--check compares exported files, --format hf writes none; leave it out")
    if arguments.format == "hf":
        from afa.inference.hub import save_pretrained

        print(save_pretrained(arguments.folder, arguments.out))
        return 0
    import torch

    from afa.inference.export import export_onnx, export_torch, read_check_images
    from afa.inference.hub import load_pretrained

    loaded = load_pretrained(arguments.folder, torch.device("cpu"))
    settings: dict[str, Any] = {
        "classes": loaded.classes,
        "images": read_check_images(Path(arguments.check)) if arguments.check else (),
        "short_side": loaded.config.evaluation.short_side,
    }
    if arguments.format == "onnx":
        print(export_onnx(loaded.network, Path(arguments.out), opset=arguments.opset, **settings))
    else:
        print(export_torch(loaded.network, Path(arguments.out), **settings))
    return 0


def _report(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    from pathlib import Path

    from afa.report.html import write_report

    if overrides:
        raise AfaError(f"--{next(iter(overrides))}: afa report takes no configuration keys")
    print(write_report(Path(arguments.folder)))
    return 0


def _refuse(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    raise AfaError(arguments.message)


def _run_config(run: Path, overrides: dict[str, str], *, root: str | None = None) -> Config:
    """The configuration of a run under the given keys; data is read from `root`, in the run's classes."""
    from afa.build import read_classes
    from afa.config import load_config

    keys: dict[str, Any] = {"data.class_subset": read_classes(run)}
    if root is not None:
        keys["data.root"] = root
    return load_config(run / "config.toml", keys | overrides)
