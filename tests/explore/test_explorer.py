"""What the page of the explorer does, without the page."""

from __future__ import annotations

import base64
import io
import socket
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from afa.api import explore
from afa.cli import main
from afa.config import config_to_toml, load_config
from afa.data.images import decode_image, read_image
from afa.evaluation.protocols import logit_maps, pseudo_labels
from afa.explore.encoded import EncodedImage, Stages, look_from, make_stages
from afa.explore.explorer import FORMS, ExploredRun, Explorer, change_settings, save_mask, word_names
from afa.explore.panes import show_look, show_stages
from afa.explore.scores import explain, mean_iou
from afa.explore.serve import listen, serve
from afa.model.attention import ATTENTION_NAME
from afa.model.vit import TokenBackbone
from afa.pseudo.cam import scale_view
from afa.report.confusion import EXPLORER_PORT
from afa.types import normalize_image
from encoders import TEXT_KEYS, write_embeddings
from mistakes import refused
from tiny import write_untrained

CPU = torch.device("cpu")
CLASSES = ("cat", "dog", "cow")
KINDS: dict[str, dict[str, Any]] = {
    "mit_tiny": {},
    "dinov2_tiny_reg": {"pseudo.propagation": "attention", "model.affinity_blocks": 1},
    "clip_mini": TEXT_KEYS,
}


def open_untrained(folder: Path, backbone: str, keys: dict[str, Any] | None = None) -> ExploredRun:
    """A run with random weights and no data set."""
    write_untrained(folder, CLASSES, {"model.backbone": backbone} | KINDS[backbone] | (keys or {}))
    run = ExploredRun.open(folder, None, CPU)
    if run.network.text is not None:
        for vectors in (run.network.text.classes, run.network.text.background):
            vectors.copy_(torch.nn.functional.normalize(torch.randn(vectors.shape), dim=1))
    return run


def random_pixels(height: int = 60, width: int = 84) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> ExploredRun:
    return open_untrained(tmp_path / "run", request.param)


@pytest.mark.parametrize("keys", [{}, {"pseudo.background_low": 0.1, "pseudo.iterations": 3, "crf": True}])
def test_maps_are_those_of_the_commands_and_take_no_pass_of_the_encoder(run: ExploredRun, keys: dict[str, Any]) -> None:
    tags, pixels = np.array([1, 0, 1], dtype=np.float32), random_pixels()
    seen = EncodedImage(run.network, run.config, pixels, tags)
    passes: list[int] = []
    run.network.backbone.register_forward_hook(lambda *_: passes.append(1))
    config = change_settings(run.config, keys)
    stages, told = make_stages(seen, config, tags), make_stages(seen, config, tags, told=True)
    assert not passes
    (refined,) = pseudo_labels(run.network, [pixels], [tags], config, kind="refined")
    height, width = stages.pseudo.shape
    if (height, width) == refined.shape:
        assert torch.equal(stages.pseudo, refined)
    (maps,) = logit_maps(run.network, [pixels], config)
    assert stages.prediction is not None
    assert torch.equal(stages.prediction.to(torch.uint8), maps.label((60, 84)))
    assert told.prediction is not None
    assert not (told.prediction == 2).any()
    assert (stages.propagated is None) == (config.pseudo.propagation == "none")


def test_a_look_is_a_row_of_attention_and_affinity(run: ExploredRun) -> None:
    seen = EncodedImage(run.network, run.config, random_pixels())
    height, width = seen.grid
    look = look_from(seen, 0.6, 0.3)
    assert (look.row, look.column) == (int(0.3 * height), int(0.6 * width))
    output, token = seen.attention, look.row * width + look.column
    logits = output.attention_logits
    assert logits is not None
    assert output.affinity is not None
    if run.network.text is None:  # else the recorded blocks are those that follow the levels
        rows = (logits.float() * output.attention_scale).softmax(-1)[0, :, token]
        last = torch.cat(look.attention[-run.config.model.affinity_blocks :])
        torch.testing.assert_close(last.flatten(1), rows, atol=1e-4, rtol=1e-2)
    assert torch.equal(look.affinity.flatten(), output.affinity[0, token])
    corner = look_from(seen, 1.0, 1.0)
    assert (corner.row, corner.column) == (height - 1, width - 1)
    shown = show_look(seen, look, block=1, head=1, learned=True)
    assert shown["look"][0]["title"] == "attention, block 1, head 1"
    assert shown["sheet"]["heads"] == [len(each) for each in look.attention]


def test_the_attention_of_every_block_and_head_is_that_of_the_encoder(run: ExploredRun) -> None:
    """Against the attention weights that transformers itself computes, special tokens left out."""
    seen = EncodedImage(run.network, run.config, random_pixels())
    backbone, look = run.network.backbone, look_from(seen, 0.6, 0.3)
    layers, prefix = backbone.attention_layers(), backbone.num_prefix_tokens
    taken: dict[int, torch.Tensor] = {}
    encoder = backbone.encoder
    with eager(encoder):
        hooks = [
            layer.module.register_forward_hook(lambda _module, _inputs, made, at=at: taken.update({at: made[1]}))
            for at, layer in enumerate(layers)
        ]
        view = scale_view(normalize_image(seen.image), seen.largest)
        with torch.inference_mode():
            if isinstance(backbone, TokenBackbone):
                grid = backbone._grid(view)
                backbone._run(range(backbone.shape.depth), backbone._embed(view, grid), [], grid)
            else:
                backbone(view)
        for hook in hooks:
            hook.remove()
    assert len(layers) == len(look.attention) == len(taken)
    for at, (layer, maps) in enumerate(zip(layers, look.attention, strict=True)):
        height, width = layer.query_grid(*view.shape[2:])
        token = int(0.3 * height) * width + int(0.6 * width)
        weights = taken[at][0, :, prefix + token, prefix:].float()
        assert maps.shape == (layer.heads, *layer.key_grid(*view.shape[2:]))
        expected = weights / weights.sum(1, keepdim=True)
        torch.testing.assert_close(maps.flatten(1), expected, atol=1e-4, rtol=1e-2)
    every = look.attention_map()
    assert float(every.sum()) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(look.attention_map(1), look.attention[0].mean(0))
    torch.testing.assert_close(look.attention_map(1, 1), look.attention[0][0])


@contextmanager
def eager(encoder: Any) -> Iterator[None]:
    """Let an encoder compute attention weights by transformers' own function, which returns them."""
    encoder.config._attn_implementation = "eager"
    try:
        yield
    finally:
        encoder.config._attn_implementation = ATTENTION_NAME


def test_a_picture_that_would_be_a_long_row_is_refused(tmp_path: Path) -> None:
    run = open_untrained(tmp_path / "run", "mit_tiny", {"evaluation.short_side": 288})
    EncodedImage(run.network, run.config, random_pixels(64, 300))
    with refused("2000 x 3 pixels", "too narrow", "cut it"):
        EncodedImage(run.network, run.config, random_pixels(3, 2000))


def test_a_class_has_one_color_in_two_runs(tmp_path: Path) -> None:
    run, colored = open_untrained(tmp_path / "run", "mit_tiny"), ("cow", "cat", "sheep", "dog")
    seen = EncodedImage(run.network, run.config, random_pixels(), truth=np.full((60, 84), 3, dtype=np.uint8))
    stages, tags = make_stages(seen, run.config, seen.tags), seen.tags
    own = show_stages(seen, stages, run.config, run.classes, tags)
    shown = show_stages(seen, stages, run.config, run.classes, tags, colored)
    color = {each["name"]: each["color"] for each in shown["legend"]}
    assert color["cow"] == "#800000"  # the first of VOC's palette
    assert {each["name"]: each["color"] for each in own["legend"]}["cow"] == "#808000"  # the third
    truth = next(pane["layer"] for pane in shown["panes"] if pane["key"] == "truth")
    with Image.open(io.BytesIO(base64.b64decode(truth.partition(",")[2]))) as layer:
        assert layer.getpixel((9, 9))[:3] == (128, 0, 0)


def test_without_tags_all_labels_are_background(run: ExploredRun) -> None:
    seen = EncodedImage(run.network, run.config, random_pixels())
    stages = make_stages(seen, run.config, np.zeros(3, dtype=np.float32))
    assert not stages.pseudo.any()
    assert not stages.cam_label.any()
    assert len(stages.cam) == 0
    panes = show_stages(seen, stages, run.config, run.classes, np.zeros(3, dtype=np.float32))["panes"]
    assert {pane["key"] for pane in panes} >= {"image", "cam", "pseudo", "prediction"}


def test_other_words_are_looked_for_by_runs_with_a_text_encoder_alone(tmp_path: Path) -> None:
    words = write_embeddings(tmp_path / "words", ["zebra", "horse", "tree", "sky", "grass"], 32)
    run = open_untrained(tmp_path / "run", "clip_mini", {"model.text_embeddings": str(words)})
    explorer = Explorer(run)
    assert explorer.text(" , ") is None
    assert word_names("zebra, | horse | tree, |") == ("zebra", "horse")
    text = explorer.text("zebra, horse | tree")
    truth, tags = np.full((60, 84), 3, dtype=np.uint8), np.ones(2, dtype=np.float32)
    seen = EncodedImage(run.network, run.config, random_pixels(), truth=truth)
    stages = make_stages(seen, run.config, tags, text=text)
    shown = show_stages(seen, stages, run.config, ("zebra", "horse"), tags)
    assert not {"truth", "prediction"} & {pane["key"] for pane in shown["panes"]}
    assert {each["name"] for each in shown["legend"]} <= {"zebra", "horse"}
    assert len(stages.cam) == 2
    assert stages.prediction is None
    assert int(stages.pseudo[stages.pseudo < 255].max()) <= 2
    assert "your words" in explain(seen, stages, ("zebra", "horse"), tags)[0]
    # The words of the run come back.
    assert make_stages(seen, run.config, np.ones(3, dtype=np.float32)).cam.shape[0] == 3
    with refused(words, "'unicorn'", "type words that it has"):
        explorer.text("unicorn")
    with refused("has no text encoder"):
        Explorer(open_untrained(tmp_path / "mit", "mit_tiny")).text("zebra")


def test_changed_settings_are_what_training_takes(tmp_path: Path) -> None:
    run = open_untrained(tmp_path / "run", "mit_tiny")
    keys = {"pseudo.background_low": 0.2, "pseudo.walk_steps": 3, "pseudo.dilations": [1, 5], "crf": True}
    changed = change_settings(run.config, keys)
    (tmp_path / "saved.toml").write_text(config_to_toml(changed))
    loaded = load_config(tmp_path / "saved.toml")
    assert loaded == changed
    assert (loaded.pseudo.walk_steps, loaded.pseudo.dilations, loaded.pseudo.crf) == (3, (1, 5), True)
    assert loaded.evaluation.protocol == "single+crf"
    with refused("settings", "background_low is 0.9", "background_high"):
        change_settings(run.config, {"pseudo.background_low": 0.9})
    with refused("settings", "pseudo.iterations is -1"):
        change_settings(run.config, {"pseudo.iterations": -1})
    threshold = change_settings(run.config, {"pseudo.label_rule": "threshold", "crf": True})
    assert threshold.evaluation.crf
    assert not threshold.pseudo.crf


def test_a_data_set_that_is_gone_leaves_photos(tiny_run: Path, tmp_path: Path) -> None:
    run = open_untrained(tmp_path / "run", "mit_tiny", {"data.root": str(tmp_path / "gone")})
    assert run.images is None
    assert "Drop a photo" in run.note
    with refused(tmp_path / "gone"):
        ExploredRun.open(tiny_run, str(tmp_path / "gone"), CPU)
    explorer = Explorer(run)
    key = explorer.add_photo("holiday.png", png(random_pixels()))
    seen = explorer.encoded(key)
    assert seen.truth is None
    assert 1 <= seen.tags.sum() <= 3
    assert explorer.encoded(key) is seen
    with refused("nothing.jpg", "no such image"):
        explorer.encoded("nothing.jpg")
    for number in range(9):
        explorer.add_photo(f"{number}.png", png(random_pixels(32, 33 + number)))
    explorer._encoded.clear()
    with refused("no longer in memory"):
        explorer.encoded(key)


def test_images_without_masks_and_of_one_class(tiny_table: Path, tmp_path: Path) -> None:
    write_untrained(tmp_path / "run", ("disk",))
    run = ExploredRun.open(tmp_path / "run", str(tiny_table), CPU)
    assert not run.has_masks
    assert run.images is not None
    seen = run.encode(0)
    stages = make_stages(seen, run.config, seen.tags)
    lines = explain(seen, stages, run.classes, seen.tags)
    assert lines[0].startswith("There is no mask of this image")


def png(pixels: np.ndarray, mode: str = "RGB") -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(content, format="PNG")
    return content.getvalue()


def test_content_is_read_as_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(random_pixels(), "RGBA"))
    assert (decode_image((tmp_path / "a.png").read_bytes(), "a.png") == read_image(tmp_path / "a.png")).all()
    bomb = io.BytesIO()
    Image.new("1", (12_000, 10_000)).save(bomb, format="PNG")
    huge = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(huge, format="PNG")
    for content in (bomb.getvalue(), huge.getvalue()):
        with refused("bomb.png: more than", "scale it down"):
            decode_image(content, "bomb.png")
    for content in (b"", b"no picture", png(random_pixels())[:200]):
        with refused("x.png"):
            decode_image(content, "x.png")


@pytest.mark.parametrize("form", FORMS)
def test_masks_are_saved_in_every_format(form: str, tmp_path: Path) -> None:
    run = open_untrained(tmp_path / "run", "mit_tiny")
    seen = EncodedImage(run.network, run.config, random_pixels(1500, 40))
    stages = make_stages(seen, run.config, seen.tags)
    if form == "voc_test":
        stages = replace(stages, pseudo=torch.zeros_like(stages.pseudo))
    name, content = save_mask(seen, stages, "photo:ab12:my cat.jpg", CLASSES, kind="prediction", form=form)
    assert name.startswith("my cat")
    if name.endswith(".zip"):
        assert zipfile.ZipFile(io.BytesIO(content)).namelist()
    elif name.endswith(".tgz"):
        with tarfile.open(fileobj=io.BytesIO(content)) as packed:
            assert packed.getnames()
    if form == "png":
        mask = np.array(Image.open(io.BytesIO(content)))
        assert mask.shape == (1500, 40)  # of the file, though the network saw less
        assert seen.shrunk


def judged(truth: int, cam: int, pseudo: int, prediction: int, rows: int = 10) -> str:
    """What is said where the upper `rows` of a mask, and the upper half of the others, are these classes."""

    def upper(value: int, rows: int = 10) -> torch.Tensor:
        label = torch.zeros(20, 20, dtype=torch.int64)
        label[:rows] = value
        return label

    seen = object.__new__(EncodedImage)
    seen.size, seen.pixels = (20, 20), random_pixels(20, 20)
    seen.truth, seen.tags = upper(truth, rows).to(torch.uint8).numpy(), np.array([1, 0, 0], dtype=np.float32)
    certainty = torch.ones(20, 20)
    stages = Stages(torch.ones(1, 20, 20), None, upper(cam), None, upper(pseudo), upper(prediction), certainty)
    return " ".join(explain(seen, stages, CLASSES, seen.tags))


def test_the_stage_that_began_a_fault_is_named() -> None:
    assert judged(1, 1, 1, 1) == "The prediction is the mask."
    weakest = "No class is badly wrong. The lowest IoU, "
    assert judged(1, 1, 1, 1, rows=9) == f"{weakest}90%, is that of 'cat': it takes pixels of 'background'."
    assert judged(1, 1, 1, 1, rows=19) == f"{weakest}10%, is that of 'background': it takes pixels of 'cat'."
    assert "misses 100% of 'cat'; 100% became 'dog'" in judged(1, 1, 1, 2)
    assert "the label is not at fault" in judged(1, 1, 1, 2)
    assert "only 30% of what it calls 'cat' is that" in judged(1, 1, 1, 2, rows=3)
    assert "takes something else for it" in judged(1, 1, 1, 2)
    assert "CAM covers only 0% of it" in judged(1, 0, 0, 0)
    assert "the pseudo label keeps 0%: there 100% became 'background'" in judged(1, 1, 0, 0)
    assert "100% stayed open" in judged(1, 1, 255, 0)
    assert "It is no tag of this image" in judged(2, 0, 0, 0)
    assert "the CAM spreads" in judged(0, 1, 1, 1)
    assert "the segmentation adds it" in judged(0, 0, 0, 1)


def test_the_ranking_orders_images_by_their_figures(tiny_run: Path) -> None:
    run = ExploredRun.open(tiny_run, None, CPU)
    explorer = Explorer(run)
    explorer.ranking.work()
    assert explorer.ranking.done
    assert str(explorer.ranking) == "6 images ranked"
    for by in ("iou", "certainty", "agreement"):
        order = explorer.ranking.order(by)
        assert [value for _, value in order] == sorted(value for _, value in order)
        assert {name for name, _ in order} == set(explorer.names)
    name, worst = explorer.ranking.order("iou")[0]
    seen = explorer.encoded(name)
    (maps,) = logit_maps(run.network, [seen.pixels], run.config)
    assert seen.truth is not None
    assert worst == pytest.approx(mean_iou(maps.label(seen.size).numpy(), seen.truth, len(run.classes)))


def test_the_links_of_a_report_lead_to_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    with listen(None) as first:  # the port of the links, unless something else on this machine has it
        with listen(None) as second:
            assert second.getsockname()[1] not in {EXPLORER_PORT, first.getsockname()[1]}
        told = capsys.readouterr().err
        assert told.count(f"port {EXPLORER_PORT} is taken") == 1 + (first.getsockname()[1] != EXPLORER_PORT)


def test_what_cannot_be_served_is_one_line(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["explore", "--help"])
    assert "why is a mask as it is?\n" in capsys.readouterr().out
    assert main(["explore", "nowhere", "--port", "70000"]) == 2
    assert "'70000' is not a port" in capsys.readouterr().err
    assert main(["explore", "nowhere", "--pseudo.crf", "true"]) == 2
    assert "takes no configuration keys" in capsys.readouterr().err
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "gradio", None)
        with refused("pip install afa[explore]"):
            explore(tiny_run)
    pytest.importorskip("gradio")
    with refused("not a run folder"):
        explore("nowhere")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with refused(f"--port {port}"):
            serve(Explorer(ExploredRun.open(tiny_run, None, CPU)), port=port, browser=False)
