"""Whether a fixed range of intensities fits the images: nothing else would say that they become one constant."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medseg.component import Component
from medseg.config import DatasetSpec
from medseg.data_case import Case
from medseg.data_reading import read_channels
from medseg.inference.intensity import first_range

__all__ = ["intensity_notices"]

_LOOKED_AT = 4  # images, as they are stored: what has been clipped does not tell where it was
_BEYOND = 0.95  # of the voxels at one end; of a CT with much air 60 to 80 % lie below a window of soft tissue
_FILLED = 0.05  # of the range


def intensity_notices(preprocess: Sequence[Component], cases: Sequence[Case], spec: DatasetSpec) -> list[str]:
    """A notice where `ScaleIntensityRanged`, the first step that changes intensities, does not suit these images.

    Args:
        preprocess: the pipeline's steps.
        cases: of which some are read.
        spec: the data set's facts.
    """
    known = first_range(preprocess)
    if known is None:
        return []
    low, high, clip = known
    found = []
    for i in np.unique(np.linspace(0, len(cases) - 1, min(_LOOKED_AT, len(cases))).round().astype(int)):
        image = read_channels(cases[i].images, spec, cases[i].id)[0].array
        image = image[:, ::2, ::2]  # enough of it for shares and percentiles
        found.append((np.mean(image < low), np.mean(image > high), *np.percentile(image, (1, 99))))
    below, above = np.mean(found, axis=0)[:2]
    dark, bright = np.median(found, axis=0)[2:]
    if max(below, above) > _BEYOND:
        side = f"below a_min {low:g}" if below > above else f"above a_max {high:g}"
        told = f"{100 * max(below, above):.4g} % of the images lie {side}"
        told += " and become one value" if clip else ""
    elif bright - dark < _FILLED * (high - low):
        told = f"the images fill only {100 * (bright - dark) / (high - low):.2g} % of {low:g} to {high:g}"
    else:
        return []
    return [
        f"{told} (1 % of the voxels below {dark:.4g}, 1 % above {bright:.4g}): set "
        "preprocess.ScaleIntensityRanged.a_min and a_max to what your images hold"
    ]
