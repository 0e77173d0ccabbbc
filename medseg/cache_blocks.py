"""Arrays on disk in blocks, so that a patch is read without reading the volume, and without holding it in memory.

A `.npy` file of shape (*number of blocks, C, *block). A patch touches few blocks, each one contiguous piece of the
file; they are read, not mapped, so memory does not grow with the data set. In a plain array a 96^3 patch of a
512x512x700 volume spreads over 26 MB.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from medseg.errors import FormatError

__all__ = ["BlockArray", "even_block", "mirror_index"]


def even_block(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """The largest block, at most `block`, that divides each axis into equal parts but for a remainder.

    >>> even_block((36, 50, 512), (32, 32, 32))
    (18, 25, 32)
    """
    return tuple(-(-n // -(-n // b)) for n, b in zip(shape, block, strict=True))


def mirror_index(start: int, size: int, length: int) -> np.ndarray:
    """Indices of `size` voxels from `start` in an axis of `length`, mirrored at its ends as often as needed.

    The border voxel itself is not repeated; an axis of one voxel repeats it.

    >>> mirror_index(-3, 9, 3).tolist()
    [1, 2, 1, 0, 1, 2, 1, 0, 1]
    """
    index = np.arange(start, start + size)
    if length == 1:
        return np.zeros_like(index)
    period = 2 * (length - 1)
    index %= period
    return np.minimum(index, period - index)


@dataclass(frozen=True)
class BlockArray:
    """One array (C, *spatial) on disk.

    Attributes:
        path: the file.
        shape: (C, *spatial).
        block: spatial size of a block; blocks at the far borders are filled up with zeros.
        dtype: as numpy writes it, such as "<f4".
        offset: bytes before the first block.
    """

    path: Path
    shape: tuple[int, ...]
    block: tuple[int, ...]
    dtype: str
    offset: int

    @classmethod
    def write(cls, path: Path, array: np.ndarray, block: Sequence[int]) -> BlockArray:
        """Write `array` (C, *spatial) to `path` (not atomic: the folder around it is) and sync it."""
        size = even_block(array.shape[1:], block)
        counts = tuple(-(-n // b) for n, b in zip(array.shape[1:], size, strict=True))
        dtype = array.dtype.newbyteorder("<")
        header = {"descr": dtype.str, "fortran_order": False, "shape": (*counts, array.shape[0], *size)}
        with path.open("wb") as file:
            np.lib.format.write_array_header_2_0(file, header)
            offset = file.tell()
            for position in itertools.product(*map(range, counts)):
                box = tuple(slice(p * b, (p + 1) * b) for p, b in zip(position, size, strict=True))
                part = array[(slice(None), *box)]
                if part.shape[1:] != size:
                    part = np.pad(part, [(0, 0), *((0, b - n) for n, b in zip(part.shape[1:], size, strict=True))])
                file.write(np.ascontiguousarray(part, dtype=dtype).tobytes())
            file.flush()
            os.fsync(file.fileno())
        return cls(path, array.shape, size, dtype.str, offset)

    def describe(self) -> dict[str, Any]:
        """Plain values, from which `BlockArray.of` makes it again."""
        return {"shape": list(self.shape), "block": list(self.block), "dtype": self.dtype, "offset": self.offset}

    @classmethod
    def of(cls, path: Path, facts: dict[str, Any]) -> BlockArray:
        """The array at `path` from what `describe` gave."""
        return cls(path, tuple(facts["shape"]), tuple(facts["block"]), str(facts["dtype"]), int(facts["offset"]))

    @property
    def size_bytes(self) -> int:
        """What the file must measure."""
        return self.offset + int(np.prod(self._counts)) * self._block_bytes

    @property
    def _counts(self) -> tuple[int, ...]:
        return tuple(-(-n // b) for n, b in zip(self.shape[1:], self.block, strict=True))

    @property
    def _block_bytes(self) -> int:
        return int(np.prod(self.block)) * self.shape[0] * np.dtype(self.dtype).itemsize

    def read(self, start: Sequence[int] | None = None, size: Sequence[int] | None = None) -> np.ndarray:
        """The box of `size` voxels from `start`, (C, *size); the whole array without arguments.

        Beyond the borders the array is mirrored (the border voxel itself not repeated), as often as needed.
        """
        spatial = self.shape[1:]
        start = (0,) * len(spatial) if start is None else tuple(map(int, start))
        size = spatial if size is None else tuple(map(int, size))
        low, high, mirrored = [], [], []
        for axis, (first, extent, length) in enumerate(zip(start, size, spatial, strict=True), start=1):
            if first >= 0 and first + extent <= length:
                low.append(first)
                high.append(first + extent)
                continue
            index = mirror_index(first, extent, length)
            low.append(int(index.min()))
            high.append(int(index.max()) + 1)
            mirrored.append((axis, index - low[-1]))
        box = self._read_box(low, high)
        for axis, index in mirrored:
            box = np.take(box, index, axis=axis)
        return box

    def _read_box(self, low: Sequence[int], high: Sequence[int]) -> np.ndarray:
        block, counts, channels = self.block, self._counts, self.shape[0]
        dtype = np.dtype(self.dtype)
        out = np.empty((channels, *(h - a for a, h in zip(low, high, strict=True))), dtype)
        first = [a // b for a, b in zip(low, block, strict=True)]
        last = [(h - 1) // b for h, b in zip(high, block, strict=True)]
        run = last[-1] - first[-1] + 1  # blocks that follow one another along the last axis are read at once
        buffer = np.empty((run, channels, *block), dtype)
        with self.path.open("rb", buffering=0) as file:
            for position in itertools.product(*(range(a, z + 1) for a, z in zip(first[:-1], last[:-1], strict=True))):
                number = int(np.ravel_multi_index((*position, first[-1]), counts))
                self._fill(file, buffer, self.offset + number * self._block_bytes)
                source, target = [], []
                for axis, p in enumerate(position):
                    begin, end = max(low[axis], p * block[axis]), min(high[axis], (p + 1) * block[axis])
                    source.append(slice(begin - p * block[axis], end - p * block[axis]))
                    target.append(slice(begin - low[axis], end - low[axis]))
                for step in range(run):
                    p, b = first[-1] + step, block[-1]
                    begin, end = max(low[-1], p * b), min(high[-1], (p + 1) * b)
                    inner = (slice(None), *source, slice(begin - p * b, end - p * b))
                    out[(slice(None), *target, slice(begin - low[-1], end - low[-1]))] = buffer[step][inner]
        return out

    def _fill(self, file: FileIO, buffer: np.ndarray, offset: int) -> None:
        view = memoryview(buffer.data).cast("B")
        done = 0
        file.seek(offset)
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                found = self.path.stat().st_size
                fix = "remove this file's folder; it is made again"
                raise FormatError("a stored array is cut off", code="E303", file=self.path,
                                  expected=f"{self.size_bytes} bytes", found=f"{found} bytes", fix=fix)  # fmt: skip
            done += count
