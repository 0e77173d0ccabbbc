"""How far torch rounds fp32, said in either of its two ways, is put back; and neither way stops what reads it."""

from __future__ import annotations

import contextlib

import pytest
import torch

from medseg.hardware import Hardware, configured
from medseg.inference import OverlapTileInferer
from medseg.precision import full_precision, kept_precision
from medseg.transforms import elastic_displacement

PLACES = ("cuda.matmul", "mkldnn.matmul", "mkldnn.conv", "cudnn.conv", "cudnn.rnn")


def place(name):
    found = torch.backends
    for part in name.split("."):
        found = getattr(found, part)
    return found


def now():
    """What torch says, by both ways; None where it refuses to say."""
    said = [torch.backends.fp32_precision, *(place(name).fp32_precision for name in PLACES)]
    for ask in (torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.allow_tf32):
        try:
            said.append(ask())
        except RuntimeError:
            said.append(None)
    return said


@pytest.fixture(
    params=["older", "older, convolutions", "cuda.matmul", "cudnn.conv", "all", "all, exact"], ids=lambda way: way
)
def said(request):
    """fp32 rounded, or not, in one of torch's ways; taken back after the test."""
    before = now()
    if request.param == "older":
        torch.set_float32_matmul_precision("high")
    elif request.param == "older, convolutions":
        torch.backends.cudnn.allow_tf32 = False
    elif request.param.startswith("all"):
        torch.backends.fp32_precision = "ieee" if "exact" in request.param else "tf32"
    else:
        place(request.param).fp32_precision = "ieee" if request.param == "cudnn.conv" else "tf32"
    yield request.param
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.fp32_precision = before[0]
    for name, value in zip(PLACES, before[1:], strict=False):
        place(name).fp32_precision = value
    assert now() == before


def test_full_precision_is_full_and_what_was_said_comes_back(said):
    before = now()
    with full_precision():
        assert {place(name).fp32_precision for name in PLACES} == {"ieee"}
        assert now()[-2:] == ["highest", False]
    assert now() == before
    with contextlib.suppress(ZeroDivisionError), kept_precision():
        torch.set_float32_matmul_precision("medium")
        raise ZeroDivisionError
    assert now() == before


def test_prediction_training_and_deformation_work_whichever_way_was_used(said):
    before, image = now(), torch.rand(1, 1, 16, 16)
    assert torch.equal(OverlapTileInferer(tile=8, context=0, divisor=1)(image, torch.nn.Identity()), image)
    with configured(Hardware(torch.device("cpu"), "fp32", 1, "")):
        assert torch.get_float32_matmul_precision() == "high"
    assert elastic_displacement((8, 8)).shape == (2, 8, 8)
    assert now() == before
