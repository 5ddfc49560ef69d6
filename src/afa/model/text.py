"""Words become vectors: by the text encoder that belongs to an image encoder, or from a file of embeddings."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from afa.errors import AfaError, first_line, quiet, shown
from afa.model.families import TOKEN_FAMILIES, TOKEN_SIZES
from afa.runtime import image_progress

_VECTORS, _NAMES = "embeddings.safetensors", "names.json"
_MANY: Final = 1000  # sentences that take long enough to show progress
_SUFFIX: Final = re.compile(r"[- _](other|stuff)$")
"""COCO-Stuff writes `sky-other` for the sky."""


@dataclass(frozen=True)
class WordEmbeddings:
    """Vectors of unit length.

    Attributes:
        classes: (C, E) of the classes.
        background: (W, E) of the background words; zeros for words without a vector, and for words of a class.
    """

    classes: Tensor
    background: Tensor


def embed_words(
    words: Sequence[Sequence[str]],
    background: Sequence[str],
    *,
    backbone: str,
    weights: str,
    embeddings: str = "",
    templates: Sequence[str] = ("a photo of a {}",),
    remedy: str = "state words that it has (classes.txt: NAME: WORD | WORD), or leave model.text_embeddings empty",
) -> WordEmbeddings:
    """Turn the words of classes and of the background into vectors.

    Args:
        words: For each class one word or several; their vectors are averaged.
        background: Words for what no class is; those of a class never compete with it.
        backbone: Name in `TOKEN_SIZES` of the image encoder that the vectors must fit.
        weights: Folder or hub id of the image encoder: its text encoder is used unless there is a file.
        embeddings: Folder with `embeddings.safetensors`, (N, E), and `names.json`; empty: none.
        templates: Sentences with {} in the place of the word, whose vectors are averaged; a file has its own.
        remedy: What to do about words that the file lacks, for the message.

    Raises:
        AfaError: A word is empty or longer than the text encoder takes; two classes have the same words; no background
            word is left; the encoder has no text encoder; the file is missing, broken, of another width or encoder, or
            lacks the word of a class.
    """
    seen: dict[frozenset[str], int] = {}
    for index, each in enumerate(words):
        if not each or not all(word.strip() for word in each):
            raise AfaError(
                f"class {shown(each[0] if each else '')}: one of its words is empty; write NAME: WORD | WORD"
            )
        other = seen.setdefault(frozenset(map(_folded, each)), index)
        if other != index:
            both = f"{words[other][0]!r} and {each[0]!r}"
            raise AfaError(f"classes {both} have the same words; state other words for one of them")
    own = {_folded(word) for each in words for word in each}
    free = [word for word in background if _folded(word) not in own]
    width = TOKEN_SIZES[backbone].language
    if embeddings:
        known = _read_file(Path(embeddings), backbone)
        missing = [word for each in words for word in each if _folded(word) not in known]
        if missing:
            near = difflib.get_close_matches(_folded(missing[0]), known, n=3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise AfaError(
                f"{embeddings}: has no vector for {missing[0]!r} ({len(missing)} words missing); {hint}{remedy}"
            )
        free = [word for word in free if _folded(word) in known]
        vectors = {word: known[_folded(word)] for word in (*free, *(word for each in words for word in each))}
    else:
        spoken = [*free, *dict.fromkeys(word for each in words for word in each)]
        vectors = dict(zip(spoken, _speak(spoken, templates, backbone, weights), strict=True))
    if not free:
        raise AfaError("model.background_words: no word is left that is known and not a class; add some")
    rows = [normalize(torch.stack([vectors[word] for word in each]).mean(0), dim=0) for each in words]
    nothing = torch.zeros(width)
    return WordEmbeddings(
        torch.stack(rows), torch.stack([vectors[word] if word in free else nothing for word in background])
    )


def _folded(word: str) -> str:
    """What ways of writing a word have in common.

    >>> _folded("Potted_plant"), _folded("sky-other")
    ('potted plant', 'sky')
    """
    return re.sub(r"[-_\s]+", " ", _SUFFIX.sub("", word.strip().lower()))


def _read_file(folder: Path, backbone: str) -> Mapping[str, Tensor]:
    """(E,) vectors of a folder by folded word; the first of equal words counts."""
    width = TOKEN_SIZES[backbone].language
    if not (folder / _VECTORS).is_file() or not (folder / _NAMES).is_file():
        raise AfaError(f"{folder}: no {_VECTORS} and {_NAMES} there; set model.text_embeddings to a folder with both")
    try:
        tensors = list(load_file(folder / _VECTORS).values())
        stored = json.loads((folder / _NAMES).read_text(encoding="utf-8"))
    except (SafetensorError, OSError, ValueError) as error:
        raise AfaError(f"{folder}: cannot be read ({first_line(error)}); make the embeddings again") from None
    names = stored.get("names") if isinstance(stored, dict) else stored
    model = stored.get("model", "") if isinstance(stored, dict) else ""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AfaError(f"{folder / _NAMES}: holds no list of names; write {{'names': [...]}}, a name for each vector")
    if len(tensors) != 1 or tensors[0].shape[:1] != (len(names),) or tensors[0].dim() != 2:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise AfaError(
            f"{folder / _VECTORS}: has {shapes} for {len(names)} names; store one (N, E) tensor, a row a name"
        )
    if tensors[0].shape[1] != width:
        raise AfaError(
            f"{folder / _VECTORS}: vectors have {tensors[0].shape[1]} values, {backbone} needs {width}; use the "
            "embeddings of its own text encoder"
        )
    published = TOKEN_SIZES[backbone].weights
    if model != published and any(model == size.weights for size in TOKEN_SIZES.values() if size.weights):
        raise AfaError(
            f"{folder}: embeddings of {model}, not of {published or backbone}; use those of its text encoder"
        )
    vectors = normalize(tensors[0].float(), dim=1)
    if not vectors.isfinite().all() or not vectors.any(1).all():
        raise AfaError(f"{folder / _VECTORS}: a vector is zero or not finite; make the embeddings again")
    known: dict[str, Tensor] = {}
    for name, vector in zip(names, vectors, strict=True):
        known.setdefault(_folded(name), vector)
    return known


@torch.no_grad()
def _speak(words: Sequence[str], templates: Sequence[str], backbone: str, weights: str) -> list[Tensor]:
    """(E,) vectors of words by the text encoder."""
    tokenizer, encoder = _text_encoder(backbone, weights)
    limit = encoder.config.max_position_embeddings
    found = []
    is_long = len(words) * len(templates) > _MANY
    with image_progress("class names", total=len(words), enabled=is_long, unit="words") as advance:
        for word in words:
            said = word.replace("_", " ").replace("-", " ")
            sentences = [template.replace("{}", said).lower() for template in templates]  # not every tokenizer does it
            longest = max(len(tokenizer(sentence)["input_ids"]) for sentence in sentences)
            if longest > limit:
                raise AfaError(f"{shown(word)}: {longest} tokens, the text encoder takes {limit}; use a shorter word")
            tokens = tokenizer(sentences, padding="max_length", max_length=limit, return_tensors="pt")
            masked = "attention_mask" in tokens and not TOKEN_FAMILIES[TOKEN_SIZES[backbone].family].pooled
            arguments = {"attention_mask": tokens["attention_mask"]} if masked else {}
            output = encoder(input_ids=tokens["input_ids"], **arguments)
            vectors = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
            found.append(normalize(normalize(vectors.float(), dim=1).mean(0), dim=0))
            advance(1)
    return found


def _text_encoder(backbone: str, weights: str) -> tuple[Any, Any]:
    import transformers

    family = TOKEN_FAMILIES[TOKEN_SIZES[backbone].family]
    otherwise = "pass model.text_embeddings FOLDER, or a folder with all files of the hub's: config, weights, tokenizer"
    if not weights:
        raise AfaError(f"model.weights is empty, so there is no text encoder for the class names; {otherwise}")
    try:
        with quiet("transformers", "huggingface_hub"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(weights)
            encoder, info = getattr(transformers, family.text).from_pretrained(
                weights, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:
        raise AfaError(f"{weights}: no text encoder can be loaded ({first_line(error)}); {otherwise}") from None
    if len(tokenizer) < min(1000, encoder.config.vocab_size):  # made of nothing where its files are missing
        raise AfaError(f"{weights}: has no tokenizer for its text encoder; {otherwise}")
    if info["missing_keys"]:
        raise AfaError(f"{weights}: has no text encoder (no {min(info['missing_keys'])}); {otherwise}")
    return tokenizer, encoder.eval()
