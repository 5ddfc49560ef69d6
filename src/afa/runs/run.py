"""The folder of a run. Only this module knows the names of its files, which docs/interfaces.md promises."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import msgspec

from afa.config import Config, config_to_toml, load_config
from afa.errors import AfaError
from afa.runs.files import write_whole


@dataclass(frozen=True)
class ImageScore:
    """How well an image was segmented.

    Attributes:
        image: Its name.
        iou: Percent, mean over the classes that its mask has, background included; None where its mask has none.
        accuracy: Percent of its pixels that are right; None as `iou`.
        truth: Class of the most frequent confusion, empty where all is right.
        prediction: What that class was taken for.
        share: Percent of the pixels that are so confused.
    """

    image: str
    iou: float | None
    accuracy: float | None
    truth: str
    prediction: str
    share: float | None


class Run:
    """A run folder, there or not yet: where its files lie, what they hold, and how they are written."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.data = self.path / "data"  # of the demo
        self.checkpoints = self.path / "checkpoints"
        self.examples = self.path / "examples"
        self.worst = self.path / "worst"  # more examples, of runs with masks
        self.best = self.path / "best"
        self.uncertain = self.path / "uncertain"  # and of those without
        self.thresholds = self.path / "thresholds"
        self.figures = self.path / "figures"
        self.features = self.path / "features"
        self.pixels = self.path / "pixels"  # of large images
        self.tensorboard = self.path / "tensorboard"
        self.weights = self.path / "model.safetensors"
        self.page = self.path / "report.html"
        self._config = self.path / "config.toml"
        self._classes = self.path / "classes.txt"
        self._metrics = self.path / "metrics.jsonl"
        self._environment = self.path / "environment.json"
        self._evaluation = self.path / "evaluation"
        self._trackers = self.path / "trackers.json"
        self._worth = self.path / "worth.json"
        self._report = self.path / "report.json"

    def __str__(self) -> str:
        return str(self.path)

    # --- Configuration and classes ---

    @property
    def exists(self) -> bool:
        """Whether a run was started in the folder."""
        return self._config.is_file()

    @property
    def is_complete(self) -> bool:
        """Whether the final weights are written."""
        return self.weights.is_file()

    @classmethod
    def of_config(cls, file: str | Path) -> Run | None:
        """The run whose stored configuration a file is; None for any other file."""
        run = cls(Path(file).parent)
        is_stored = Path(file).name == run._config.name and run.has_classes
        return run if is_stored and (run.is_complete or run.latest_checkpoint() is not None) else None

    def start(self, config: Config, classes: Sequence[str]) -> None:
        """Write the resolved configuration and the C class names in index order; the folder is a run from then on."""
        write_whole(self._classes, "".join(f"{name}\n" for name in classes), durable=True)
        write_whole(self._config, config_to_toml(config), durable=True)

    def config(self, overrides: Mapping[str, Any] | None = None) -> Config:
        """The configuration that was resolved when the run was started, under dotted keys that win.

        Raises:
            AfaError: Not a run folder; the file is empty; as `load_config`.
        """
        if not self.exists:
            raise self._no_run()
        if not self._config.read_bytes().strip():
            raise AfaError(f"{self._config}: is empty; restore it or train again")
        return load_config(self._config, overrides, stored=True)

    @property
    def has_classes(self) -> bool:
        """Whether the folder lists its classes."""
        return self._classes.is_file()

    def classes(self) -> tuple[str, ...]:
        """Names of the C foreground classes, in index order.

        Raises:
            AfaError: Not a run folder; the list is no text in UTF-8, or empty.
        """
        if not self.exists or not self.has_classes:
            raise self._no_run()
        try:
            names = tuple(self._classes.read_text(encoding="utf-8").splitlines())
        except UnicodeDecodeError:
            raise AfaError(f"{self._classes}: not a text file in UTF-8; restore it or train again") from None
        if not names:
            raise AfaError(f"{self._classes}: lists no class; restore it or train again")
        return names

    def _no_run(self) -> AfaError:
        names = f"{self._config.name} and {self._classes.name}"
        return AfaError(f"{self}: not a run folder (no {names}); pass the --out of afa train")

    # --- Weights ---

    def newest_weights(self) -> Path:
        """The final weights, or those of the newest checkpoint.

        Raises:
            AfaError: The run has none yet.
        """
        if self.is_complete:
            return self.weights
        latest = self.latest_file
        if latest.is_file():
            weights = self.weights_of(self.checkpoints / latest.read_text().strip())
            if weights.is_file():
                return weights
        raise AfaError(f"{self}: has no weights yet (neither {self.weights.name} nor a checkpoint); train it first")

    @property
    def latest_file(self) -> Path:
        """File with the name of the newest checkpoint."""
        return self.checkpoints / "latest"

    @staticmethod
    def weights_of(checkpoint: Path) -> Path:
        """File of the weights in the folder of a checkpoint."""
        return checkpoint / "model.safetensors"

    @staticmethod
    def state_of(checkpoint: Path) -> Path:
        """File of the optimizer's state and the step in the folder of a checkpoint."""
        return checkpoint / "training_state.pt"

    def latest_checkpoint(self) -> Path | None:
        """Folder of the newest complete checkpoint, or None."""
        for folder in sorted(self.checkpoints.glob("step_*"), reverse=True):
            if self.weights_of(folder).is_file() and self.state_of(folder).is_file():
                return folder
        return None

    # --- Figures ---

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Append a line with `kind` and `step` to the log."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def write_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Replace the log."""
        write_whole(self._metrics, "".join(json.dumps(line) + "\n" for line in lines), durable=True)

    def metrics(self) -> list[dict[str, Any]]:
        """The log in the order of its steps.

        A killed run leaves a torn line and, once resumed, repeats the steps since its last checkpoint: what is not a
        JSON object with `kind` and `step` is skipped, and the last line of a step is the one kept.

        Returns:
            One dictionary a line; figures that are not finite are None. Empty when there is no log.
        """
        if not self._metrics.is_file():
            return []
        kept: dict[tuple[str, str, int], dict[str, Any]] = {}
        for text in self._metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text, parse_constant=lambda _: None)
            except json.JSONDecodeError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int) and "kind" in line:
                kept[(line["kind"], line.get("labels", ""), line["step"])] = line
        return sorted(kept.values(), key=lambda line: line["step"])

    def environment(self) -> dict[str, Any]:
        """Machine, versions and time of a finished training; empty before. Raises `AfaError` for a broken file."""
        return _read_object(self._environment)

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Write what `environment` reads."""
        _write_object(self._environment, environment)

    def scores(self, name: str) -> dict[str, Any]:
        """An evaluation: `seg`, `cam`, `propagated`, `tags`; empty if there is none. Raises `AfaError` if it is broken.

        What it holds: docs/interfaces.md.
        """
        return _read_figures(self._evaluation / f"{name}.json")

    def all_scores(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every evaluation and its file, whatever the file is called."""
        for path in sorted(self._evaluation.glob("*.json")):
            yield path, _read_figures(path)

    def write_scores(self, name: str, figures: Mapping[str, Any]) -> None:
        """Write what `scores` reads."""
        _write_object(self._evaluation / f"{name}.json", figures)

    def worth(self) -> dict[str, Any]:
        """What can be said of a result without masks; empty where there are some. Raises `AfaError` if it is broken."""
        return _read_object(self._worth)

    def write_worth(self, worth: Mapping[str, Any]) -> None:
        """Write what `worth` reads."""
        _write_object(self._worth, worth)

    def tracker_ids(self) -> dict[str, Any]:
        """The runs of trackers that this one is, by their names; raises `AfaError` if the file is broken."""
        return _read_object(self._trackers)

    def write_tracker_ids(self, ids: Mapping[str, str]) -> None:
        """Write what `tracker_ids` reads."""
        _write_object(self._trackers, ids)

    def report(self) -> dict[str, Any]:
        """The figures of the report; empty before it is written. Raises `AfaError` for a broken file."""
        return _read_object(self._report)

    def write_report(self, report: Mapping[str, Any], page: str) -> None:
        """Write the figures of the report and the page that shows them."""
        _write_object(self._report, report)
        write_whole(self.page, page, durable=True)


def _write_object(path: Path, value: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(value, indent=2) + "\n", durable=True)


class _Figures(TypedDict, total=False):
    """What an evaluation must hold if it has such a key."""

    labels: str
    protocol: str
    num_images: int
    seconds: float | None
    miou: float | None
    tag_f1: float | None
    boundary_iou: float | None
    per_class: dict[str, float | None]
    confusion: list[list[int]] | None
    images: list[ImageScore]


def _read_figures(path: Path) -> dict[str, Any]:
    """An evaluation: a JSON object as `_Figures` says."""
    figures = _read_object(path)
    try:
        confusion: Sequence[Sequence[int]] = msgspec.convert(figures, _Figures).get("confusion") or ()
    except msgspec.ValidationError:
        confusion = ([],)
    if any(len(row) != len(confusion) for row in confusion):
        raise AfaError(f"{path}: not what afa evaluate --json writes; write it again or delete it")
    return figures


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object, numbers that are not finite as None; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise AfaError(f"{path}: not valid JSON ({error}); write it again or delete it") from None
    if not isinstance(value, dict):
        raise AfaError(f"{path}: holds {type(value).__name__}, not a JSON object; write it again or delete it")
    return value
