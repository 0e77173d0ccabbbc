"""Networks: the U-Nets of the articles, each faithful to its source, all under one contract (`SegmentationNetwork`).

>>> network = build_network("UNet", channels=(4, 8), padding="same", norm="batch")
>>> network.divisor
(2, 2)
"""

from __future__ import annotations

from difflib import get_close_matches
from inspect import signature
from typing import Any

from medseg.errors import UsageError
from medseg.networks.attention_gate import AttentionGate, FullResolutionGate
from medseg.networks.attention_unet import AttentionUNet
from medseg.networks.fcn import FCN
from medseg.networks.geometry import SegmentationNetwork
from medseg.networks.resnet_unet import ResUNet
from medseg.networks.unet import UNet

__all__ = [
    "FCN",
    "NETWORKS",
    "AttentionGate",
    "AttentionUNet",
    "FullResolutionGate",
    "ResUNet",
    "SegmentationNetwork",
    "UNet",
    "build_network",
]

NETWORKS: dict[str, type[SegmentationNetwork]] = {
    network.__name__: network for network in (UNet, AttentionUNet, ResUNet, FCN)
}


def build_network(name: str, **arguments: Any) -> SegmentationNetwork:
    """Build a network by its name, with random weights.

    Raises:
        UsageError: no such network, no such argument (the message names the nearest), or a wrong value.

    >>> build_network("FCN", spatial_dims=2, in_channels=3, out_channels=2, channels=(4, 4, 8, 8, 8), hidden=16).divisor
    (32, 32)
    """
    if name not in NETWORKS:
        raise UsageError("no such network", field="network", **_nearest(name, list(NETWORKS)))
    network: Any = NETWORKS[name]
    known = list(signature(network).parameters)
    for argument in arguments:
        if argument not in known:
            raise UsageError(f"{name} has no such argument", field=argument, **_nearest(argument, known))
    return network(**arguments)


def _nearest(found: str, known: list[str]) -> dict[str, str]:
    lower = {name.lower(): name for name in known}
    near = get_close_matches(found.lower(), list(lower), n=1, cutoff=0.5)
    fix = {"fix": f"did you mean {lower[near[0]]}?"} if near else {}
    return {"expected": " | ".join(known), "found": found, **fix}
