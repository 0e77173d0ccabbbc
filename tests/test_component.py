"""Components: closed tables, arguments checked before anything is built, facts filled in by the program."""

from __future__ import annotations

import pickle

import pytest
import torch

from medseg import schedules
from medseg.component import Component, build_component, check_component, names, nearest, parse_component, to_target
from medseg.component_table import KINDS, SPATIAL_KEYS, facts_for_monai
from medseg.errors import ConfigError


def faults(value, kind):
    return check_component(parse_component(value), kind)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("UNet", Component("UNet")),
        ({"UNet": None}, Component("UNet")),
        ({"UNet": {}}, Component("UNet")),
        ({"UNet": {"channels": [1, 2]}}, Component("UNet", {"channels": [1, 2]})),
    ],
)
def test_the_three_ways_of_writing_a_component(value, expected):
    assert parse_component(value) == expected
    assert parse_component(parse_component(value).plain()) == expected


@pytest.mark.parametrize("value", [None, 3, "", [], {}, {"A": {}, "B": {}}, {"A": 3}, {"A": []}, {1: {}}, ["UNet"]])
def test_anything_else_is_no_component(value):
    with pytest.raises(ConfigError, match="not a component"):
        parse_component(value)


def test_every_kind_has_names_and_none_reaches_out_of_its_table():
    for kind in KINDS:
        assert names(kind), kind
    # what lies in the same namespaces but is not listed: file readers, callables, abstract bases, result types
    for kind, name in [
        ("transform", "LoadImaged"),
        ("transform", "Lambdad"),
        ("transform", "SaveImaged"),
        ("transform", "MapTransform"),
        ("optimizer", "Optimizer"),
        ("optimizer", "LBFGS"),
        ("schedule", "Schedule"),
        ("network", "AttentionGate"),
        ("network", "SegmentationNetwork"),
        ("network", "os.system"),
        ("loss", "__import__"),
        ("inferer", "plan_tiles"),
    ]:
        (fault,) = faults(name, kind)
        assert fault.code == "E112", (kind, name)
        with pytest.raises(ConfigError):
            build_component(Component(name), kind)


@pytest.mark.parametrize(
    ("value", "kind", "code", "field", "fix"),
    [
        ("AdmaW", "optimizer", "E112", None, "did you mean `AdamW`?"),
        ({"AdamW": {"learning": 1.0}}, "optimizer", "E112", "learning", None),
        ({"AdamW": {"weight_deacy": 1.0}}, "optimizer", "E112", "weight_deacy", "did you mean `weight_decay`?"),
        ({"AdamW": {"params": []}}, "optimizer", "E113", "params", "remove it"),
        ({"AdamW": {"lr": "fast"}}, "optimizer", "E114", "lr", None),
        ({"AdamW": {"lr": True}}, "optimizer", "E114", "lr", None),
        ({"AdamW": {"amsgrad": 1}}, "optimizer", "E114", "amsgrad", None),
        ({"AdamW": {"betas": [0.9]}}, "optimizer", "E114", "betas", None),
        ({"AdamW": {"betas": 0.9}}, "optimizer", "E114", "betas", None),
        ({"StepLR": {}}, "schedule", "E115", None, None),
        ({"StepLR": {"step_size": 3.5}}, "schedule", "E114", "step_size", None),
        ({"UNet": {"channels": "many"}}, "network", "E114", "channels", None),
        ({"UNet": {"channels": [1.5, 2]}}, "network", "E114", "channels", None),
        ({"UNet": {"spatial_dims": 3}}, "network", "E113", "spatial_dims", "remove it"),
        ({"UNet": {"chanels": [1, 2]}}, "network", "E112", "chanels", "did you mean `channels`?"),
        ({"Spacingd": {"pixdim": [1, 1], "keys": ["image"]}}, "transform", "E113", "keys", "remove it"),
        ({"RandAffined": {"mode": "nearest"}}, "transform", "E113", "mode", "remove it"),
        ({"CropForegroundd": {"select_fn": "os.system"}}, "transform", "E114", "select_fn", None),
        ({"ScaleIntensityRanged": {"a_min": 0.0}}, "transform", "E115", None, None),
        ({"NormalizeIntensityd": {"subtrahend": "x"}}, "transform", "E114", "subtrahend", None),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_built(value, kind, code, field, fix):
    found = faults(value, kind)
    assert [(fault.code, fault.field) for fault in found] == [(code, field)]
    assert found[0].fix == fix
    assert found[0].exit_code == 2


def test_all_faults_of_a_component_come_together():
    codes = [fault.code for fault in faults({"StepLR": {"gama": 0.1, "warmup": "x"}}, "schedule")]
    assert sorted(codes) == ["E112", "E114", "E115"]


def test_whole_numbers_fit_fractions_and_lists_fit_tuples():
    optimizer = build_component(
        parse_component({"AdamW": {"lr": 1, "betas": [0.8, 0.9]}}),
        "optimizer",
        params=[torch.nn.Parameter(torch.ones(1))],
    )
    assert optimizer.defaults["lr"] == 1.0
    assert optimizer.defaults["betas"] == (0.8, 0.9)


def test_values_that_the_part_refuses_are_config_errors():
    parameter = [torch.nn.Parameter(torch.ones(1))]
    with pytest.raises(ConfigError, match="Invalid learning rate") as caught:
        build_component(Component("AdamW", {"lr": -1.0}), "optimizer", params=parameter)
    assert caught.value.code == "E116"
    with pytest.raises(ConfigError, match="CosineLR") as caught:
        build_component(Component("CosineLR", {"warmup": 2.0}), "schedule")
    assert caught.value.field == "warmup"


def test_facts_are_filled_in_where_the_signature_asks_for_them():
    network = build_component(
        parse_component({"UNet": {"channels": [4, 8], "padding": "same"}}),
        "network",
        spatial_dims=3,
        in_channels=2,
        out_channels=5,
        params="not asked for",
    )
    assert (network.spatial_dims, network.in_channels, network.out_channels) == (3, 2, 5)


def test_monai_transforms_touch_the_right_keys():
    spatial = build_component(parse_component({"RandAffined": {"prob": 1.0}}), "transform")
    assert spatial.keys == SPATIAL_KEYS
    assert [str(mode) for mode in spatial.mode] == ["bilinear", "nearest", "bilinear", "nearest", "nearest"]
    assert spatial.allow_missing_keys
    intensity = build_component(parse_component({"RandGaussianNoised": {}}), "transform")
    assert intensity.keys == ("image",)
    assert facts_for_monai("RandElasticDeformationd") == {}


def test_spatial_transforms_keep_image_and_label_together_and_labels_whole():
    flip = build_component(parse_component({"RandFlipd": {"prob": 1.0, "spatial_axis": [1]}}), "transform")
    rotate = build_component(parse_component({"RandRotated": {"prob": 1.0, "range_x": 0.7}}), "transform")
    image = torch.zeros(1, 32, 32)
    image[0, 8:20, 4:16] = 3.0
    sample = {"image": image, "label": (image > 0).to(torch.uint8)}
    flipped = flip(sample)
    assert torch.equal(torch.as_tensor(flipped["image"]), image.flip(2))
    assert torch.equal(torch.as_tensor(flipped["label"]), sample["label"].flip(2))
    turned = rotate(sample)
    assert set(torch.as_tensor(turned["label"]).unique().tolist()) == {0, 1}


def test_a_metric_is_its_entry_with_checked_arguments():
    assert build_component(Component("Dice"), "metric").name == "Dice"
    (fault,) = faults({"SurfaceDice": {"tolerance": -1}}, "metric")
    assert fault.field == "tolerance"
    (fault,) = faults({"SurfaceDice": {"tol": 1.0}}, "metric")
    assert fault.fix == "did you mean `tolerance`?"


def test_target_of_a_bundle():
    target = to_target(
        parse_component({"UNet": {"channels": [4, 8]}}), "network", spatial_dims=2, in_channels=1, out_channels=2
    )
    assert target == {
        "_target_": "medseg.networks.unet.UNet",
        "spatial_dims": 2,
        "in_channels": 1,
        "out_channels": 2,
        "channels": [4, 8],
    }


def test_nearest_name():
    assert nearest("adamw", ["Adam", "AdamW", "SGD"]) == "AdamW"
    assert nearest("zzz", ["Adam", "SGD"]) is None


def test_errors_survive_pickling():
    (fault,) = faults("AdmaW", "optimizer")
    assert str(pickle.loads(pickle.dumps(fault))) == str(fault)


# --- schedules --------------------------------------------------------------------------------------------------


def test_polynomial_and_cosine_agree_with_torch_over_a_budget_of_100_steps():
    parameter = torch.nn.Parameter(torch.ones(1))
    pairs = [
        (schedules.PolynomialLR(power=0.9), lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 100, 0.9)),
        (schedules.CosineLR(), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 100)),
    ]
    for ours, make in pairs:
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        theirs = make(optimizer)
        for step in range(100):
            assert ours(step / 100) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
            optimizer.step()
            theirs.step()


def test_step_and_exponential_agree_with_torch():
    parameter = torch.nn.Parameter(torch.ones(1))
    pairs = [
        (schedules.StepLR(step_size=3, gamma=0.5), lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5)),
        (schedules.ExponentialLR(gamma=0.9), lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)),
    ]
    for ours, make in pairs:
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        theirs = make(optimizer)
        for epoch in range(12):
            assert ours(0.0, epoch) == pytest.approx(optimizer.param_groups[0]["lr"])
            optimizer.step()
            theirs.step()


@pytest.mark.parametrize("name", names("schedule"))
def test_warm_up_climbs_to_the_curve_and_never_starts_at_zero(name):
    arguments = {"StepLR": {"step_size": 5}, "ExponentialLR": {"gamma": 0.9}}.get(name, {})
    schedule = build_component(Component(name, {**arguments, "warmup": 0.2}), "schedule")
    rising = [schedule(p) for p in (0.0, 0.05, 0.1, 0.15, 0.1999)]
    assert rising == sorted(rising)
    assert rising[0] > 0
    assert schedule(0.2) == pytest.approx(1.0)
    assert schedule(-1.0) == schedule(0.0)
    assert schedule(1.5) == schedule(1.0)


@pytest.mark.parametrize("first", [float("nan"), float("inf")])
def test_plateau_never_takes_a_score_that_is_no_number_for_the_best(first):
    schedule = schedules.ReduceLROnPlateau(factor=0.5, patience=3)
    for score in (first, 0.1, 0.2, 0.3):
        schedule.observe(score)
    assert schedule(0.5) == 1.0
    assert schedule.state_dict()["best"] == 0.3


def test_plateau_drops_after_patience_counts_nan_as_no_better_and_resumes_alike():
    schedule = schedules.ReduceLROnPlateau(factor=0.5, patience=2, min_factor=0.2)
    interrupted = schedules.ReduceLROnPlateau(factor=0.5, patience=2, min_factor=0.2)
    factors = []
    for score in (0.5, 0.6, float("nan"), 0.6, 0.6, 0.55, 0.1, 0.1, 0.7):
        state = interrupted.state_dict()  # stopped and resumed after every validation
        interrupted = schedules.ReduceLROnPlateau(factor=0.5, patience=2, min_factor=0.2)
        interrupted.load_state_dict(state)
        for one in (schedule, interrupted):
            one.observe(score)
        factors.append(schedule(0.5))
        assert interrupted(0.5) == factors[-1]
    assert factors == [1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.2, 0.2]
    assert all(isinstance(value, int | float | None) for value in schedule.state_dict().values())
