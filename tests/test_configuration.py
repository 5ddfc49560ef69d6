"""What afa.config promises: where values come from, and one clear line for each mistake."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from afa.config import (
    PRESETS,
    AugmentConfig,
    Config,
    ScheduleConfig,
    config_from_dict,
    config_to_dict,
    config_to_toml,
    load_config,
)
from afa.config.keys import COMMON, all_keys, find_keys
from afa.errors import AfaError
from afa.report.paper_tables import PAPER_TABLES, find_table
from mistakes import refused

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.toml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_the_paper_preset() -> None:
    assert load_config() == Config()
    assert load_config(preset="paper") == Config()
    config = load_config()
    assert (config.schedule.max_steps, config.schedule.batch_size, config.augment.crop_size) == (
        20_000,
        8,
        512,
    )
    assert (config.pseudo.background_low, config.pseudo.background_high) == (0.35, 0.55)
    weights = (config.loss.segmentation_weight, config.loss.affinity_weight, config.loss.energy_weight)
    assert weights == (0.1, 0.1, 0.01)
    assert config.train.supervision == "tags"


def test_flags_win_over_file_wins_over_preset(tmp_path: Path) -> None:
    path = write(tmp_path, 'preset = "paper_coco"\n[schedule]\nmax_steps = 70\nrefined_steps = 6_000\n')
    config = load_config(path, {"schedule.max_steps": "7"})
    assert config.preset == "paper_coco"
    assert config.schedule.max_steps == 7
    assert config.schedule.refined_steps == 6_000
    assert config.schedule.cls_steps == 5_001
    assert config.pseudo.iterations == 15
    assert load_config(path, preset="paper").schedule.cls_steps == 2_001


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("schedule.max_steps", "1_000", 1000),
        ("schedule.learning_rate", "1e-4", 1e-4),
        ("schedule.learning_rate", "1", 1.0),
        ("loss.energy_weight", ".5", 0.5),
        ("schedule.freeze_norms", "False", False),
        ("model.pooling", "gap", "gap"),
        ("model.weights", "", ""),
        ("pseudo.scales", "1,0.5", (1.0, 0.5)),
        ("pseudo.dilations", "[1, 2]", (1, 2)),
        ("data.classes", "['cat', \"dog\"]", ("cat", "dog")),
        ("data.classes", "cat,dog", ("cat", "dog")),
        ("data.classes", "", ()),
        ("schedule.betas", "0.9,0.99", (0.9, 0.99)),
    ],
)
def test_flag_text_becomes_the_type_of_the_field(key: str, text: str, value: object) -> None:
    section, name = key.split(".")
    read = getattr(getattr(load_config(overrides={key: text}), section), name)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"schedule.max_stepz": "1"}, "schedule.max_stepz; did you mean schedule.max_steps?"),
        ({"shedule.max_steps": "1"}, "shedule.max_steps; did you mean schedule.max_steps?"),
        ({"shedule.rate": "1"}, "unknown key shedule.rate; afa keys lists them all"),
        ({"max_steps": "1"}, "unknown key max_steps; did you mean schedule.max_steps?"),
        ({"train.max_steps": "1"}, "unknown key train.max_steps; did you mean schedule.max_steps?"),
        ({"schedule.": "1"}, "unknown key schedule.;"),
        ({"schedule.max_steps": "many"}, "schedule.max_steps is 'many'; use a whole number"),
        ({"schedule.max_steps": 1.5}, "schedule.max_steps is 1.5; use a whole number"),
        ({"schedule.max_steps": True}, "schedule.max_steps is True; use a whole number"),
        ({"schedule.max_steps": "0"}, "schedule.max_steps is 0; use a whole number, 1 or more"),
        ({"schedule.learning_rate": "fast"}, "schedule.learning_rate is 'fast'; use a number"),
        ({"schedule.learning_rate": "nan"}, "schedule.learning_rate is nan; use a number, 0 to 10"),
        ({"schedule.learning_rate": "inf"}, "schedule.learning_rate is inf; use a number, 0 to 10"),
        ({"schedule.learning_rate": "-1"}, "schedule.learning_rate is -1; use a number, 0 to 10"),
        ({"schedule.freeze_norms": "maybe"}, "schedule.freeze_norms is 'maybe'; use true or false"),
        ({"schedule.freeze_norms": 1}, "schedule.freeze_norms is 1; use true or false"),
        ({"schedule.betas": "0.9"}, "schedule.betas is [0.9]; use 2 values with a comma between, each a number"),
        ({"model.pooling": "max"}, "model.pooling is 'max'; use one of gmp, gap, topk"),
        ({"pseudo.scales": 1.0}, "pseudo.scales is 1.0; use a list"),
        ({"pseudo.scales": "1,9"}, "pseudo.scales is [1, 9]; use a list, such as 1,2,3, each a number, 0.1 to 4"),
        ({"pseudo.scales": ""}, "pseudo.scales is empty"),
        ({"pseudo.dilations": ""}, "pseudo.dilations is empty"),
        ({"train.supervision": "mask"}, "train.supervision is 'mask'; use one of tags, masks"),
        ({"pseudo.refinement": "crf", "pseudo.label_rule": "threshold"}, "label_rule is threshold, which has no"),
        ({"train.supervision": "masks", "train.feature_cache": True}, "train.feature_cache is true, and train.superv"),
        ({"evaluation.scales": ""}, "evaluation.scales is empty"),
        ({"data.root": 3}, "data.root is 3; use a text"),
        ({"pseudo.background_low": 0.6}, "pseudo.background_low is 0.6, above pseudo.background_high (0.55)"),
        ({"augment.scale_min": 3}, "augment.scale_min is 3.0, above augment.scale_max (2.0)"),
        ({"augment.crop_size": 100}, "augment.crop_size is 100; use a multiple of 32"),
        ({"schedule.refined_steps": 1}, "schedule.refined_steps is 1, before schedule.cls_steps (2001)"),
        ({"pseudo.reuse_training_pass": True, "pseudo.scales": "0.5"}, "has no 1.0 to reuse"),
        ({"data.classes": "cat", "data.class_subset": "dog"}, "data.class_subset names 'dog'"),
    ],
)
def test_a_wrong_flag_is_one_clear_line(overrides: dict[str, Any], message: str) -> None:
    with refused(message):
        load_config(overrides=overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\npoolin = 'gap'\n", "unknown key model.poolin; did you mean model.pooling?"),
        ("[modell]\npooling = 'gap'\n", "[modell]; did you mean model?"),
        ("model = 3\n", "model is 3; write a table [model]"),
        ("preset = 'papr'\n", "preset is 'papr'; use one of paper"),
        ("preset = 3\n", "preset is 3; use one of"),
        ("[model\n", "not valid TOML"),
        ("[schedule]\nmax_steps = '5'\n", "schedule.max_steps is '5'; use a whole number"),
        ("[schedule]\nfreeze_norms = 'true'\n", "schedule.freeze_norms is 'true'; use true or false"),
        ("[pseudo]\nscales = ['1.0']\n", "pseudo.scales is ['1.0']; use a list"),
        ("[augment]\ncrop_size = 100\n", "augment.crop_size is 100; use a multiple of 32"),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with refused(f"{path}: ", message):
        load_config(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"schedule.max_stepz": "3"}, "unknown key schedule.max_stepz"),
        ({"schedule.max_steps": "many"}, "schedule.max_steps is 'many'"),
        ({"augment.crop_size": "100"}, "augment.crop_size is 100"),
    ],
)
def test_a_wrong_flag_is_not_blamed_on_the_file(tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    path = write(tmp_path, "[schedule]\nmax_steps = 7\n[augment]\ncrop_size = 64\n")
    with pytest.raises(AfaError, match=rf"\A{re.escape(message)}"):
        load_config(path, overrides)
    with pytest.raises(AfaError, match=r"\Apreset is 'best'"):
        load_config(path, preset="best")


def test_a_missing_or_unreadable_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(AfaError, match=r"absent\.toml: no such"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(AfaError, match="cannot be read"):
        load_config(tmp_path)
    path = tmp_path / "latin.toml"
    path.write_bytes(b"# \xe9\n")
    with pytest.raises(AfaError, match="cannot be read"):
        load_config(path)


def test_round_trip_through_toml_and_json(tmp_path: Path) -> None:
    config = load_config(
        preset="paper_coco",
        overrides={
            "data.root": 'a "quoted" \\ folder, ünïcode',
            "data.classes": "cat,dog",
            "schedule.learning_rate": 1e-7,
            "schedule.freeze_norms": False,
        },
    )
    assert load_config(write(tmp_path, config_to_toml(config))) == config
    assert config_from_dict(config_to_dict(config), origin="checkpoint") == config


def test_a_run_of_an_earlier_version_keeps_what_it_did(tmp_path: Path) -> None:
    config = load_config(preset="paper")
    tree = config_to_dict(config)
    for key in ("decoder_init", "norm_eps"):
        del tree["model"][key]
    del tree["pseudo"]["par_image"], tree["loss"]["reduction"]
    words = "\n".join(line for line in config_to_toml(config).splitlines() if not line.startswith(("norm_eps", "par_")))
    for run in (config_from_dict(tree, origin="old"), load_config(write(tmp_path, words), stored=True)):
        assert (run.model.norm_eps, run.pseudo.par_image) == (1e-5, "exact")
        assert run.pseudo.propagated_scale == config.pseudo.propagated_scale
    assert config_from_dict(tree, origin="old").loss.reduction == "batch"
    assert config.loss.reduction == "process"


def test_presets_of_afa_leave_out_what_the_published_code_does_by_accident() -> None:
    for preset in ("demo", "frozen"):
        config = load_config(preset=preset)
        assert (config.pseudo.par_image, config.loss.reduction) == ("exact", "batch")
        assert (config.model.decoder_init, config.evaluation.multiscale_rule) == ("uniform", "direct")
    assert load_config(preset="paper_coco").loss.energy_weight == 0


def test_a_stored_configuration_with_foreign_keys_is_refused() -> None:
    with pytest.raises(AfaError, match=r"checkpoint: unknown section \[optimizer\]"):
        config_from_dict({"optimizer": {}}, origin="checkpoint")
    with pytest.raises(AfaError, match=r"checkpoint: unknown key model\.depth"):
        config_from_dict({"model": {"depth": 3}}, origin="checkpoint")


def test_a_configuration_cannot_be_changed() -> None:
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.schedule.max_steps = 3  # type: ignore[misc]


def test_the_list_of_keys_has_every_key_once() -> None:
    keys = {key.name: key for key in all_keys()}
    assert list(keys) == [f"{s}.{key}" for s, part in config_to_dict(Config()).items() if s != "preset" for key in part]
    assert len(keys) == len(all_keys())
    assert keys["schedule.max_steps"][1:] == ("a whole number, 1 or more", "20000", "Training steps.")
    assert keys["pseudo.refinement"].allowed == "one of par, par_color, pamr, crf, none"
    assert keys["data.classes"].default == "[]"
    assert all(key.text for key in keys.values())
    assert set(COMMON) <= set(keys)


def test_keys_are_found_by_section_and_by_word() -> None:
    assert {key.name.split(".")[0] for key in find_keys("loss")} == {"loss"}
    assert [key.name for key in find_keys("BETA_H")] == ["pseudo.background_high"]
    assert [key.name for key in find_keys("max_steps")] == ["schedule.max_steps"]
    for word, near in (("modell", "model"), ("learnin_rte", "schedule.learning_rate")):
        with refused(f"'{word}'", f"did you mean {near}?"):
            find_keys(word)


def test_protocols_say_whether_they_have_scales_and_the_crf() -> None:
    evaluation = load_config(overrides={"evaluation.protocol": "multiscale+crf"}).evaluation
    assert (evaluation.multiscale, evaluation.crf) == (True, True)
    assert evaluation.with_crf(True) == evaluation
    plain = evaluation.with_crf(False)
    assert (plain.protocol, plain.multiscale, plain.crf) == ("multiscale", True, False)
    assert plain.with_crf(True) == evaluation
    assert Config().evaluation.with_crf(True).protocol == "single+crf"


def test_every_default_passes_its_own_check() -> None:
    """A default out of its own range would be refused as soon as a stored configuration is read back."""
    assert config_from_dict(config_to_dict(Config()), origin="defaults") == Config()


@pytest.mark.parametrize("cls", [AugmentConfig, ScheduleConfig])
def test_numeric_fields_state_a_range(cls: type[Any]) -> None:
    hints = typing.get_type_hints(cls, include_extras=True)
    assert not [name for name, kind in hints.items() if kind in (int, float)]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_loads(preset: str) -> None:
    assert load_config(preset=preset).preset == preset


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_says_how_to_run_it(path: Path) -> None:
    config = load_config(path)
    assert config.data.root == "", "the folder of the images differs by machine; it is a flag"
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# afa ")
    assert path.stem in first


TABLE_CONFIGS = [path for path in CONFIGS if path.parent.name.startswith("table")]


@pytest.mark.parametrize("path", TABLE_CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_row_of_a_table_names_its_command_its_label_and_the_paper(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    place = f"{path.parent.name}/{path.stem}"
    assert text.startswith(f"# afa train --config configs/{place}.toml --data.root VOC2012 --out runs/{place}\n")
    config = load_config(path)
    found = find_table(config.train.label)
    assert found is not None
    table, name = found
    row = table.row(name)
    if row is None or table.number != int(path.parent.name[-1]):
        assert "The paper has no such row." in text
        return
    figures = [figure for figure in (row.train, row.val) if figure is not None]
    assert all(str(figure) in text.split('preset = "')[0] for figure in figures)
    # What is trained on masks is no row of weak supervision.
    assert (config.train.supervision == "masks") == (name == "full supervision")


def test_the_tables_have_all_the_rows_that_need_a_run() -> None:
    labels = [load_config(path).train.label for path in TABLE_CONFIGS]
    assert len(set(labels)) == len(labels)
    runs = {f"table{table.number}: {row.name}" for table in PAPER_TABLES for row in table.rows if not row.run_of}
    # The paper's own row of Table 5 is that of Table 2; Table 6 is the preset `paper_coco`.
    assert runs - set(labels) == {"table5: AFA", "table6: AFA CRF"}


def test_rows_differ_from_the_paper_preset_as_their_tables_say() -> None:
    def loaded(place: str) -> Config:
        return load_config(CONFIGS[0].parent / f"{place}.toml")

    assert loaded("table2/par_afa_reg").loss == loaded("table3/afa").loss == Config().loss
    baseline = loaded("table2/baseline")
    assert (baseline.pseudo.refinement, baseline.pseudo.propagation) == ("none", "none")
    assert baseline.loss.affinity_weight == baseline.loss.energy_weight == 0
    for place in ("table1/gmp", "table4/cam"):
        assert (loaded(place).model, loaded(place).pseudo, loaded(place).loss) == (
            baseline.model,
            baseline.pseudo,
            baseline.loss,
        )
    assert loaded("table2/par").pseudo.refinement == "par"
    assert loaded("table2/par").loss == baseline.loss
    assert loaded("table2/par_afa").loss.energy_weight == 0
    assert loaded("table3/prop_with_mhsa").pseudo.propagation == "attention"
    rrm = loaded("table5/rrm")
    assert (rrm.preset, rrm.pseudo.refinement, rrm.pseudo.propagation) == ("rrm", "crf", "none")
    assert (rrm.loss.affinity_weight, rrm.loss.energy_weight) == (0, 0.01)


def test_the_voc_recipe_is_the_paper_preset() -> None:
    recipe = load_config(next(path for path in CONFIGS if path.stem == "voc_mit_b1"))
    for section in ("augment", "model", "pseudo", "loss", "schedule", "evaluation"):
        assert getattr(recipe, section) == getattr(Config(), section), section
