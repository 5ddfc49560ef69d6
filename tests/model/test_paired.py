"""Two encoders side by side give what each gives alone, on the grid of the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import interpolate, normalize

from afa.config import load_config
from afa.model.language import agreement_walk
from afa.model.network import AfaNetwork
from afa.model.paired import PairedBackbone, add_second, token_similarity
from afa.model.registry import build_backbone
from afa.runs.network import build_network
from encoders import random_backbone, random_image
from mistakes import refused

SIZE = (40, 57)


def pair(first: str = "clip_mini", second: str = "dinov2_tiny_reg", *, similarity: bool = False) -> PairedBackbone:
    language = {"language": True, "attention_blocks": 1} if first == "clip_mini" else {}
    both = PairedBackbone(
        random_backbone(first, **language),
        random_backbone(second, freeze_blocks=4, feature_levels=2),
        similarity=similarity,
    )
    both.freeze()
    return both.eval()


@pytest.mark.parametrize("first", ["clip_mini", "mit_tiny", "vit_mini"])
@pytest.mark.parametrize("second", ["dinov2_tiny_reg", "dinov3_mini", "siglip_mini"])
def test_levels_are_those_of_each_encoder(first: str, second: str) -> None:
    both, image = pair(first, second), random_image(SIZE)
    with torch.no_grad():
        found, alone = both(image, attention=True), both.first(image, attention=True)
        grid = alone.features[-1].shape[2:]
        more = both.second(interpolate(image, size=[8 * side for side in grid], mode="bilinear"))
    assert more.features[-1].shape[2:] == grid
    expected = [*alone.features[:-1], *more.features, alone.features[-1]]
    assert [feature.shape[1] for feature in expected] == list(both.channels)
    assert [-(-57 // stride) for stride in both.strides] == [feature.shape[3] for feature in expected]
    for feature, other in zip(found.features, expected, strict=True):
        torch.testing.assert_close(feature, other)
    torch.testing.assert_close(found.attention_logits, alone.attention_logits)
    assert found.attention_logits.shape[1] == both.num_attention_maps


def test_patches_of_14_pixels_beside_patches_of_8() -> None:
    torch.manual_seed(0)
    second = build_backbone("dinov2_small", freeze_blocks=12, feature_levels=1)
    both, image = PairedBackbone(random_backbone("vit_mini"), second).eval(), random_image(SIZE, batch=1)
    with torch.no_grad():
        found = both(image).features
        # Shown at 14 pixels a token, it has the tokens of the first encoder: five by eight.
        expected = second(interpolate(image, size=(70, 112), mode="bilinear")).features[-1]
    assert [feature.shape[2:] for feature in found] == [(5, 8)] * 5
    torch.testing.assert_close(found[3], expected)


def test_the_second_never_learns() -> None:
    both = pair("vit_mini").train()
    assert not both.second.training
    assert both.first.training
    network = AfaNetwork(both, 3, decoder_width=8)
    network(random_image(SIZE)).seg_logits.square().mean().backward()
    assert all(parameter.grad is None for parameter in both.second.parameters())
    assert next(both.first.parameters()).grad is not None
    first, second = ({id(p) for m in part.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters()}
                     for part in (both.first, both.second))  # fmt: skip
    norms = {id(parameter) for parameter in both.norm_parameters()}
    assert norms == first
    assert not norms & second
    hashed = both.weights_hash()
    next(both.second.parameters()).data.add_(1)
    assert both.weights_hash() != hashed


def test_similarity_is_a_softmax_over_what_is_alike() -> None:
    feature = torch.randn(2, 5, 2, 3, generator=torch.Generator().manual_seed(0))
    found = token_similarity(feature)
    for image in range(2):
        tokens = normalize(feature[image].reshape(5, 6).T, dim=1)
        cosines = tokens @ tokens.T
        for row in range(6):
            logits = [3 * float(cosines[row, column] - 1.2 * cosines.mean()) for column in range(6)]
            weights = torch.tensor([value if value >= 0 else -torch.inf for value in logits]).softmax(0)
            torch.testing.assert_close(found[image, row], weights)
    # Tokens that are all alike attend to themselves alone, and nothing is NaN.
    torch.testing.assert_close(token_similarity(torch.ones(1, 5, 2, 3))[0], torch.eye(6))
    assert agreement_walk(token_similarity(torch.ones(1, 5, 2, 3))).isfinite().all()


@pytest.mark.parametrize("similarity", [False, True])
def test_class_scores_walk_along_one_of_the_encoders(similarity: bool) -> None:
    both, image = pair(similarity=similarity), random_image(SIZE)
    with torch.no_grad():
        found, alone = both(image), both.first(image)
    expected = token_similarity(found.features[-2]) if similarity else alone.agreement
    torch.testing.assert_close(found.agreement, expected)


def test_a_network_is_built_by_the_keys() -> None:
    keys = {"model.backbone": "vit_mini", "model.weights": "", "model.second_backbone": "dinov2_tiny_reg"}
    model = load_config(None, keys | {"model.second_feature_levels": 2, "model.decoder_width": 8}).model
    network = build_network(model, 3)
    assert network.backbone.channels == (64,) * 6
    assert not any(parameter.requires_grad for parameter in network.backbone.second.parameters())
    assert network.segment(random_image(SIZE)).shape == (2, 4, 5, 8)


@pytest.mark.parametrize(
    ("name", "weights", "levels", "words"),
    [
        ("dinov2_tinny", None, 1, ("model.second_backbone is 'dinov2_tinny'", "did you mean dinov2_tiny")),
        ("mit_tiny", None, 1, ("model.second_backbone is mit_tiny", "plain vision transformer")),
        ("dinov2_tiny", None, 5, ("model.second_feature_levels is 5", "dinov2_tiny has 4 blocks")),
        ("dinov2_tiny", "nowhere/at/all", 1, ("nowhere/at/all: no such weights folder", "model.second_weights")),
    ],
)
def test_mistakes(name: str, weights: str | None, levels: int, words: tuple[str, ...]) -> None:
    with refused(*words):
        add_second(random_backbone("vit_mini"), name, weights, levels=levels, similarity=False)


def test_weights_of_another_encoder(tmp_path: Path) -> None:
    random_backbone("vit_mini").encoder.save_pretrained(tmp_path)
    with refused(tmp_path, "model.second_weights needs a DINOv2 encoder"):
        add_second(random_backbone("vit_mini"), "dinov2_tiny", str(tmp_path), levels=1, similarity=False)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"model.second_weights": "some/where"}, ("model.second_weights is some/where", "model.second_backbone")),
        ({"model.second_similarity": True}, ("model.second_similarity is true", "model.second_backbone is empty")),
        (
            {"model.second_similarity": True, "model.second_backbone": "dinov2_tiny"},
            ("model.second_similarity is true", "model.classifier is learned", "text"),
        ),
    ],
)
def test_keys_that_contradict_each_other(keys: dict[str, Any], words: tuple[str, ...]) -> None:
    with refused(*words):
        load_config(None, keys)
