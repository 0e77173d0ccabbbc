"""Load an encoder's published weights from a local file or state dict, and say exactly what fitted."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medseg.errors import CheckpointError

__all__ = ["WeightReport", "adapt_input", "load_weights", "read_state_dict"]

Source = str | Path | Mapping[str, torch.Tensor]
# what training wrappers put before the names of an encoder's weights
PREFIXES = ("module.", "model.", "encoder.", "backbone.", "net.")
SHOWN = 6


@dataclass(frozen=True)
class WeightReport:
    """What became of a state dict: names `loaded` as they are, `adapted` in shape, and `ignored` (classifier heads)."""

    loaded: tuple[str, ...]
    adapted: tuple[str, ...]
    ignored: tuple[str, ...]


def read_state_dict(source: Source) -> dict[str, torch.Tensor]:
    """Tensors by name, from a mapping, a .safetensors file or a file of torch.save (opened with weights_only=True).

    A mapping inside under "state_dict" or "model" is taken out; a prefix such as "module." that all names share is cut.

    Raises:
        CheckpointError: the file is missing, unreadable, or holds no tensors by name.
    """
    content: Mapping[Any, Any] = source if isinstance(source, Mapping) else _read_file(Path(source))
    for key in ("state_dict", "model"):
        inner = content.get(key)
        if isinstance(inner, Mapping):
            content = inner
    tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        file = None if isinstance(source, Mapping) else source
        raise CheckpointError("no weights by name found", field="weights", file=file)
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def load_weights(
    encoder: nn.Module,
    source: Source,
    *,
    ignore: Sequence[str] = (),
    adapt: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor | None] | None = None,
) -> WeightReport:
    """Copy weights into `encoder`, all or none.

    Args:
        encoder: the module whose own names the source must have.
        source: a path or a mapping, see `read_state_dict`.
        ignore: beginnings of names that the source may have beyond the encoder's.
        adapt: called with name, given and own tensor where shapes differ; returns a tensor of the own shape, or None.

    Raises:
        CheckpointError: names are missing or unknown, or shapes differ; all are counted, the first are named.
    """
    tensors = read_state_dict(source)
    own = encoder.state_dict()
    ignored = tuple(name for name in tensors if name not in own and name.startswith(tuple(ignore)))
    unknown = [name for name in tensors if name not in own and name not in ignored]
    # older files have no count of batches; it does not enter the result
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    adapted: list[str] = []
    differing: list[str] = []
    fitting: dict[str, torch.Tensor] = {}
    for name, value in own.items():
        if name not in tensors:
            continue
        given = tensors[name]
        if given.shape != value.shape:
            changed = adapt(name, given, value) if adapt else None
            if changed is None or changed.shape != value.shape:
                differing.append(f"{name} {tuple(given.shape)} for {tuple(value.shape)}")
                continue
            adapted.append(name)
            given = changed
        fitting[name] = given
    if missing or unknown or differing:
        parts = [("missing", missing), ("unknown", unknown), ("other shape", differing)]
        found = "; ".join(
            f"{len(names)} {what}: {', '.join(names[:SHOWN])}{' ...' if len(names) > SHOWN else ''}"
            for what, names in parts
            if names
        )
        raise CheckpointError(
            f"the weights do not fit {type(encoder).__name__}",
            field="weights",
            file=None if isinstance(source, Mapping) else source,
            expected=f"{len(own)} tensors, named like {', '.join(list(own)[:3])}",
            found=found,
        )
    if not any(value.is_meta for value in own.values()):  # a stand-in that is only checked; torch would warn of each
        encoder.load_state_dict(fitting, strict=False)
    return WeightReport(tuple(name for name in fitting if name not in adapted), tuple(adapted), ignored)


def adapt_input(given: torch.Tensor, own: torch.Tensor) -> torch.Tensor | None:
    """First-convolution weights for another number of image channels.

    One channel gets the sum over the given ones (a grey image gives what it would give as equal channels); more get
    the given ones in turn, times given / wanted, so that activations keep their size. None if more than that differs.
    """
    if given.shape[0] != own.shape[0] or given.shape[2:] != own.shape[2:]:
        return None
    wanted, have = own.shape[1], given.shape[1]
    if wanted == 1:
        return given.sum(dim=1, keepdim=True)
    turns = given[:, [channel % have for channel in range(wanted)]]
    return turns * (have / wanted)


def _read_file(path: Path) -> Mapping[Any, Any]:
    if not path.is_file():
        fix = "write the whole path, or one from the folder in which medseg is started; or leave `weights` out"
        raise CheckpointError("no such file of weights", field="weights", file=path, fix=fix)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    broken = (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, SafetensorError)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except broken as error:
        raise CheckpointError(
            "the file of weights cannot be read", field="weights", file=path, found=str(error)
        ) from error
    if not isinstance(content, Mapping):
        found = type(content).__name__
        raise CheckpointError("the file holds no weights by name", field="weights", file=path, found=found)
    return content
