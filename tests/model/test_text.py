"""Words become vectors: by tiny text encoders of transformers, and from files of embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from afa.config.schema import BACKGROUND_WORDS
from afa.data.classes import VOC_CLASSES
from afa.model.registry import build_backbone
from afa.model.text import WordEmbeddings, embed_words
from encoders import write_embeddings
from mistakes import refused

NAMES = ["cat", "potted plant", "sky-other", "grass", "kitten"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_embeddings(tmp_path / "words", NAMES, 32)


def embed(words: list[tuple[str, ...]], folder: Path | str, background: Any = ("sky", "grass")) -> WordEmbeddings:
    return embed_words(words, background, backbone="clip_mini", weights="", embeddings=str(folder))


def vectors(folder: Path) -> dict[str, torch.Tensor]:
    rows = normalize(load_file(folder / "embeddings.safetensors")["embeddings"], dim=1)
    return dict(zip(NAMES, rows, strict=True))


def test_names_are_looked_up_in_a_file(folder: Path) -> None:
    rows = vectors(folder)
    found = embed([("cat", "kitten"), ("Potted_Plant",)], folder, ("sky", "lava", "grass"))
    torch.testing.assert_close(found.classes[0], normalize(rows["cat"] + rows["kitten"], dim=0))
    torch.testing.assert_close(found.classes[1], rows["potted plant"])
    torch.testing.assert_close(found.background[0], rows["sky-other"])
    assert not found.background[1].any()  # no vector, so it never competes
    torch.testing.assert_close(found.background[2], rows["grass"])


def test_a_word_of_a_class_is_no_background(folder: Path) -> None:
    found = embed([("cat",), ("Grass",)], folder)
    assert found.background.any(1).tolist() == [True, False]
    with refused("model.background_words", "add some"):
        embed([("sky",), ("grass",)], folder)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([("cat", " ")], ("class 'cat'", "empty")),
        ([("cat",), ("CAT",)], ("'cat' and 'CAT'", "same words")),
        ([("cat",), ("cat",)], ("same words",)),
        ([("cat", "kitten"), ("kitten", "cat")], ("same words",)),
        ([("cta",)], ("no vector for 'cta'", "did you mean cat?", "model.text_embeddings")),
    ],
)
def test_words_that_are_no_good(folder: Path, words: Any, said: tuple[str, ...]) -> None:
    with refused(*said):
        embed(words, folder)


def break_folder(folder: Path, how: str) -> None:
    rows = torch.randn(len(NAMES), 32)
    if how == "missing":
        (folder / "names.json").unlink()
    elif how == "not json":
        (folder / "names.json").write_text("{")
    elif how == "no names":
        (folder / "names.json").write_text('{"names": 3}')
    elif how == "too few":
        (folder / "names.json").write_text('{"names": ["cat"]}')
    elif how == "broken":
        (folder / "embeddings.safetensors").write_bytes(b"x" * 20)
    elif how == "width":
        write_embeddings(folder, NAMES, 16)
    elif how == "zero":
        rows[2] = 0
        save_file({"embeddings": rows}, folder / "embeddings.safetensors")
    else:
        write_embeddings(folder, NAMES, 32, model="openai/clip-vit-large-patch14")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", ("names.json", "model.text_embeddings")),
        ("not json", ("cannot be read", "make the embeddings again")),
        ("no names", ("no list of names",)),
        ("too few", ("(5, 32) for 1 names",)),
        ("broken", ("cannot be read",)),
        ("width", ("vectors have 16 values", "clip_mini needs 32")),
        ("zero", ("zero or not finite",)),
        ("model", ("embeddings of openai/clip-vit-large-patch14", "not of clip_mini")),
    ],
)
def test_files_that_are_no_good(folder: Path, how: str, said: tuple[str, ...]) -> None:
    break_folder(folder, how)
    with refused(str(folder), *said):
        embed([("cat",)], folder)


# --- Text encoders -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny text encoder of CLIP and its tokenizer, which knows letters alone."""
    folder = tmp_path_factory.mktemp("tower")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=32, max_position_embeddings=40, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.CLIPTextModelWithProjection(config).save_pretrained(folder)
    return folder


def speak(words: list[tuple[str, ...]], tower: Path, **settings: Any) -> WordEmbeddings:
    return embed_words(words, ("sky",), backbone="clip_mini", weights=str(tower), **settings)


def test_a_text_encoder_says_the_words(tower: Path) -> None:
    templates = ("a photo of a {}", "the {}")
    found = speak([("cat", "kit_ten"), ("dog",)], tower, templates=templates)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tower)
    encoder = transformers.CLIPTextModelWithProjection.from_pretrained(tower).eval()

    def vector(word: str) -> torch.Tensor:
        rows = []
        for template in templates:
            tokens = tokenizer(template.format(word), return_tensors="pt")
            with torch.no_grad():
                rows.append(normalize(encoder(**tokens).text_embeds[0], dim=0))
        return normalize(torch.stack(rows).mean(0), dim=0)

    expected = normalize(vector("cat") + vector("kit ten"), dim=0)
    torch.testing.assert_close(found.classes[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.classes[1], vector("dog"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.background[0], vector("sky"), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole tiny SigLIP and the tokenizer of its second version, which knows letters alone."""
    folder = tmp_path_factory.mktemp("siglip")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocab = {
        token: number for number, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *letters])
    }
    transformers.Siglip2Tokenizer(vocab=vocab, padding_side="right").save_pretrained(folder)
    torch.manual_seed(0)
    tiny = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {"vocab_size": len(vocab), "max_position_embeddings": 24, "projection_size": 64}
    config = transformers.SiglipConfig(
        text_config=tiny | text, vision_config=tiny | {"patch_size": 8, "image_size": 64}
    )
    transformers.SiglipModel(config).save_pretrained(folder)
    return folder


def test_siglip_says_and_sees_the_words_of_one_folder(siglip: Path) -> None:
    """Texts in lower case, padded to the full length, without a mask: as it was trained."""
    found = embed_words([("Cat",), ("dog",)], ("sky",), backbone="siglip_mini", weights=str(siglip))
    whole = transformers.SiglipModel.from_pretrained(siglip).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(siglip)(
        ["a photo of a cat", "a photo of a dog", "a photo of a sky"], padding="max_length", max_length=24,
        return_tensors="pt",
    )["input_ids"]  # fmt: skip
    assert tokens.shape == (3, 24)
    image = torch.randn(1, 3, 8, 8)
    backbone = build_backbone("siglip_mini", str(siglip), language=True, attention_blocks=1).eval()
    with torch.no_grad():
        output = whole(
            input_ids=tokens, pixel_values=image * backbone.image_scale + backbone.image_shift,
            interpolate_pos_encoding=True,
        )  # fmt: skip
        seen = backbone(image).features[-1][0, :, 0, 0]
    torch.testing.assert_close(found.classes, output.text_embeds[:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.background, output.text_embeds[2:], rtol=1e-4, atol=1e-5)
    # An image of one token: the cosines of the whole model, before its factor and its bias.
    cosines = (output.logits_per_image[0] - whole.logit_bias) / whole.logit_scale.exp()
    torch.testing.assert_close(seen @ torch.cat([found.classes, found.background]).T, cosines, rtol=1e-4, atol=1e-5)


def test_words_that_siglip_cannot_say(siglip: Path) -> None:
    for word, said in (("x" * 60, ("tokens, the text encoder takes 24", "shorter")), (" ", ("empty",))):
        with refused(*said):
            embed_words([(word,)], ("sky",), backbone="siglip_mini", weights=str(siglip))
    with refused("embeddings of google/siglip-base-patch16-224, not of google/siglip2-base-patch16-224"):
        folder = write_embeddings(siglip / "words", NAMES, 768, model="google/siglip-base-patch16-224")
        embed_words([("cat",)], ("sky",), backbone="siglip2_b16", weights="", embeddings=str(folder))


def test_a_word_that_is_too_long(tower: Path) -> None:
    with refused("tokens, the text encoder takes 40", "shorter"):
        speak([("x" * 60,)], tower)


def test_an_encoder_without_text(tmp_path: Path) -> None:
    transformers.CLIPVisionConfig().save_pretrained(tmp_path)
    for weights in (tmp_path, ""):
        with refused("model.text_embeddings FOLDER"):
            embed_words([("cat",)], ("sky",), backbone="clip_mini", weights=str(weights))


def test_a_text_encoder_without_its_tokenizer(tower: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tower / name).read_bytes())
    with refused("tokenizer", "model.text_embeddings FOLDER"):
        embed_words([("cat",)], ("sky",), backbone="clip_mini", weights=str(tmp_path))


@pytest.mark.data
def test_the_embeddings_of_clip_have_the_classes_of_voc_and_the_background(shared_dir: Path) -> None:
    folder = shared_dir / "weights" / "clip-vit-base-patch16-text"
    found = embed_words(
        [(name,) for name in VOC_CLASSES], BACKGROUND_WORDS, backbone="clip_b16", weights="", embeddings=str(folder)
    )
    assert found.classes.shape == (20, 512)
    assert found.background.any(1).all()
    stored = load_file(folder / "embeddings.safetensors")["embeddings"].float()
    torch.testing.assert_close(found.classes, stored[:20], rtol=1e-3, atol=1e-3)
