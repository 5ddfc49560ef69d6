"""Feature maps in the space of a text encoder, and class scores from them, against transformers and plain sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, normalize

from afa.model.language import LanguageBackbone, TextClassifier, agreement_walk
from afa.model.network import AfaNetwork
from afa.model.registry import build_backbone
from encoders import load_eager, random_backbone, random_image
from mistakes import refused

SIZE = (40, 57)
GRID = (5, 8)


def language_backbone(**settings: Any) -> Any:
    return random_backbone("clip_mini", language=True, **{"attention_blocks": 1} | settings)


def eager_states(backbone: Any, image: Tensor) -> tuple[Any, Any]:
    """transformers' own model, and its output with all hidden states and attention of every block."""
    eager = load_eager(backbone)
    pixels = torch.nn.functional.interpolate(image, size=(40, 64), mode="bilinear")
    pixels = pixels * backbone.image_scale + backbone.image_shift
    with torch.no_grad():
        return eager, eager(pixels, interpolate_pos_encoding=True, output_hidden_states=True, output_attentions=True)


def heads(tokens: Tensor) -> Tensor:
    return tokens.view(*tokens.shape[:2], 4, 16).transpose(1, 2)


def test_output_is_what_the_blocks_of_transformers_say() -> None:
    backbone = language_backbone(attention_blocks=2)
    image = random_image(SIZE)
    eager, output = eager_states(backbone, image)
    with torch.no_grad():
        found = backbone(image, attention=True)
    assert backbone.levels == (2, 3, 4)
    assert [tuple(feature.shape) for feature in found.features] == [(2, 64, *GRID)] * 3 + [(2, 32, *GRID)]
    states = output.hidden_states
    for level, feature in zip(backbone.levels, found.features, strict=False):
        torch.testing.assert_close(feature.flatten(2).mT, layer_norm(states[level][:, 1:], (64,)), rtol=1e-4, atol=1e-4)
    # Four blocks: the three before the last one agree.
    agreement = torch.stack([attention.mean(1)[:, 1:, 1:] for attention in output.attentions[:3]]).mean(0)
    torch.testing.assert_close(found.agreement, agreement, rtol=1e-4, atol=1e-5)
    block = eager.encoder.layers[3]
    tokens = block.layer_norm1(states[3])
    q, k, v = (heads(getattr(block.self_attn, f"{part}_proj")(tokens)) for part in "qkv")
    maps = [(each @ each.mT / 4).softmax(-1) for each in (q, k)]
    one = ((maps[0] + maps[1]) / 2 @ v)[:, :, 1:]
    two = (agreement / agreement.sum(-1, keepdim=True))[:, None] @ v[:, :, 1:]
    parts = []
    for gathered in (one, two):
        joined = block.self_attn.out_proj(gathered.transpose(1, 2).flatten(2))
        parts.append(normalize(backbone.projection(eager.post_layernorm(joined)), dim=-1))
    torch.testing.assert_close(found.features[-1].flatten(2).mT, sum(parts) / 2, rtol=1e-4, atol=1e-4)
    for number, level in enumerate((2, 3)):
        block = eager.encoder.layers[level]
        tokens = block.layer_norm1(states[level])[:, 1:]
        for name, part in (("q_proj", found.attention.query), ("k_proj", found.attention.key)):
            expected = heads(getattr(block.self_attn, name)(tokens))
            torch.testing.assert_close(part[:, 4 * number : 4 * number + 4], expected, rtol=1e-3, atol=1e-3)


def test_siglip_pools_tokens_one_by_one() -> None:
    """Its own head over one token at a time says what that token shows."""
    backbone = random_backbone("siglip_mini", language=True, attention_blocks=1)
    eager = load_eager(backbone)
    image = random_image((40, 64))
    with torch.no_grad():
        found = backbone(image, attention=True)
        pixels = image * backbone.image_scale + backbone.image_shift
        output = eager(pixels, interpolate_pos_encoding=True, output_hidden_states=True, output_attentions=True)
        agreement = torch.stack([attention.mean(1) for attention in output.attentions[:3]]).mean(0)
        tokens = output.last_hidden_state  # (2, 40, 64)
        gathered = agreement / agreement.sum(-1, keepdim=True) @ tokens
        one, two = (eager.head(each.reshape(-1, 1, 64)).view(2, -1, 64) for each in (tokens, gathered))
    torch.testing.assert_close(found.agreement, agreement, rtol=1e-4, atol=1e-5)
    expected = (normalize(one, dim=-1) + normalize(two, dim=-1)) / 2
    torch.testing.assert_close(found.features[-1].flatten(2).mT, expected, rtol=1e-4, atol=1e-4)
    for level, feature in zip(backbone.levels[:-1], found.features, strict=False):
        states = layer_norm(output.hidden_states[level], (64,))
        torch.testing.assert_close(feature.flatten(2).mT, states, rtol=1e-4, atol=1e-4)
    # Of an image of one token, this is what transformers gives as the vector of the image.
    with torch.no_grad():
        small = random_image((8, 8))
        pooled = eager(small * backbone.image_scale + backbone.image_shift, interpolate_pos_encoding=True).pooler_output
        torch.testing.assert_close(backbone(small).features[-1][:, :, 0, 0], normalize(pooled), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [0, 4])
def test_every_parameter_of_siglip_learns_or_is_frozen(frozen: int) -> None:
    backbone = random_backbone("siglip_mini", language=True, attention_blocks=1, freeze_blocks=frozen).train()
    output = backbone(random_image(SIZE), attention=True)
    if frozen:
        assert not any(feature.requires_grad for feature in output.features)
        assert not any(parameter.requires_grad for parameter in backbone.parameters())
    else:
        sum(feature.square().mean() + feature[:, 0].mean() for feature in output.features).backward()
        assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_mirrored_images_give_mirrored_maps_of_agreement_shape() -> None:
    backbone = language_backbone()
    output = backbone(random_image((64, 64)))
    assert output.attention is None
    assert output.agreement.shape == (2, 64, 64)
    torch.testing.assert_close(output.features[-1].norm(dim=1).clamp(max=1), output.features[-1].norm(dim=1))


@pytest.mark.parametrize("frozen", [0, 2, 4])
def test_what_is_frozen_does_not_learn(frozen: int) -> None:
    backbone = language_backbone(freeze_blocks=frozen).train()
    output = backbone(random_image(SIZE), attention=True)
    learns = [feature.requires_grad for feature in output.features]
    assert learns == {0: [True] * 4, 2: [False, True, True, True], 4: [False] * 4}[frozen]
    free = language_backbone()(random_image(SIZE))
    for feature, expected in zip(output.features, free.features, strict=True):
        torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-4)


def test_classifier_is_a_softmax_over_one_class_and_the_background() -> None:
    generator = torch.Generator().manual_seed(0)
    classes, background = (normalize(torch.randn(n, 6, generator=generator), dim=1) for n in (3, 4))
    background = torch.cat([background, torch.zeros(2, 6)])  # two words without a vector
    language = 0.2 * torch.randn(2, 6, 2, 3, generator=generator)
    agreement = torch.rand(2, 6, 6, generator=generator)
    text = TextClassifier(classes, background, sharpness=7.0)
    logits = text(language)
    scores = text.scores(logits, agreement)
    for image in range(2):
        walk = naive_walk(agreement[image])
        for place in range(6):
            vector = language[image].reshape(6, 6)[:, place]
            words = [7 * float(vector @ word) for word in background[:4]]
            for number in range(3):
                own = 7 * float(vector @ classes[number])
                share = torch.tensor([own, *words]).softmax(0)[0]
                found = logits[image, number].reshape(-1)[place].sigmoid()
                torch.testing.assert_close(found, share, rtol=1e-4, atol=1e-5)
        probabilities = logits[image].sigmoid().reshape(3, 6)
        torch.testing.assert_close(scores[image].reshape(3, 6), probabilities @ walk.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(agreement_walk(agreement).sum(2), torch.ones(2, 6))


def naive_walk(agreement: Tensor) -> Tensor:
    weights = agreement**2
    weights = weights / weights.sum(0)[None]
    weights = weights / weights.sum(1)[:, None]
    weights = (weights + weights.T) / 2
    twice = weights @ weights
    return twice / twice.sum(1)[:, None]


def test_network_adds_what_the_words_say_to_the_segmentation() -> None:
    torch.manual_seed(0)
    text = TextClassifier(*(normalize(torch.randn(n, 32), dim=1) for n in (3, 4)))
    network = AfaNetwork(language_backbone(freeze_blocks=4), 3, decoder_width=8, text=text).eval()
    image = random_image(SIZE)
    output = network(image)
    features = network.backbone(image).features
    words = text(features[-1])
    expected = network.decoder(features) + network.text_gain * torch.cat([torch.zeros(2, 1, *GRID), words], 1)
    torch.testing.assert_close(output.seg_logits, expected)
    torch.testing.assert_close(network.segment(image), expected)
    torch.testing.assert_close(output.image_logits, words.amax((2, 3)))
    assert not output.class_scores.requires_grad
    kept = network.encode(image)
    for mine, other in ((network(kept), output), (network.score(kept, True), network.score(image, True))):
        torch.testing.assert_close(mine.class_scores, other.class_scores)
        torch.testing.assert_close(mine.image_logits, other.image_logits)
        torch.testing.assert_close(mine.affinity, other.affinity)
    output.seg_logits.square().mean().backward()
    assert network.text_gain.grad is not None


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("dinov2_tiny", {}, ("model.backbone is 'dinov2_tiny'", "clip_b16")),
        ("mit_tiny", {}, ("model.backbone is 'mit_tiny'", "model.classifier")),
        ("clip_mini", {"feature_levels": 2}, ("model.feature_levels is 2", "3 or more")),
        ("clip_mini", {"attention_blocks": 3}, ("model.affinity_blocks is 3", "at most that many")),
    ],
)
def test_mistakes(name: str, settings: dict[str, Any], words: tuple[str, ...]) -> None:
    with refused(*words):
        build_backbone(name, language=True, **settings)


def test_is_a_language_backbone() -> None:
    assert isinstance(language_backbone(), LanguageBackbone)
