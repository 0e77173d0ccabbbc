"""How a pipeline's patches are read from these cases, and what they do there that was not asked for: transforms that
they limit, work that they waste."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from medseg.augmentation import Augmentation
from medseg.config import Pipeline
from medseg.patches import PatchReader

__all__ = ["patch_notices", "patch_reader"]

_WASTE = 0.2  # of a patch, from which it is told


def patch_reader(
    pipeline: Pipeline, margin: tuple[int, ...], augmentation: Augmentation, training: Mapping[str, Any]
) -> PatchReader:
    """The reader of a run's patches, with the context that its augmentation takes off again.

    Args:
        pipeline: its size of a patch, share around structures and neighbouring slices.
        margin: what an unpadded network cuts off.
        augmentation: whose first transform is asked how far it looks beyond a patch.
        training: stored cases by id: there is no context where no image is larger than the patch.
    """
    patch = tuple(pipeline.train.patch)
    reader = PatchReader(patch, margin, pipeline.train.foreground, pipeline.train.context_slices)
    cases = training.values()
    largest = (max(sizes) for sizes in zip(*(case.shape[: len(patch)] for case in cases), strict=True))
    room = [n - p for n, p in zip(largest, patch, strict=True)]
    context = augmentation.context(patch, room, sorted({reader.spacing(case) for case in cases}))
    return dataclasses.replace(reader, context=context)


def patch_notices(
    network: Any, reader: PatchReader, training: Mapping[str, Any], augmentation: Augmentation
) -> list[str]:
    """Notices on the patch, none where it fits.

    Args:
        network: `legal_size(size)` says which patches it can take.
        reader: of the patches.
        training: stored cases by id.
        augmentation: whose transforms are asked what they do on a patch of this size.
    """
    spacing = reader.spacing(next(iter(training.values())))
    return _padding(network, reader, [case.shape for case in training.values()]) + _limited(
        augmentation, reader.patch, spacing
    )


def _padding(network: Any, reader: PatchReader, shapes: Sequence[Sequence[int]]) -> list[str]:
    """How much of the patches lies beyond the images (mirrored, so computed for little), and which patch fits.

    Images of 35 x 51 x 36 voxels: patches of 32 x 48 x 32 instead of 40 x 56 x 40, of which 30 % lay beyond them, gave
    twice as many iterations in the same time (hippocampus, benchmarks/RESULTS.md).
    """
    patch = reader.patch

    def covered(shape: Sequence[int]) -> tuple[int, ...]:
        """Of a patch, what an image of this shape fills, with the margin that an unpadded network cuts off."""
        return tuple(min(p, n + 2 * m) for p, n, m in zip(patch, shape, reader.margin, strict=True))

    shapes = [shape[: len(patch)] for shape in shapes]  # a slice of a volume has two axes
    waste = 1 - statistics.fmean(math.prod(covered(shape)) for shape in shapes) / math.prod(patch)
    if waste < _WASTE:
        return []
    middle = [statistics.median_low(sizes) for sizes in zip(*shapes, strict=True)]
    fitting = _at_most(network, covered(middle))
    told = (
        f"{100 * waste:.0f} % of what is computed for a patch of {_shown(patch)} lies beyond the images "
        f"(median size {_shown(middle)} after preprocessing)"
    )
    if fitting is not None:
        told += f"; with --set train.patch={str(list(fitting)).replace(' ', '')} training sees more in the same time"
    return [told]


def _at_most(network: Any, size: tuple[int, ...]) -> tuple[int, ...] | None:
    """The largest patch that the network can take and that is nowhere larger than `size`, None if there is none."""
    found = []
    for axis, largest in enumerate(size):
        for n in range(largest, 0, -1):
            if network.legal_size([n] * len(size))[axis] == n:
                found.append(n)
                break
        else:
            return None
    return tuple(found)


def _limited(augmentation: Augmentation, patch: Sequence[int], spacing: Sequence[float]) -> list[str]:
    """Transforms that limit what they were asked for on this patch, so that nothing folds: what they really do."""
    told = []
    for part, transform in zip(augmentation.components, augmentation.transforms, strict=True):
        if not hasattr(transform, "applied_sigma"):
            continue
        applied, asked = transform.applied_sigma(patch, spacing), transform.applied_sigma([10**6] * len(patch), spacing)
        if any(a < 0.99 * b for a, b in zip(applied, asked, strict=True)):
            shown = " x ".join(f"{a:.2g}" for a in applied)
            told.append(
                f"{part.name}: sigma {transform.sigma:g} is limited to {shown} voxels on this patch, so that it does "
                "not fold; a larger patch or fewer control points (grid) allow more"
            )
    return told


def _shown(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
