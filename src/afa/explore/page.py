"""The page: gradio's widgets beside a board of pictures, and what each of them asks the `Explorer` for."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Final, NamedTuple

import gradio as gr
import numpy as np
from numpy.typing import NDArray

from afa.config import Config, config_to_toml
from afa.errors import AfaError
from afa.explore.encoded import EncodedImage, Stages, look_from, make_stages
from afa.explore.explorer import FORMS, Explorer, change_settings, save_mask, word_names
from afa.explore.panes import map_name, show_look, show_stages
from afa.explore.scores import ORDERS, explain

_LISTED: Final = 1000

_SAY_BUSY: Final = "(...inputs) => { document.dispatchEvent(new Event('afa-busy')); return inputs; }"

_WALKS: Final = ("affinity", "attention", "none")
_SLIDERS: Final = {
    "Background scores": (
        ("pseudo.background_low", "beta_l: below it, background", 0, 1, 0.01),
        ("pseudo.background_high", "beta_h: above it, a class; between them, open", 0, 1, 0.01),
    ),
    "Random walk": (
        ("pseudo.affinity_radius", "radius, tokens", 1, 32, 1),
        ("pseudo.affinity_power", "power", 0, 16, 0.5),
        ("pseudo.walk_steps", "steps", 1, 16, 1),
    ),
    "Refinement by color (PAR)": (
        ("pseudo.iterations", "iterations", 0, 50, 1),
        ("pseudo.rgb_bandwidth", "bandwidth of colors", 0.01, 2, 0.01),
        ("pseudo.pos_bandwidth", "bandwidth of positions", 0.01, 2, 0.01),
        ("pseudo.pos_weight", "weight of positions", 0, 1, 0.01),
    ),
}
"""Accordion -> key, text, lowest, highest, step."""


class _Asked(NamedTuple):
    """What the widgets say: the inputs of every event, in the order of `Page.inputs`."""

    key: str
    words: str
    point: tuple[float, float] | None
    tags: list[str]
    told: bool
    which: int
    values: tuple[Any, ...]


def _answer(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run a method under the lock; a user's mistake becomes the message of the board, the last output."""

    @wraps(method)
    def guarded(page: Page, *inputs: Any) -> Any:
        page.explorer.used()
        try:
            with page.explorer.lock:
                return method(page, *inputs)
        except AfaError as error:
            return {page.board: {"message": str(error)}}
        finally:
            page.explorer.used()

    return guarded


class Page:
    """The page of an explorer.

    Args:
        explorer: What it shows.
    """

    def __init__(self, explorer: Explorer) -> None:
        self.explorer = explorer
        self.run = explorer.run
        self.keys: list[str] = []
        self.controls: list[Any] = []
        folder = Path(__file__).parent
        html, css, script = ((folder / f"board.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
        with gr.Blocks(title=f"afa: {self.run.path.name}", analytics_enabled=False, fill_width=True) as self.blocks:
            gr.Markdown(self._heading())
            with gr.Row(elem_id="afa-layout"):
                with gr.Column(min_width=280, elem_id="afa-images"):
                    self._add_images()
                with gr.Column(min_width=280, elem_id="afa-settings"):
                    self._add_settings()
                with gr.Column(min_width=280, elem_id="afa-board"):
                    self.board = gr.HTML(
                        value={}, html_template=html, css_template=css, js_on_load=script, apply_default_css=False,
                        elem_id="board",
                    )  # fmt: skip
            self.inputs = [self.key, self.sought, self.point, self.tags, self.told, self.which, *self.controls]
            self._connect()

    def _heading(self) -> str:
        config = self.run.config
        text = f"## {self.run.path.name}\n{config.model.backbone}, {len(self.run.classes)} classes, {config.preset}. "
        if self.explorer.other is not None:
            text += f"Compared with {self.explorer.other.path.name}. "
        return f"{text}{self.run.note}"

    def _add_images(self) -> None:
        names = self.explorer.names[:_LISTED]
        self.key, self.sought, self.point = gr.State(""), gr.State(""), gr.State(None)
        has = bool(names)
        orders = [(text, key) for key, text in ORDERS.items() if key != "iou" or self.run.has_masks]
        self.order = gr.Dropdown(orders, value="list", label="order of the images", visible=has)
        self.image = gr.Dropdown(
            list(names), value=names[0] if has else None, label="image", allow_custom_value=True, visible=has
        )
        with gr.Row(visible=has):
            self.back = gr.Button("← previous", size="sm", min_width=80)
            self.next = gr.Button("next →", size="sm", min_width=80)
        self.status = gr.Markdown(visible=has)
        self.timer = gr.Timer(2, active=has)

    def _add_settings(self) -> None:
        self.tags = gr.CheckboxGroup(list(self.run.classes), label="tags that the pseudo label is told")
        self.told = gr.Checkbox(label="tell the prediction the tags, too")
        self.words = gr.Textbox(
            label="other words (dog, cat | kitten); Enter looks for them", visible=self.run.network.text is not None
        )
        for title, sliders in _SLIDERS.items():
            with gr.Accordion(title, open=title.startswith("Background")):
                if title == "Random walk":
                    self._add("pseudo.propagation", gr.Radio(_WALKS, label="walks along"))
                for key, text, low, high, step in sliders:
                    value = _value(self.run.config, key)
                    high = max(high, value)
                    slider = gr.Slider(low, high, step=step, label=text)
                    slider.preprocess = _as_it_is
                    self._add(key, slider)
                if title.startswith("Refinement"):
                    self._add("pseudo.dilations", gr.Textbox(label="dilations, pixels"))
        self._add("crf", gr.Checkbox(label="dense CRF on prediction and pseudo label (takes about a second)"))
        layers = self.run.network.backbone.attention_layers()
        self.maps = [(0, 0), *((b, head) for b, layer in enumerate(layers, 1) for head in range(1 + layer.heads))]
        names_of = [map_name(*each) for each in self.maps]
        self.which = gr.Dropdown(names_of, value=names_of[0], type="index", label="Attention map")
        self.reset = gr.Button("settings of the run", size="sm")
        with gr.Accordion("Save", open=False):
            self.kind = gr.Radio(["prediction", "pseudo"], value="prediction", label="which label")
            self.form = gr.Dropdown(FORMS, value="png", label="format")
            self.save = gr.Button("save the mask", size="sm")
            self.toml = gr.Button("save the settings (TOML for afa train --config)", size="sm")

    def _add(self, key: str, widget: Any) -> None:
        widget.value = _value(self.run.config, key)
        self.keys.append(key)
        self.controls.append(widget)

    def _connect(self) -> None:
        shown = [self.image, self.key, self.point, self.tags, self.board]
        quick: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
        slow = quick | {"js": _SAY_BUSY}
        self.blocks.load(self._load, self.inputs, shown, **slow)
        self.image.input(self._choose, [self.image, *self.inputs], shown, **slow)
        self.order.input(self._order, [self.order, *self.inputs], shown, **slow)
        for button, by in ((self.back, -1), (self.next, 1)):
            button.click(None, js=f"() => document.dispatchEvent(new CustomEvent('afa-step', {{detail: {by}}}))")
        self.board.step(self._step, [self.order, self.image, *self.inputs], shown, **quick)
        self.board.photo(self._photo, self.inputs, shown, **quick)
        self.board.point(self._look, self.inputs, [self.point, self.board], **quick)
        self.which.input(self._look_again, self.inputs, [self.board], **quick)
        self.board.map(self._look_at_map, self.inputs, [self.which, self.board], **quick)
        changes = [each.submit if isinstance(each, gr.Textbox) else each.input for each in self.controls]
        gr.on([*changes, self.tags.input, self.told.input], self._redraw, self.inputs, [self.board], **quick)
        self.words.submit(self._look_for, [self.words, *self.inputs], [self.sought, self.tags, self.board], **slow)
        self.board.again(self._again, self.inputs, [self.board], **quick)
        self.reset.click(self._reset, self.inputs, [*self.controls, self.board], **quick)
        self.save.click(self._save, [self.kind, self.form, *self.inputs], [self.board], **slow)
        self.toml.click(self._save_settings, self.inputs, [self.board], **quick)
        self.timer.tick(
            self._progress, None, [self.status, self.timer], show_progress="hidden", api_visibility="private"
        )

    # --- What the events do ---

    @_answer
    def _load(self, request: gr.Request, *inputs: Any) -> Any:
        names = self.explorer.names
        asked = request.query_params.get("image")
        if not names and not asked:
            return {self.board: {"message": self.run.note}}
        return self._open(asked or names[0], _asked(inputs))

    @_answer
    def _choose(self, name: str, *inputs: Any) -> Any:
        return self._open(name, _asked(inputs))

    @_answer
    def _order(self, order: str, *inputs: Any) -> Any:
        names = self._names(order)
        if not names:
            raise AfaError("no image is ranked yet; wait until the count below the list has begun")
        return self._open(names[0], _asked(inputs)) | {self.image: gr.update(choices=names, value=names[0])}

    @_answer
    def _step(self, event: gr.EventData, order: str, name: str, *inputs: Any) -> Any:
        return self._open(self._neighbor(event.by, order, name), _asked(inputs))

    @_answer
    def _photo(self, event: gr.EventData, *inputs: Any) -> Any:
        try:
            content = base64.b64decode(event.data, validate=True)
        except (binascii.Error, ValueError, TypeError):
            raise AfaError(f"{event.name}: it did not arrive whole; drop it again") from None
        return self._open(self.explorer.add_photo(str(event.name), content), _asked(inputs)) | {self.image: None}

    @_answer
    def _look(self, event: gr.EventData, *inputs: Any) -> Any:
        asked, point = _asked(inputs), (float(event.x), float(event.y))
        return {self.point: point, self.board: self._from_point(asked._replace(point=point))}

    @_answer
    def _look_again(self, *inputs: Any) -> Any:
        return {self.board: self._from_point(_asked(inputs))}

    @_answer
    def _look_at_map(self, event: gr.EventData, *inputs: Any) -> Any:
        asked, which = _asked(inputs), self.maps.index((int(event.block), int(event.head)))
        return {self.which: map_name(*self.maps[which]), self.board: self._from_point(asked._replace(which=which))}

    @_answer
    def _redraw(self, *inputs: Any) -> Any:
        return {self.board: self._shown(_asked(inputs))}

    @_answer
    def _again(self, *inputs: Any) -> Any:
        """All of the image that is open now, for changes that came while it was encoded."""
        asked = _asked(inputs)
        return {self.board: self._shown(asked) | self._from_point(asked) | {"opened": asked.key}}

    @_answer
    def _look_for(self, words: str, *inputs: Any) -> Any:
        asked = self._with_tags(_asked(inputs)._replace(words=words))
        return {self.sought: words, self.tags: self._tag_boxes(asked), self.board: self._shown(asked)}

    @_answer
    def _reset(self, *inputs: Any) -> Any:
        values = tuple(_value(self.run.config, key) for key in self.keys)
        asked = _asked(inputs)._replace(values=values)
        found = dict(zip(self.controls, values, strict=True))
        return found | {self.board: self._shown(asked)}

    @_answer
    def _save(self, kind: str, form: str, *inputs: Any) -> Any:
        asked = _asked(inputs)
        stages, names = self._stages(asked), self._classes(asked.words)
        return self._download(*save_mask(self._seen(asked), stages, asked.key, names, kind=kind, form=form))

    @_answer
    def _save_settings(self, *inputs: Any) -> Any:
        text = config_to_toml(self._settings(_asked(inputs)))
        return self._download(f"{self.run.path.name}.toml", text.encode())

    def _progress(self) -> Any:
        ranking = self.explorer.ranking
        return str(ranking), gr.Timer(active=not ranking.done)

    # --- Their parts ---

    def _names(self, order: str) -> list[str]:
        if order == "list":
            return list(self.explorer.names[:_LISTED])
        return [name for name, _ in self.explorer.ranking.order(order)]

    def _neighbor(self, by: int, order: str, name: str | None) -> str:
        names = self._names(order)
        if not names:
            raise AfaError(self.run.note or "no image is ranked yet")
        return names[(names.index(name) + by) % len(names)] if name in names else names[0]

    def _open(self, name: str, asked: _Asked) -> dict[Any, Any]:
        """Everything of an image: its tags, its maps, and the look from where its CAM is strongest."""
        asked = self._with_tags(asked._replace(key=name))
        stages = self._stages(asked)
        asked = asked._replace(point=_peak(stages))
        board = self._shown(asked, stages) | self._from_point(asked) | {"opened": name, "other": None}
        if self.explorer.other is not None:
            board["other"] = self._other(name)
        return {
            self.image: name,
            self.key: name,
            self.point: asked.point,
            self.tags: self._tag_boxes(asked),
            self.board: board,
        }

    def _other(self, name: str) -> dict[str, Any] | None:
        """The panes of the other run, with its own settings; None where it does not have the image."""
        run = self.explorer.other
        assert run is not None
        if not name.startswith("photo:") and (run.images is None or name not in run.images.names):
            return None
        seen = self.explorer.encoded(name, other=True)
        stages = make_stages(seen, run.config, seen.tags)
        colored = tuple(dict.fromkeys((*self.run.classes, *run.classes)))  # a class has one color in both
        return show_stages(seen, stages, run.config, run.classes, seen.tags, colored)

    def _seen(self, asked: _Asked) -> EncodedImage:
        if not asked.key:
            raise AfaError("choose an image or drop a photo first")
        return self.explorer.encoded(asked.key)

    def _classes(self, words: str) -> tuple[str, ...]:
        return word_names(words) or self.run.classes

    def _settings(self, asked: _Asked) -> Config:
        keys = dict(zip(self.keys, asked.values, strict=True))
        return change_settings(self.run.config, {key: _typed(self.run.config, key, keys[key]) for key in keys})

    def _with_tags(self, asked: _Asked) -> _Asked:
        """With the tags that an image begins with: its own, or all of the other words."""
        own = _chosen(self.run.classes, self._seen(asked).tags)
        return asked._replace(tags=list(word_names(asked.words)) or own)

    def _tag_boxes(self, asked: _Asked) -> Any:
        return gr.update(choices=list(self._classes(asked.words)), value=asked.tags)

    def _stages(self, asked: _Asked) -> Stages:
        seen, tags, text = self._seen(asked), self._tags(asked), self.explorer.text(asked.words)
        return make_stages(seen, self._settings(asked), tags, told=asked.told, text=text)

    def _tags(self, asked: _Asked) -> NDArray[np.float32]:
        return np.array([name in asked.tags for name in self._classes(asked.words)], dtype=np.float32)

    def _shown(self, asked: _Asked, stages: Stages | None = None) -> dict[str, Any]:
        seen, stages = self._seen(asked), stages or self._stages(asked)
        names, tags = self._classes(asked.words), self._tags(asked)
        return show_stages(seen, stages, self._settings(asked), names, tags) | {
            "why": explain(seen, stages, names, tags),
            "message": "",
            "of": asked.key,
        }

    def _from_point(self, asked: _Asked) -> dict[str, Any]:
        seen = self._seen(asked)
        look, (block, head) = look_from(seen, *(asked.point or (0.5, 0.5))), self.maps[asked.which]
        shown = show_look(seen, look, block=block, head=head, learned=self.run.learned_affinity)
        return shown | {"of": asked.key}

    def _download(self, name: str, content: bytes) -> dict[Any, Any]:
        return {
            self.board: {"download": {"name": name, "data": base64.b64encode(content).decode()}, "message": ""},
        }


def _asked(inputs: Sequence[Any]) -> _Asked:
    key, words, point, tags, told, which = inputs[:6]
    return _Asked(key, words, point, tags or [], bool(told), which or 0, tuple(inputs[6:]))


def _as_it_is(number: Any) -> Any:
    """Instead of gradio's check of a slider: an empty or wrong number is refused in words, where settings change."""
    return number


def _chosen(names: Sequence[str], tags: NDArray[np.float32]) -> list[str]:
    return [name for name, on in zip(names, tags, strict=True) if on]


def _peak(stages: Stages) -> tuple[float, float]:
    """(x, y) in 0..1 where the CAM of the tagged classes is strongest."""
    if not len(stages.cam):
        return 0.5, 0.5
    strongest = stages.cam.amax(0)
    row, column = divmod(int(strongest.argmax()), strongest.shape[1])
    return (column + 0.5) / strongest.shape[1], (row + 0.5) / strongest.shape[0]


def _value(config: Config, key: str) -> Any:
    """What a widget shows of a setting."""
    if key == "crf":
        return config.evaluation.crf
    section, _, name = key.partition(".")
    value = getattr(getattr(config, section), name)
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def _typed(config: Config, key: str, value: Any) -> Any:
    """What a widget says, in the type of its setting."""
    if key == "pseudo.dilations":
        try:
            return [int(part) for part in str(value).split(",")]
        except ValueError:
            raise AfaError(f"dilations are {value!r}; write whole numbers with commas, such as 1,2,4") from None
    if value is None:
        raise AfaError(f"{key} is empty; write a number")
    return type(_value(config, key))(value)
