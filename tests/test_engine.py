"""The training step: its loss against the plain definition, steps that are skipped, the average, memory, schedules."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_pipeline
from torch import nn

from medseg import engine_compile, engine_session
from medseg.batches import Batch
from medseg.config import TrainConfig
from medseg.distributed import Group
from medseg.doctor import describe_machine
from medseg.engine import (
    TrainStep,
    build_network,
    build_optimizer,
    check_patch,
    crop_margin,
    supervised_loss,
)
from medseg.engine_budget import Budget, Progress
from medseg.engine_recompute import recompute_activations
from medseg.engine_session import Session
from medseg.errors import ConfigError, ResourceError, UsageError
from medseg.hardware import Hardware, choose_hardware, configured, fast_layout, keep_memory, peak_memory, real_cores
from medseg.networks import FCN, ResUNet, UNet
from medseg.schedules import (
    ConstantLR,
    CosineLR,
    ExponentialLR,
    PolynomialLR,
    ReduceLROnPlateau,
    StepLR,
)

CPU = Hardware(torch.device("cpu"), "fp32", 1, "test")


def squared(logits, target, weight=None):
    error = (logits[:, :1] - target.float()) ** 2
    return (error if weight is None else error * weight).mean()


def make(**options) -> TrainStep:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 1))
    network.spatial_dims = 2
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    return TrainStep(network, squared, optimizer, options.pop("hardware", CPU), **options)


def normed(**options) -> TrainStep:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    network.spatial_dims = 2
    return TrainStep(network, squared, torch.optim.SGD(network.parameters(), lr=0.1), CPU, **options)


def batch(value: float = 1.0) -> Batch:
    torch.manual_seed(1)
    images = torch.rand(2, 1, 4, 4) * value
    return Batch((0, 0), ("a", "b"), (1, 2), {"image": images, "label": torch.ones(2, 1, 4, 4, dtype=torch.long)})


def test_one_step_is_plain_gradient_descent():
    step = make()
    weight = step.bare[0].weight.detach().clone().requires_grad_()
    bias = step.bare[0].bias.detach().clone().requires_grad_()
    one = batch()
    logits = torch.einsum("bcij,oc->boij", one.tensors["image"], weight[:, :, 0, 0]) + bias[None, :, None, None]
    expected = squared(logits, one.tensors["label"])
    expected.backward()
    loss = step(one, seed=0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(step.bare[0].weight, weight - 0.1 * weight.grad, atol=1e-7)


def test_a_compiled_network_is_called_in_its_place():
    torch._dynamo.reset()
    network = UNet(2, 1, 2, channels=(4, 8), padding="same", norm=None, dropout=0.0)
    optimizer, calls = torch.optim.SGD(network.parameters(), lr=0.1), []
    network.register_forward_pre_hook(lambda *_: calls.append(torch.compiler.is_compiling()))
    # a compiled module has no truth value: it asks for the length of a network that has none
    compiled = TrainStep(network, squared, optimizer, CPU, forward=torch.compile(network, backend="eager"))
    plain = TrainStep(copy.deepcopy(network), squared, torch.optim.SGD(network.parameters(), lr=0.1), CPU)
    assert torch.allclose(plain(batch(), seed=0, update=False), compiled(batch(), seed=0))
    assert compiled.forward is not network
    assert True in calls


SHORT, BROKEN = torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("no C++ compiler")


@pytest.mark.parametrize(
    ("fast", "plain", "wish", "used", "told"),
    [
        (1.0, 2.0, "auto", True, "2.00 times as fast: used"),
        (2.0, 2.0, "auto", False, "1.00 times as fast: not used"),
        (BROKEN, 2.0, "auto", False, "does not work here (RuntimeError): not used"),
        (SHORT, 2.0, "auto", False, None),  # the first step says it, and what helps
        (SHORT, 2.0, True, True, None),
        (1.0, SHORT, "auto", True, "does not fit into memory: used"),
    ],
)
def test_on_a_gpu_compiling_is_measured(fast, plain, wish, used, told, monkeypatch):
    network, compiled = nn.Identity(), nn.Identity()

    def pace(network, call, shape, hardware):
        found = fast if call is compiled else plain
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(engine_compile, "_pace", pace)
    monkeypatch.setattr(torch, "compile", lambda network: compiled)
    gpu = Hardware(torch.device("cuda"), "bf16", 1, "")
    chosen, notices = engine_compile.choose_compiled(network, wish, (1, 1, 8, 8), gpu)
    assert chosen is (compiled if used else network)
    assert [told in notice for notice in notices] == [True] * (told is not None)


def test_a_network_that_cannot_be_compiled_stays_as_it_was(monkeypatch):
    network = normed().bare.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}

    def broken(network):
        def call(images):
            network(images).sum().backward()
            raise BROKEN

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ResourceError, match="does not work here"):
        engine_compile.choose_compiled(network, True, (2, 1, 4, 4), CPU)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(value.grad is None for value in network.parameters())


def test_clipping_bounds_the_gradient():
    step, before = make(clip=0.01), make().bare[0].weight.detach().clone()
    bias = step.bare[0].bias.detach().clone()
    step(batch(), seed=0)
    moved = torch.cat([(step.bare[0].weight - before).flatten(), (step.bare[0].bias - bias).flatten()])
    assert moved.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted():
    step = make(ema=0.5)
    before = {k: v.clone() for k, v in step.bare.state_dict().items()}
    for count in range(1, 4):
        step(batch(math.inf), seed=0)
        assert step.bad_steps() == count
    assert all(torch.equal(v, before[k]) for k, v in step.bare.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in step.average.state_dict().items())
    step(batch(), seed=0)
    assert step.bad_steps() == 0


def test_a_skipped_first_step_leaves_no_momentum(monkeypatch):
    # as on a GPU: fused, and skipped by the scaler (fp16 begins with a scale that is often too large)
    step = make()
    step.optimizer = torch.optim.SGD(step.network.parameters(), lr=0.1, momentum=0.9, fused=True)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda value, **options: empty(value, **options).fill_(1e3))
    before = [p.detach().clone() for p in step.network.parameters()]
    label = torch.zeros(1, 1, 2, 2, dtype=torch.long)
    for images in (torch.full((1, 1, 2, 2), torch.inf), torch.ones(1, 1, 2, 2)):
        step(Batch((0, 0), ("a",), (0,), {"image": images, "label": label}), seed=0)
    plain = make()
    plain.optimizer = torch.optim.SGD(plain.network.parameters(), lr=0.1, momentum=0.9)
    plain(Batch((0, 0), ("a",), (0,), {"image": torch.ones(1, 1, 2, 2), "label": label}), seed=0)
    for start, one, two in zip(before, step.network.parameters(), plain.network.parameters(), strict=True):
        torch.testing.assert_close(one, two)
        assert not torch.equal(start[:1], one[:1])


def test_the_average_follows_its_definition():
    step = make(ema=0.8)
    average = step.bare[0].weight.detach().clone()
    for _ in range(3):
        step(batch(), seed=0)
        average = 0.8 * average + 0.2 * step.bare[0].weight.detach()
    assert torch.allclose(step.validated[0].weight, average, atol=1e-7)


def test_the_average_takes_the_running_statistics_of_the_network():
    step = normed(ema=0.9)
    step(batch(), seed=0)
    own, averaged = dict(step.bare.named_buffers()), dict(step.validated.named_buffers())
    assert own["1.running_var"].max() < 1
    assert all(torch.equal(averaged[name], value) for name, value in own.items())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_leaves_batch_norms_statistics(accumulate):
    """NaN among the running ones would stay there, and with it every prediction from then on."""
    step = normed(ema=0.9)
    for turn in range(accumulate):
        step(batch(), seed=0, divide=accumulate, update=turn + 1 == accumulate)
    before = {name: value.clone() for name, value in step.bare.state_dict().items()}
    for turn in range(accumulate):  # the first of them is no number, or the only one
        step(batch(math.nan if turn == 0 else 1.0), seed=0, divide=accumulate, update=turn + 1 == accumulate)
    assert step.bad_steps() == 1
    assert all(torch.equal(value, before[name]) for name, value in step.bare.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in step.validated.named_buffers())
    step(batch(), seed=0)
    assert int(step.bare[1].num_batches_tracked) == accumulate + 1
    assert not torch.equal(step.bare[1].running_mean, before["1.running_mean"])
    assert make().validated is not None


def test_an_epochs_last_step_takes_what_there_is_and_shares_weigh_the_loss():
    """Four iterations in steps of three: 1/3 + 1/3 + 1/3, then the last one by itself. Of a loss of 2 this process,
    with 3/4 of the samples, has 3/2 of each iteration."""
    asked = []

    def step(_, *, seed, divide, update):
        asked.append((divide, update))
        return torch.tensor(2.0)

    session = SimpleNamespace(
        progress=Progress(), train=SimpleNamespace(accumulate=3, seed=0), per_epoch=4, set_rate=lambda: 0.1,
        device_augmentation=None, hardware=CPU, group=Group(), step=step, recent=[], loss=None, images=0,
        maker=SimpleNamespace(samples=lambda key: [None] * 2), seconds={"step": 0.0},
    )  # fmt: skip
    session.at_step_end = partial(Session.at_step_end, session)
    for _ in range(4):
        Session.iterate(session, dataclasses.replace(batch(), share=0.75))
    assert asked == [(3, False), (3, False), (3, True), (1, True)]
    Session.gather_loss(session)
    assert session.progress.loss_sum == 4 * 1.5


def test_dropout_follows_from_the_seed_alone():
    def losses(seeds):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(1, 2, 1))
        network.spatial_dims = 2
        step = TrainStep(network, squared, torch.optim.SGD(network.parameters(), lr=0.0), CPU)
        return [step(batch(), seed=seed).item() for seed in seeds]

    assert losses([1, 2, 3])[1:] == losses([2, 3])
    assert losses([1, 2])[0] != losses([1, 2])[1]


def test_deep_supervision_weighs_coarser_outputs_by_halves():
    label = torch.arange(16).reshape(1, 1, 4, 4).float()
    outputs = [torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 2, 2)]
    # of each 2x2 group the voxel that stands last, as nearest-neighbour indexing at the group's middle takes it
    coarse = torch.tensor([5.0, 7.0, 13.0, 15.0])
    expected = 2 / 3 * (label**2).mean() + 1 / 3 * (coarse**2).mean()
    assert supervised_loss(squared, outputs, label, None).item() == pytest.approx(expected.item())


def test_unpadded_outputs_are_compared_with_the_middle():
    label = torch.zeros(1, 1, 6, 6)
    label[:, :, 2:4, 2:4] = 1
    weight = torch.ones(1, 1, 6, 6)
    weight[:, :, 2, 2] = 3
    logits = torch.zeros(1, 1, 2, 2)
    assert supervised_loss(squared, logits, label, None).item() == 1
    assert supervised_loss(squared, logits, label, weight).item() == pytest.approx(6 / 4)
    assert crop_margin((6, 7), (2, 2)) == (2, 3)


def test_recomputed_activations_give_the_same_gradients_with_less_memory():
    pipeline = tiny_pipeline(network={"UNet": {"channels": [4, 8], "padding": "same", "dropout": 0.5}})
    gradients = []
    for recompute in (False, True):
        network = build_network(pipeline, in_channels=1, out_channels=2, seed=3).train()
        if recompute:
            assert recompute_activations(network) > 0
        torch.manual_seed(0)
        network(torch.rand(1, 1, 8, 8, 8)).sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))
    assert network.state_dict().keys() == build_network(pipeline, in_channels=1, out_channels=2).state_dict().keys()


def kept_for_the_gradient(network, image) -> int:
    """Bytes of all that the forward pass keeps, weights included."""
    sizes = {}

    def pack(value):
        sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        network(image).sum()
    return sum(sizes.values())


@pytest.mark.parametrize(
    "network",
    [
        FCN(2, 1, 2, channels=(8, 8, 16, 16, 16), hidden=16, dropout=0),
        ResUNet(2, 1, 2, channels=(8, 8, 16, 16), blocks=(2, 2, 2, 2)),
    ],
    ids=["fcn", "resunet"],
)
def test_published_encoders_recompute_their_activations_too(network):
    """Their levels are in no ModuleList, since names of weights are published: nothing of them was recomputed."""
    again = copy.deepcopy(network)
    recompute_activations(again)
    image = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert kept_for_the_gradient(again, image) < 0.8 * kept_for_the_gradient(network, image)
    for one in (network, again):
        one(image).square().mean().backward()
    pairs = zip(network.named_parameters(), again.named_parameters(), strict=True)
    assert all(a == b and torch.allclose(p.grad, q.grad, atol=1e-6) for (a, p), (b, q) in pairs)
    copied = copy.deepcopy(again).eval()
    with torch.no_grad():
        wanted = again.eval()(image)
        for parameter in again.parameters():
            parameter.zero_()
        assert torch.equal(copied(image), wanted)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_recomputed_activations_leave_the_running_statistics_of_one_pass(momentum):
    plain = UNet(2, 1, 2, channels=(4, 8), padding="same", norm="batch", dropout=0).train()
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = momentum
    again = copy.deepcopy(plain)
    recompute_activations(again)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        image = torch.rand(2, 1, 8, 8, generator=generator)
        for network in (plain, again):
            network(image).square().mean().backward()
    found = dict(again.named_buffers())
    assert {name for name in found if name.endswith("num_batches_tracked")}
    assert all(torch.equal(found[name], value) for name, value in plain.named_buffers())
    pairs = zip(plain.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(one.grad, two.grad) for one, two in pairs)


def test_a_copy_of_a_network_with_recomputed_activations_runs_its_own_weights():
    network = UNet(2, 1, 2, channels=(4, 8), padding="same", norm="batch").eval()  # no dropout
    recompute_activations(network)
    average = copy.deepcopy(network)  # as the running mean of the weights is made
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    before = average(image)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert not network(image).any()
    assert torch.equal(average(image), before)
    assert before.any()


def test_the_networks_weights_follow_from_the_seed_and_leave_the_generator_alone():
    pipeline = tiny_pipeline()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two = (build_network(pipeline, in_channels=1, out_channels=2, seed=9) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_patches_that_the_network_cannot_take_are_refused_with_one_that_it_can():
    network = build_network(tiny_pipeline(), in_channels=1, out_channels=2)
    assert check_patch(network, (8, 8, 10)) == (8, 8, 10)
    with pytest.raises(ConfigError) as caught:
        check_patch(network, (8, 8, 9))
    assert "[8, 8, 10]" in caught.value.expected


def test_optimizers_are_fused_where_they_can_be():
    pipeline = tiny_pipeline()
    network = build_network(pipeline, in_channels=1, out_channels=2)
    assert build_optimizer(pipeline, network, torch.device("cpu")).defaults["fused"] is True
    plain = tiny_pipeline(optimizer={"NAdam": {"lr": 0.01}})
    assert isinstance(build_optimizer(plain, network, torch.device("cpu")), torch.optim.NAdam)


def budget(per_epoch: int = 10, **train) -> Budget:
    plain = {"batch": 1, "patch": [8, 8], **train}
    return Budget.of(TrainConfig.model_validate_json(__import__("json").dumps(plain)), per_epoch)


def test_budgets_know_their_share():
    assert budget(epochs=3).share(Progress(iteration=15)) == 0.5
    assert budget(iterations=20).is_spent(Progress(iteration=20))
    assert not budget(iterations=20).is_spent(Progress(iteration=19))
    assert budget(minutes=10).share(Progress(minutes=2.5)) == 0.25
    assert budget(minutes=10).minutes_left(Progress(minutes=2.5)) == 7.5
    assert budget(epochs=2).minutes_left(Progress(iteration=5, minutes=1.0)) == pytest.approx(3.0)
    assert budget(epochs=2).minutes_left(Progress()) is None
    assert [budget(epochs=1).describe(), budget(minutes=2.5).describe()] == ["1 epoch", "2.5 minutes"]


def test_a_budget_that_ends_within_a_step_spans_it():
    """Ten iterations, four to a step: steps are done with iterations 4, 8 and 12, the third not with a rate of 0."""
    schedule = PolynomialLR(power=1.0)
    found = budget(iterations=10, accumulate=4, per_epoch=50)
    assert [schedule(found.share(Progress(iteration=done))) for done in (3, 7, 11)] == pytest.approx(
        [3 / 4, 5 / 12, 1 / 12]
    )
    assert [found.is_spent(Progress(iteration=done)) for done in (11, 12)] == [False, True]
    # an epoch's end is a step's end
    totals = {(9, 4): 10, (10, 4): 10, (11, 4): 14, (15, 3): 16, (20, 4): 20, (7, 1): 7}
    assert {key: budget(iterations=key[0], accumulate=key[1]).total for key in totals} == totals


def test_minutes_that_pass_within_a_step_leave_it_its_rate():
    """Two iterations to a step, ten minutes: the last step begins after 9 of them and is done after 10.5."""
    groups = [{"lr": 1.0}, {"lr": 1.0}]
    session: Any = SimpleNamespace(
        budget=budget(minutes=10, accumulate=2), schedule=PolynomialLR(power=1.0), rates=[0.5, 2.0],
        step=SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups)), progress=Progress(),
    )  # fmt: skip
    rates = []
    for number, minutes in enumerate((0.0, 5.0, 9.0, 10.5)):
        session.progress.iteration, session.progress.minutes = number, minutes
        session.progress.rate = Session.set_rate(session)
        rates.append([group["lr"] for group in groups])
    assert rates == [pytest.approx(pair) for pair in ([0.5, 2.0], [0.25, 1.0], [0.05, 0.2], [0.05, 0.2])]
    assert session.progress.rate == pytest.approx(0.05)


def test_a_budget_in_minutes_goes_on_with_the_minutes_that_were_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(engine_session, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    session: Any = SimpleNamespace(progress=Progress(minutes=3.0), _started=None, _before=0.0)
    Session.tick(session)
    assert session.progress.minutes == 3.0  # until training begins the clock stands
    Session.start_clock(session)
    now[0] += 120
    Session.tick(session)
    Session.tick(session)
    assert session.progress.minutes == 5.0
    assert Budget(None, None, 6.0, 10).minutes_left(session.progress) == 1.0


def test_a_score_that_is_no_number_is_the_worst():
    progress = Progress()
    assert progress.observe(math.nan)  # the first validation: there is nothing better yet
    assert progress.best is None
    assert progress.observe(-5.0)
    assert not progress.observe(math.nan)
    assert not progress.observe(-6.0)
    assert (progress.best, progress.waited) == (-5.0, 2)
    assert progress.observe(-4.0)
    assert Progress.from_dict(progress.to_dict()) == progress


def test_scores_that_are_all_no_number_are_waited_for():
    progress, found = Progress(), []
    for progress.epoch in range(1, 5):
        found.append((progress.observe(math.nan), progress.waited))
    assert found == [(True, 0), (False, 1), (False, 2), (False, 3)]
    assert (progress.best, progress.best_epoch) == (None, 1)
    assert progress.observe(0.1)  # any number is better


def test_schedules_follow_torchs_where_torch_has_them():
    parameter = nn.Parameter(torch.zeros(1))

    def torchs(kind, steps, **arguments):
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        schedule = kind(optimizer, **arguments)
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return rates

    module = torch.optim.lr_scheduler
    share = [i / 10 for i in range(10)]
    assert [PolynomialLR(0.9)(p) for p in share] == pytest.approx(
        torchs(module.PolynomialLR, 10, total_iters=10, power=0.9)
    )
    assert [CosineLR()(p) for p in share] == pytest.approx(torchs(module.CosineAnnealingLR, 10, T_max=10))
    assert [StepLR(3, 0.5)(0, e) for e in range(10)] == pytest.approx(torchs(module.StepLR, 10, step_size=3, gamma=0.5))
    assert [ExponentialLR(0.9)(0, e) for e in range(10)] == pytest.approx(torchs(module.ExponentialLR, 10, gamma=0.9))
    assert ConstantLR()(0.3) == 1


def test_warm_up_climbs_linearly():
    schedule = CosineLR(warmup=0.2)
    assert [schedule(p) for p in (0.05, 0.1, 0.2, 1.0)] == pytest.approx([0.25, 0.5, 1.0, 0.0])
    assert schedule(0.0) > 0


def test_plateau_reduces_after_patience_and_keeps_its_state():
    schedule = ReduceLROnPlateau(factor=0.1, patience=2, min_factor=0.02)
    factors = []
    for score in (0.5, 0.6, math.nan, 0.6, 0.6, 0.59, 0.9, 0.1, 0.2):
        schedule.observe(score)
        factors.append(schedule(0.5))
    assert factors == pytest.approx([1, 1, 1, 0.1, 0.1, 0.02, 0.02, 0.02, 0.02])
    other = ReduceLROnPlateau(factor=0.1, patience=2, min_factor=0.02)
    other.load_state_dict(schedule.state_dict())
    assert other.state_dict() == schedule.state_dict()


def test_plateau_does_not_wait_while_the_rate_climbs():
    schedule = ReduceLROnPlateau(factor=0.1, patience=1, warmup=0.5)
    for share in (0.1, 0.2, 0.3, 0.4):
        schedule.observe(0.5, share)
    assert schedule(0.5) == 1
    schedule.observe(0.5, 0.6)
    assert schedule(0.6) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PolynomialLR(power=0),
        lambda: StepLR(0),
        lambda: CosineLR(warmup=1.0),
        lambda: CosineLR(final=2),
        lambda: ExponentialLR(0),
        lambda: ReduceLROnPlateau(factor=1.0),
        lambda: ReduceLROnPlateau(patience=0),
    ],
)
def test_impossible_schedules_are_refused(make):
    with pytest.raises(UsageError, match="out of range"):
        make()


def test_hardware_is_chosen_and_checked(monkeypatch):
    assert choose_hardware("cpu").precision in ("fp32", "bf16")
    assert choose_hardware("cpu", "bf16").dtype == torch.bfloat16
    with pytest.raises(UsageError, match="unknown device"):
        choose_hardware("quantum")
    with pytest.raises(UsageError, match="unknown precision"):
        choose_hardware("cpu", "fp8")
    with pytest.raises(UsageError, match="fp16 needs"):
        choose_hardware("cpu", "fp16")
    if not torch.cuda.is_available():
        with pytest.raises(ResourceError, match="no such GPU"):
            choose_hardware("cuda")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert real_cores() == 1


@pytest.mark.parametrize(("threads", "processes", "share"), [("1", 4, 4), ("3", 4, 3), ("1", 1, 1), ("1", 99, 1)])
def test_processes_of_torchrun_share_the_cores(threads, processes, share, monkeypatch):
    """Of 16 cores: torchrun sets one thread for each of several processes where nobody chose."""
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 16)
    monkeypatch.setattr("medseg.hardware._container_quota", lambda: None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert real_cores() == share
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert real_cores() == int(threads)  # without torchrun it was chosen


@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT"])
def test_the_layout_suits_the_network(capability, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    half, full = Hardware(torch.device("cpu"), "bf16", 1, ""), CPU
    gpu = Hardware(torch.device("cuda"), "bf16", 1, "")
    flat, deep = torch.channels_last, torch.channels_last_3d
    for norm, dims, hardware, wanted in [
        ("batch", 2, half, flat),
        ("batch", 2, full, flat),
        ("batch", 3, half, deep),
        ("batch", 3, full, deep if capability == "AVX2" else torch.contiguous_format),
        ("instance", 3, full, deep if capability == "AVX2" else torch.contiguous_format),
        ("instance", 2, full, torch.contiguous_format),
        ("instance", 2, half, torch.contiguous_format),
        ("instance", 3, half, torch.contiguous_format),
        ("instance", 3, gpu, deep),
        (None, 2, full, flat),
    ]:
        network = UNet(dims, 1, 2, channels=(4, 8), padding="same", norm=norm)
        assert fast_layout(network, hardware) == wanted, (norm, dims, hardware)
    # and the step really uses it
    network = UNet(2, 1, 2, channels=(4, 8), padding="same", norm="instance")
    seen = []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    step = TrainStep(network, squared, torch.optim.SGD(network.parameters(), lr=0.1), half)
    images = torch.rand(2, 1, 8, 8).expand(2, 1, 8, 8).contiguous(memory_format=flat)
    label = torch.ones(2, 1, 8, 8, dtype=torch.long)
    step(Batch((0, 0), ("a", "b"), (1, 2), {"image": images, "label": label}), seed=0)
    assert seen == [True]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells its own largest memory there")
def test_the_largest_memory_is_in_millions_of_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    kernel = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    # a kilobyte of 1000 bytes would be 2.4 % less
    assert peak_memory(torch.device("cpu"))["process"] == pytest.approx(kernel / 1e6, rel=0.01)


@pytest.mark.parametrize(
    ("own", "wanted", "seen"), [(None, True, ":4096:8"), (None, False, None), (":16:8", True, ":16:8")]
)
def test_on_a_gpu_matrix_products_have_a_workspace_of_fixed_size(own, wanted, seen, monkeypatch):
    # cuBLAS reads it from the environment; without it torch warns that they are not deterministic, and they are not
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if own is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", own)
    with configured(Hardware(torch.device("cuda"), "bf16", 1, "x"), deterministic=wanted):
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == seen
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == own


def test_a_gpu_whose_driver_does_not_fit_is_none(monkeypatch):
    # the devices are counted all the same, and asking for their names ends in a traceback
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ResourceError, match="no such GPU"):
        choose_hardware("cuda")
    assert not [device for device in describe_machine()["devices"] if device.startswith("cuda")]


def test_what_was_configured_is_taken_back():
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    with configured(Hardware(torch.device("cpu"), "fp32", 1, "x")):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before
    assert isinstance(keep_memory(False), bool)
