"""Losses: plain arguments in, `loss(logits, target, weight=None) -> scalar`; all know the distance weight map."""

from __future__ import annotations

from medseg.losses.distance_weighted import DistanceWeightedCELoss, DistanceWeightedDiceCELoss

__all__ = ["DistanceWeightedCELoss", "DistanceWeightedDiceCELoss"]
