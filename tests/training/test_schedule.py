"""Learning rate and phases at their boundaries, against "Schedule" of docs/method.md worked out by hand."""

import dataclasses

import pytest

from afa.config import Config, ScheduleConfig, TrainConfig, load_config
from afa.training.schedule import Phase, learning_rate, learning_rate_factor, phase

PAPER = Config()
COCO = load_config(preset="paper_coco")


def at(step: int, config: Config = PAPER, **loss: float) -> Phase:
    return phase(step, dataclasses.replace(config, loss=dataclasses.replace(config.loss, **loss)))


CLS = Phase("cls", segmentation=False, affinity=False, want_initial=False, want_refined=False)
INITIAL = Phase("initial", segmentation=True, affinity=True, want_initial=True, want_refined=False)
REFINED = Phase("refined", segmentation=True, affinity=True, want_initial=True, want_refined=True)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, CLS), (2000, CLS), (2001, INITIAL), (5999, INITIAL), (6000, INITIAL), (6001, REFINED), (19_999, REFINED)],
)
def test_voc_phases(step: int, expected: Phase) -> None:
    assert at(step) == expected


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (5000, CLS),
        (5001, INITIAL),
        (15_000, INITIAL),
        # The affinity learns from what the segmentation learns from, so nothing needs the initial label any more.
        (15_001, dataclasses.replace(REFINED, want_initial=False)),
        (79_999, dataclasses.replace(REFINED, want_initial=False)),
    ],
)
def test_coco_phases(step: int, expected: Phase) -> None:
    assert at(step, COCO) == expected


def test_a_loss_without_weight_is_not_computed_nor_its_label() -> None:
    assert at(3000, affinity_weight=0) == dataclasses.replace(INITIAL, affinity=False)
    assert at(7000, affinity_weight=0) == dataclasses.replace(REFINED, affinity=False, want_initial=False)
    assert at(3000, segmentation_weight=0) == dataclasses.replace(INITIAL, segmentation=False)
    assert at(7000, segmentation_weight=0) == dataclasses.replace(REFINED, segmentation=False, want_refined=False)
    # The COCO affinity still needs the refined label.
    assert at(20_000, COCO, segmentation_weight=0) == dataclasses.replace(
        REFINED, segmentation=False, want_initial=False
    )
    assert at(20_000, COCO, affinity_weight=0) == dataclasses.replace(REFINED, affinity=False, want_initial=False)
    nothing = at(7000, affinity_weight=0, segmentation_weight=0)
    assert nothing == Phase("refined", False, False, False, False)


@pytest.mark.parametrize("step", [0, 3000, 19_999])
def test_full_supervision_has_one_phase_and_no_label(step: int) -> None:
    found = phase(step, Config(train=TrainConfig(supervision="masks")))
    assert found == Phase("masks", segmentation=True, affinity=False, want_initial=False, want_refined=False)


def test_phases_may_be_skipped() -> None:
    config = Config(schedule=ScheduleConfig(cls_steps=0, refined_steps=0))
    assert [phase(step, config).name for step in (0, 1)] == ["initial", "refined"]


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 6e-5 * 1e-6),
        (750, 6e-5 * 0.5000005),
        (1499, 6e-5 * (1 - (1 - 1e-6) / 1500)),
        (1500, 6e-5 * 0.925),  # on the decay, which has gone on from step 0: a small jump down
        (10_000, 3e-5),
        (19_999, 6e-5 / 20_000),
        (20_000, 0.0),
    ],
)
def test_learning_rate(step: int, rate: float) -> None:
    assert learning_rate(step, PAPER.schedule) == pytest.approx(rate, rel=1e-9, abs=1e-18)


def test_decay_may_count_from_the_end_of_the_warm_up() -> None:
    schedule = ScheduleConfig(max_steps=100, warmup_steps=20, warmup_ratio=0.0, poly_offset=True, poly_power=2.0)
    factors = [learning_rate_factor(step, schedule) for step in (10, 19, 20, 60, 100, 101)]
    assert factors == pytest.approx([0.5, 0.95, 1.0, 0.25, 0.0, 0.0])


def test_warm_up_may_be_absent_or_as_long_as_the_run() -> None:
    without = ScheduleConfig(max_steps=10, warmup_steps=0)
    assert learning_rate_factor(0, without) == 1.0
    long = ScheduleConfig(max_steps=10, warmup_steps=10, warmup_ratio=0.0, poly_offset=True)
    assert learning_rate_factor(9, long) == pytest.approx(0.9)
    assert learning_rate_factor(10, long) == 1.0  # never taken: steps are 0..9
