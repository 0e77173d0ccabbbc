"""Pictures too large for memory: windows are read from the file when the network needs them.

TIFF alone keeps tiles or strips that can be read by themselves. Preprocessing is then limited to steps that act on each
pixel alone, and to normalisation by mean and standard deviation, which are gathered in one pass over the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medseg import volumes
from medseg.component import Component, build_component
from medseg.errors import DataError, MedsegError
from medseg.volumes_colour import to_channels
from medseg.volumes_tiff import has_windows, segment_shape

__all__ = ["LABEL_ONLY", "POINTWISE", "LargePicture", "open_large"]

# each voxel of the result depends on that voxel alone, whatever the arguments
POINTWISE = frozenset({"ScaleIntensityRanged", "ThresholdIntensityd"})
LARGE = 2**26  # pixels, 8192 x 8192; below, a picture is read whole
_PIECE = 2**22  # pixels read at once in the pass over the file; as float64 32 MB
_PREVIEW = 2048  # longest side of the picture under the overlay
# nothing to do without labels
LABEL_ONLY = frozenset({"BoundaryWeightMapd", "InstancesToLabeld", "InteriorBorderLabeld", "RemapLabelsd"})


class LargePicture:
    """A picture (C, row, column) in its file, for the inferers: `shape`, and `read(start, size)` of boxes inside it.

    Args:
        path: TIFF with tiles or strips.
        spec: the data set's facts (`in_channels`, `colour`, `nan`).
        steps: preprocessing, see `open_large`.

    Raises:
        DataError: E310 channels, E311 NaN, E314 colour. FormatError: as `volumes.read_window`.
    """

    device = torch.device("cpu")

    def __init__(self, path: Path, spec: Any, steps: Sequence[Component], *, case: str | None = None) -> None:
        self.path, self.spec, self.case = path, spec, case
        self.native, _, _ = volumes.read_geometry(path)
        self.affine = torch.as_tensor(np.array(self.native.affine))
        self.stride = -(-max(self.native.shape) // _PREVIEW)
        self._steps: list[Any] = []
        # one pass over the file for each normalisation, and one at least: it refuses what a whole read would refuse
        self.preview = self._read_preview()
        self.shape = (len(self.preview), *self.native.shape)
        for step in steps:
            if step.name in POINTWISE:
                self._steps.append(build_component(step, "transform"))
            elif step.name == "NormalizeIntensityd":
                self._steps.append(self._normalisation(**step.arguments))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def as_tensor(self) -> LargePicture:
        """Itself: there is no tensor of all of it."""
        return self

    def read(self, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        """The preprocessed box (C, *size) from pixel `start`, float32; it must lie inside the picture."""
        return self._preprocessed(self._pixels(start, size))

    def _preprocessed(self, pixels: np.ndarray) -> torch.Tensor:
        image = torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32))
        for step in self._steps:
            image = torch.as_tensor(step({"image": image})["image"])
        return image.as_tensor() if hasattr(image, "as_tensor") else image

    def _pixels(self, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        box = (slice(start[0], start[0] + size[0]), slice(start[1], start[1] + size[1]))
        window = np.moveaxis(volumes.read_window(self.path, box), 0, -1)
        wanted = self.spec.in_channels
        pixels, _ = to_channels(window, 2, self.spec.colour, channels=wanted, path=self.path, case=self.case)
        if len(pixels) != wanted:
            message, fix = "the number of channels differs from what is declared", "convert the image"
            raise DataError(
                message, code="E310", case=self.case, file=self.path, expected=wanted, found=len(pixels), fix=fix
            )
        with np.errstate(over="ignore"):  # as of an image read whole, what single precision cannot hold is infinite
            pixels = pixels.astype(np.float32, copy=False) if pixels.dtype.kind == "f" else pixels
        if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
            if isinstance(self.spec.nan, str):
                message = "the image has NaN or infinite voxels"
                raise DataError(message, code="E311", case=self.case, file=self.path, expected="finite")
            pixels = np.nan_to_num(pixels, nan=self.spec.nan, posinf=self.spec.nan, neginf=self.spec.nan)
        return pixels

    def _read_preview(self) -> np.ndarray:
        step, preview = self.stride, None
        for (row, column), part in self._pieces():
            if preview is None:
                preview = np.zeros((len(part), *(-(-n // step) for n in self.native.shape)), part.dtype)
            sample = part[:, -row % step :: step, -column % step :: step]
            top, left = -(-row // step), -(-column // step)
            preview[:, top : top + sample.shape[1], left : left + sample.shape[2]] = sample
        assert preview is not None
        return preview

    def _pieces(self) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
        """The picture in boxes (first pixel, pixels) of whole tiles or strips, each unpacked once."""
        rows, columns = self.native.shape
        high, wide = segment_shape(self.path)
        wide *= max(1, min(-(-columns // wide), _PIECE // (high * wide)))
        high *= max(1, _PIECE // (high * wide)) if wide >= columns else 1
        for row in range(0, rows, high):
            for column in range(0, columns, wide):
                size = (min(high, rows - row), min(wide, columns - column))
                yield (row, column), self._pixels((row, column), size)

    def _normalisation(
        self, subtrahend: Any = None, divisor: Any = None, channel_wise: bool = False, **_: Any
    ) -> _Normalise:
        """Mean and standard deviation of the picture as the steps before leave it, where they are not given."""
        sums = np.zeros((3, self.shape[0]))
        for _first, part in self._pieces():
            values = self._preprocessed(part).double().flatten(1)
            sums += np.stack([np.full(len(values), values.shape[1]), values.sum(1), (values**2).sum(1)])
        count, total, squares = sums if channel_wise else sums.sum(1, keepdims=True)
        mean = total / count
        deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
        mean = mean if subtrahend is None else np.asarray(subtrahend, dtype=float).reshape(-1)
        deviation = deviation if divisor is None else np.asarray(divisor, dtype=float).reshape(-1)
        return _Normalise(mean, np.where(deviation == 0, 1.0, deviation))


class _Normalise:
    """(image - mean) / deviation, one number or one per channel."""

    def __init__(self, mean: np.ndarray, deviation: np.ndarray) -> None:
        self.mean, self.deviation = (torch.as_tensor(v, dtype=torch.float32)[:, None, None] for v in (mean, deviation))

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        return {"image": (sample["image"] - self.mean) / self.deviation}


def open_large(
    path: Path, spec: Any, steps: Sequence[Component], *, case: str | None = None, limit: int | None = None
) -> LargePicture | None:
    """`path` as a picture that stays in its file; None where it is to be read whole.

    That is when it has at most `limit` pixels (2^26 unless given), is no TIFF with tiles or small strips, or when one
    of `steps` needs the whole picture (all but ScaleIntensityRanged, ThresholdIntensityd, NormalizeIntensityd without
    `nonzero`, and steps that act on labels alone).
    """
    if spec.dims != 2 or not path.is_file():
        return None
    try:
        if volumes.find_format(path) != "tiff":
            return None
        geometry, _, _ = volumes.read_geometry(path)
    except MedsegError:
        return None  # refused with the message of a whole read
    if len(geometry.shape) != 2 or math.prod(geometry.shape) <= (LARGE if limit is None else limit):
        return None
    able = all(
        step.name in POINTWISE | LABEL_ONLY
        or (step.name == "NormalizeIntensityd" and not step.arguments.get("nonzero", False))
        for step in steps
    )
    return LargePicture(path, spec, steps, case=case) if able and has_windows(path) else None
