"""Trained networks as folders that can be passed on: saved, loaded again, and exchanged through the Hugging Face hub.

A folder holds model.safetensors, config.json, preprocessor_config.json and a model card. Pickled weights are never
read. Files for other programs are up to `afa.inference.onnx`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import huggingface_hub
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from afa import __version__
from afa.config import Config, config_from_dict, config_to_dict
from afa.errors import AfaError, first_line
from afa.inference.model_card import is_hub_id, model_card, read_figures
from afa.model.weights import load_weights
from afa.runs.network import LoadedRun, build_network, load_run
from afa.runs.run import Run
from afa.types import IMAGE_MEAN, IMAGE_STD

FORMAT: Final = 1
"""Version of the layout of config.json."""

_WEIGHTS: Final = "model.safetensors"
_CONFIG: Final = "config.json"
_PREPROCESSOR: Final = "preprocessor_config.json"
_CARD: Final = "README.md"
_FILES: Final = (_WEIGHTS, _PREPROCESSOR, _CARD, _CONFIG)
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MAX_CLASSES: Final = 254


def save_pretrained(source: str | Path | LoadedRun, folder: str | Path) -> Path:
    """Write a trained network as a folder that `load_pretrained` reads, model card included.

    Paths of this machine stay out of it: of the data set and of initial weights only the last part is kept.

    Args:
        source: Run folder, folder written by this function, or hub id; or what was loaded of one. The figures of the
            card are read there.
        folder: Folder to write; made if absent. What an earlier call wrote there is replaced.

    Raises:
        AfaError: The source cannot be loaded; the folder holds something else or cannot be written.
    """
    folder = Path(folder)
    if not isinstance(source, LoadedRun):
        source = load_pretrained(source, torch.device("cpu"))
    _check_free(folder)
    config, figures = _without_paths(source.config), _figures(source.origin)
    texts = {
        _CARD: model_card(config, source.classes, figures, title=folder.resolve().name),
        _PREPROCESSOR: _to_json(_preprocessing(config)),
        _CONFIG: _to_json(_description(config, source.classes, figures)),
    }
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in source.network.state_dict().items()}
    partial = folder.with_name(f".partial_{folder.name}")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        save_file(state, partial / _WEIGHTS, metadata={"format": "pt"})
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        folder.mkdir(parents=True, exist_ok=True)
        # config.json comes last: if it exists, everything else exists.
        for name in (_WEIGHTS, *texts):
            (partial / name).replace(folder / name)
    except (OSError, SafetensorError) as error:
        reason = first_line(error)
        raise AfaError(f"{folder}: cannot be written ({reason}); free space or choose another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def find_pretrained(source: str | Path) -> Path:
    """The local folder of a trained network, fetched from the hub if `source` is not a folder but a hub id.

    Raises:
        AfaError: Neither a folder nor a hub id, or the hub cannot be reached or has no such model.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not isinstance(source, str) or not is_hub_id(source):
        raise AfaError(f"{source}: no such folder; pass a run, a folder of save_pretrained, or a hub id OWNER/NAME")
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=list(_FILES)))
    except Exception as error:
        raise AfaError(
            f"{source}: not a run folder, and cannot be fetched from the Hugging Face hub "
            f"({first_line(error)}); pass the --out of afa train, or download it elsewhere and pass its folder"
        ) from None


def load_pretrained(source: str | Path, device: torch.device) -> LoadedRun:
    """Load a trained network, in evaluation mode, from a folder of `save_pretrained`, a hub id or a run folder.

    Raises:
        AfaError: As `find_pretrained`; a file is missing, broken, of another library or a newer afa; the weights are
            pickled, broken or of another network.
    """
    folder = find_pretrained(source)
    if Run(folder).exists:
        return load_run(folder, device)
    description = _read_description(folder)
    classes = _read_classes(folder / _CONFIG, description)
    _check_preprocessor(folder / _PREPROCESSOR)
    config = config_from_dict(description["config"], origin=str(folder / _CONFIG))
    if not (folder / _WEIGHTS).is_file():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        found = f"only {pickled[0]}, a pickle, which can run code and is never loaded" if pickled else "no weights"
        raise AfaError(f"{folder}: holds {found}; afa reads {_WEIGHTS}: write it with save_pretrained")
    network = build_network(config.model, len(classes), pretrained=False)
    load_weights(network, folder / _WEIGHTS)
    return LoadedRun(network.to(device).eval(), config, classes, folder)


def push_to_hub(source: str | Path | LoadedRun, repo_id: str, *, private: bool = False) -> str:
    """Publish a trained network on the Hugging Face hub, and return its address.

    The account is the one that `hf auth login` or HF_TOKEN names.

    Args:
        source: As for `save_pretrained`.
        repo_id: OWNER/NAME of the model; made if absent.
        private: Only the owner can see it. An existing public model is then refused.

    Raises:
        AfaError: As `save_pretrained`; the id is malformed; the hub cannot be reached or refuses.
    """
    if not is_hub_id(repo_id):
        raise AfaError(f"{repo_id!r} is no hub id; write OWNER/NAME")
    with tempfile.TemporaryDirectory() as place:
        folder = save_pretrained(source, Path(place) / repo_id.rpartition("/")[2])
        try:
            api = huggingface_hub.HfApi()
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.repo_info(repo_id).private:
                raise AfaError(
                    f"{repo_id}: is public on the hub already; make it private there, or push without private"
                )
            message = f"Upload a network trained with afa {__version__}"
            api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=list(_FILES), commit_message=message)
        except AfaError:
            raise
        except Exception as error:
            raise AfaError(
                f"{repo_id}: cannot be pushed to the Hugging Face hub ({first_line(error)}); "
                "check the connection and log in with `hf auth login`"
            ) from None
    return str(url)


def _check_free(folder: Path) -> None:
    """Refuse to write among the files of something else."""
    if Run(folder).exists:
        raise AfaError(f"{folder}: is a run folder; save into another one")
    if (folder / _CONFIG).is_file():
        _read_description(folder)
    if folder.exists() and not folder.is_dir():
        raise AfaError(f"{folder}: is a file; pass a folder")


def _description(config: Config, classes: Sequence[str], figures: dict[str, Any]) -> dict[str, Any]:
    """What config.json holds."""
    return {
        "library": "afa",
        "format": FORMAT,
        "afa_version": __version__,
        "architecture": config.model.backbone,
        "classes": list(classes),
        "protocol": config.evaluation.protocol,
        "config": config_to_dict(config),
        "figures": figures,
    }


def _preprocessing(config: Config) -> dict[str, Any]:
    """What preprocessor_config.json holds."""
    side = config.evaluation.short_side
    return {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
        "do_resize": side > 0,
        **({"size": {"shortest_edge": side}} if side else {}),
    }


def _to_json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _without_paths(config: Config) -> Config:
    """The configuration without what is true of one machine only."""
    data: dict[str, Any] = {
        f.name: Path(value).name
        for f in dataclasses.fields(config.data)
        if isinstance(value := getattr(config.data, f.name), str) and Path(value).is_absolute()
    }
    data["root"] = Path(config.data.root).resolve().name if config.data.root else ""
    model: dict[str, Any] = {
        key: Path(weights).name
        for key in ("weights", "second_weights")
        if (weights := getattr(config.model, key)) and (Path(weights).exists() or not is_hub_id(weights))
    }
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **data),
        model=dataclasses.replace(config.model, **model),
    )


def _figures(origin: Path) -> dict[str, Any]:
    """Figures for the card, from the run or from the folder that was saved of it."""
    if Run(origin).exists:
        return read_figures(origin)
    figures = _read_description(origin).get("figures")
    return figures if isinstance(figures, dict) else {}


def _read_description(folder: Path) -> dict[str, Any]:
    """config.json, checked to be ours."""
    path = folder / _CONFIG
    if not path.is_file():
        raise AfaError(f"{folder}: has no {_CONFIG}; pass a run, a folder of save_pretrained, or a hub id OWNER/NAME")
    description = _read_json(path)
    if description.get("library") != "afa":
        kind = description.get("model_type")
        what = f"a {kind!r} model of transformers" if isinstance(kind, str) else "of another library"
        raise AfaError(
            f"{path}: is {what}, not a network trained with afa; as initial weights pass it as model.weights"
        )
    if description.get("format") != FORMAT:
        raise AfaError(f"{path}: format is {description.get('format')!r}, this afa reads {FORMAT}; install a newer afa")
    if not isinstance(description.get("config"), dict):
        raise AfaError(f"{path}: has no object `config`; write it again with save_pretrained")
    return description


def _read_classes(path: Path, description: dict[str, Any]) -> tuple[str, ...]:
    classes = description.get("classes")
    if (
        not isinstance(classes, list)
        or not 1 <= len(classes) <= _MAX_CLASSES
        or len(set(map(str, classes))) != len(classes)
    ):
        raise AfaError(f"{path}: `classes` must list 1 to {_MAX_CLASSES} different names; write it again")
    for name in classes:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise AfaError(f"{path}: `classes` holds {name!r}; use printable texts of one line")
    return tuple(classes)


def _check_preprocessor(path: Path) -> None:
    if not path.is_file():
        return
    values = _read_json(path)
    for key, ours in (("image_mean", IMAGE_MEAN), ("image_std", IMAGE_STD)):
        if key in values and values[key] != list(ours):
            raise AfaError(f"{path}: {key} is {values[key]}, but afa normalizes with {list(ours)}; restore the file")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AfaError(f"{path}: not valid JSON ({first_line(error)}); write it again with save_pretrained") from None
    if not isinstance(value, dict):
        raise AfaError(f"{path}: holds {type(value).__name__}, not a JSON object; write it again with save_pretrained")
    return value
