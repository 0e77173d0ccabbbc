"""Where an attention network looks: its gates' coefficients of a case, on the case's own grid, for the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from medseg.checkpoint import load_model
from medseg.component import build_component
from medseg.data import load_image_sample
from medseg.inference import OverlapTileInferer
from medseg.inference.slices import SliceBlocks

__all__ = ["AttentionMaps", "has_attention"]


def has_attention(network_name: str) -> bool:
    """Whether a network of that name can return its attention maps.

    >>> has_attention("AttentionUNet"), has_attention("UNet")
    (True, False)
    """
    import inspect

    from medseg.networks import NETWORKS

    return "return_attention" in inspect.signature(NETWORKS[network_name].forward).parameters


class AttentionMaps:
    """The attention maps of a run's network, case by case.

    Args:
        run: run folder.

    Raises:
        CheckpointError: there is no usable checkpoint.
    """

    def __init__(self, run: str | Path) -> None:
        self.model = load_model(run)
        self.preprocess = [build_component(part, "transform") for part in self.model.pipeline.preprocess]
        self.network = _GatesAsOutput(self.model.network)

    def __call__(self, case: Any) -> dict[str, np.ndarray]:
        """Name -> map (*spatial of the stored image) in [0, 1], one for each gated skip, fine to coarse.

        Args:
            case: `medseg.data.Case`.

        Raises:
            DataError: the image is refused.
        """
        sample = load_image_sample(case.images, self.model.dataset, case=case.id)
        native = sample["native"]
        for transform in self.preprocess:
            sample = dict(transform(sample))
        image = sample["image"]
        affine = np.asarray(image.affine, np.float64)
        pixels, inferer = image.as_tensor(), OverlapTileInferer()
        by_slices = self.network.spatial_dims == 2 and pixels.ndim == 4
        source = SliceBlocks(inferer) if by_slices else inferer
        maps: np.ndarray = np.empty(0, np.float32)
        with torch.inference_mode():
            for block in source.blocks(pixels, [self.network], device=pixels.device):
                if block.values is None:
                    continue
                if not maps.size:
                    maps = np.zeros((len(block.values), *pixels.shape[1:]), np.float32)
                box = tuple(slice(a, b) for a, b in zip(block.start, block.stop, strict=True))
                maps[:, *box] = block.values.numpy()
        return {f"gate {level}": _to_native(one, affine, native) for level, one in enumerate(maps, start=1)}


class _GatesAsOutput(nn.Module):
    """The network with its attention maps, raised to the image's size, in place of logits: they are tiled alike."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        for name in ("spatial_dims", "in_channels", "divisor", "context", "padded", "exact_under_tiling"):
            setattr(self, name, getattr(network, name))
        self.output_size, self.legal_size = network.output_size, network.legal_size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, *spatial) -> (B, gated skips, *spatial); several gates of one skip are averaged."""
        _, maps = self.network(images, return_attention=True)
        mode = "trilinear" if images.ndim == 5 else "bilinear"
        size = images.shape[2:]
        raised = [
            nn.functional.interpolate(alpha.mean(1, keepdim=True), size, mode=mode, align_corners=False)
            for alpha in maps
        ]
        return torch.cat(raised, dim=1)


def _to_native(values: np.ndarray, affine: np.ndarray, native: Any) -> np.ndarray:
    from scipy import ndimage

    dims = values.ndim
    keep = [*range(dims), 3]
    way = np.linalg.solve(affine[np.ix_(keep, keep)], native.affine[np.ix_(keep, keep)])
    resample: Any = ndimage.affine_transform
    # one more voxel on every side: without it all beyond the centres of the outermost voxels would be 0
    around = np.pad(values, 1, mode="edge")
    moved = resample(around, way[:dims, :dims], way[:dims, dims] + 1, native.shape, order=1, mode="constant", cval=0.0)
    return np.clip(moved, 0.0, 1.0)
