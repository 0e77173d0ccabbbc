"""Losses against their formulas, worked out voxel by voxel, and against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from medseg.errors import GeometryError, LabelError, UsageError
from medseg.losses import DistanceWeightedCELoss, DistanceWeightedDiceCELoss

LOSSES = [DistanceWeightedCELoss, DistanceWeightedDiceCELoss]


def case(classes=3, shape=(2, 9, 11), seed=0):
    g = torch.Generator().manual_seed(seed)
    batch, *spatial = shape
    logits = torch.randn(batch, classes, *spatial, generator=g, requires_grad=True)
    target = torch.randint(0, max(classes, 2), (batch, 1, *spatial), generator=g)
    weight = torch.rand(batch, 1, *spatial, generator=g) * 10
    return logits, target, weight


def slow_ce(logits, target, weight, by_class=None) -> float:
    """Sum of w CE over sum of w, one voxel at a time."""
    total = mass = 0.0
    rows = logits.detach().double().movedim(1, -1).reshape(-1, logits.shape[1]).tolist()
    for row, y, w in zip(rows, target.flatten().tolist(), weight.flatten().double().tolist(), strict=True):
        if len(row) == 1:
            ce = math.log1p(math.exp(-row[0] if y else row[0]))
        else:
            ce = math.log(sum(math.exp(v) for v in row)) - row[y]
        w *= 1.0 if by_class is None else by_class[y]
        total, mass = total + w * ce, mass + w
    return total / mass


def slow_dice(logits, target, kept, smooth=1.0, background=False) -> float:
    shares = logits.detach().double().softmax(1)
    scores = []
    for k in range(0 if background else 1, logits.shape[1]):
        p = [v for v, m in zip(shares[:, k].flatten().tolist(), kept.flatten().tolist(), strict=True) if m]
        t = [float(y == k) for y, m in zip(target.flatten().tolist(), kept.flatten().tolist(), strict=True) if m]
        both = sum(a * b for a, b in zip(p, t, strict=True))
        scores.append((2 * both + smooth) / (sum(p) + sum(t) + smooth))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("classes", [1, 2, 4])
@pytest.mark.parametrize("shape", [(2, 9, 11), (1, 4, 5, 6)])
def test_weighted_cross_entropy_equals_the_formula(classes, shape):
    logits, target, weight = case(classes, shape)
    target = target.clamp(max=max(classes, 2) - 1)
    found = DistanceWeightedCELoss()(logits, target, weight)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(slow_ce(logits, target, weight), rel=1e-5)


def test_class_weights_multiply_the_map():
    logits, target, weight = case(3)
    found = DistanceWeightedCELoss(class_weights=[0.5, 2.0, 7.0])(logits, target, weight)
    assert found.item() == pytest.approx(slow_ce(logits, target, weight, [0.5, 2.0, 7.0]), rel=1e-5)
    alone = DistanceWeightedCELoss(class_weights=[0.5, 2.0, 7.0])(logits, target)
    expected = F.cross_entropy(logits, target[:, 0], weight=torch.tensor([0.5, 2.0, 7.0]))
    torch.testing.assert_close(alone, expected)


def test_without_a_map_it_is_torchs():
    logits, target, _ = case(3)
    torch.testing.assert_close(DistanceWeightedCELoss()(logits, target), F.cross_entropy(logits, target[:, 0]))
    smoothed = DistanceWeightedCELoss(label_smoothing=0.1)(logits, target)
    torch.testing.assert_close(smoothed, F.cross_entropy(logits, target[:, 0], label_smoothing=0.1))
    single, target, _ = case(1)
    expected = F.binary_cross_entropy_with_logits(single, target.float())
    torch.testing.assert_close(DistanceWeightedCELoss()(single, target), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_constant_map_changes_nothing(loss):
    logits, target, weight = case(3)
    torch.testing.assert_close(loss()(logits, target, torch.full_like(weight, 4.2)), loss()(logits, target))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classes", [1, 2, 3])
def test_weight_zero_ignores_a_voxel_whatever_it_holds(loss, classes):
    logits, target, weight = case(classes)
    target = target.clamp(max=max(classes, 2) - 1)
    weight[:, :, 3:] = 0
    other_target, other_logits = target.clone(), logits.detach().clone()
    other_target[:, :, 3:], other_logits[:, :, 3:] = 255, 9.0
    torch.testing.assert_close(loss()(other_logits, other_target, weight), loss()(logits, target, weight))
    loss()(logits, target, weight).backward()
    assert logits.grad[:, :, 3:].abs().max() == 0
    assert logits.grad[:, :, :3].abs().min() > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_the_switch_leaves_the_map_out_but_still_ignores(loss):
    logits, target, weight = case(3)
    weight[:, :, :2] = 0
    plain = loss(use_weight=False)(logits, target, weight)
    torch.testing.assert_close(plain, loss()(logits, target, (weight > 0).float()))
    assert not torch.isclose(plain, loss()(logits, target, weight))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_of_nothing_but_ignored_voxels_gives_no_gradient(loss):
    logits, target, weight = case(3)
    value = loss()(logits, target, torch.zeros_like(weight))
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    value.backward()
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_both_shapes_of_target_and_weight_are_the_same(loss):
    logits, target, weight = case(3)
    torch.testing.assert_close(loss()(logits, target[:, 0], weight[:, 0]), loss()(logits, target, weight))
    torch.testing.assert_close(loss()(logits, target.to(torch.uint8), weight), loss()(logits, target, weight))


@pytest.mark.parametrize("background", [False, True])
def test_dice_equals_the_formula_within_the_mask(background):
    logits, target, weight = case(3)
    weight[:, :, :4] = 0
    found = DistanceWeightedDiceCELoss(ce=0.0, include_background=background)(logits, target, weight)
    expected = 1 - slow_dice(logits, target, weight > 0, background=background)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_dice_of_each_image_by_itself():
    logits, target, weight = case(3)
    weight[0, :, :4] = 0  # the mask differs from image to image
    target[1] = target[1].clamp(max=1)  # a class that one image lacks
    found = DistanceWeightedDiceCELoss(ce=0.0, per_image=True)(logits, target, weight)
    slow = [slow_dice(logits[i : i + 1], target[i : i + 1], weight[i : i + 1] > 0) for i in range(len(logits))]
    assert found.item() == pytest.approx(1 - sum(slow) / len(slow), rel=1e-5)
    assert found.item() != pytest.approx(DistanceWeightedDiceCELoss(ce=0.0)(logits, target, weight).item(), rel=1e-3)


def test_dice_and_cross_entropy_add_with_their_shares():
    logits, target, weight = case(3)
    both = DistanceWeightedDiceCELoss(dice=0.7, ce=2.0)(logits, target, weight)
    dice = DistanceWeightedDiceCELoss(ce=0.0)(logits, target, weight)
    torch.testing.assert_close(both, 0.7 * dice + 2.0 * DistanceWeightedCELoss()(logits, target, weight))


def test_a_class_that_is_nowhere():
    target = torch.zeros(1, 1, 8, 8, dtype=torch.int64)
    loss = DistanceWeightedDiceCELoss(ce=0.0)
    sure = torch.stack([torch.full((1, 8, 8), 50.0), torch.zeros(1, 8, 8)], dim=1)
    assert float(loss(sure, target)) == pytest.approx(0.0, abs=1e-6)
    assert float(loss(-sure, target)) == pytest.approx(1 - 1 / 65, abs=1e-5)  # 64 voxels of false alarm


@pytest.mark.parametrize("loss", LOSSES)
def test_perfect_and_wrong_answers(loss):
    _, target, weight = case(3)
    right = 40.0 * F.one_hot(target[:, 0], 3).movedim(-1, 1).float()
    assert float(loss()(right, target, weight)) < 0.05
    assert float(loss()(-right, target, weight)) > 10


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_safe(loss, dtype):
    logits, target, weight = case(3, (2, 64, 64))
    extreme = (logits.detach() * 3000).clamp(-60000, 60000).to(dtype).requires_grad_()
    value = loss()(extreme, target, weight * 1000)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert torch.isfinite(extreme.grad).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = loss()(logits, target, weight)
    torch.testing.assert_close(within, loss()(logits, target, weight))


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_right(loss):
    logits, target, weight = case(3, (1, 3, 3))
    # in double: the losses work in float32, so a wide step
    numeric, step = torch.zeros_like(logits), 1e-2
    for index in range(logits.numel()):
        moved = logits.detach().clone()
        moved.view(-1)[index] += step
        up = loss()(moved, target, weight)
        moved.view(-1)[index] -= 2 * step
        numeric.view(-1)[index] = (up - loss()(moved, target, weight)) / (2 * step)
    loss()(logits, target, weight).backward()
    torch.testing.assert_close(logits.grad, numeric.detach(), atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"target": torch.rand(2, 1, 9, 11)}, LabelError),
        ({"target": torch.zeros(2, 1, 9, 12, dtype=torch.int64)}, GeometryError),
        ({"weight": torch.ones(2, 1, 9, 12)}, GeometryError),
        ({"weight": torch.ones(2, 1, 9, 11, dtype=torch.int64)}, UsageError),
        ({"weight": torch.full((2, 1, 9, 11), float("nan"))}, UsageError),
        ({"weight": torch.full((2, 1, 9, 11), float("inf"))}, UsageError),
        ({"weight": torch.full((2, 1, 9, 11), -1.0)}, UsageError),
    ],
)
def test_bad_input_is_refused(loss, change, error):
    logits, target, weight = case(3)
    if "weight" in change and error is UsageError and change["weight"].is_floating_point():
        bad, change = change["weight"], {"weight": weight.clone()}
        change["weight"][0, 0, 4, 4] = bad[0, 0, 4, 4]  # one voxel is enough
    with pytest.raises(error):
        loss()(**{"logits": logits, "target": target, "weight": weight, **change})


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("classes", "value"), [(1, 255), (1, 2), (1, -1), (3, 3), (3, -100)])
def test_a_value_that_is_no_class_is_refused(loss, weighted, classes, value):
    logits, target, weight = case(classes)
    target[0, 0, 4, 4] = value
    weight[0, 0, 4, 4] = 0.5
    for terms in ({}, {"ce": 0.0} if loss is DistanceWeightedDiceCELoss else {}):
        with pytest.raises(LabelError, match="no class"):
            loss(**terms)(logits, target, weight if weighted else None)


def test_bad_arguments():
    wrong = ([1.0], [1.0, -1.0], [1.0, float("nan")])
    for arguments in (*({"class_weights": weights} for weights in wrong), {"label_smoothing": 1.0}):
        with pytest.raises(UsageError):
            DistanceWeightedCELoss(**arguments)
    for arguments in ({"dice": -1.0}, {"dice": 0.0, "ce": 0.0}, {"smooth": 0.0}):
        with pytest.raises(UsageError):
            DistanceWeightedDiceCELoss(**arguments)
    for loss in LOSSES:
        for arguments in ({"class_weights": 2.0}, {"class_weights": [1.0, "x"]}, {"label_smoothing": "x"}):
            with pytest.raises(UsageError, match="wrong type") as caught:
                loss(**arguments)
            assert caught.value.field in arguments
    logits, target, weight = case(3)
    with pytest.raises(UsageError, match="one weight for each class"):
        DistanceWeightedCELoss(class_weights=[1.0, 2.0])(logits, target, weight)


def test_arguments_may_be_tensors_as_torchs_own_are():
    logits, target, weight = case(3)
    given = {"class_weights": torch.tensor([1.0, 2.0, 3.0]), "label_smoothing": torch.tensor(0.25)}
    plain = {"class_weights": iter([1.0, 2.0, 3.0]), "label_smoothing": 0.25}
    assert DistanceWeightedCELoss(**given)(logits, target, weight) == DistanceWeightedCELoss(**plain)(
        logits, target, weight
    )


def test_one_sigmoid_channel_is_smoothed_as_two_classes_are():
    """sigmoid(z) is the second of softmax(0, z), so that both losses are one number."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 5, 6, generator=generator)
    target = torch.randint(2, (2, 1, 5, 6), generator=generator)
    loss = DistanceWeightedCELoss(label_smoothing=0.2)
    two = torch.cat([torch.zeros_like(logits), logits], dim=1)
    torch.testing.assert_close(loss(logits, target), loss(two, target))
    assert loss(logits, target) != DistanceWeightedCELoss()(logits, target)
