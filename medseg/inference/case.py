"""One case from the preprocessed image to labels on its own grid; training's validation and `predict` both call it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, overload

import numpy as np
import torch

from medseg.errors import GeometryError, UsageError
from medseg.inference.grid_map import grid_map
from medseg.inference.native import NativeLabels, Sink
from medseg.inference.slices import SliceBlocks
from medseg.inference.streams import TileInferer

__all__ = ["NativeGrid", "predict_case"]


class NativeGrid(Protocol):
    """What is needed of `medseg.volumes.Geometry`."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def affine(self) -> np.ndarray: ...
    @property
    def spacing(self) -> tuple[float, ...]: ...


@overload
def predict_case(
    networks: Sequence[Any], image: torch.Tensor, *, want_probabilities: Literal[False] = False, **options: Any
) -> np.ndarray: ...
@overload
def predict_case(
    networks: Sequence[Any], image: torch.Tensor, *, want_probabilities: Literal[True], **options: Any
) -> tuple[np.ndarray, np.ndarray]: ...
def predict_case(  # type: ignore[misc]  (the overloads write `**options` for the keywords below)
    networks: Sequence[Any],
    image: torch.Tensor,
    *,
    inferer: TileInferer,
    affine_pre: np.ndarray,
    native: NativeGrid,
    mask: torch.Tensor | np.ndarray | None = None,
    postprocess: Sequence[Callable[..., np.ndarray]] = (),
    threshold: float | None = None,
    want_probabilities: bool = False,
    device: torch.device | str = "cpu",
    sink: Sink | None = None,
    probability_sink: Callable[[tuple[slice, ...], np.ndarray], None] | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Labels of one case on its native grid.

    Args:
        networks: one network, or the folds of an ensemble (probabilities are averaged per tile); in eval mode.
        image: (C, *spatial), preprocessed, float32, on the host; or a `LargePicture`, which stays in its file.
        inferer: `OverlapTileInferer` or `GaussianTileInferer`.
        affine_pre: 4x4 affine of `image`; `native`: the grid of the result (`.shape`, `.affine`, `.spacing`).
        mask: (*spatial) or (1, *spatial) of `image`, nonzero where there can be something (field of view); what lies
            outside becomes background, and tiles without a voxel inside are skipped. None: everywhere.
        postprocess: called in turn as `step(label, probabilities=..., spacing=...)` on the whole native label image.
        threshold: see `NativeLabels`.
        want_probabilities: give (labels, probabilities (K, *native shape) float32) instead of labels.
        device: of the networks.
        sink: called with finished planes in order (see `NativeLabels`); after post-processing when there is some.
        probability_sink: called with (native slices, probabilities (K, *box)) of each finished piece.
        out: zeros (*native.shape), uint8, in which the labels are put, such as a file mapped into memory.

    Returns:
        integers (*native.shape), uint8, or int16 with more than 256 classes.

    Raises:
        GeometryError: affines or shapes that do not belong together.
        ResourceError: out of memory even with the smallest plan.

    A 2-D network takes a 3-D image slice by slice along the last axis.

    >>> from medseg.inference import OverlapTileInferer
    >>> from medseg.volumes import Geometry
    >>> network = torch.nn.Conv2d(1, 2, 1)
    >>> _ = network.weight.data.copy_(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)), network.bias.data.zero_()
    >>> network.context, network.divisor, network.exact_under_tiling = (0, 0), (1, 1), True
    >>> grid, image = Geometry.of((2, 3)), torch.tensor([[[-1.0, 2, 2], [-1, -1, 2]]])  # label 1 where it is above 0
    >>> predict_case([network.eval()], image, inferer=OverlapTileInferer(), affine_pre=grid.affine, native=grid)
    array([[0, 1, 1],
           [0, 0, 1]], dtype=uint8)
    """
    if not networks:
        raise UsageError("no network given", field="networks")
    image = image if hasattr(image, "read") else torch.as_tensor(image)
    image = image.as_tensor() if hasattr(image, "as_tensor") else image
    size = tuple(image.shape[1:])
    shape = tuple(int(n) for n in native.shape)
    if len(shape) != len(size):
        raise GeometryError(
            "image and result need the same number of axes", expected=f"{len(shape)} axes", found=f"{len(size)} axes"
        )
    inside = None if mask is None else _mask(mask, size)
    grid = grid_map(affine_pre, size, native.affine, shape)
    whole: list[np.ndarray] = []

    def keep(box: tuple[slice, ...], values: np.ndarray) -> None:
        if probability_sink is not None:
            probability_sink(box, values)
        if keep_all:
            if not whole:
                whole.append(np.zeros((values.shape[0], *shape), dtype=np.float32))
                if values.shape[0] > 1:
                    whole[0][0] = 1.0
            whole[0][(slice(None), *box)] = values

    keep_all = want_probabilities or any(getattr(step, "needs_probabilities", False) for step in postprocess)
    labels = NativeLabels(
        grid,
        threshold=threshold,
        sink=None if postprocess else sink,
        probabilities=keep if keep_all or probability_sink is not None else None,
        out=out,
    )
    dims = getattr(networks[0], "spatial_dims", len(size))
    source = SliceBlocks(inferer) if dims == 2 and len(size) == 3 else inferer
    for block in source.blocks(image, networks, axis=grid.axis, mask=inside, device=device):
        labels.add(_inside(block, inside))
        del block  # its logits must not live on while the next tile is computed
    result = labels.finish()
    probabilities = whole[0] if whole else None
    if want_probabilities and probabilities is None:
        raise UsageError("nothing was predicted: the mask is empty", field="mask")
    for step in postprocess:
        result = np.asarray(step(result, probabilities=probabilities, spacing=tuple(native.spacing)))
    if postprocess and sink is not None:
        sink(0, result)
    return (result, probabilities) if want_probabilities and probabilities is not None else result


def _mask(mask: torch.Tensor | np.ndarray, size: tuple[int, ...]) -> torch.Tensor:
    inside = torch.as_tensor(mask)
    inside = inside.as_tensor() if hasattr(inside, "as_tensor") else inside
    if inside.ndim == len(size) + 1:
        inside = inside[0]
    if tuple(inside.shape) != size:
        raise GeometryError("mask and image differ in shape", expected=size, found=tuple(inside.shape))
    return inside != 0


def _inside(block: Any, mask: torch.Tensor | None) -> Any:
    """Background outside of the mask, whatever the tile that covers it says."""
    if mask is None or block.values is None:
        return block
    box = tuple(slice(a, b) for a, b in zip(block.start, block.stop, strict=True))
    outside = ~mask[box].to(block.values.device)
    if not bool(outside.any()):
        return block
    values = block.values.clone()
    values.masked_fill_(outside, -60.0)  # probability 0 after softmax and sigmoid
    if len(values) > 1:
        values[0].masked_fill_(outside, 60.0)
    return type(block)(block.start, block.stop, values, block.complete)
