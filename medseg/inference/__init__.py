"""Tiled inference: the plan (`plan_tiles`), its execution (`OverlapTileInferer`, `GaussianTileInferer`), and a whole
case back on its own grid (`predict_case`)."""

from __future__ import annotations

from medseg.inference.blending import WindowPlan, plan_windows
from medseg.inference.case import predict_case
from medseg.inference.gaussian import GaussianTileInferer
from medseg.inference.inferers import OverlapTileInferer
from medseg.inference.streams import Block
from medseg.inference.tiling import Tile, TilePlan, plan_tiles

__all__ = [
    "Block",
    "GaussianTileInferer",
    "OverlapTileInferer",
    "Tile",
    "TilePlan",
    "WindowPlan",
    "plan_tiles",
    "plan_windows",
    "predict_case",
]
