"""The closed tables of what a pipeline may name: kind and name -> where the class is. Nothing else can be reached.

Parts of medseg come from their folder's namespace (`__all__` of medseg.networks and so on), so a new part needs no
entry here. Parts of torch and MONAI are listed one by one, because those namespaces also hold things that write files,
run callables or fetch from the network. Everything is imported when it is first asked for.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

__all__ = ["IMAGE_KEYS", "KINDS", "SPATIAL_KEYS", "facts_for_monai", "find_part", "names"]

KINDS = ("network", "loss", "transform", "optimizer", "schedule", "inferer", "postprocess", "metric")

IMAGE_KEYS = ("image",)
SPATIAL_KEYS = ("image", "label", "weight", "fov", "instances")

# kind -> (module whose __all__ is the table, test that a class belongs to this kind)
_NAMESPACES: dict[str, tuple[str, str]] = {
    "loss": ("medseg.losses", "torch.nn:Module"),
    "transform": ("medseg.transforms", "monai.transforms:MapTransform"),
    "postprocess": ("medseg.transforms.postprocess", "builtins:object"),
    "schedule": ("medseg.schedules", "medseg.schedules:Schedule"),
    "inferer": ("medseg.inference", "builtins:object"),
}
# kind -> a table that the part's own folder keeps
_TABLES = {
    "network": "medseg.networks:NETWORKS",
    "metric": "medseg.metrics:METRICS",
    "protocol": "medseg.metrics:PROTOCOLS",
}
_OPTIMIZERS = ("Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD")
_MONAI_INTENSITY = (
    "AdjustContrastd",
    "ClipIntensityPercentilesd",
    "GaussianSmoothd",
    "HistogramNormalized",
    "MedianSmoothd",
    "NormalizeIntensityd",
    "RandAdjustContrastd",
    "RandBiasFieldd",
    "RandCoarseDropoutd",
    "RandGaussianNoised",
    "RandGaussianSharpend",
    "RandGaussianSmoothd",
    "RandGibbsNoised",
    "RandHistogramShiftd",
    "RandRicianNoised",
    "RandScaleIntensityFixedMeand",
    "RandScaleIntensityd",
    "RandShiftIntensityd",
    "RandSimulateLowResolutiond",
    "ScaleIntensityRangePercentilesd",
    "ScaleIntensityRanged",
    "ScaleIntensityd",
    "ThresholdIntensityd",
)
# name -> interpolation of (image and weight, label-like); None where nothing is interpolated
_MONAI_SPATIAL: dict[str, tuple[str, str] | None] = {
    "CenterSpatialCropd": None,
    "CropForegroundd": None,
    "Orientationd": None,
    "RandAffined": ("bilinear", "nearest"),
    "RandAxisFlipd": None,
    "RandFlipd": None,
    "RandRotate90d": None,
    "RandRotated": ("bilinear", "nearest"),
    "Resized": ("area", "nearest-exact"),  # torch's "nearest" rounds down: labels half a voxel beside the image
    "Spacingd": ("bilinear", "nearest"),
}


def names(kind: str) -> list[str]:
    """Sorted names that a pipeline may use for `kind`.

    Raises:
        KeyError: no such kind (a programming error).

    >>> names("schedule")
    ['ConstantLR', 'CosineLR', 'ExponentialLR', 'PolynomialLR', 'ReduceLROnPlateau', 'StepLR']
    """
    return sorted(_table(kind))


def find_part(kind: str, name: str) -> Any:
    """The class (for a metric: its entry in the table of metrics) called `name`.

    Raises:
        KeyError: not in the closed table of this kind.
    """
    return _table(kind)[name]


def makes_labels(name: Any) -> bool:
    """Whether a transform makes other labels of the data set's, so that the network has other classes.

    >>> makes_labels("InteriorBorderLabeld"), makes_labels("Spacingd"), makes_labels("Spaced")
    (True, False, False)
    """
    return name in names("transform") and find_part("transform", name).__module__ == "medseg.transforms.labels"


def facts_for_monai(name: str) -> dict[str, Any]:
    """Arguments that follow from what a MONAI transform does: which keys it touches and how each is interpolated.

    Intensities are changed in the image alone; anything spatial moves image, label, weight, field of view and instances
    together, image and weight linearly, the others by nearest neighbour. Empty for a transform of medseg's own.

    >>> facts_for_monai("Spacingd")["mode"]
    ('bilinear', 'nearest', 'bilinear', 'nearest', 'nearest')
    """
    if name in _MONAI_INTENSITY:
        return {"keys": IMAGE_KEYS, "allow_missing_keys": False}
    if name not in _MONAI_SPATIAL:
        return {}
    facts: dict[str, Any] = {"keys": SPATIAL_KEYS, "allow_missing_keys": True}
    modes = _MONAI_SPATIAL[name]
    if modes is not None:
        smooth, sharp = modes
        facts["mode"] = tuple(smooth if key in ("image", "weight") else sharp for key in SPATIAL_KEYS)
    if name == "CropForegroundd":
        facts["source_key"] = "image"
    if name == "Orientationd":  # MONAI's own default, said aloud: without it MONAI warns of a change that is past
        facts["labels"] = (("L", "R"), ("P", "A"), ("I", "S"))
    return facts


@cache
def _table(kind: str) -> dict[str, Any]:
    if kind in _TABLES:
        return dict(_load(_TABLES[kind]))
    if kind == "optimizer":
        module = import_module("torch.optim")
        return {name: getattr(module, name) for name in _OPTIMIZERS}
    source, test = _NAMESPACES[kind]
    module = import_module(source)
    base = _load(test)
    found: dict[str, Any] = {}
    for name in module.__all__:
        part = getattr(module, name)
        if not isinstance(part, type) or not issubclass(part, base) or part is base or issubclass(part, Exception):
            continue
        # a namespace also holds result types and building blocks (TilePlan, Inferer): only whole parts count
        if kind == "inferer" and not name.endswith("Inferer"):
            continue
        if kind == "postprocess" and not callable(getattr(part, "__call__", None)):  # noqa: B004  (on the class)
            continue
        found[name] = part
    if kind == "transform":
        monai = import_module("monai.transforms")
        found |= {name: getattr(monai, name) for name in (*_MONAI_INTENSITY, *_MONAI_SPATIAL)}
    return found


def _load(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)
