"""What this machine offers medseg, and a self test of a few seconds of what medseg promises.

`medseg doctor` is the first thing to run when something is odd, and what a report of a bug should hold.
It names no user, host, file or patient.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["describe_machine", "self_test"]

PACKAGES = (
    "medseg",
    "torch",
    "monai",
    "pytorch-ignite",
    "numpy",
    "scipy",
    "nibabel",
    "SimpleITK",
    "pydicom",
    "scikit-image",
)
EXTRAS = {
    "dicom": ("highdicom",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "bundle": ("fire", "jsonschema"),
    "mlflow": ("mlflow-skinny", "sqlalchemy", "alembic"),
}


def describe_machine(folder: str | Path = ".") -> dict[str, Any]:
    """Versions, devices, threads, memory, disk at `folder`, and which extras are installed.

    Returns:
        Plain values only: sizes in GB (10^9 bytes), `None` for a package that is not installed.

    >>> sorted(describe_machine())
    ['devices', 'disk', 'extras', 'memory', 'precision', 'python', 'system', 'threads', 'versions']
    """
    import psutil
    import torch

    devices = ["cpu"]
    # where the driver does not fit they are counted all the same, but cannot be asked
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(number)
        devices.append(f"cuda:{number} {facts.name}, {facts.total_memory / 1e9:.1f} GB")
    if torch.backends.mps.is_available():
        devices.append("mps")
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(folder)
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {name: _version(name) for name in PACKAGES},
        "extras": {extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()},
        "devices": devices,
        "threads": {"cores": _cores(), "torch": torch.get_num_threads()},
        "precision": {"bf16_on_cpu": _cpu_has_bf16(), "capability": torch.backends.cpu.get_cpu_capability()},
        "memory": {"total_gb": round(memory.total / 1e9, 1), "free_gb": round(memory.available / 1e9, 1)},
        "disk": {"total_gb": round(disk.total / 1e9, 1), "free_gb": round(disk.free / 1e9, 1)},
    }


def self_test() -> Iterator[tuple[str, bool, str]]:
    """Run each check and yield (what, passed, what was measured), in about ten seconds altogether."""
    for check in (_weight_map, _network, _tiling, _distances, _round_trip):
        start = time.perf_counter()
        what = (check.__doc__ or check.__name__).strip().splitlines()[0].rstrip(".")
        try:
            measured = check()
            passed = True
        except Exception as error:  # a self test reports, whatever went wrong
            measured, passed = f"{type(error).__name__}: {error}", False
        yield what, passed, f"{measured} ({time.perf_counter() - start:.1f} s)"


def _weight_map() -> str:
    """The weight map of a straight gap equals the paper's formula."""
    import numpy as np

    from medseg.transforms import boundary_weight_map

    expected = {1: 9.231, 2: 8.353, 4: 6.065, 8: 1.979}
    for gap, term in expected.items():
        instances = np.zeros((21, 40), np.int32)
        instances[:, :15], instances[:, 15 + gap :] = 1, 2
        found = float(boundary_weight_map(instances)[10, 15]) - 1.0
        _expect(abs(found - term) < 1e-3, f"gap {gap}: {found:.4f}, not {term}")
    return "gaps of 1, 2, 4, 8 voxels: 9.231, 8.353, 6.065, 1.979"


def _network() -> str:
    """The U-Net of 2015 has the paper's geometry and a training step changes every weight's gradient."""
    import torch

    from medseg.networks import UNet

    _expect(tuple(UNet().output_size((572, 572))) == (388, 388), "572 does not give 388")
    network = UNet(spatial_dims=2, channels=(4, 8, 16), padding="same", norm="batch")
    network(torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    lost = [name for name, weight in network.named_parameters() if weight.grad is None]
    _expect(not lost, f"no gradient in {lost}")
    return "572 -> 388; all weights have a gradient"


def _tiling() -> str:
    """Tiled inference equals whole-image inference."""
    import torch

    from medseg.inference import OverlapTileInferer
    from medseg.networks import UNet

    generator = torch.Generator().manual_seed(0)
    network = UNet(spatial_dims=2, channels=(4, 8, 16), padding="same", norm="batch").eval()
    image = torch.randn(1, 1, 240, 176, generator=generator)
    with torch.inference_mode():
        whole = OverlapTileInferer(tile=(1024, 1024))(image, network)
        tiled = OverlapTileInferer(tile=(112, 96))(image, network)
    difference = float((whole - tiled).abs().max() / whole.abs().max())
    _expect(difference < 1e-5, f"largest difference {difference:.2e} of the output's scale")
    return f"largest difference {difference:.1e} of the output's scale"


def _distances() -> str:
    """The Hausdorff distance of two concentric spheres is the difference of their radii."""
    import numpy as np

    from medseg.metrics import surface_distances

    axes = np.ogrid[-20:21, -20:21, -20:21]
    radius = np.sqrt(sum(np.square(axis * 2.0) for axis in axes))  # voxels of 2 mm
    distance = surface_distances(radius <= 30, radius <= 34, (2.0, 2.0, 2.0)).hausdorff()
    _expect(abs(distance - 4.0) <= 2.0, f"{distance} mm, not 4 mm within a voxel")
    return f"{distance:.1f} mm for radii 30 and 34 mm, voxels of 2 mm"


def _round_trip() -> str:
    """A volume that was written is read back voxel for voxel, affine and all."""
    import nibabel as nib
    import numpy as np

    from medseg.volumes import read_image

    affine = np.array([[0.0, -1.5, 0, 10], [2.0, 0, 0, -20], [0, 0, 5.0, 30], [0, 0, 0, 1]])
    array = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "volume.nii.gz"
        nib.save(nib.Nifti1Image(array, affine), path)
        volume = read_image(path, dims=3)
    _expect(np.array_equal(volume.array[0], array), "voxels differ")
    _expect(np.allclose(volume.geometry.affine, affine, atol=1e-5), "affine differs")
    return "voxels and affine equal"


def _expect(true: bool, otherwise: str) -> None:
    if not true:
        raise AssertionError(otherwise)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cores() -> int:
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _cpu_has_bf16() -> bool:
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if torch.backends.mkldnn.is_available() else False
