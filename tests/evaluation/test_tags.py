"""F1 of tags against scikit-learn's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from afa.config import load_config
from afa.data.dataset import TaggedImages
from afa.data.open import open_data
from afa.errors import AfaError
from afa.evaluation import tags as evaluation_tags
from afa.evaluation.evaluate import evaluate, first_images
from afa.evaluation.protocols import logit_maps
from afa.evaluation.tags import TagResult, evaluate_tags
from afa.model.network import AfaNetwork
from afa.runs.network import build_network
from tiny import tiny_config


@pytest.fixture(scope="module")
def network(tiny_data: Path) -> AfaNetwork:
    torch.manual_seed(0)
    return build_network(tiny_config(tiny_data).model, 5)


def score(network: AfaNetwork, root: Path, protocol: Any = "single", limit: int | None = None) -> TagResult:
    config = tiny_config(root)
    images = first_images(open_data(config.data).validation(), limit)
    config = replace(config, evaluation=replace(config.evaluation, protocol=protocol))
    return evaluate_tags(network, images, config)


def test_it_is_the_f1_of_scikit_learn(network: AfaNetwork, tiny_data: Path) -> None:
    config = tiny_config(tiny_data)
    images = open_data(config.data).validation()
    network.eval()
    found = []
    with torch.inference_mode():
        for index in range(len(images)):
            (maps,) = logit_maps(network, [images.image(index)], config)
            found.append((maps.image > 0).numpy())
    true = np.stack([images.tags(index) > 0 for index in range(len(images))])
    network.train()
    result = score(network, tiny_data)
    assert network.training
    assert result.tag_f1 == pytest.approx(100 * f1_score(true, np.stack(found), average="micro"))
    each = f1_score(true, np.stack(found), average=None, zero_division=np.nan)
    assert [np.nan if f1 is None else f1 for f1 in result.per_class.values()] == pytest.approx(100 * each, nan_ok=True)
    assert list(result.per_class) == list(images.classes)


def test_it_is_the_tag_f1_of_the_evaluation_with_masks(network: AfaNetwork, tiny_data: Path) -> None:
    config = tiny_config(tiny_data)
    scored = open_data(config.data).masked()
    whole = evaluate(network, scored, config)
    assert score(network, tiny_data).tag_f1 == pytest.approx(whole.extras["tag_f1"])


def test_limit_protocol_and_json(network: AfaNetwork, tiny_data: Path) -> None:
    result = score(network, tiny_data, limit=2, protocol="multiscale+crf")
    figures = result.to_json()
    assert (figures["num_images"], figures["protocol"], figures["miou"]) == (2, "multiscale", None)
    assert figures["tag_f1"] == round(result.tag_f1 or 0, 2)


def test_mistakes(network: AfaNetwork, tiny_data: Path) -> None:
    config = load_config(None, {"data.root": str(tiny_data), "data.class_subset": "disk,ring"}, preset="demo")
    with pytest.raises(AfaError, match=r"protocol is 'best'"):
        score(network, tiny_data, protocol="best")
    few = TaggedImages(classes=("disk", "ring"), names=(), paths=(), tags=np.zeros((0, 2), dtype=bool))
    with pytest.raises(AfaError, match=r"network has 5 .*data set 2"):
        evaluate_tags(network, few, config)
    assert evaluation_tags._f1(0, 0) is None
