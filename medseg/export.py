"""Export: a trained model in a form that others can use and check.

    package   model.safetensors and model.json (the whole pipeline, the data set's facts, SHA-256)
    onnx      model.onnx, the same model.json, and run_onnx.py, which needs numpy, scipy, nibabel and onnxruntime only
    bundle    a MONAI Bundle (medseg.export_monai)

`medseg predict` takes each of them in place of a run. Every export has a model card.
"""

from __future__ import annotations

import json
import logging
import warnings
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medseg import __version__
from medseg.checkpoint import Model, load_model
from medseg.checkpoint_model import hash_weights
from medseg.errors import CheckpointError, ResourceError, UsageError
from medseg.errors_arguments import checked
from medseg.export_card import model_card
from medseg.export_monai import write_bundle
from medseg.files import atomic_path, sha256_file, write_json, write_text
from medseg.inference.large import LABEL_ONLY
from medseg.package import FORMAT, MODEL_FILE

__all__ = ["export_bundle", "export_onnx", "export_package"]

TOLERANCE = 1e-4  # largest difference of an exported graph's logits, relative to the largest logit above 1
# preprocessing that run_onnx.py does in numpy, and the arguments that it looks at
_RUNNER = {
    "Orientationd": {"axcodes"}, "Spacingd": {"pixdim"}, "ScaleIntensityd": {"minv", "maxv"},
    "ScaleIntensityRanged": {"a_min", "a_max", "b_min", "b_max", "clip"},
    "ScaleIntensityRangePercentilesd": {"lower", "upper", "b_min", "b_max", "clip", "channel_wise"},
    "NormalizeIntensityd": {"subtrahend", "divisor", "channel_wise"},
}  # fmt: skip
# transforms that touch labels only (LABEL_ONLY) are left out there
_RUNNER_POST = {"KeepLargestComponent", "Threshold"}


@checked
def export_package(run: str | Path, output: str | Path) -> Path:
    """Write weights as safetensors and everything else as one JSON.

    Args:
        run: run folder or checkpoint.
        output: folder; made when missing; an earlier export of the same model in it is replaced, anything else is
            refused.

    Returns:
        The folder.

    Raises:
        CheckpointError: there is no usable checkpoint.
        UsageError: the folder holds something else, or the export of another model.
        ResourceError: it cannot be written.

    >>> import medseg
    >>> medseg.export_package("runs/liver", "liver_package")  # doctest: +SKIP
    PosixPath('liver_package')
    """
    from safetensors.torch import save_file

    model = load_model(run)
    folder = _target(output, model, "safetensors")
    weights = folder / "model.safetensors"
    state = {name: value.detach().cpu().contiguous() for name, value in _only(model).state_dict().items()}
    with atomic_path(weights) as temporary:
        save_file(state, temporary, metadata={"format": "pt", "medseg": __version__})
    _write_description(model, folder, weights, "safetensors", run)
    return folder


@checked
def export_onnx(run: str | Path, output: str | Path) -> Path:
    """Write the network as ONNX with free batch and spatial sizes, checked in onnxruntime, and a standalone runner.

    The graph maps `image` (B, C, *spatial) float32, preprocessed, to `logits` (B, K, *spatial'). It is run on two
    sizes and compared with the network before it gets its name.

    Args:
        run, output: as `export_package`.

    Raises:
        ResourceError: the extra `onnx` is not installed.
        CheckpointError: the graph's logits differ from the network's by more than 1e-4.
        UsageError, CheckpointError: as `export_package`.

    >>> import medseg
    >>> medseg.export_onnx("runs/liver", "liver_onnx")  # doctest: +SKIP
    PosixPath('liver_onnx')
    """
    try:
        import onnxruntime  # noqa: F401  (asked for before anything is written; torch.onnx and the check use them)
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ResourceError(
            "ONNX export needs the extra packages", code="E540", fix="pip install 'medseg[onnx]'"
        ) from error
    model = load_model(run)
    folder = _target(output, model, "onnx")
    graph = folder / "model.onnx"
    network = _only(model)
    with atomic_path(graph) as temporary:
        _write_graph(network, temporary)
        difference = _compare(network, temporary)
    runner = _runner_facts(model)
    _write_description(model, folder, graph, "onnx", run, onnx={"difference": difference, **runner})
    script = (resources.files("medseg") / "resources" / "export" / "run_onnx.py").read_text(encoding="utf-8")
    write_text(folder / "run_onnx.py", script)
    return folder


@checked
def export_bundle(run: str | Path, output: str | Path) -> Path:
    """Write a MONAI Bundle: configs/, models/model.pt, docs/; `python -m monai.bundle run` predicts with it.

    Args:
        run, output: as `export_package`.

    Raises:
        UsageError, CheckpointError, ResourceError: as `export_package`.

    >>> import medseg
    >>> medseg.export_bundle("runs/liver", "liver_bundle")  # doctest: +SKIP
    PosixPath('liver_bundle')
    """
    model = load_model(run)
    folder = _target(output, model, "state_dict")
    write_bundle(model, folder, describe(model), model_card(model, run))
    return folder


def describe(model: Model) -> dict[str, Any]:
    """What model.json says besides its weights: everything that turns an image into labels."""
    meta = model.metadata
    network: Any = model.network
    # where the file of weights lay that training began with is nobody else's business, nor is it needed
    pipeline = model.pipeline.model_copy(update={"network": model.pipeline.network.without("weights")})
    return {
        "format": FORMAT, "medseg": __version__, "pipeline": _plain(pipeline), "dataset": _plain(model.dataset),
        "in_channels": meta["in_channels"], "out_channels": meta["out_channels"], "threshold": meta.get("threshold"),
        "metrics": meta.get("metrics", {}), "progress": {"epoch": meta.get("epoch")},
        "versions": meta.get("versions", {}), "identity": _identity(model), "seen": meta.get("seen"),
        "geometry": {
            "spatial_dims": network.spatial_dims, "context": list(network.context), "divisor": list(network.divisor),
            "padded": bool(network.padded), "exact_under_tiling": bool(network.exact_under_tiling),
        },
    }  # fmt: skip


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value.to_dict() if hasattr(value, "to_dict") else value.model_dump(mode="json")))


def _write_description(model: Model, folder: Path, weights: Path, kind: str, run: str | Path, **more: Any) -> None:
    facts = {"file": weights.name, "kind": kind, "sha256": sha256_file(weights), "bytes": weights.stat().st_size}
    write_json(folder / MODEL_FILE, {**describe(model), **more, "weights": facts})
    write_text(folder / "MODEL_CARD.md", model_card(model, run))


def _only(model: Model) -> Any:
    if len(model.networks) != 1:
        raise UsageError("an export holds one network", field="run", found=f"an ensemble of {len(model.networks)}")
    if not hasattr(model.network, "legal_size") or not any(True for _ in model.network.parameters()):
        raise UsageError("only a trained run can be exported, not an export", field="run")
    return model.network


def _identity(model: Model) -> str:
    """Hash of the network's weights: what exports of one model share, in whatever form."""
    return hash_weights([model.network]).hexdigest()


def _target(output: str | Path, model: Model, kind: str) -> Path:
    _only(model)
    folder = Path(output)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / MODEL_FILE).is_file()):
        raise UsageError(
            "the folder holds something else",
            field="output",
            file=folder,
            expected="a new or empty folder, or an earlier export",
        )
    if (folder / MODEL_FILE).is_file():
        try:
            facts = json.loads((folder / MODEL_FILE).read_text(encoding="utf-8"))
            found = facts["identity"], facts["weights"]["kind"]
        except (OSError, ValueError, KeyError, TypeError):
            found = None
        if found != (_identity(model), kind):
            raise UsageError(
                "the folder holds the export of another model, or in another form", field="output", file=folder,
                fix="name another folder, or remove this one",
            )  # fmt: skip
    return folder


def _sizes(network: Any) -> list[tuple[int, ...]]:
    """Two legal sizes that differ along every axis."""
    first = network.legal_size([max(3 * d, 16) for d in network.divisor])
    second = network.legal_size([n + (k + 1) * d for k, (n, d) in enumerate(zip(first, network.divisor, strict=True))])
    return [tuple(first), tuple(second)]


def _write_graph(network: Any, path: Path) -> None:
    first = _sizes(network)[0]
    # legal sizes are start + divisor * n: the exporter is told so, or it would take the first size for the only one
    axes: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=1024)}
    for axis, (size, divisor) in enumerate(zip(first, network.divisor, strict=True)):
        steps = torch.export.Dim(f"n{axis}", min=1, max=max(2, 65536 // divisor))
        rest = size % divisor
        axes[axis + 2] = divisor * steps + rest if rest else divisor * steps
    log = logging.getLogger("torch.onnx")
    level = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.setLevel(logging.ERROR)  # torch warns of operators of packages that are not installed
        torch.onnx.export(
            network.eval(), (torch.zeros(2, network.in_channels, *first),), str(path), dynamo=True, verbose=False,
            dynamic_shapes=(axes,), input_names=["image"], output_names=["logits"], external_data=False, optimize=True,
        )  # fmt: skip
        log.setLevel(level)


def _compare(network: Any, path: Path) -> float:
    """Largest difference of the logits on two sizes and batches, relative to the largest logit above 1."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch, size in enumerate(_sizes(network), start=1):
        image = torch.randn((batch, network.in_channels, *size), generator=generator)
        with torch.inference_mode():
            wanted = network(image).numpy()
        (found,) = session.run(None, {"image": image.numpy()})
        worst = max(worst, float(np.abs(found - wanted).max() / max(1.0, np.abs(wanted).max())))
    if not worst <= TOLERANCE:
        raise CheckpointError(
            "the ONNX graph differs from its network", code="E365", expected=f"at most {TOLERANCE}", found=worst
        )
    return worst


def _runner_facts(model: Model) -> dict[str, Any]:
    """What run_onnx.py does and does not do for this model; it refuses to run where something is missing."""
    lacks = []
    for part in model.pipeline.preprocess:
        if part.name in _RUNNER:
            # an argument that is null or false, as most are by default, asks for nothing
            extra = [name for name in part.arguments if name not in _RUNNER[part.name] and part.arguments[name]]
            lacks += [f"{part.name}.{name}" for name in extra]
        elif part.name not in LABEL_ONLY:
            lacks.append(part.name)
    skips = [part.name for part in model.pipeline.postprocess if part.name not in _RUNNER_POST]
    inferer = model.pipeline.inference
    if inferer.name != "OverlapTileInferer":
        skips.insert(0, inferer.name)  # tiles that meet stand in for it
    elif inferer.arguments.get("border") == "mirror" and model.network.padded:
        lacks.append("OverlapTileInferer.border")
    return {"runner_lacks": lacks, "runner_skips": skips}
