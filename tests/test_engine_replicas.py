"""Parts of a batch side by side: the same gradient as the undivided batch, each part's own statistics, exact resume."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from tiny import tiny_pipeline, write_cases
from torch import nn

from medseg.batches import Batch
from medseg.checkpoint import CheckpointStore
from medseg.engine import TrainStep
from medseg.engine_replicas import Replicas, choose_replicas
from medseg.errors import ConfigError, MedsegError
from medseg.hardware import Hardware
from medseg.losses import DistanceWeightedDiceCELoss
from medseg.networks import UNet
from medseg.training import train

CPU = Hardware(torch.device("cpu"), "fp32", 2, "test")


def network(norm: str | None = None, **options: Any) -> UNet:
    torch.manual_seed(0)
    return UNet(2, 1, 3, channels=(4, 8), padding="same", norm=norm, dropout=0.0, **options).train()


def batch(samples: int) -> Batch:
    torch.manual_seed(1)
    images, label = torch.rand(samples, 1, 16, 16), torch.randint(0, 3, (samples, 1, 16, 16))
    weight = torch.rand(samples, 1, 16, 16)
    names = tuple(map(str, range(samples)))
    return Batch((0, 0), names, tuple(range(samples)), {"image": images, "label": label, "weight": weight})


def step(net: nn.Module, replicas: int = 1, **options: Any) -> TrainStep:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return TrainStep(net, DistanceWeightedDiceCELoss(), optimizer, CPU, replicas=replicas, **options)


def weights(one: TrainStep) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in one.bare.parameters()])


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("norm", [None, "instance"])
def test_without_batch_norm_the_step_is_that_of_the_undivided_batch(samples: int, norm: str | None):
    plain, split = step(network(norm), clip=1.0, ema=0.9), step(network(norm), 3, clip=1.0, ema=0.9)
    for _ in range(2):  # the second step starts from weights that the copies have to see
        losses = [one(batch(samples), seed=0).item() for one in (plain, split)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert torch.allclose(weights(plain), weights(split), atol=1e-6)
    assert not torch.allclose(weights(plain), weights(step(network(norm))), atol=1e-4)


def test_accumulated_iterations_add_up():
    plain, split = step(network()), step(network(), 2)
    for one in (plain, split):
        one(batch(4), seed=0, divide=2, update=False)
        one(batch(3), seed=0, divide=2)
    assert torch.allclose(weights(plain), weights(split), atol=1e-6)


def test_deep_supervision_has_a_gradient_from_every_output():
    class Deep(nn.Module):
        spatial_dims = 2

        def __init__(self) -> None:
            super().__init__()
            self.fine, self.coarse = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(1, 3, 3, padding=1, stride=2)

        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            return [self.fine(image), self.coarse(image)]

    torch.manual_seed(0)
    deep = Deep()
    plain, split = step(copy.deepcopy(deep)), step(copy.deepcopy(deep), 2)
    for one in (plain, split):
        one(batch(4), seed=0)
    assert torch.allclose(weights(plain), weights(split), atol=1e-6)
    assert not torch.equal(plain.bare.coarse.weight, deep.coarse.weight)


def test_batch_norm_takes_each_parts_statistics_and_the_running_ones_their_mean():
    net = network("batch")
    expected, parts = [copy.deepcopy(net) for _ in range(2)], batch(5).tensors["image"].tensor_split(2)
    outputs = torch.cat([own(part) for own, part in zip(expected, parts, strict=True)])
    replicas = Replicas(net, 2, CPU)
    logits = replicas(batch(5).tensors["image"])
    assert torch.allclose(logits, outputs, atol=1e-6)
    logits.sum().backward()
    replicas.backward()
    for (name, value), one, two in zip(net.named_buffers(), expected[0].buffers(), expected[1].buffers(), strict=True):
        assert torch.allclose(value.float(), (one + two) / 2, atol=1e-6), name
    assert any("num_batches_tracked" in name and value == 1 for name, value in net.named_buffers())


def test_a_part_with_batch_norm_has_two_samples_at_least():
    net = network("batch")
    whole = copy.deepcopy(net)(batch(3).tensors["image"])
    assert torch.allclose(Replicas(net, 2, CPU)(batch(3).tensors["image"]), whole, atol=1e-5)


def test_equal_steps_give_equal_bits():
    runs = []
    for _ in range(2):
        one = step(network("batch"), 2)
        for number in range(4):
            one(batch(4 + number), seed=0)
        runs.append(torch.cat([weights(one), *[b.flatten().float() for b in one.bare.buffers()]]))
    assert torch.equal(*runs)


def test_bf16_is_used_in_every_part():
    half = Hardware(torch.device("cpu"), "bf16", 2, "test")
    seen = []
    net = network()
    plain = TrainStep(copy.deepcopy(net), DistanceWeightedDiceCELoss(), torch.optim.SGD(net.parameters(), 0.1), half)
    replicas = Replicas(net, 2, half)
    for part in replicas.networks:
        part.register_forward_hook(lambda _module, _images, output: seen.append(output.dtype))
    logits = replicas(batch(4).tensors["image"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain.bare(batch(4).tensors["image"])
    assert seen == [torch.bfloat16] * 2
    assert torch.allclose(logits.float(), expected.float(), atol=0.02)


def test_each_part_has_its_own_threads_and_the_others_keep_theirs():
    before = torch.get_num_threads()
    replicas = Replicas(network(), 2, Hardware(torch.device("cpu"), "fp32", 6, "test"))
    torch.set_num_threads(before + 1)
    here = threading.Barrier(2)
    try:
        found = list(replicas._pool.map(lambda _: here.wait() >= 0 and torch.get_num_threads(), range(2)))
        assert found == [3, 3]
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_part_is_raised():
    with pytest.raises(MedsegError, match="cannot take an input"):
        step(network(), 2)(Batch((0, 0), ("a", "b"), (1, 2), {"image": torch.rand(2, 5, 16, 16)}), seed=0)


@pytest.mark.parametrize(
    ("norm", "options", "threads", "samples", "expected"),
    [
        ("batch", {}, 2, 8, 2),
        ("batch", {}, 16, 8, 2),
        ("batch", {}, 3, 8, 2),
        (None, {}, 6, 8, 3),
        (None, {}, 8, 8, 8),
        (None, {}, 4, 6, 2),
        ("batch", {}, 2, 3, 1),
        (None, {}, 2, 3, 1),
        (None, {}, 2, 4, 2),
        (None, {}, 16, 3, 3),
        (None, {}, 1, 8, 1),
        ("batch", {"dropout": 0.1}, 2, 8, 1),
        ("batch", {"alone": False}, 2, 8, 1),
    ],
)
def test_how_many_parts_are_chosen(norm, options, threads, samples, expected):
    net = UNet(2, 1, 2, channels=(4, 8), padding="same", norm=norm, dropout=options.get("dropout", 0.0))
    hardware = Hardware(torch.device("cpu"), "fp32", threads, "test")
    count, told = choose_replicas(net, "auto", samples, hardware, alone=options.get("alone", True))
    assert count == expected
    assert bool(told) == (count > 1)
    if told and norm == "batch":
        assert f"{samples // count} samples" in told[0]


@pytest.mark.parametrize(
    ("wish", "norm", "dropout", "alone", "device", "word"),
    [
        (9, None, 0.0, True, "cpu", "suffices for 8"),
        (5, "batch", 0.0, True, "cpu", "2 samples of the batch, which suffices for 4"),
        (2, None, 0.5, True, "cpu", "dropout"),
        (2, None, 0.0, False, "cpu", "one process"),
        (2, None, 0.0, True, "meta", "CPU"),
    ],
)
def test_parts_that_cannot_be_are_refused_with_the_reason(wish, norm, dropout, alone, device, word):
    net = UNet(2, 1, 2, channels=(4, 8), padding="same", norm=norm, dropout=dropout)
    hardware = Hardware(torch.device(device), "fp32", 4, "test")
    with pytest.raises(ConfigError, match=word) as found:
        choose_replicas(net, wish, 8, hardware, alone=alone)
    assert found.value.field == "train.replicas"
    assert choose_replicas(net, 1, 8, hardware, alone=alone) == (1, [])


def test_an_error_leaves_no_gradient_behind():
    one = step(network(), 2)
    one.replicas(batch(2).tensors["image"]).sum().backward()
    one.replicas.backward()
    copied = one.replicas.networks[1]
    weight = next(copied.parameters())
    weight.grad = torch.ones_like(weight)
    with pytest.raises(MedsegError):
        one.replicas(torch.rand(2, 5, 16, 16))
    assert all(value.grad is None for value in copied.parameters())


def test_more_memory_is_estimated_for_parts(tmp_path):
    from types import SimpleNamespace

    from medseg.training_memory import _estimate

    def need(parts: int) -> int:
        one = step(network(), parts)
        session = SimpleNamespace(
            hardware=CPU, step=one, train=SimpleNamespace(batch=4), group=SimpleNamespace(world=1),
            channels={"in_channels": 1, "out_channels": 3},
        )  # fmt: skip
        return _estimate(session, (16, 16))  # pyright: ignore[reportArgumentType, reportReturnType]

    # gradients of all weights in fp32, and output and its gradient: 4 samples, 3 classes, 16 x 16
    assert need(2) - need(1) == 4 * weights(step(network())).numel() + 2 * 4 * 4 * 3 * 16 * 16


def test_parts_that_cannot_be_are_refused_before_an_image_is_opened(tmp_path):
    data = write_cases(tmp_path / "data")
    for image in (data / "images").iterdir():
        image.write_bytes(b"no image")
    with pytest.raises(ConfigError, match="several parts"):
        train(
            tiny_pipeline(replicas=2), data=data, cache=tmp_path / "cache", output=tmp_path / "runs", device="cpu",
            progress=False,
        )  # fmt: skip
    assert not list((tmp_path / "runs").rglob("*.json"))


def test_a_run_in_two_parts_is_resumed_bit_for_bit_in_two_parts(tmp_path):
    data = write_cases(tmp_path / "data")
    choices = {"network": {"UNet": {"channels": [4, 8], "padding": "same", "norm": "batch", "dropout": 0.0}}}
    places = {"data": data, "cache": tmp_path / "cache", "device": "cpu", "progress": False}
    pipeline = tiny_pipeline(**choices, batch=4, replicas=2, epochs=2)
    whole = train(pipeline, output=tmp_path / "whole", **places)
    stopped = _stop_after_first_epoch(pipeline, tmp_path / "stopped", places)
    at_stop, at_end = (CheckpointStore(run).load("last")[0] for run in (stopped, whole))
    assert at_stop["replicas"] == 2
    assert 0 < at_stop["progress"]["iteration"] < at_end["progress"]["iteration"]
    train(None, resume=stopped, **{k: v for k, v in places.items() if k != "data"})
    found = CheckpointStore(stopped).load("last")[0]
    assert found["replicas"] == 2
    for name, value in at_end["network_state"].items():
        assert torch.equal(value, found["network_state"][name]), name


def _stop_after_first_epoch(pipeline, output, places):
    import os
    import signal

    from medseg import handlers

    run: list[Any] = []
    finish = handlers.finish_epoch

    def stop(session, signals):
        run[:] = [session.run.path]
        os.kill(os.getpid(), signal.SIGTERM)
        return finish(session, signals)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handlers, "finish_epoch", stop)
        with pytest.raises(SystemExit):
            train(pipeline, output=output, **places)
    return run[0]
