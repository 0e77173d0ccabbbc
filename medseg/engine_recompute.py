"""Activations that are forgotten in the forward pass and computed again for the gradient: less memory, more time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn

__all__ = ["recompute_activations"]


def recompute_activations(network: nn.Module) -> int:
    """Make every level of the network forget its activations and compute them again for the gradient.

    Applied to the members of the network's `ModuleList`s (encoder and decoder levels); to the `stages` of an encoder
    whose names are published; and where these are pieces of one sequence, to what features go `through` in them. Memory
    falls to about the largest level's, one more forward pass is paid; gradients and batch norm's running statistics
    stay equal. Returns how many levels were changed.
    """
    levels = [level for module in network.modules() if isinstance(module, nn.ModuleList) for level in module]
    for module in network.modules():
        if hasattr(module, "through"):
            module.through = _recomputed  # pyright: ignore[reportArgumentType]
    levels += [stage for module in network.modules() for stage in getattr(module, "stages", ())]
    outer = [level for level in levels if not any(level is not o and level in set(o.modules()) for o in levels)]
    chosen = [level for level in outer if any(True for _ in level.parameters())]
    for level in chosen:
        # a bound method: a deep copy of the network (a running mean of its weights) is bound to its own levels
        level.forward = MethodType(_recomputed, level)  # pyright: ignore[reportAttributeAccessIssue]
    return len(chosen)


def _recomputed(level: nn.Module, *values: Any, **named: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    plain = MethodType(type(level).forward, level)
    if not torch.is_grad_enabled():
        return plain(*values, **named)
    if not torch.compiler.is_compiling():  # a compiled backward pass updates no buffers
        named["context_fn"] = lambda: (contextlib.nullcontext(), _statistics_kept(level))
    return checkpoint(plain, *values, use_reentrant=False, **named)


@contextlib.contextmanager
def _statistics_kept(level: nn.Module) -> Iterator[None]:
    """Batch norm normalises as it does in training, but the same batch is not counted twice: a copy counts it."""
    norms = [module for module in level.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    buffers = [(module, name, value) for module in norms for name, value in module.named_buffers(recurse=False)]
    for module, name, value in buffers:
        setattr(module, name, value.clone())
    try:
        yield
    finally:
        for module, name, value in buffers:
            setattr(module, name, value)
