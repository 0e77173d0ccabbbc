"""What a network costs: parameters, operations, receptive field, memory. Measured on the meta device: no computing."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from medseg.networks import NETWORKS, SegmentationNetwork

__all__ = ["describe", "list_networks"]

MEBI = 2**20


def list_networks() -> list[dict[str, Any]]:
    """One row per network at its default arguments: name, parameters, divisor, context, what it is.

    >>> {row["name"]: row["parameters"] for row in list_networks()}["UNet"]
    31030658
    """
    rows = []
    for name, kind in NETWORKS.items():
        build: Any = kind
        with torch.device("meta"):
            network = build()
        rows.append(
            {
                "name": name,
                "parameters": _count(network),
                "divisor": network.divisor[0],
                "context": network.context[0],
                "what": (inspect.getdoc(kind) or "").splitlines()[0].rstrip("."),
            }
        )
    return rows


def describe(network: SegmentationNetwork, input_size: Sequence[int], batch: int = 1) -> dict[str, Any]:
    """Size and cost of a network for one input, in fp32.

    Args:
        network: any network of medseg.
        input_size: voxels per side; the nearest legal size that is not smaller is taken.
        batch: images at a time.

    Returns:
        name, parameters, input_size (the legal one), output_size, context, receptive_field, divisor, padded,
        exact_under_tiling; flops: floating-point operations of one forward pass (a multiply-add counts 2; convolutions
        and matrix products only); activations_mib: tensors that autograd keeps for the backward pass; step_mib: one
        training step with Adam: weights, gradients, two moments, kept tensors. The loss, the gradients of activations
        in flight and the libraries' workspaces come on top.

    >>> from medseg.networks import UNet
    >>> facts = describe(UNet(), (572, 572))
    >>> facts["parameters"], facts["output_size"], round(facts["flops"] / 1e9)
    (31030658, (388, 388), 301)
    """
    size = network.legal_size(input_size)
    ghost = copy.deepcopy(network).to("meta")
    shape = (batch, network.in_channels, *size)
    flops = FlopCounterMode(display=False)
    with flops, torch.no_grad():
        ghost.eval()(torch.empty(shape, device="meta"))
    weights = sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))
    trained = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    kept = _kept_bytes(ghost.train(), torch.empty(shape, device="meta"))
    return {
        "name": type(network).__name__,
        "parameters": _count(network),
        "batch": batch,
        "input_size": size,
        "output_size": network.output_size(size),
        "context": network.context,
        "receptive_field": network.receptive_field,
        "divisor": network.divisor,
        "padded": network.padded,
        "exact_under_tiling": network.exact_under_tiling,
        "flops": int(flops.get_total_flops()),
        "activations_mib": round(kept / MEBI, 1),
        "step_mib": round((weights + 3 * trained + kept) / MEBI, 1),
    }


def _count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _kept_bytes(network: torch.nn.Module, images: torch.Tensor) -> int:
    """Bytes of the tensors that autograd saves in a forward pass, each storage once, weights not counted."""
    weights = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage  # kept alive here, so that its address stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(images)
    del output
    return sum(storage.nbytes() for storage in storages.values())
