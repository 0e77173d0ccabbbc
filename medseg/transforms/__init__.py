"""Transforms of samples: dictionary transforms in MONAI's manner, and the array functions beneath them."""

from __future__ import annotations

from medseg.transforms.elastic import RandElasticDeformationd, elastic_displacement
from medseg.transforms.intensity import RandIntensityd
from medseg.transforms.labels import InstancesToLabeld, InteriorBorderLabeld, RemapLabelsd, part_instances
from medseg.transforms.postprocess import (
    CellsFromMembranes,
    FillHoles,
    InstancesFromProbability,
    KeepLargestComponent,
    RemoveSmallObjects,
    Threshold,
)
from medseg.transforms.weight_map import BoundaryWeightMapd, boundary_weight_map

__all__ = [
    "BoundaryWeightMapd",
    "CellsFromMembranes",
    "FillHoles",
    "InstancesFromProbability",
    "InstancesToLabeld",
    "InteriorBorderLabeld",
    "KeepLargestComponent",
    "RandElasticDeformationd",
    "RandIntensityd",
    "RemapLabelsd",
    "RemoveSmallObjects",
    "Threshold",
    "boundary_weight_map",
    "elastic_displacement",
    "part_instances",
]
