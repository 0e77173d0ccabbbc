"""Cases held in a device's memory: the same patches as from the store; what fits, what is refused, what is said."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_pipeline, write_cases

from medseg import engine_held
from medseg.batches import BatchMaker
from medseg.cache import CaseStore
from medseg.checkpoint import read_state
from medseg.config import load_dataset
from medseg.data import find_cases
from medseg.engine_held import HeldCase, hold_cases
from medseg.engine_stream import BatchStream
from medseg.errors import ResourceError
from medseg.patches import PatchReader
from medseg.training import train

CPU = torch.device("cpu")
# six cases of 16x20x12 voxels, image float32 and label uint8
BYTES = 6 * 16 * 20 * 12 * (4 + 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held")
    write_cases(folder / "data", 6)
    return folder


@pytest.fixture(scope="module")
def stored(place):
    spec = load_dataset("tiny", root=place / "data")
    return CaseStore(spec, folder=place / "cache").prepare(find_cases(spec, place / "data"))


@pytest.mark.parametrize(
    ("patch", "margin", "slices"),
    [((8, 8, 8), (3, 0, 2), 0), ((24, 8, 8), (0, 0, 0), 0), ((8, 8), (2, 2), 0), ((8, 8), (0, 0), 2)],
    ids=["beyond the border", "larger than the image", "slices", "neighbouring slices"],
)
def test_patches_are_those_of_the_store(stored, patch, margin, slices):
    reader = PatchReader(patch, margin, 0.5, slices)
    held = {name: HeldCase(case, CPU) for name, case in stored.items()}
    one, two = (BatchMaker(cases, 60, reader, batch=3, seed=5) for cases in (stored, held))
    for key in [(0, n) for n in range(20)]:
        first, second = one[key], two[key]
        assert (first.cases, first.seeds, first.spacings) == (second.cases, second.seeds, second.spacings)
        assert first.tensors.keys() == second.tensors.keys() == {"image", "label"}
        for name, values in first.tensors.items():
            assert torch.equal(values, second.tensors[name]), name
            assert values.dtype == second.tensors[name].dtype
            assert second.tensors[name].is_contiguous()


def test_batches_are_copies_not_views(stored):
    held = HeldCase(stored["c0"], CPU)
    before = held.arrays["image"].clone()
    maker = BatchMaker({"c0": held}, 1, PatchReader((8, 8, 8), (0, 0, 0), 0.0), batch=1, seed=0)
    maker[0, 0].tensors["image"].zero_()
    assert torch.equal(held.arrays["image"], before)


def test_auto_holds_on_a_gpu_alone_and_in_a_quarter_of_its_free_memory(stored, monkeypatch):
    gpu, free = torch.device("cuda", 0), [BYTES * 4]
    monkeypatch.setattr(engine_held, "available_memory", lambda device: free[0])
    monkeypatch.setattr(engine_held, "HeldCase", lambda case, device: (case.id, device))
    held, told = hold_cases(stored, "auto", gpu)
    assert held == {name: (name, gpu) for name in stored}
    wanted = "6 training cases (0.000115 GB) are kept on cuda:0, of 0.000461 GB free on cuda:0: patches are cut there"
    assert told == [wanted]
    free[0] -= 1
    held, told = hold_cases(stored, "auto", gpu)
    assert held == stored
    assert "read from the store: more than 25% of" in told[0]
    assert hold_cases(stored, False, gpu) == hold_cases(stored, "auto", CPU) == (stored, [])


def test_what_was_asked_for_and_does_not_fit_is_refused(stored, monkeypatch):
    monkeypatch.setattr(engine_held, "available_memory", lambda device: BYTES * 2)
    with pytest.raises(ResourceError, match="do not fit") as caught:
        hold_cases(stored, True, CPU, neighbours=2)  # a half for each of two processes
    assert caught.value.code == "E525"
    assert caught.value.exit_code == 5
    assert "keep_on_device=false" in str(caught.value.fix)
    held, told = hold_cases(stored, True, CPU)
    assert held["c3"].arrays["image"].shape == (1, 16, 20, 12)
    assert "kept on cpu" in told[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_holds_its_cases_trains_alike_and_resumes_without(place, workers):
    options = {"data": place / "data", "output": place / "runs", "cache": place / "cache", "device": "cpu"}
    whole = train(tiny_pipeline(schedule="ConstantLR"), progress=False, **options)
    held = train(tiny_pipeline(schedule="ConstantLR", keep_on_device=True, workers=workers, epochs=1), **options)
    assert "kept on cpu" in (held / "provenance.json").read_text()
    train(None, resume=held, overrides=("train.epochs=2", "train.keep_on_device=false"), progress=False, **options)
    one, two = (read_state(run / "last.pt")["network_state"] for run in (whole, held))
    assert all(torch.equal(values, two[name]) for name, values in one.items())


@pytest.mark.gpu
def test_on_a_gpu_patches_are_cut_there(stored):
    gpu = torch.device("cuda", 0)
    held, told = hold_cases(stored, "auto", gpu)
    assert "kept on cuda:0" in told[0]
    reader = PatchReader((8, 8), (2, 2), 0.5, 1)
    one, two = (BatchMaker(cases, 20, reader, batch=2, seed=5) for cases in (stored, held))
    # workers have no GPU: none are started, whatever was asked for
    stream = BatchStream(two, workers=2)
    assert stream.workers == 0
    for key in [(0, n) for n in range(10)]:
        first, second = one[key], next(stream)
        for name, values in first.tensors.items():
            assert second.tensors[name].device == gpu
            assert torch.equal(values, second.tensors[name].cpu())
