"""A MONAI Bundle: metadata, configs, weights and documents, for `python -m monai.bundle` and everything built on it.

configs/metadata.json    what the model is, its inputs and outputs     verify_metadata, verify_net_in_out
configs/inference.json   `run` predicts a folder as `medseg predict` does
configs/schema.json      the JSON schema that verify_metadata checks against, so that it works offline
models/model.pt          the network's state dict
model.json               the whole pipeline; with it the folder is a package that `medseg predict` takes
docs/README.md           the model card
"""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from medseg import __version__
from medseg.files import atomic_path, sha256_file, write_json, write_text
from medseg.package import MODEL_FILE

__all__ = ["write_bundle"]

_NETWORK = "network_def"


def write_bundle(model: Any, folder: Path, description: dict[str, Any], card: str) -> None:
    """Write the bundle of a model with one network into `folder`.

    Args:
        model: as `load_model` gives it.
        folder: made when missing.
        description: what model.json says besides its weights.
        card: Markdown.

    Raises:
        ResourceError: it cannot be written.
    """
    weights = folder / "models" / "model.pt"
    with atomic_path(weights) as temporary:
        torch.save(
            {name: value.detach().cpu().contiguous() for name, value in model.network.state_dict().items()}, temporary
        )
    facts = {
        "file": "models/model.pt",
        "kind": "state_dict",
        "sha256": sha256_file(weights),
        "bytes": weights.stat().st_size,
    }
    write_json(folder / MODEL_FILE, {**description, "weights": facts})
    write_json(folder / "configs" / "schema.json", _schema())
    write_json(folder / "configs" / "inference.json", _inference(model))
    write_json(folder / "configs" / "metadata.json", _metadata(model))
    write_text(folder / "docs" / "README.md", _how_to() + card)
    write_text(folder / "LICENSE", _licence(model))


def _inference(model: Any) -> dict[str, Any]:
    pipeline = model.pipeline
    return {
        "imports": ["$import medseg", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/predictions'",
        "device": "$'cuda' if torch.cuda.is_available() else 'cpu'",
        _NETWORK: {
            "_target_": "medseg.package.traced_network", "name": pipeline.network.name,
            "spatial_dims": len(pipeline.train.patch), "in_channels": model.metadata["in_channels"],
            "out_channels": model.metadata["out_channels"], **pipeline.network.without("weights").arguments,
        },
        "model": "$medseg.load_model(@bundle_root, device=@device)",
        "network": "$@model.network",
        "initialize": [],
        "run": ["$medseg.predict(@model, @dataset_dir, @output_dir, device=@device)"],
        "finalize": [],
    }  # fmt: skip


def _metadata(model: Any) -> dict[str, Any]:
    spec, network = model.dataset, model.network
    size = list(network.legal_size(model.pipeline.train.patch))
    channels, classes = model.metadata["in_channels"], model.metadata["out_channels"]
    named = {str(i): name for i, name in enumerate(spec.channels)} if len(spec.channels) == channels else {}
    labels = (
        {str(i): name for i, name in spec.labels.items()}
        if classes > 1
        else {"0": "probability of label 1, before the sigmoid"}
    )
    return {
        "schema": "configs/schema.json",
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported by medseg {__version__}"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").split("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"medseg": __version__, "nibabel": version("nibabel")},
        "python_version": platform.python_version(),
        "name": spec.name,
        "task": model.pipeline.title or spec.title,
        "description": f"{model.pipeline.network.name} trained with medseg. Research use only, not a medical device.",
        "authors": "see docs/README.md",
        "copyright": "see LICENSE",
        "data_source": spec.url or spec.title,
        "data_type": "NIfTI, DICOM, TIFF, PNG",
        "image_classes": f"{spec.modality}; preprocessing is part of model.json",
        "label_classes": ", ".join(f"{index} {name}" for index, name in spec.labels.items()),
        "pred_classes": ", ".join(f"{index} {name}" for index, name in spec.labels.items()),
        "eval_metrics": {k: v for k, v in model.metadata.get("metrics", {}).items() if isinstance(v, int | float)},
        "intended_use": "Research. Not for diagnosis, treatment or any decision about a patient.",
        "references": [spec.citation] if spec.citation else [],
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image", "format": "magnitude", "modality": spec.modality, "num_channels": channels,
                    "spatial_shape": size, "dtype": "float32", "value_range": [], "is_patch_data": True,
                    "channel_def": named,
                }
            },
            "outputs": {
                "pred": {
                    "type": "image", "format": "logits", "num_channels": classes,
                    "spatial_shape": list(network.output_size(size)),
                    "dtype": "float32", "value_range": [], "is_patch_data": True, "channel_def": labels,
                }
            },
        },
    }  # fmt: skip


def _schema() -> dict[str, Any]:
    """The fields that MONAI's bundle specification requires of metadata.json, as JSON schema."""
    text = {"type": "string", "minLength": 1}
    tensor = {
        "type": "object",
        "properties": {
            "type": text, "format": text, "num_channels": {"type": "integer", "minimum": 1},
            "spatial_shape": {"type": "array", "items": {"type": ["integer", "string"]}, "minItems": 1},
            "dtype": {"type": "string"}, "value_range": {"type": "array", "items": {"type": "number"}},
            "is_patch_data": {"type": "boolean"}, "channel_def": {"type": "object"}, "modality": {"type": "string"},
        },
        "required": [
            "type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data", "channel_def",
        ],
    }  # fmt: skip
    tensors = {"type": "object", "minProperties": 1, "additionalProperties": tensor}
    fields = [
        "schema",
        "version",
        "monai_version",
        "pytorch_version",
        "numpy_version",
        "task",
        "description",
        "authors",
        "copyright",
    ]
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "metadata.json of a MONAI Bundle",
        "description": "Written from the MONAI Bundle specification, so that verification needs no network.",
        "type": "object",
        "properties": {
            **dict.fromkeys(fields, text),
            "changelog": {"type": "object"},
            "required_packages_version": {"type": "object", "additionalProperties": text},
            "network_data_format": {
                "type": "object", "properties": {"inputs": tensors, "outputs": tensors},
                "required": ["inputs", "outputs"],
            },
        },
        "required": [*fields, "required_packages_version", "network_data_format"],
    }  # fmt: skip


def _how_to() -> str:
    return """Run it in this folder (medseg has to be installed; `fire` and `jsonschema` for MONAI's command line):

    python -m monai.bundle run --config_file configs/inference.json --dataset_dir IMAGES --output_dir MASKS
    python -m monai.bundle verify_metadata --meta_file configs/metadata.json --filepath configs/schema.json
    python -m monai.bundle verify_net_in_out network_def \\
        --meta_file configs/metadata.json --config_file configs/inference.json
    python -m monai.bundle ckpt_export network_def --filepath models/model.ts --ckpt_file models/model.pt \\
        --meta_file configs/metadata.json --config_file configs/inference.json
    medseg predict . IMAGES -o MASKS

All of this works offline. The masks of the first and the last line are the same.

"""


def _licence(model: Any) -> str:
    return (
        "The code that runs this model, medseg, is licensed under Apache-2.0.\n"
        f"The model was trained on: {model.dataset.title}. Licence of these data: {model.dataset.licence}.\n"
        "Whether its terms extend to the weights is for the user to find out.\n"
    )
