"""Out of memory in training: estimated before the first step, told with options and the largest patch that fits."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import ENTRY, tiny_pipeline, write_cases
from torch import nn

from medseg import engine_replicas, training_memory
from medseg.cli import main
from medseg.config import to_yaml
from medseg.distributed import Group
from medseg.engine_recompute import recompute_activations
from medseg.engine_replicas import Replicas
from medseg.hardware import Hardware
from medseg.inference.memory import container_memory
from medseg.networks import UNet
from medseg.training_memory import check_memory, largest_patch, memory_error, step_bytes

SAYINGS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "python": MemoryError("Unable to allocate 12.0 GiB for an array"),
    "torch on a CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 34359738368 bytes. Error code 12 (Cannot allocate memory)"
    ),
}


def session(patch=(64, 64), *, batch=4, world=1, precision="fp32", network=None, **train) -> SimpleNamespace:
    """What of a Session has to do with memory."""
    network = network or UNet(len(patch), 1, 2, (8, 16, 32), padding="same", norm="batch", dropout=0.0)
    return SimpleNamespace(
        train=tiny_pipeline(patch=list(patch), batch=batch, **train).train,
        hardware=Hardware(torch.device("cpu"), precision, 1, "none"),
        group=Group(world=world),
        channels={"in_channels": 1, "out_channels": 2},
        step=SimpleNamespace(bare=network, parts=1, optimizer=torch.optim.SGD(network.parameters(), lr=0.1)),
    )


def held_bytes(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Bytes that autograd keeps between a real forward and backward pass, weights excepted."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.zeros(shape)).sum()
    weights = {value.untyped_storage()._cdata for value in [*network.parameters(), *network.buffers()]}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)


def test_a_step_is_estimated_by_what_autograd_really_keeps():
    network = UNet(2, 1, 2, (8, 16, 32), padding="same", norm="batch", dropout=0.0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    need, held = step_bytes(network, (2, 1, 64, 64)), held_bytes(network, (2, 1, 64, 64))
    # all that is kept, and the gradients and copies of a level or two
    assert held < need < 2.5 * held
    assert step_bytes(network, (2, 1, 64, 64), half=True) == pytest.approx(0.6 * need, abs=1)
    assert step_bytes(network, (4, 1, 64, 64)) == pytest.approx(2 * need, rel=0.1)
    recompute_activations(network)
    assert step_bytes(network, (2, 1, 64, 64)) < 0.8 * need
    # nothing was computed: a fifth of a terabyte
    assert step_bytes(network, (2, 1, 32768, 32768)) > 2e11
    held_bytes(network, (2, 1, 16, 16))  # a real pass, so that batch norm's buffers would differ if they were shared
    assert all(value.grad is None for value in network.parameters())
    assert torch.equal(
        before["encoder.0.0.weight"] if "encoder.0.0.weight" in before else next(iter(before.values())),
        next(iter(network.state_dict().values())),
    )


@pytest.mark.parametrize("count", [2, 4])
def test_parts_side_by_side_need_gradients_of_their_own_and_the_outputs_put_together(monkeypatch, count):
    tried, held = session(batch=8), []
    each = Replicas._each

    def watched(self, function, *arguments):
        found = each(self, function, *arguments)
        if function is engine_replicas._backward:
            held.extend(value.grad.nbytes for other in self.networks[1:] for value in other.parameters())
        return found

    monkeypatch.setattr(Replicas, "_each", watched)
    parts = Replicas(tried.step.bare, count, tried.hardware)
    output = parts(torch.rand(8, 1, 64, 64))
    output.square().mean().backward()
    held += [output.nbytes, output.grad.nbytes]
    parts.backward()
    alone = training_memory._estimate(tried, (64, 64))
    tried.step.parts = count
    assert training_memory._estimate(tried, (64, 64)) - alone == sum(held)


@pytest.mark.parametrize("saying", SAYINGS.values(), ids=SAYINGS)
def test_the_options_that_help_are_named_and_no_others(saying):
    error = memory_error(saying, session())
    assert error.code == "E523"
    assert "patch [64, 64], batch 4, fp32" in error.found
    for option in (
        "train.patch=[",
        "train.batch=2 with train.accumulate=2",
        "train.checkpoint_activations=true",
        "bf16",
    ):
        assert option in error.fix
    done = memory_error(saying, session(batch=1, precision="bf16", checkpoint_activations=True))
    for option in ("train.batch", "checkpoint", "bf16"):
        assert option not in done.fix
    assert "train.patch=[" in done.fix
    # three processes cannot share fewer than three patches
    assert "train.batch=3 with train.accumulate=4" in memory_error(saying, session(batch=5, world=3, accumulate=2)).fix
    assert memory_error(RuntimeError("shapes do not match"), session()) is None


def test_what_the_failed_step_held_is_free_when_smaller_patches_are_tried(monkeypatch):
    held = []

    def forward():
        features = torch.zeros(100)
        held.append(weakref.ref(features))
        raise SAYINGS["cuda"]

    alive = []
    monkeypatch.setattr(training_memory, "largest_patch", lambda session: alive.append(held[0]() is not None))
    with pytest.raises(RuntimeError) as caught:
        forward()
    assert memory_error(caught.value, session()).code == "E523"
    assert alive == [False]


def test_the_largest_patch_fits_by_the_estimate_and_the_next_does_not(monkeypatch):
    tried = session(patch=(256, 128), batch=1)
    network = tried.step.bare
    limit = step_bytes(network, (1, 1, 128, 64)) + 1
    monkeypatch.setattr(training_memory, "available_memory", lambda device: limit)
    # multiples of 4 in the proportions of the patch; 128 x 64 fits just so
    found = largest_patch(tried)
    assert found == network.legal_size(found)
    assert step_bytes(network, (1, 1, *found)) <= limit
    assert 0.85 * 128 * 64 < found[0] * found[1] <= 128 * 64
    monkeypatch.setattr(training_memory, "available_memory", lambda device: 1000)
    assert largest_patch(tried) is None
    assert "train.patch=[" not in memory_error(MemoryError(), tried).fix
    # there seems to be plenty of memory, and yet it ran out: what needs as much again is not advised
    monkeypatch.setattr(training_memory, "available_memory", lambda device: 10**15)
    assert step_bytes(network, (1, 1, *largest_patch(tried))) < 0.71 * step_bytes(network, (1, 1, 256, 128))


def test_where_it_is_tried_the_first_that_works_is_told(monkeypatch):
    tried = session(patch=(128, 128), batch=1)
    tried.hardware = Hardware(torch.device("cuda"), "fp32", 1, "none")
    seen = []

    class Limited(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, image):
            seen.append(tuple(image.shape[2:]))
            if image.shape[2] > 80:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return torch.cat([image, image], 1) * self.weight

        @staticmethod
        def legal_size(size):
            return tuple(-(-n // 8) * 8 for n in size)

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device=None, **options: zeros(*sizes, **options))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    tried.step.bare = Limited()
    assert largest_patch(tried) == (80, 80)
    assert all(n < 128 for n, _ in seen)
    assert tried.step.bare.weight.grad is None or not tried.step.bare.weight.grad.any()


def test_on_a_cpu_a_step_that_cannot_fit_is_refused_before_it_begins(monkeypatch):
    need = step_bytes(session().step.bare, (4, 1, 64, 64))
    monkeypatch.setattr(training_memory.psutil, "swap_memory", lambda: SimpleNamespace(free=0))
    for share, told in ((2.0, []), (0.9, ["memory may run out"])):
        monkeypatch.setattr(training_memory, "available_memory", lambda device, n=int(share * need): n)
        notes = check_memory(session())
        assert [note[:18] for note in notes] == told
    monkeypatch.setattr(training_memory, "available_memory", lambda device: int(0.5 * need))
    with pytest.raises(training_memory.ResourceError, match="not enough memory") as caught:
        check_memory(session())
    assert caught.value.code == "E523"
    assert "train.patch=[" in caught.value.fix
    # two processes on one machine have half of it each
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(training_memory, "available_memory", lambda device: int(0.95 * need))
    assert check_memory(session(world=2)) != [] == check_memory(session(batch=2))


def test_from_the_command_line_a_huge_patch_ends_with_5_and_advice(tmp_path, capsys):
    write_cases(tmp_path / "data", 3)
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny_pipeline(patch=[8192, 8192, 8192], precision="fp32")))
    command = ["train", tmp_path / "tiny.yaml", "--data", tmp_path / "data", "-o", tmp_path / "runs"]
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in [*command, "--cache", tmp_path / "cache", "--device", "cpu"]])
    said = capsys.readouterr().err
    assert ended.value.code == 5
    assert "E523" in said
    assert "Traceback" not in said
    assert "train.patch=[" in said
    assert "train.checkpoint_activations=true" in said


def write_group(folder: Path, names: tuple[str, str], limit: str, used: int, cache: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{cache}\n")


def test_limits_of_containers_count(tmp_path):
    own, root = tmp_path / "cgroup", tmp_path / "groups"
    own.write_text("0::/job/step\n")
    assert container_memory(own, root) is None
    names = ("memory.max", "memory.current")
    write_group(root / "job" / "step", names, "max", 300, "inactive_file 1")
    write_group(root / "job", names, "1000", 700, "inactive_file 50")
    write_group(root, names, "5000", 700, "inactive_file 0")
    assert container_memory(own, root) == 350
    # the first version of control groups; a container sees its own group at the root
    own.write_text("3:cpu,cpuacct:/x\n4:memory:/docker/1234\n")
    old = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    write_group(root / "memory", old, "2000", 600, "total_inactive_file 100")
    assert container_memory(own, root) == 1500
    assert container_memory(tmp_path / "nothing", root) is None


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_cases(tmp_path):
    write_cases(tmp_path / "data", 16, shape=(160, 160, 160))
    largest = {}
    for count in (4, 16):
        data = tmp_path / f"data{count}"
        for name in ("images", "labels"):
            (data / name).mkdir(parents=True)
            for number in range(count):
                (data / name / f"c{number}.nii.gz").symlink_to(tmp_path / "data" / name / f"c{number}.nii.gz")
        (data / "datasets.yaml").write_text(ENTRY.replace("  dims: 3\n", "  dims: 3\n  links: true\n"))
        # two epochs of twelve patches: every case is visited
        pipeline = tiny_pipeline(patch=[32, 32, 32], iterations_per_epoch=6, folds=4, validation_cases=1)
        (tmp_path / "tiny.yaml").write_text(to_yaml(pipeline))
        command = [sys.executable, "-m", "medseg", "train", tmp_path / "tiny.yaml", "--data", data, "--no-report"]
        command += ["-o", tmp_path / f"runs{count}", "--cache", tmp_path / "cache", "--device", "cpu"]
        # the least of three: of equal runs one may need 100 MB more than another
        for _ in range(3):
            process = subprocess.Popen([str(word) for word in command], env={**os.environ, "OMP_NUM_THREADS": "1"})
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            assert process.returncode == 0
            largest[count] = min(largest.get(count, math.inf), used.ru_maxrss / 1e3)
    # twelve more cases hold 12 x 160^3 x (4 + 1) bytes = 246 MB
    assert largest[16] - largest[4] < 150, largest
