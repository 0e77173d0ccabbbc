"""Augmentation, loss and step ask the device for no value: the CPU runs ahead of a GPU instead of waiting for it."""

from __future__ import annotations

import csv

import pytest
import torch
from tiny import tiny_pipeline, write_cases

from medseg.augmentation import Augmentation, finish_targets
from medseg.component import Component
from medseg.engine import supervised_loss
from medseg.engine_session import Session
from medseg.losses import DistanceWeightedDiceCELoss
from medseg.networks import UNet
from medseg.training import train

SHAPING = {"sigma": 2.0, "grid": 3, "rotate": 10, "scale": [0.9, 1.1], "flip": True}
SHADING = {"brightness": 0.3, "contrast": [0.8, 1.2], "gamma": [0.7, 1.5], "blur": [0.5, 1.0], "low_resolution": 0.5}


@pytest.mark.parametrize("dims", [2, 3])
def test_no_value_is_asked_for(dims):
    # a tensor on torch's meta device has no values: what would wait on a GPU fails here
    augmentation = Augmentation(
        [Component("RandElasticDeformationd", SHAPING), Component("RandIntensityd", {**SHADING, "prob": 1.0})]
    )
    size = (2, 1, *[12] * dims)
    kinds = {"image": torch.float32, "label": torch.uint8, "weight": torch.float32, "fov": torch.uint8}
    given = {name: torch.empty(size, dtype=kind, device="meta") for name, kind in kinds.items()}
    batch = finish_targets(augmentation(given, (1, 2), [(1.0,) * dims] * 2), ignore=3)
    network = UNet(dims, 1, 3, channels=(4, 8, 8), padding="same", norm="batch", dropout=0.1, deep_supervision=1)
    network.to("meta").train()
    criterion = DistanceWeightedDiceCELoss(class_weights=[1.0, 2.0, 3.0]).to("meta")
    outputs = network(batch["image"])
    loss = supervised_loss(criterion, outputs, batch["label"], batch["weight"])
    loss.backward()
    assert len(outputs) == 2
    assert loss.device.type == "meta"
    assert all(weight.grad is not None for weight in network.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("held", [True, False])
def test_on_a_gpu_no_iteration_waits(tmp_path, monkeypatch, held):
    iterate = Session.iterate

    def strict(session, batch):
        # the first iterations make workspaces and the optimizer's state
        torch.cuda.set_sync_debug_mode("error" if session.progress.iteration > 2 else "default")
        try:
            return iterate(session, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Session, "iterate", strict)
    write_cases(tmp_path / "data")
    pipeline = tiny_pipeline(
        augment=[{"RandElasticDeformationd": SHAPING}, {"RandIntensityd": {**SHADING, "noise": 0.1, "prob": 1.0}}],
        loss={"DistanceWeightedDiceCELoss": {"class_weights": [1.0, 2.0, 3.0]}},
        iterations_per_epoch=8,
        keep_on_device=held,
        precision="auto",
        clip=12.0,
        ema=0.9,
    )
    run = train(pipeline, data=tmp_path / "data", output=tmp_path / "runs", cache=tmp_path / "cache", device="cuda")
    assert len(list(csv.DictReader((run / "log.csv").open()))) == 2
    assert (" kept on cuda:0" in (run / "provenance.json").read_text()) is held


@pytest.mark.gpu
@pytest.mark.parametrize("wrong", [-1.0, float("inf"), float("nan")])
def test_on_a_gpu_a_wrong_weight_makes_the_loss_no_number(wrong):
    logits, target = torch.zeros(1, 2, 4, 4, device="cuda"), torch.zeros(1, 4, 4, dtype=torch.long, device="cuda")
    weight = torch.ones(1, 4, 4, device="cuda")
    assert DistanceWeightedDiceCELoss()(logits, target, weight).isfinite()
    weight[0, 1, 2] = wrong
    assert DistanceWeightedDiceCELoss()(logits, target, weight).isnan()


@pytest.mark.gpu
def test_on_a_gpu_compiling_is_measured_and_told(tmp_path, capsys):
    write_cases(tmp_path / "data")
    options = {"data": tmp_path / "data", "output": tmp_path / "runs", "cache": tmp_path / "cache", "device": "cuda"}
    train(tiny_pipeline(compile="auto", epochs=1), **options)
    assert "torch.compile makes a step" in capsys.readouterr().err
