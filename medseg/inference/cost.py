"""What a prediction will cost, told before it runs, and the certificate that tiling changed nothing."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from medseg.errors import UsageError
from medseg.inference.blending import WindowPlan
from medseg.inference.gaussian import GaussianTileInferer
from medseg.inference.inferers import OverlapTileInferer
from medseg.inference.keeping import held_bytes
from medseg.inference.memory import bytes_per_voxel, resident_bytes
from medseg.inference.slices import middle_slice
from medseg.inference.streams import TileInferer
from medseg.inference.tiling import Border, TilePlan
from medseg.inference.windows import network_geometry, read_window

__all__ = ["Certificate", "Cost", "certify", "estimate"]

TOLERANCE = 1e-5  # of the largest logit, or absolute where that is below 1


@dataclass(frozen=True)
class Cost:
    """Of one case; bytes and seconds. `peak_vram` is 0 on a CPU."""

    case: str
    image_size: tuple[int, ...]
    window: tuple[int, ...]
    tiles: int
    passes: int
    redundancy: float
    peak_ram: int
    peak_vram: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        size, window = ("x".join(map(str, v)) for v in (self.image_size, self.window))
        gpu = f", GPU {self.peak_vram / 2**30:.1f} GB" if self.peak_vram else ""
        return (
            f"{self.case}: image {size}, {self.tiles} tiles of {window}, {self.passes} passes, redundancy "
            f"{self.redundancy:.2f}, about {self.seconds:.0f} s, RAM {self.peak_ram / 2**30:.1f} GB{gpu}"
        )


def estimate(
    case: str,
    image: torch.Tensor,
    networks: Sequence[Any],
    inferer: TileInferer,
    *,
    device: torch.device | str = "cpu",
    axis: int = -1,
    native_voxels: int = 0,
    exact_grid: bool = True,
    time_it: bool = True,
) -> Cost:
    """The cost of `image` (C, *spatial); one tile is computed to tell the time (`time_it`).

    Args:
        native_voxels: voxels of the result. exact_grid: False when probabilities are interpolated to it.
    """
    whole_size = tuple(image.shape[1:])
    image, slices = middle_slice(image, networks[0])
    size, channels = tuple(image.shape[1:]), image.shape[0]
    last, axis = axis % len(whole_size) == len(whole_size) - 1, axis if slices == 1 else -1
    plan: TilePlan | WindowPlan
    if isinstance(inferer, OverlapTileInferer):
        plan = inferer.plan(size, networks[0], channels=channels, axis=axis, device=device)
        tiles = len(plan.tiles)
    elif isinstance(inferer, GaussianTileInferer):
        plan = inferer.plan(size, networks[0], axis=axis)
        tiles = plan.count
    else:
        raise UsageError("the cost of this inferer is not known", field="inferer", found=type(inferer).__name__)
    passes = inferer.passes(networks, len(size), device)
    on_gpu = passes.device.type == "cuda"
    window = torch.zeros((1, channels, *plan.window), dtype=torch.float32)
    # constant input would be as quick, but denormal and zero operands are faster on some processors: noise it is
    window.normal_(generator=torch.Generator().manual_seed(0))
    seconds, classes = 0.0, int(getattr(networks[0], "out_channels", 2))
    resident = resident_bytes()  # before the timed tile, whose memory libraries keep: it is counted below
    if time_it:
        for _ in range(2 if on_gpu else 1):  # a GPU's first pass loads its kernels, for seconds
            begin = time.perf_counter()
            classes = passes(window).shape[1]
            if on_gpu:
                torch.cuda.synchronize(passes.device)
            seconds = (time.perf_counter() - begin) * tiles * slices
    half = inferer.precision != "fp32"
    together = min(inferer.at_once(passes, networks[0], channels, plan.window), tiles * len(passes.flips))
    one = bytes_per_voxel(networks[0], channels, plan.window, half=half) * math.prod(plan.window)
    activations = int(one * together)
    slab = math.prod(n for a, n in enumerate(size) if a != plan.axis)
    held = held_bytes(plan, classes)
    if not exact_grid and slices == 1:
        held += 4 * classes * slab * min(2 * plan.window[plan.axis], size[plan.axis])
    elif not exact_grid:  # slices come one after the other; where those of the result lie across, all are held
        held += 4 * classes * math.prod(size) * (2 if last else slices)
    host = resident + held + native_voxels
    return Cost(
        case,
        whole_size,
        plan.window,
        tiles * slices,
        tiles * slices * passes.count,
        plan.redundancy,
        host + (0 if on_gpu else activations),
        activations if on_gpu else 0,
        seconds,
    )


@dataclass(frozen=True)
class Certificate:
    """`difference`: the largest between logits of tiles and of the whole image; `scale`: the largest logit."""

    difference: float
    scale: float
    exact: bool
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """With None for what was not compared: JSON has no NaN."""
        return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in asdict(self).items()}

    def text(self) -> str:
        word = "exact" if self.exact else "not exact"
        if math.isnan(self.difference):
            return f"tiled and whole-image output: {word}; {self.reason}"
        return (
            f"tiled and whole-image output differ by at most {self.difference:.2e} (largest logit {self.scale:.2e}): "
            f"{word}; {self.reason}"
        )


def certify(
    image: torch.Tensor,
    network: Any,
    inferer: TileInferer,
    *,
    device: torch.device | str = "cpu",
) -> Certificate:
    """Compare tiles with one pass over the whole of a sample: the middle of `image`, large enough for several tiles.

    The word "exact" needs an overlap-tile inferer in fp32, a network that is exact under tiling, more than one tile,
    and a difference of at most 1e-5 (of the largest logit, where that is above 1). The whole is always computed in
    fp32, so that with bf16 or fp16 the difference is that of rounding and tiling together.
    """
    image, _ = middle_slice(image, network)
    dims = image.ndim - 1
    geometry = network_geometry(network, dims)
    if geometry.context is None and not isinstance(inferer, GaussianTileInferer):
        return Certificate(math.nan, math.nan, False, "the network does not state its context")
    context = geometry.context or (0,) * dims
    # three tiles along each axis that is long enough, the smallest windows: every kind of seam, at little cost
    wanted = [2 * c + 2 * d for c, d in zip(context, geometry.divisor, strict=True)]
    long = [w + 4 * d for w, d in zip(wanted, geometry.divisor, strict=True)]
    size = [min(n, extent) for n, extent in zip(image.shape[1:], long, strict=True)]
    longest = max(range(dims), key=lambda a: size[a])
    # a smaller image is mirrored until it needs tiles
    size[longest] = max(size[longest], long[longest]) if all(map(operator.le, size, wanted)) else size[longest]
    half = inferer.precision != "fp32"
    legal = wanted if geometry.legal_size is None else geometry.legal_size(tuple(wanted))
    per_voxel = bytes_per_voxel(network, image.shape[0], legal, half=half)
    if per_voxel * math.prod(size) > inferer.budget(device):  # seams along one axis alone
        size = [n if a == longest else min(n, w) for a, (n, w) in enumerate(zip(size, wanted, strict=True))]
    if per_voxel * math.prod(size) > inferer.budget(device):
        return Certificate(
            math.nan, math.nan, False, "a sample of several tiles does not fit the memory, nothing was compared"
        )
    start = [(n - s) // 2 for n, s in zip(image.shape[1:], size, strict=True)]
    sample = read_window(image, start, size)[None].to(device)
    border: Border = inferer.border if isinstance(inferer, OverlapTileInferer) else "auto"
    whole_plan = OverlapTileInferer(tile=tuple(n + 2 * w for n, w in zip(size, wanted, strict=True)), border=border)
    whole = whole_plan(sample, network)
    rounded = f"computed in {inferer.precision}, compared with fp32" if inferer.precision != "fp32" else ""
    if isinstance(inferer, GaussianTileInferer):
        tiled = inferer(sample, network)
        difference, scale = _difference(tiled, whole)
        return Certificate(difference, scale, False, ", ".join(filter(None, ("Gaussian tiles are blended", rounded))))
    tiled = OverlapTileInferer(tile=tuple(wanted), border=border, precision=inferer.precision)(sample, network)
    difference, scale = _difference(tiled, whole)
    if rounded:
        return Certificate(difference, scale, False, rounded)
    if not geometry.exact:
        return Certificate(difference, scale, False, "the network's outputs depend on the whole window (instance norm)")
    if difference > TOLERANCE * max(1.0, scale):
        return Certificate(difference, scale, False, "the difference is larger than rounding")
    return Certificate(difference, scale, True, f"sample of {'x'.join(map(str, size))} voxels")


def _difference(tiled: torch.Tensor, whole: torch.Tensor) -> tuple[float, float]:
    return float((tiled - whole).abs().max()), float(whole.abs().max())
