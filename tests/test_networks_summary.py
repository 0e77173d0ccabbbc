"""Costs of a network: against the convolution formula and against autograd."""

from __future__ import annotations

import json

import torch

from medseg.networks import NETWORKS, AttentionUNet, UNet
from medseg.networks.summary import describe, list_networks


def test_list_has_every_network_with_its_parameters():
    rows = list_networks()
    assert [row["name"] for row in rows] == list(NETWORKS)
    by_name = {row["name"]: row for row in rows}
    assert by_name["UNet"]["parameters"] == 31_030_658
    assert by_name["UNet"]["context"] == 92
    assert all(row["what"] for row in rows)
    json.dumps(rows)


def test_flops_of_the_papers_network_by_hand():
    """Twice voxels x kernel x channels in x channels out, sizes as printed in the paper's figure 1."""
    layers = [
        *((570, 9, 1, 64), (568, 9, 64, 64), (282, 9, 64, 128), (280, 9, 128, 128), (138, 9, 128, 256)),
        *((136, 9, 256, 256), (66, 9, 256, 512), (64, 9, 512, 512), (30, 9, 512, 1024), (28, 9, 1024, 1024)),
        *((56, 1, 1024, 512), (54, 9, 1024, 512), (52, 9, 512, 512), (104, 1, 512, 256), (102, 9, 512, 256)),
        *((100, 9, 256, 256), (200, 1, 256, 128), (198, 9, 256, 128), (196, 9, 128, 128), (392, 1, 128, 64)),
        *((390, 9, 128, 64), (388, 9, 64, 64), (388, 1, 64, 2)),
    ]
    expected = sum(2 * side**2 * kernel * inputs * outputs for side, kernel, inputs, outputs in layers)
    with torch.device("meta"):
        network = UNet()
    facts = describe(network, (560, 572))  # 560 is not legal: 572 is the next
    assert facts["input_size"] == (572, 572)
    assert facts["output_size"] == (388, 388)
    assert facts["flops"] == expected
    json.dumps(facts)


def test_cost_grows_with_batch_and_names_what_it_is():
    network = AttentionUNet(2, 1, 2, (4, 8, 16))
    one, four = describe(network, (64, 64)), describe(network, (64, 64), batch=4)
    assert four["flops"] == 4 * one["flops"]
    assert 3.9 < four["activations_mib"] / one["activations_mib"] < 4.1
    assert one["step_mib"] > one["activations_mib"]
    assert one["name"] == "AttentionUNet"
    assert network.training  # the network itself is left as it was
    assert next(network.parameters()).device.type == "cpu"


def test_kept_memory_by_hand():
    """Convolution, ReLU, convolution: autograd keeps the image, the ReLU's result, and no copy of it."""
    with torch.device("meta"):
        network = UNet(2, 1, 2, (8, 8), padding="same", convs_per_level=1, dropout=0.0)
    kept = describe(network, (64, 64))["activations_mib"] * 2**20
    fine, coarse = 64 * 64 * 4, 32 * 32 * 4
    # image; 8 features and the indices of their maxima (8 bytes); pooled; coarse features; both joined; decoded
    expected = fine + 8 * fine + 8 * coarse * 2 + 8 * coarse + 8 * coarse + 16 * fine + 8 * fine
    assert abs(kept - expected) <= 0.05 * 2**20
