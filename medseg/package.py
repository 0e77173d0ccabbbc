"""Released models: a folder with model.json (pipeline, data set's facts, checksums) beside weights or an ONNX graph.

`read_package` gives the same plain state as a checkpoint, so that `load_model` builds a model from either; a model in
ONNX form keeps the geometry (context, divisor, sizes) of its network and computes in onnxruntime.
"""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from medseg.errors import CheckpointError, ResourceError
from medseg.files import inside, sha256_file

__all__ = ["FORMAT", "MODEL_FILE", "OnnxNetwork", "read_package", "traced_network"]

FORMAT = "medseg-package-1"
MODEL_FILE = "model.json"
_LARGEST_JSON = 16 << 20


def read_package(path: str | Path) -> dict[str, Any]:
    """The state in a package: keys pipeline, dataset, in_channels, out_channels, threshold, metrics, progress,
    versions; and `network_state` (safetensors), or `onnx` (path of the graph).

    Args:
        path: model.json, or the folder that holds it.

    Raises:
        CheckpointError: E360 missing, E361 the checksum of a file is not the one noted, E362 not a package.
    """
    path = Path(path)
    path = path / MODEL_FILE if path.is_dir() else path
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(
                "model.json is too large to be one", code="E362", file=path, found=f"{path.stat().st_size} bytes"
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError("no package here", code="E360", file=path) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError("model.json cannot be read", code="E362", file=path, found=str(error)) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError("not a package of this program", code="E362", file=path, expected=FORMAT, found=found)
    weights = content.get("weights")
    if not isinstance(weights, dict) or not {"file", "sha256", "kind"} <= weights.keys():
        raise CheckpointError("model.json does not name its weights", code="E362", file=path, field="weights")
    file = inside(path.parent, str(weights["file"]))
    if not file.is_file():
        raise CheckpointError("the package's weights are missing", code="E360", file=file)
    digest = sha256_file(file)
    if digest != weights["sha256"]:
        raise CheckpointError(
            "the weights are damaged or were changed", code="E361", file=file, expected=weights["sha256"], found=digest
        )
    state = {key: value for key, value in content.items() if key not in ("weights", "format")}
    if weights["kind"] == "onnx":
        return {**state, "onnx": str(file), "sha256": digest}
    if weights["kind"] == "state_dict":  # a MONAI Bundle's models/model.pt
        try:
            return {**state, "network_state": torch.load(file, map_location="cpu", weights_only=True)}
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
            raise CheckpointError("the weights cannot be read", code="E361", file=file, found=str(error)) from error
    if weights["kind"] != "safetensors":
        kinds = "safetensors, onnx or state_dict"
        raise CheckpointError("unknown kind of weights", code="E362", file=path, expected=kinds, found=weights["kind"])
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {**state, "network_state": load_file(file)}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError("the weights cannot be read", code="E361", file=file, found=str(error)) from error


class OnnxNetwork(nn.Module):
    """An ONNX graph that stands where its network stood: images (B, C, *spatial) to logits (B, K, *spatial'), float32.

    Args:
        network: the network that was exported; only what it states about its geometry is used.
        path: the graph.
        digest: its SHA-256, in the state dict, so that results can be told apart by their model.

    Raises:
        ResourceError: onnxruntime is not installed.
        CheckpointError: the graph cannot be loaded.
    """

    def __init__(self, network: Any, path: str | Path, digest: str) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise ResourceError(
                "onnxruntime is not installed", code="E540", fix="pip install 'medseg[onnx]'"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own errors share no base class but Exception
            raise CheckpointError("the ONNX graph cannot be loaded", code="E361", file=path, found=error) from error
        names = (
            "spatial_dims",
            "in_channels",
            "out_channels",
            "divisor",
            "context",
            "receptive_field",
            "padded",
            "exact_under_tiling",
        )
        for name in names:
            setattr(self, name, getattr(network, name))
        self.output_size, self.legal_size = network.output_size, network.legal_size
        # the memory of a window is measured without data, on the network's outline (a list hides its parameters)
        self._outline = [network.to("meta").eval()]
        self.register_buffer("digest", torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, on the device of the images; the graph itself runs on the CPU."""
        if images.is_meta:
            return self._outline[0](images)
        array = np.ascontiguousarray(images.detach().cpu().float().numpy())
        (logits,) = self.session.run(None, {"image": array})
        return torch.from_numpy(np.asarray(logits)).to(images.device)


def traced_network(
    name: str, spatial_dims: int, in_channels: int, out_channels: int, **arguments: Any
) -> torch.jit.ScriptModule:
    """A network of `medseg.networks` in TorchScript and eval mode, for tools that need one (a MONAI Bundle's network).

    It has the same parameters by the same names and takes every legal size.

    Args:
        name: of the network; the other arguments are its own.

    >>> traced_network("UNet", 2, 1, 2, channels=[4, 8], padding="same")(torch.zeros(1, 1, 8, 16)).shape
    torch.Size([1, 2, 8, 16])
    """
    from medseg.networks import build_network

    network = build_network(
        name, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels, **arguments
    )
    size = network.legal_size([max(2 * d, 8) for d in network.divisor])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # checks of sizes are not traced, as they should be
        traced = torch.jit.trace(network.eval(), torch.zeros(1, in_channels, *size), check_trace=False)
    assert isinstance(traced, torch.jit.ScriptModule)
    return traced
