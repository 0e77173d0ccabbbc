"""What the losses share: targets checked and brought to one shape, and weights that may say "ignore this voxel"."""

from __future__ import annotations

import math

import torch

from medseg.errors import GeometryError, LabelError, UsageError

__all__ = ["align_target", "align_weight"]


def align_target(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """The target as int64 (B, *spatial), whichever of its two shapes it came in, 0 where the weight is.

    Args:
        logits: (B, K, *spatial) floating; K = 1 means one sigmoid channel.
        target: (B, 1, *spatial) or (B, *spatial), integer class indices.
        weight: of `align_weight`; an ignored voxel (weight 0) may hold any value, 255 too.

    Raises:
        LabelError: soft (floating) targets; values that are no class (on a GPU, where looking would make every step
            wait, that is left to torch).
        GeometryError: another shape than the logits'.
    """
    if logits.ndim < 3 or not logits.is_floating_point():
        raise UsageError(
            "logits need a class axis", field="logits", expected="floating (B, K, *spatial)", found=_shape(logits)
        )
    if target.is_floating_point() or target.is_complex():
        raise LabelError(
            "soft targets are not supported", field="target", expected="integer class indices", found=target.dtype
        )
    spatial = logits.shape[2:]
    if target.ndim == logits.ndim and target.shape[1] == 1:
        target = target[:, 0]
    if target.shape != (logits.shape[0], *spatial):
        raise GeometryError(
            "target and logits differ in shape",
            field="target",
            expected=f"(B, *{tuple(spatial)})",
            found=_shape(target),
        )
    target = target.long()
    if weight is not None:
        target = target.masked_fill(weight == 0, 0)
    if target.device.type == "cpu" and target.numel():
        low, high = (int(bound) for bound in torch.aminmax(target))
        if low < 0 or high >= max(2, logits.shape[1]):
            raise LabelError(
                "the target has values that are no class",
                field="target",
                expected=f"0 to {max(2, logits.shape[1]) - 1}",
                found=f"smallest {low}, largest {high}",
                fix="voxels to ignore have weight 0; a mask of 0 and 255 needs 1 for 255",
            )
    return target


def align_weight(logits: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor | None:
    """The weight as float32 (B, *spatial); None stays None.

    Raises:
        GeometryError: another shape than the logits'.
        UsageError: not floating; negative, NaN or infinite (on a GPU, where looking would make every step wait, such a
            weight becomes NaN, and so does the loss).
    """
    if weight is None:
        return None
    if not weight.is_floating_point():
        raise UsageError("weights are floating", field="weight", expected="float32", found=weight.dtype)
    spatial = logits.shape[2:]
    if weight.ndim == logits.ndim and weight.shape[1] == 1:
        weight = weight[:, 0]
    if weight.shape != (logits.shape[0], *spatial):
        raise GeometryError(
            "weight and logits differ in shape",
            field="weight",
            expected=f"(B, *{tuple(spatial)})",
            found=_shape(weight),
        )
    weight = weight.float()
    if weight.device.type != "cpu":
        return torch.where((weight >= 0) & (weight < math.inf), weight, math.nan)
    if weight.numel():
        # one pass; a NaN is neither above nor below anything, so both bounds become NaN
        low, high = (float(bound) for bound in torch.stack(torch.aminmax(weight.detach())).tolist())
        if not (low >= 0 and math.isfinite(high)):
            raise UsageError(
                "weights are finite and not negative",
                field="weight",
                found=f"smallest {low}, largest {high}",
                fix="look at the weight map of the batch's cases; voxels to ignore have weight 0",
            )
    return weight


def _shape(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
