"""Attention gates against the paper's equations, written out per voxel; the networks' published sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from medseg.networks import AttentionGate, AttentionUNet, FullResolutionGate


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy().astype(np.float64)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return module.eval()


def linear_up(coarse: np.ndarray, factor: int) -> np.ndarray:
    """Linear interpolation along the last axis at half-pixel centres, ends held."""
    places = (np.arange(coarse.shape[-1] * factor) + 0.5) / factor - 0.5
    return np.apply_along_axis(lambda row: np.interp(places, np.arange(len(row)), row), -1, coarse)


def slow_gate(gate: AttentionGate, x: np.ndarray, g: np.ndarray, stride: tuple[int, ...]):
    """Equations 1 and 2 of arXiv:1804.03999, one voxel of the coarse grid at a time, in double precision."""
    W_x, W_g, b_g = array(gate.W_x.weight), array(gate.W_g.weight), array(gate.W_g.bias)
    psi, b_psi = array(gate.psi.weight), array(gate.psi.bias)
    W, b = array(gate.W[0].weight), array(gate.W[0].bias)
    alpha = np.empty(g.shape[1:])
    for voxel in np.ndindex(*g.shape[1:]):
        window = tuple(slice(i * s, (i + 1) * s) for i, s in zip(voxel, stride, strict=True))
        seen = x[(slice(None), *window)]
        theta = np.array([(kernel * seen).sum() for kernel in W_x])
        phi = W_g.reshape(len(W_g), -1) @ g[(slice(None), *voxel)] + b_g
        q = psi.ravel() @ np.maximum(theta + phi, 0) + b_psi[0]
        alpha[voxel] = 1 / (1 + np.exp(-q))
    for axis, factor in enumerate(stride):
        alpha = np.moveaxis(linear_up(np.moveaxis(alpha, axis, -1), factor), -1, axis)
    gated = np.tensordot(W.reshape(W.shape[:2]), alpha * x, axes=1) + b.reshape(-1, *[1] * len(stride))
    return gated, alpha


@pytest.mark.parametrize("stride", [(2, 2), (2, 2, 2), (2, 2, 1), (3, 2)])
def test_gate_equals_the_equations(stride):
    dims = len(stride)
    gate = randomise(AttentionGate(dims, 3, 5, 4, stride=stride)).double()
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(1, 5, *(4, 3, 3)[:dims], generator=generator).double()
    x = torch.randn(1, 3, *(n * s for n, s in zip(g.shape[2:], stride, strict=True)), generator=generator).double()
    with torch.no_grad():
        gated, alpha = gate(x, g)
    expected, expected_alpha = slow_gate(gate, array(x[0]), array(g[0]), stride)
    np.testing.assert_allclose(array(gated[0]), expected, atol=1e-6, rtol=0)
    np.testing.assert_allclose(array(alpha[0, 0]), expected_alpha, atol=1e-6, rtol=0)
    assert (alpha > 0).all()
    assert (alpha < 1).all()
    assert alpha.std() > 0.01


def test_gate_in_single_precision_equals_the_equations():
    gate = randomise(AttentionGate(2, 8, 16))
    x, g = torch.randn(1, 8, 12, 12), torch.randn(1, 16, 6, 6)
    gated, alpha = gate(x, g)
    expected, expected_alpha = slow_gate(gate, array(x[0]), array(g[0]), (2, 2))
    np.testing.assert_allclose(array(alpha[0, 0]), expected_alpha, atol=1e-6, rtol=0)
    np.testing.assert_allclose(array(gated[0]), expected, atol=1e-6 * np.abs(expected).max(), rtol=0)


def test_gate_is_independent_of_g_only_when_its_weight_is_zero():
    gate = randomise(AttentionGate(2, 4, 6))
    x, g, other = torch.randn(1, 4, 8, 8), torch.randn(1, 6, 4, 4), torch.randn(1, 6, 4, 4)
    assert not torch.equal(gate(x, g)[1], gate(x, other)[1])
    nn.init.zeros_(gate.W_g.weight)
    assert torch.equal(gate(x, g)[0], gate(x, other)[0])


def test_gate_has_the_papers_layers():
    gate = AttentionGate(3, 4, 6)
    assert gate.W_x.bias is None
    assert gate.W_x.kernel_size == gate.W_x.stride == (2, 2, 2)
    assert gate.W_g.bias is not None
    assert gate.psi.bias is not None


def test_full_resolution_gate_equals_its_formula():
    gate = randomise(FullResolutionGate(2, 6, norm=None)).double()
    x, g = torch.randn(1, 6, 5, 7).double(), torch.randn(1, 6, 5, 7).double()
    gated, alpha = gate(x, g)
    theta, phi, psi = (part[0] for part in (gate.W_x, gate.W_g, gate.psi))
    hidden = np.einsum("oi,ihw->ohw", array(theta.weight)[..., 0, 0], array(x[0]))
    hidden += np.einsum("oi,ihw->ohw", array(phi.weight)[..., 0, 0], array(g[0]))
    hidden += (array(theta.bias) + array(phi.bias))[:, None, None]
    q = np.einsum("i,ihw->hw", array(psi.weight).ravel(), np.maximum(hidden, 0)) + array(psi.bias)[0]
    np.testing.assert_allclose(array(alpha[0, 0]), 1 / (1 + np.exp(-q)), atol=1e-6)
    np.testing.assert_allclose(array(gated[0]), array(x[0]) / (1 + np.exp(-q)), atol=1e-6)


@pytest.mark.parametrize("gate", ["grid", "additive_full"])
@pytest.mark.parametrize("norm", [None, "batch"])
def test_open_gates_begin_open(gate, norm):
    torch.manual_seed(0)
    options = {"channels": (8, 16, 32), "gate": gate, "norm": norm}
    images = torch.randn(1, 1, 32, 32)
    network = AttentionUNet(2, 1, 2, open_gates=True, **options).eval()
    biases = [
        part.bias
        for name, part in network.named_modules()
        if name.endswith(("psi", "psi.0", "psi.1")) and getattr(part, "bias", None) is not None
    ]
    assert sum(float(bias.detach().sum()) for bias in biases) == 3.0 * sum(m.shape[1] for m in network(images, True)[1])
    shut = AttentionUNet(2, 1, 2, **options).eval()
    assert min(m.mean() for m in network(images, True)[1]) > 0.75
    assert all(m.mean() < 0.75 for m in shut(images, True)[1])


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_oktays_ct_network_has_6_40_million_parameters():
    with torch.device("meta"):
        network = AttentionUNet(3, 1, 2)
    assert round(count(network) / 1e6, 2) == 6.40  # table 2 of the paper
    assert len(network.gates) == 3  # the finest skip passes no gate
    logits, maps = network.eval()(torch.empty(1, 1, 32, 32, 32, device="meta"), return_attention=True)
    assert logits.shape == (1, 2, 32, 32, 32)
    assert [tuple(alpha.shape) for alpha in maps] == [(1, 2, n, n, n) for n in (16, 8, 4)]


def test_the_widespread_variant_has_34_9_million_parameters():
    with torch.device("meta"):
        network = AttentionUNet(2, 3, 1, (64, 128, 256, 512, 1024), gate="additive_full")
    # 34 878 573 in its usual form, which has a useless bias before each norm: two convolutions a level on both ways,
    # one after each up-sampling, three in each gate
    decoder = 64 + 128 + 256 + 512
    biases = 2 * (decoder + 1024) + decoder + 2 * decoder + 2 * decoder // 2 + 4
    assert count(network) + biases == 34_878_573
    assert len(network.gates) == 4


def test_top_skip_is_not_gated_and_others_are():
    torch.manual_seed(0)
    network = AttentionUNet(2, 1, 2, (4, 8, 16)).eval()
    images = torch.randn(1, 1, 16, 16)
    before = network(images)
    with torch.no_grad():
        for gate in network.gates:
            for part in gate.gates:
                part.psi.bias.fill_(-1e4)  # shut
    logits, maps = network(images, return_attention=True)
    assert max(float(alpha.detach().max()) for alpha in maps) == 0.0
    assert not torch.equal(logits, before)
    skip = network.encoder[0](images)  # still reaches the finest decoder level unchanged
    seen = []
    network.decoder[0].register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    network(images)
    assert torch.equal(seen[0][:, -4:], skip)


def test_scales_are_fused():
    torch.manual_seed(0)
    network = AttentionUNet(2, 1, 2, (4, 8, 16, 32)).eval()
    images = torch.randn(1, 1, 32, 32)
    before = network(images)
    with torch.no_grad():
        network.further_heads[1].weight.zero_()  # the logits of the coarsest decoder level
    assert not torch.equal(network(images), before)
    assert network.fusion.in_channels == 3 * 2
    assert AttentionUNet(2, 1, 2, (4, 8, 16), fuse_scales=False).fusion is None
    assert AttentionUNet(2, 1, 2, (4, 8, 16), gate="additive_full").fusion is None


def test_attention_maps_are_those_that_were_used():
    torch.manual_seed(0)
    network = AttentionUNet(2, 1, 2, (4, 8, 16)).eval()
    images = torch.randn(1, 1, 32, 32)
    logits, maps = network(images, return_attention=True)
    assert torch.equal(network(images), logits)
    assert all(((alpha > 0) & (alpha < 1)).all() for alpha in maps)
    network.train()
    outputs, maps = AttentionUNet(2, 1, 2, (4, 8, 16), deep_supervision=1)(images.repeat(2, 1, 1, 1), True)
    assert isinstance(outputs, tuple)
    assert [tuple(alpha.shape[2:]) for alpha in maps] == [(16, 16)]
