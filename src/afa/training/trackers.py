"""Where the figures of a run go besides metrics.jsonl: TensorBoard, and the trackers that `train.trackers` names.

Each is its own library, imported when it is asked for. They are called in one thread of their own, so that a network
that stalls holds up no step; what fails there ends that tracker, not the training.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from afa.config import Config, config_to_dict
from afa.errors import AfaError, first_line
from afa.runs.run import Run
from afa.runtime import say

PROJECT: Final = "afa"
"""Project or experiment of the runs, where the environment of the tracker names no other."""


class TensorBoard:
    """Event files; the only one that draws precision-recall curves itself."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.id = ""
        self._writer = SummaryWriter(str(run.tensorboard))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Figures of a step, by name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """A picture of a step."""
        self._writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def tags(
        self, classes: Sequence[str], logits: NDArray[np.float32], targets: NDArray[np.float32], step: int
    ) -> None:
        """Precision and recall of the tags, of all classes together and of each that an image is tagged with."""
        scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
        columns = {name: (targets[:, i], scores[:, i]) for i, name in enumerate(classes)}
        for name, (present, found) in ({"all classes": (targets, scores)} | columns).items():
            if (present > 0).any():
                known = present >= 0
                self._writer.add_pr_curve(f"tags/{name}", present[known], found[known], step)

    def close(self, *, failed: bool) -> None:
        """Write what is held back; `failed` says how the run ended."""
        self._writer.close()


class _Wandb:
    def __init__(self, run: Run, config: dict[str, Any], resumed: str) -> None:
        self._library = import_module("wandb")
        self.id = resumed or uuid.uuid4().hex[:8]
        project, name = os.environ.get("WANDB_PROJECT", PROJECT), run.path.resolve().name
        self._run = self._library.init(
            project=project, name=name, id=self.id, resume="allow", dir=str(run.path), config=config
        )
        # A run that goes on repeats the steps since its checkpoint, which the library's own count would refuse.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self._run.log({name: self._library.Image(picture), "step": step})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Mlflow:
    def __init__(self, run: Run, config: dict[str, Any], resumed: str) -> None:
        self._library = import_module("mlflow")
        self._client = self._library.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        self.id = resumed
        if resumed:
            self._client.update_run(resumed, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self.id = self._client.create_run(number, run_name=run.path.resolve().name).info.run_id
        for section, keys in config.items():
            for key, value in keys.items() if isinstance(keys, dict) else ():
                self._client.log_param(self.id, f"{section}.{key}", str(value)[:500])

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        now, metric = int(time.time() * 1000), self._library.entities.Metric
        self._client.log_batch(self.id, metrics=[metric(name, value, now, step) for name, value in values.items()])

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self._client.log_image(self.id, picture, artifact_file=f"{name}/{step:08d}.png")

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


class _Trackio:
    def __init__(self, run: Run, config: dict[str, Any], resumed: str) -> None:
        self._library = import_module("trackio")
        self.id = resumed or f"{run.path.resolve().name}-{uuid.uuid4().hex[:6]}"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._run = self._library.init(project=project, name=self.id, resume="allow", config=config, embed=False)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self._run.log({name: self._library.Image(picture)}, step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish()


_OPENERS: Final[dict[str, Callable[[Run, dict[str, Any], str], Any]]] = {
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise an `AfaError` if a tracker's library is not installed."""
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name, such as the one that wandb writes
            raise AfaError(f"train.trackers names {name}, which is not installed; pip install {name}, or leave it out")


class Trackers:
    """All trackers of a run; only its main process has them.

    Args:
        run: Run folder; a run that goes on finds its trackers' ids there.
        config: Its `train` section says which; all of it is told to them.
        resumed: Go on with the trackers' runs of the folder.

    Raises:
        AfaError: A library is not installed, or does not start.
    """

    def __init__(self, run: Run, config: Config, *, resumed: bool) -> None:
        check_trackers(config.train.trackers)
        self._open: dict[str, Any] = {}
        ids = run.tracker_ids() if resumed else {}
        for name in config.train.trackers:
            try:
                self._open[name] = _OPENERS[name](run, config_to_dict(config), str(ids.get(name, "")))
            except Exception as error:  # whatever a library may raise
                for tracker in self._open.values():
                    with contextlib.suppress(Exception):
                        tracker.close(failed=True)
                raise AfaError(
                    f"{name} does not start ({_short_line(error)}); mend that, or leave it out of train.trackers"
                ) from None
        if self._open:
            run.write_tracker_ids(ids | {name: tracker.id for name, tracker in self._open.items()})
        if config.train.tensorboard:
            with contextlib.suppress(ImportError):  # it is not installed
                self._open["tensorboard"] = TensorBoard(run)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="afa-track")

    def tell(self, method: str, *values: Any) -> None:
        """Call `scalars`, `picture` or `tags` of the trackers that have it, in the order of the calls."""
        for name in list(self._open):
            self._pool.submit(self._call, name, method, *values)

    def close(self, *, failed: bool) -> None:
        """Hand over what is left."""
        for name in list(self._open):
            self._pool.submit(self._call, name, "close", failed=failed)
        self._pool.shutdown()

    def _call(self, name: str, method: str, *values: Any, **settings: Any) -> None:
        call = getattr(self._open.get(name), method, None)
        if call is None:
            return
        try:
            call(*values, **settings)
        except Exception as error:  # whatever a library may raise
            del self._open[name]
            say(f"warning: {name} gets no more figures ({_short_line(error)}); the training goes on without it")


def _short_line(error: Exception) -> str:
    line = first_line(error)
    return line if len(line) <= 200 else f"{line[:200]}..."
