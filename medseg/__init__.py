"""medseg: medical image segmentation with U-Nets, from a folder of images to a verified, reported result.

The public names are loaded when first used, so that `import medseg` and `medseg --help` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "train": "medseg.training",
    "predict": "medseg.prediction",
    "evaluate": "medseg.evaluation",
    "compare": "medseg.comparison",
    "load_pipeline": "medseg.config",
    "load_model": "medseg.checkpoint",
    "export_bundle": "medseg.export",
    "export_onnx": "medseg.export",
    "export_package": "medseg.export",
    "MedsegError": "medseg.errors",
}

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'medseg' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
