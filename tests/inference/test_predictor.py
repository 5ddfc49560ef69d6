"""The predictor: kinds of input, restriction by tags, sizes, and the messages of its errors."""

import base64
import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from afa.config import Config, EvaluationConfig
from afa.errors import AfaError
from afa.evaluation.protocols import LogitMaps, logit_maps
from afa.inference.prediction import Prediction, image_array, show
from afa.inference.predictor import Predictor
from afa.runs.network import load_run
from colors import CLASSES, ColorNetwork
from mistakes import refused
from tiny import write_untrained


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def predictor(*, max_side: int = 1024, **evaluation: Any) -> Predictor:
    config = Config(evaluation=EvaluationConfig(**evaluation))
    return Predictor(ColorNetwork(), CLASSES, config=config, max_side=max_side)  # type: ignore[arg-type]


def test_prediction_has_the_size_of_the_image_and_its_scores_sum_to_one() -> None:
    image = random_image(41, 57)
    prediction = predictor()(image)
    assert prediction.label.shape == (41, 57)
    assert prediction.label.dtype == np.uint8
    assert prediction.scores.shape == (4, 41, 57)
    assert prediction.scores.dtype == np.float32
    assert prediction.classes == ("background", *CLASSES)
    (maps,) = logit_maps(ColorNetwork(), [image], Config())  # type: ignore[arg-type]
    logits = maps.enlarge((41, 57))
    np.testing.assert_allclose(prediction.scores, torch.softmax(logits, 0).numpy(), atol=1e-6)
    np.testing.assert_array_equal(prediction.label, prediction.scores.argmax(0))
    assert len(np.unique(prediction.label)) == 4


def test_tags_restrict_the_argmax_and_the_softmax() -> None:
    image = random_image(40, 40)
    free = predictor()(image)
    prediction = predictor()(image, tags=["dog"])
    assert set(np.unique(free.label)) - {0, 2}
    assert set(np.unique(prediction.label)) == {0, 2}
    assert not prediction.scores[[1, 3]].any()
    np.testing.assert_allclose(prediction.scores.sum(0), 1, atol=1e-6)
    ratio = free.scores[2] / free.scores[0]
    np.testing.assert_allclose(prediction.scores[2] / prediction.scores[0], ratio, rtol=1e-4)


def test_no_tags_is_all_background() -> None:
    prediction = predictor()(random_image(40, 40), tags=())
    assert not prediction.label.any()
    assert (prediction.scores[0] == 1).all()


def test_path_pillow_and_array_are_the_same(tmp_path: Path) -> None:
    image = random_image(40, 50)
    Image.fromarray(image).save(tmp_path / "image.png")
    expected = predictor()(image)
    path, picture = tmp_path / "image.png", Image.fromarray(image)
    for kind in (path, str(path), picture, np.asarray(picture)):
        np.testing.assert_array_equal(predictor()(kind).scores, expected.scores)


def test_pillow_images_are_turned_upright_and_made_rgb() -> None:
    image = Image.fromarray(random_image(40, 50)).convert("L")
    image.getexif()[0x0112] = 6
    assert image_array(image).shape == (50, 40, 3)


def test_the_image_is_left_alone() -> None:
    image = random_image(40, 50)
    before = image.copy()
    predictor()(image, tags=["cat"])
    np.testing.assert_array_equal(image, before)


def test_large_images_are_scaled_down_for_the_network_only() -> None:
    predict = predictor(max_side=64)
    prediction = predict(random_image(100, 200))
    assert predict.network.sizes == [(32, 64)]
    assert prediction.label.shape == (100, 200)
    assert predict(random_image(1, 500)).scores.shape == (4, 1, 500)


def test_protocol_is_the_configured_one() -> None:
    predict = predictor(protocol="multiscale", scales=(1.0, 0.5), long_side=64)
    predict(random_image(64, 64))
    assert predict.network.sizes == [(64, 64), (32, 32)]


def test_save_and_overlay(tmp_path: Path) -> None:
    image = random_image(40, 50)
    prediction = predictor()(image)
    prediction.save(tmp_path / "new" / "mask.png")
    with Image.open(tmp_path / "new" / "mask.png") as mask:
        assert mask.mode == "P"
        np.testing.assert_array_equal(np.array(mask), prediction.label)
    assert prediction.overlay(image).size == (50, 40)
    blank = Prediction(np.zeros((40, 50), dtype=np.uint8), prediction.scores, prediction.classes)
    assert prediction.overlay(image).tobytes() != blank.overlay(image).tobytes()


def shown_picture(prediction: Prediction) -> Image.Image:
    """The picture in what a notebook is given, which holds everything itself."""
    html = prediction._repr_html_()
    assert not re.search(r"<script|https?:|url\(", html)
    found = re.search(r'src="data:image/png;base64,([^"]+)"', html)
    assert found
    return Image.open(io.BytesIO(base64.b64decode(found[1])))


@pytest.mark.parametrize("kind", [Path, str, Image.Image, np.ndarray])
def test_a_notebook_shows_the_overlay_with_its_classes(tmp_path: Path, kind: type) -> None:
    pixels = random_image(40, 50)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    kinds = {Path: tmp_path / "image.png", str: str(tmp_path / "image.png"), np.ndarray: pixels}
    image = kinds.get(kind, Image.fromarray(pixels))
    (prediction,) = predictor()([image])
    assert shown_picture(prediction).tobytes() == prediction.overlay(image).tobytes()
    html = prediction._repr_html_()
    share = (prediction.label == 2).mean()
    assert f"dog {100 * share:.1f} %" in html
    assert "background:rgb(0, 128, 0)" in html
    assert (
        "background alone"
        in Prediction(np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4)), ("background", *CLASSES))._repr_html_()
    )


def test_a_notebook_shows_the_mask_alone_where_the_image_is_gone(tmp_path: Path) -> None:
    Image.fromarray(random_image(40, 50)).save(tmp_path / "image.png")
    prediction = predictor()(tmp_path / "image.png")
    (tmp_path / "image.png").unlink()
    assert "the image is not at hand" in prediction._repr_html_()
    assert shown_picture(prediction).size == (50, 40)
    assert (
        "&lt;b&gt;" in Prediction(np.ones((4, 4), np.uint8), np.zeros((2, 4, 4)), ("background", "<b>"))._repr_html_()
    )


def test_large_images_are_shown_small() -> None:
    label = np.zeros((3000, 5000), np.uint8)
    label[:, 2500:] = 1
    image = np.full((3000, 5000, 3), 200, np.uint8)
    prediction = Prediction(label, np.zeros((4, 1, 1), np.float32), ("background", *CLASSES))
    prediction.source = image
    assert max(shown_picture(prediction).size) <= 640
    picture = show(image, prediction)
    assert picture.width <= 2 * 640 + 8
    assert picture.getpixel((10, 10)) == (200, 200, 200)  # the image on the left
    assert picture.getpixel((8 + 625 + 500, 10)) == (164, 100, 100)  # the class on the right of the mask
    with refused("200x100", "5000x3000"):
        show(np.zeros((100, 200, 3), np.uint8), prediction)


def test_unknown_tag_names_the_closest_class() -> None:
    with refused("'hrose'", "mean horse?", "cat, dog, horse"):
        predictor()(random_image(40, 40), tags=["hrose"])


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (np.zeros((4, 4, 3), dtype=np.float32), "float32 array of shape (4, 4, 3)"),
        (np.zeros((4, 4), dtype=np.uint8), "uint8 array of shape (4, 4)"),
        (np.zeros((3, 4, 4), dtype=np.uint8), "uint8 array of shape (3, 4, 4)"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "uint8 array of shape (0, 4, 3)"),
    ],
)
def test_other_arrays(image: Any, found: str) -> None:
    with refused(f"image is a {found}; pass (height, width, 3) uint8"):
        predictor()(image)


def test_missing_file_unknown_protocol_and_foreign_overlay(tmp_path: Path) -> None:
    with pytest.raises(AfaError, match=r"nothing\.jpg: no such image; check"):
        predictor()(tmp_path / "nothing.jpg")
    with pytest.raises(AfaError, match=r"^protocol is 'crf'; use .*single\+crf"):
        predictor(protocol="crf")
    with pytest.raises(AfaError, match=r"image is 20x10 .*50x40; pass"):
        predictor()(random_image(40, 50)).overlay(random_image(10, 20))


def test_scores_are_computed_when_they_are_first_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    scores = LogitMaps.scores
    monkeypatch.setattr(LogitMaps, "scores", lambda maps, size: (calls.append(size), scores(maps, size))[1])
    prediction = predictor()(random_image(40, 50))
    assert calls == []
    assert prediction.scores is prediction.scores
    assert calls == [(40, 50)]


def test_predictions_can_be_pickled() -> None:
    prediction = predictor()(random_image(40, 50), tags=["dog"])
    copy = pickle.loads(pickle.dumps(prediction))
    np.testing.assert_array_equal(copy.label, prediction.label)
    np.testing.assert_array_equal(copy.scores, prediction.scores)


def test_a_list_of_images_gives_a_list_in_its_order() -> None:
    images = [random_image(height, 50, seed) for seed, height in enumerate([40, 60, 40, 40, 60])]
    tags = [None, ["dog"], ["cat", "dog"], [], None]
    together = predictor(batch_size=2)
    predictions = together(images, tags)
    assert len(together.network.sizes) == 3
    for image, image_tags, prediction in zip(images, tags, predictions, strict=True):
        expected = predictor()(image, image_tags)
        np.testing.assert_array_equal(prediction.label, expected.label)
        np.testing.assert_allclose(prediction.scores, expected.scores, atol=1e-6)
    assert predictor()([]) == []


def test_lists_are_checked() -> None:
    with pytest.raises(AfaError, match=r"2 images and tags of 1; give"):
        predictor()([random_image(40, 50)] * 2, [["dog"]])
    with pytest.raises(AfaError, match=r"^gone\.png: no such image; check"):
        predictor()([Path("gone.png")])


def test_from_run(tmp_path: Path) -> None:
    write_untrained(tmp_path, CLASSES, {"evaluation.protocol": "multiscale"})
    loaded = Predictor.from_run(tmp_path, device="cpu", protocol="single")
    assert loaded.classes == CLASSES
    assert loaded.protocol == "single"
    assert Predictor.from_run(str(tmp_path), device="cpu").protocol == "multiscale"
    image = random_image(48, 64)
    expected = Predictor(load_run(tmp_path, torch.device("cpu")).network, CLASSES)(image)
    np.testing.assert_array_equal(loaded(image).scores, expected.scores)


def test_from_run_of_another_folder(tmp_path: Path) -> None:
    with refused("not a run folder"):
        Predictor.from_run(tmp_path)
