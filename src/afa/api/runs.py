"""What is done with a finished run: scores, exports, reports, comparisons, and the explorer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from afa.api.settings import at_work, run_config
from afa.config import DataConfig
from afa.data.open import open_data
from afa.data.split import VALIDATION
from afa.errors import AfaError
from afa.evaluation import evaluate as evaluation
from afa.evaluation.evaluate import first_images
from afa.evaluation.scores import EvaluationResult
from afa.evaluation.tags import TagResult, evaluate_tags
from afa.inference.hub import load_pretrained, save_pretrained
from afa.inference.onnx import ExportCheck, export_metadata, export_onnx, export_torch, read_check_images
from afa.report.compare import compare_runs, render_text, write_comparison
from afa.report.figures import write_figures
from afa.report.page import write_report
from afa.runs.network import load_run
from afa.runtime import pick_device, say


def evaluate(
    run: str | Path,
    data: str | Path,
    *,
    labels: str = "seg",
    protocol: str | None = None,
    refine: bool = False,
    boundary: bool = False,
    list_file: str | None = None,
    limit: int | None = None,
    progress: bool = True,
    **overrides: Any,
) -> EvaluationResult | TagResult:
    """Score a run against masks, or against tags where the data set has no masks, as `afa evaluate`.

    Args:
        run: Run folder.
        data: Folder of the data set.
        labels: What is scored: `seg`, or with the images' true tags `cam`, `propagated`, `initial` or `refined`.
        protocol: `single`, `multiscale`, `single+crf` or `multiscale+crf`; None is that of the run.
        refine: Refine `cam` or `propagated` scores by the image first.
        boundary: Also score the boundary IoU.
        list_file: Names of the images, one a line; None is what the data has for validation.
        limit: Only the first so many images.
        progress: Show progress on standard error.
        overrides: Keys of the run's configuration to change, of those that this reads: `**{"train.device": "cpu"}`.

    Returns:
        Scores in percent; of the tags alone where there are no masks and the segmentation was asked for.

    Raises:
        AfaError: As `afa.evaluation.evaluate.evaluate`; not a run folder; the data set is missing or broken.
    """
    run = Path(run)
    protocols = {} if protocol is None else {"evaluation.protocol": protocol}
    config = run_config(run, overrides | protocols, f"evaluate --labels {labels}", data=data)
    with at_work(config, progress) as (device, processes):
        network, layout = load_run(run, device).network, open_data(config.data)
        layout.leave_out_broken((VALIDATION,), list_file=list_file)
        if labels == "seg" and not layout.has_masks and config.data.mask_dir == DataConfig().mask_dir:
            if processes.is_main:
                say(f"{layout.root}: no masks, so nothing tells the mIoU; the tags are scored")
            images = first_images(layout.validation(list_file=list_file), limit)
            return evaluate_tags(network, images, config, processes=processes)
        scored = first_images(layout.masked(list_file=list_file), limit)
        scored.check_values()
        options: dict[str, Any] = {"labels": labels, "refine": refine, "boundary": boundary}
        return evaluation.evaluate(network, scored, config, processes=processes, **options)


def export(
    run: str | Path, out: str | Path, *, format: str, check: str | Path | None = None, opset: int | None = None
) -> Path | ExportCheck:
    """Write the network as a file for other programs, or as a folder to pass on, as `afa export`.

    Args:
        run: Run folder, folder of `save_pretrained`, or hub id.
        out: File .onnx or .pt2, or folder (`hf`).
        format: `onnx`, `torch` or `hf`.
        check: Folder of images to compare with PyTorch on; None compares on generated ones.
        opset: Version of ONNX's operators.

    Raises:
        AfaError: An option that the format does not know; as `save_pretrained`, `export_onnx` and `export_torch`.
    """
    if opset and format != "onnx":
        raise AfaError(f"--opset is {opset}, which --format {format} does not know; leave it out")
    if format == "hf":
        if check:
            raise AfaError("--check compares exported files, --format hf writes none; leave it out")
        return save_pretrained(str(run), out)
    loaded = load_pretrained(str(run), torch.device("cpu"))
    settings: dict[str, Any] = {
        "metadata": export_metadata(loaded.classes, white_level=loaded.config.data.white_level),
        "images": read_check_images(Path(check)) if check else (),
        "short_side": loaded.config.evaluation.short_side,
    }
    if format == "onnx":
        return export_onnx(loaded.network, Path(out), opset=opset, **settings)
    return export_torch(loaded.network, Path(out), **settings)


def report(run: str | Path, *, figures: bool = False, data: str | None = None) -> list[Path]:
    """Write report.html and report.json anew, as `afa report`; returns the figures and, last, the page.

    Args:
        run: Run folder.
        figures: Also draw the paper's figures.
        data: For the figures: folder of the data set; None is that of the run.

    Raises:
        AfaError: As `write_report` and `write_figures`.
    """
    drawn = write_figures(Path(run), data=data) if figures else []
    return [*drawn, write_report(Path(run))]


def explore(
    run: str | Path,
    *,
    data: str | None = None,
    compare: str | Path | None = None,
    port: int | None = None,
    browser: bool = True,
    device: str = "auto",
) -> None:
    """Serve a page on this machine that shows why masks are as they are, until Ctrl-C, as `afa explore`.

    Args:
        run: Run folder.
        data: Folder of the data set; None is that of the run, and if it is gone, photographs can still be dropped.
        compare: Another run folder, whose maps are laid beside.
        port: None takes 7860, where the links of a report lead, or a free one if that is taken; 0 a free one. The first
            line on standard output is the address.
        browser: Open the page in the browser.
        device: `auto`, `cpu`, `cuda` or `mps`.

    Raises:
        AfaError: Not a run folder; no data set in `data`; gradio is missing; the port is taken.
    """
    from afa.explore.explorer import ExploredRun, Explorer  # transformers would come with it
    from afa.explore.serve import require_gradio, serve

    require_gradio()
    where = pick_device(device)
    other = None if compare is None else ExploredRun.open(compare, data, where)
    serve(Explorer(ExploredRun.open(run, data, where), other), port=port, browser=browser)


def compare(runs: Sequence[str | Path], *, out: str | Path | None = None) -> str:
    """Put runs beside each other and the paper's tables, as `afa report --compare`.

    Args:
        runs: Run folders.
        out: Folder for compare.html and compare.json.

    Returns:
        The tables as text.

    Raises:
        AfaError: As `compare_runs` and `write_comparison`.
    """
    groups = compare_runs([Path(run) for run in runs])
    if out is not None:
        say(str(write_comparison(groups, Path(out))))
    return render_text(groups)
