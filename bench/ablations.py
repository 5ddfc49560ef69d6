"""The rows of the paper's Tables 1 to 5 on generated images: which of its orderings hold at this size?

    python bench/ablations.py [--out runs/ablations] [--seeds 3] [--steps 450] [--tables 1 2 3]

As in the paper, every row starts from one encoder that has learned to classify other images: here it takes
`--pretraining-steps` on the tags of generated images with a single object each, with the pooling of `_PRETRAINING`. A
row then trains the `demo` preset from those weights for `--steps`. Its phases have the paper's shares of a run, and it
adds the keys by which the row's file in configs/ differs from the preset `paper`. Each seed makes a data set of its
own. Rows of the same configuration share their runs, and Tables 1 and 4 score the CAM of one run. The script keeps
finished runs, so the same command continues where it was stopped.

Figures are mIoU in percent on the validation images, mean and standard deviation over the seeds. They do not compare
with the paper's, which come from other images and another encoder; only orderings compare. The script prints the
orderings last, seed by seed: a row and the row that the paper puts below it see the same data.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from afa.api import evaluate, train_and_report
from afa.config import Config, config_to_dict, load_config
from afa.data.open import open_data
from afa.demo.shapes import DEFAULT_STYLE
from afa.demo.write import write_shapes
from afa.errors import AfaError
from afa.runs.run import Run
from afa.runtime import pick_device, say, showing_progress
from afa.training.loop import train

CONFIGS: Final = Path(__file__).parents[1] / "configs"
NUM_TRAIN, NUM_VAL, IMAGE_SIZE = 800, 200, 128
NUM_PRETRAIN: Final = 2000
_PRETRAINING: Final[dict[str, Any]] = {"model.pooling": "gmp"}
"""What sets the pretraining apart from the demo preset. With gap the tags of single objects are not learned in 800
steps (docs/lab/2026-11.md)."""
_PRETRAINING_SEED: Final = 1000
_ENERGY: Final = 2.0
"""Weight of the energy loss in the rows that have it. The demo preset has none; on its crops of few pixels a weight of
0.01 would do nothing: this one makes it about as strong beside the cross-entropy as the paper's is on its crops."""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        table: Number of the table.
        name: What the paper calls it.
        paper: The paper's figure, percent.
        config: File in configs/ without `.toml`: what is trained.
        labels: What is scored.
        protocol: How the segmentation is scored.
        refinement: The refinement of CAMs before they are scored.
    """

    table: int
    name: str
    paper: float
    config: str
    labels: str = "seg"
    protocol: str = "single"
    refinement: str = ""


ROWS: Final = (
    Row(1, "gap", 31.1, "table1/gap", "cam"),
    Row(1, "top 50 %", 34.8, "table1/top50", "cam"),
    Row(1, "top 25 %", 39.7, "table1/top25", "cam"),
    Row(1, "top 10 %", 43.6, "table1/top10", "cam"),
    Row(1, "gmp", 48.3, "table1/gmp", "cam"),
    Row(2, "baseline", 46.7, "table2/baseline"),
    Row(2, "PAR", 56.2, "table2/par"),
    Row(2, "PAR AFA", 62.6, "table2/par_afa"),
    Row(2, "PAR AFA reg", 63.8, "table2/par_afa_reg"),
    Row(2, "PAR AFA reg CRF", 66.0, "table2/par_afa_reg", protocol="single+crf"),
    Row(3, "w/o AFA", 54.2, "table3/wo_afa", "propagated"),
    Row(3, "w/o propagation", 64.4, "table3/wo_propagation", "propagated"),
    Row(3, "prop. with MHSA", 55.9, "table3/prop_with_mhsa", "propagated"),
    Row(3, "AFA", 66.5, "table3/afa", "propagated"),
    Row(4, "CAM", 48.2, "table4/cam", "cam"),
    Row(4, "PAMR", 51.4, "table4/cam", "cam", refinement="pamr"),
    Row(4, "PAR color only", 51.7, "table4/cam", "cam", refinement="par_color"),
    Row(4, "PAR", 52.9, "table4/cam", "cam", refinement="par"),
    Row(5, "full supervision", 78.7, "table5/full_supervision"),
    Row(5, "RRM", 63.5, "table5/rrm"),
    Row(5, "AFA", 66.0, "table2/par_afa_reg", protocol="single+crf"),
)


ORDERINGS: Final = (
    (1, "gmp", "gap"),
    (4, "PAR", "PAMR"),
    (4, "PAMR", "CAM"),
    (3, "AFA", "w/o propagation"),
    (3, "w/o propagation", "prop. with MHSA"),
    (3, "prop. with MHSA", "w/o AFA"),
    (2, "PAR", "baseline"),
    (2, "PAR AFA", "PAR"),
    (2, "PAR AFA reg", "PAR AFA"),
    (2, "PAR AFA reg CRF", "PAR AFA reg"),
    (5, "full supervision", "AFA"),
    (5, "AFA", "RRM"),
)
"""Table, row, and the row that the paper's figure puts below it."""


def row_keys(name: str) -> dict[str, Any]:
    """Keys in which a file in configs/, its own preset included, differs from the preset `paper`."""
    path = CONFIGS / f"{name}.toml"
    config, paper = load_config(path), load_config()
    changed = {
        f"{section}.{key}": value
        for section, values in config_to_dict(config).items()
        if isinstance(values, dict)
        for key, value in values.items()
        if value != config_to_dict(paper)[section][key] and (section, key) != ("train", "label")
    }
    stated = tomllib.loads(path.read_text(encoding="utf-8"))
    # Table 1 compares poolings: gmp is the paper's default and not the demo's.
    changed |= {f"model.{key}": value for key, value in stated.get("model", {}).items()}
    return {"loss.energy_weight": _ENERGY} | changed


def row_config(name: str, *, root: Path, weights: str, seed: int, steps: int) -> Config:
    """The demo preset with a row's keys, from pretrained weights, its phases at the paper's shares of the steps."""
    paper = load_config().schedule
    scale = steps / paper.max_steps
    phases = {key: max(1, round(scale * getattr(paper, key))) for key in ("cls_steps", "refined_steps", "warmup_steps")}
    keys = {
        "data.root": str(root),
        "model.weights": weights,
        "train.seed": seed,
        "train.example_images": 0,
        "train.save_steps": max(1, steps // 2),
        "train.tensorboard": False,
        "schedule.max_steps": steps,
        **{f"schedule.{key}": value for key, value in phases.items()},
    }
    return load_config(None, keys | row_keys(name), preset="demo")


def run_name(config: Config) -> str:
    """Folder of a run; rows of the same configuration have the same folder."""
    plain = config_to_dict(load_config(preset="demo"))
    words = [
        f"{key}={value}"
        for section in ("model", "pseudo", "loss")
        for key, value in config_to_dict(config)[section].items()
        if value != plain[section][key] and key != "weights"
    ]
    words += [f"supervision={config.train.supervision}"] if config.train.supervision != "tags" else []
    return ",".join(words) or "demo"


def pretrained_encoder(out: Path, *, steps: int) -> Path:
    """Teach an encoder the tags of single objects, unless it exists already; returns its folder."""
    encoder = out / f"pretraining{steps}" / "encoder"
    if (encoder / "config.json").is_file():
        return encoder
    root = out / "data" / "pretraining"
    style = dataclasses.replace(DEFAULT_STYLE, num_objects=(1, 1))
    write_shapes(
        root,
        num_train=NUM_PRETRAIN,
        num_val=NUM_VAL,
        image_size=IMAGE_SIZE,
        seed=_PRETRAINING_SEED,
        style=style,
    )
    phases = dict.fromkeys(("max_steps", "cls_steps", "refined_steps"), steps)
    keys = _PRETRAINING | {f"schedule.{key}": value for key, value in phases.items()}
    keys |= {"data.root": str(root), "train.save_steps": max(1, steps // 2), "train.tensorboard": False}
    run = encoder.parent / "run"
    say(f"pretraining: {run}")
    config = load_config(None, keys, preset="demo")
    device = pick_device(config.train.device)
    data = open_data(config.data)
    resume = Run(run).exists
    with showing_progress(False):
        result = train(config, data, run, device=device, resume=resume)
    network: Any = result.network.cpu()
    partial = encoder.with_name("encoder.partial")
    network.backbone.encoder.save_pretrained(partial)
    partial.rename(encoder)
    return encoder


def run_of(row: Row, *, out: Path, encoder: Path, seed: int, steps: int) -> Path:
    """Train the run of a row, unless it exists already; returns its folder."""
    root = out / "data" / f"seed{seed}"
    write_shapes(root, num_train=NUM_TRAIN, num_val=NUM_VAL, image_size=IMAGE_SIZE, seed=seed)
    config = row_config(row.config, root=root, weights=str(encoder), seed=seed, steps=steps)
    run = encoder.parent / f"steps{steps}" / run_name(config) / f"seed{seed}"
    if not Run(run).report():
        say(f"table {row.table}, {row.name}, seed {seed}: {run}")
        train_and_report(config, run, resume=Run(run).exists, progress=False)
    return run


def score_of(row: Row, run: Path) -> float:
    """Percent mIoU of a row on the images for validation; kept in the run's folder."""
    plain = row.protocol == "single" and not row.refinement
    name = row.labels if plain else f"{row.labels}_{row.refinement or row.protocol}"
    figures = Run(run).scores(name)
    if not figures:
        keys: dict[str, Any] = {"pseudo.refinement": row.refinement} if row.refinement else {}
        root = Run(run).config().data.root
        result = evaluate(
            run, root, labels=row.labels, protocol=row.protocol, refine=bool(row.refinement), progress=False, **keys
        )
        figures = result.to_json()
        Run(run).write_scores(name, figures)
    return float(figures["miou"])


def mean_text(values: Sequence[float], form: str = ".1f") -> str:
    """Mean, and standard deviation where there is more than one value."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def table_text(scores: dict[Row, list[float]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| table | row | scored | paper | here | seeds |", "|---|---|---|---|---|---|"]
    for row, values in scores.items():
        scored = " ".join(word for word in (row.labels, row.refinement, row.protocol.removeprefix("single")) if word)
        lines.append(f"| {row.table} | {row.name} | {scored} | {row.paper} | {mean_text(values)} | {len(values)} |")
    return "\n".join(lines)


def orderings_text(scores: dict[Row, list[float]]) -> str:
    """The difference of the two rows for each ordering of the paper, as a Markdown table."""
    by_name = {(row.table, row.name): row for row in scores}
    lines = ["| table | ordering | paper | here, mean of seeds | seeds where it holds |", "|---|---|---|---|---|"]
    for table, better, worse in ORDERINGS:
        if (table, better) not in by_name:
            continue
        first, second = by_name[table, better], by_name[table, worse]
        gains = [one - other for one, other in zip(scores[first], scores[second], strict=True)]
        holds = f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
        paper = f"{first.paper - second.paper:+.1f}"
        lines.append(f"| {table} | {better} > {worse} | {paper} | {mean_text(gains, '+.1f')} | {holds} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), metavar="DIR", help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each row (default 3)")
    parser.add_argument("--steps", type=int, default=450, metavar="N", help="training steps of a run (default 450)")
    parser.add_argument(
        "--pretraining-steps", type=int, default=1500, metavar="N", help="of the encoder of all rows (default 1500)"
    )
    parser.add_argument("--tables", type=int, nargs="+", default=[1, 2, 3, 4, 5], metavar="N", help="which tables")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="threads of torch (default: all cores)")
    arguments = parser.parse_args(words)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = [row for row in ROWS if row.table in arguments.tables]
    scores: dict[Row, list[float]] = {row: [] for row in rows}
    try:
        encoder = pretrained_encoder(arguments.out, steps=arguments.pretraining_steps)
        # All rows of one seed come before the next seed, so that the finished rows compare whenever the script stops.
        for seed in range(arguments.seeds):
            for row in rows:
                run = run_of(row, out=arguments.out, encoder=encoder, seed=seed, steps=arguments.steps)
                scores[row].append(score_of(row, run))
            text = f"{table_text(scores)}\n\n{orderings_text(scores)}"
            (arguments.out / "table.md").write_text(text + "\n", encoding="utf-8")
    except AfaError as error:
        print(f"bench/ablations.py: {error}", file=sys.stderr)
        return 1
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
