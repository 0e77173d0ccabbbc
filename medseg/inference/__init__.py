"""Tiled inference: the plan (`plan_tiles`), its execution (`OverlapTileInferer`, `GaussianTileInferer`), and a whole
case back on its own grid (`predict_case`)."""

from __future__ import annotations

from medseg.inference.case import predict_case
from medseg.inference.gaussian import GaussianTileInferer, WindowPlan, plan_windows
from medseg.inference.inferers import Block, OverlapTileInferer, TileInferer
from medseg.inference.tiling import Tile, TilePlan, plan_tiles

__all__ = [
    "Block",
    "GaussianTileInferer",
    "OverlapTileInferer",
    "Tile",
    "TileInferer",
    "TilePlan",
    "WindowPlan",
    "plan_tiles",
    "plan_windows",
    "predict_case",
]
