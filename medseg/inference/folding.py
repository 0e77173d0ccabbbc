"""Batch norm taken into the convolution before it: one pass over the features and one copy of them less."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["fold_norms"]

_PAIRS: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
    (nn.Conv1d, nn.BatchNorm1d),
    (nn.Conv2d, nn.BatchNorm2d),
    (nn.Conv3d, nn.BatchNorm3d),
)


def fold_norms(network: Any) -> Any:
    """A copy of `network` in which convolutions followed by batch norm do the norm's scaling and shifting themselves.

    After training, batch norm is a scale and a shift per channel: w (x * k) + b with another kernel k and bias (Jacob
    et al. 2018, doi:10.1109/CVPR.2018.00286, section 3.2). Outputs change by rounding. Only neighbours in an
    `nn.Sequential`, in eval mode, without hooks or parametrizations, are folded; where there are none, or the network
    is no plain module (compiled, scripted, a function), the network itself is returned.

    >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    >>> folded = fold_norms(network)
    >>> [type(layer).__name__ for layer in folded]
    ['Conv2d', 'Identity', 'ReLU']
    >>> image = torch.rand(1, 1, 8, 8)
    >>> bool(torch.allclose(folded(image), network(image), atol=1e-6))
    True
    """
    plain = isinstance(network, nn.Module) and not isinstance(network, torch.jit.ScriptModule)
    if not plain or hasattr(network, "_orig_mod") or not any(_places(part) for part in network.modules()):
        return network
    network = copy.deepcopy(network)
    for part in network.modules():
        for first, second in _places(part):
            layers = part._modules
            convolution: Any = layers[first]
            layers[first] = fuse_conv_bn_eval(convolution, layers[second])  # pyright: ignore[reportArgumentType]
            layers[second] = nn.Identity()
    return network


def _places(part: nn.Module) -> list[tuple[str, str]]:
    """Names of neighbours in a sequence that can be folded."""
    if not isinstance(part, nn.Sequential) or type(part).forward is not nn.Sequential.forward:
        return []
    # not named_children(), which leaves out a layer that comes twice
    layers = [(name, layer) for name, layer in part._modules.items() if layer is not None]
    return [
        (first, second)
        for (first, convolution), (second, norm) in itertools.pairwise(layers)
        if any(type(convolution) is a and type(norm) is b for a, b in _PAIRS)
        and _foldable(convolution)
        and _foldable(norm)
        and getattr(norm, "running_mean", None) is not None
    ]


def _foldable(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks)
    return not layer.training and not any(hooks) and not parametrize.is_parametrized(layer)
