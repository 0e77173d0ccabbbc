"""What both inferers share: they are MONAI inferers, and streams of finished blocks.

`inferer(inputs, network)` gives logits of the whole image. `inferer.blocks(image, networks)` gives them piece by piece,
so that a volume never needs memory for classes times voxels: `medseg.inference.predict_case` reduces each piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.inferers.inferer import Inferer

from medseg.errors import UsageError
from medseg.inference.memory import available_memory, bytes_per_voxel, parse_bytes
from medseg.inference.passes import Passes

__all__ = ["Block", "TileInferer"]

SHARE = 0.5  # of the free memory, when no limit is given


@dataclass(frozen=True)
class Block:
    """Finished logits (K, *box) of the box start..stop; all of the image below `complete` on the slab axis is done."""

    start: tuple[int, ...]
    stop: tuple[int, ...]
    values: torch.Tensor | None  # None: nothing to predict here (outside the mask)
    complete: int


class TileInferer(Inferer):
    """What both inferers share: options, batches of images, memory. Not used by itself."""

    def __init__(
        self,
        *,
        batch: int | str = "auto",
        mirror: bool | Sequence[int] = False,
        precision: str = "fp32",
        max_ram: int | str | None = None,
        max_vram: int | str | None = None,
        device: torch.device | str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__()
        if batch != "auto" and (not isinstance(batch, int) or batch < 1):
            raise UsageError("batch must be a number or auto", field="batch", found=batch)
        self.batch, self.mirror, self.precision = batch, mirror, precision
        self.max_ram, self.max_vram = parse_bytes(max_ram), parse_bytes(max_vram, "max_vram")
        self.device = device
        self.progress = progress

    def blocks(
        self,
        image: torch.Tensor,
        networks: Sequence[Any],
        *,
        axis: int = -1,
        mask: torch.Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Iterator[Block]:
        """Logits of `image` (C, *spatial) as finished blocks, ordered along the slab axis.

        A block's values are valid until the next block is asked for. `mask` (*spatial): tiles without a voxel in it are
        skipped. The mean over `networks` is taken per tile.
        """
        raise NotImplementedError

    def __call__(self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logits (B, K, *spatial), float32, of `inputs` (B, C, *spatial), on the inputs' device.

        With mirroring, the logarithm of the mean probability. Further arguments go to the network. As from MONAI's
        inferers, a MetaTensor comes back as one, with its affine and what was applied to it. An empty batch gives an
        empty result, as from torch's modules.
        """
        if inputs.ndim < 3:
            raise UsageError("inputs need the axes (B, C, *spatial)", field="inputs", found=tuple(inputs.shape))
        networks = [_Bound(network, args, kwargs) if args or kwargs else network]
        if not len(inputs):
            return _with_meta(self._of_nothing(inputs, networks), inputs)
        result: torch.Tensor | None = None
        for number, image in enumerate(_plain(inputs)):
            for block in self._whole(image, networks, self.device or inputs.device):
                assert block.values is not None
                if result is None:
                    shape = (len(inputs), block.values.shape[0], *inputs.shape[2:])
                    if block.values.shape[1:] == inputs.shape[2:] and len(inputs) == 1:
                        return _with_meta(block.values[None].to(inputs.device), inputs)
                    result = torch.empty(shape, dtype=torch.float32, device=inputs.device)
                box = tuple(slice(a, b) for a, b in zip(block.start, block.stop, strict=True))
                result[number, :, *box] = block.values.to(inputs.device)
        assert result is not None
        return _with_meta(result, inputs)

    def _of_nothing(self, inputs: torch.Tensor, networks: Sequence[Any]) -> torch.Tensor:
        """Logits of no image: how many classes they have is seen at the first piece of one of zeros."""
        blank = _plain(inputs).new_zeros(inputs.shape[1:])
        first = next(self.blocks(blank, networks, axis=0, device=self.device or inputs.device))
        assert first.values is not None
        shape = (0, first.values.shape[0], *inputs.shape[2:])
        return torch.empty(shape, dtype=torch.float32, device=inputs.device)

    def _whole(self, image: torch.Tensor, networks: Sequence[Any], device: torch.device | str) -> Iterator[Block]:
        return self.blocks(image, networks, axis=0, device=device)

    def passes(self, networks: Sequence[Any], dims: int, device: torch.device | str) -> Passes:
        return Passes(networks, dims, mirror=self.mirror, precision=self.precision, device=device)

    def budget(self, device: torch.device | str, held: int = 0) -> int:
        """Bytes that one batch of windows may take: the limit, or half of what is free now, less what is `held`."""
        on_host = torch.device(device).type == "cpu"
        limit = self.max_ram if on_host else self.max_vram
        free = available_memory(device)
        return max(1, min(limit - held, free) if limit is not None else int(free * SHARE))

    def at_once(self, passes: Passes, network: Any, channels: int, window: Sequence[int]) -> int:
        """Windows times mirrors in one call of a network.

        "auto": on a CPU one, since more gain nothing and cost memory; on a GPU all mirrors of a window, 8 at least, but
        no more than the budget holds.
        """
        if isinstance(self.batch, int):
            return self.batch
        if passes.device.type == "cpu":
            return 1
        one = bytes_per_voxel(network, channels, window, half=self.precision != "fp32") * math.prod(window)
        return max(1, min(max(len(passes.flips), 8), int(self.budget(passes.device) / one)))


class _Bound:
    """A network with further arguments; keeps the network's own attributes visible."""

    def __init__(self, network: Any, args: tuple, kwargs: dict) -> None:
        self._network, self._args, self._kwargs = network, args, kwargs

    def __call__(self, windows: torch.Tensor) -> Any:
        return self._network(windows, *self._args, **self._kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


def _plain(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs  # MetaTensor costs time in every operation


def _with_meta(result: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    if not hasattr(inputs, "as_tensor"):
        return result
    from monai.data.meta_tensor import MetaTensor

    return MetaTensor(result).copy_meta_from(inputs, copy_attr=False)
