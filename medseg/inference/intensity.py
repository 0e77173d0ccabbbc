"""Whether an image's values lie where a fixed range of intensities expects them: a network says nothing of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from medseg.component import Component

__all__ = ["first_range", "unlike_range"]

_LEFT_ALONE = ("CenterSpatialCropd", "Orientationd", "Resized", "Spacingd")  # what leaves intensities as they are
_VOXELS = 1 << 20  # looked at
_ONE_SIDE = 0.99  # of the voxels below the range, or above it: of a picture mostly of air some are inside
_FILLED = 0.02  # of the range: values of 0 to 1 where 0 to 255 are expected
_BEYOND = {False: 10, True: 50}  # times the range, without and with `clip`: 16 bits where 8 are expected


def first_range(preprocess: Sequence[Component]) -> tuple[float, float, bool] | None:
    """`a_min`, `a_max` and `clip` of `ScaleIntensityRanged`, if that is the first step that changes intensities."""
    first = next((part for part in preprocess if part.name not in _LEFT_ALONE), None)
    if first is None or first.name != "ScaleIntensityRanged":
        return None
    return float(first.arguments["a_min"]), float(first.arguments["a_max"]), bool(first.arguments.get("clip"))


def unlike_range(image: np.ndarray, preprocess: Sequence[Component]) -> list[str]:
    """A note on an image, as it is stored, whose values are of another kind than those that the pipeline is for.

    >>> scale = Component("ScaleIntensityRanged", {"a_min": 0, "a_max": 255})
    >>> unlike_range(np.arange(256), [scale]), len(unlike_range(np.arange(256) / 255, [scale]))
    ([], 1)
    """
    known = first_range(preprocess)
    if known is None or image.min() == image.max():  # a constant image is told by the reader
        return []
    low, high, clip = known
    # of each channel every so many voxels of each axis: a view, whatever the order in memory
    step = math.ceil((image.size / _VOXELS) ** (1 / max(1, image.ndim - 1)))
    values = image[(slice(None), *[slice(None, None, max(1, step))] * (image.ndim - 1))]
    dark, bright = np.percentile(values, (1, 99))
    far = _BEYOND[clip] * (high - low)
    outside = max(np.mean(values < low), np.mean(values > high)) > _ONE_SIDE
    if not outside and bright - dark >= _FILLED * (high - low) and low - far <= dark and bright <= high + far:
        return []
    return [
        f"its values (1 % below {dark:.4g}, 1 % above {bright:.4g}) do not suit the range {low:g} to {high:g} of "
        "ScaleIntensityRanged: the network may find little; store them as in the training images (bits, scale, offset)"
    ]
