"""Reading a checkpoint file as data: checksums first, then tensors and plain values, nothing that could run."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from medseg.errors import CheckpointError

__all__ = ["read_state"]

_FORMATS = ("medseg-checkpoint-1",)


def read_state(path: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """The state in a checkpoint file, on the CPU.

    Args:
        path: a .pt file that medseg wrote.
        verify: compare the archive's checksums first (torch does not).

    Raises:
        CheckpointError: E360 missing, E361 empty, cut off or with wrong checksums, E362 not written by medseg or with
            objects that are not plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError("no such checkpoint", code="E360", file=path)
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip() if verify else None
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        start = _first_bytes(path)
        if not start.startswith(b"PK"):
            text = "not a checkpoint" if start else "the checkpoint is empty"
            raise CheckpointError(text, code="E362" if start else "E361", file=path) from error
        found, text = f"{path.stat().st_size} bytes", "the checkpoint is cut off or damaged"
        raise CheckpointError(text, code="E361", file=path, found=found) from error
    if broken is not None:
        raise CheckpointError("the checkpoint is damaged: wrong checksum", code="E361", file=path, found=broken)
    try:
        # weights_only is always given: the environment cannot switch it off then
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text, fix = "the file holds objects other than tensors and plain values", "use a checkpoint that medseg wrote"
        raise CheckpointError(text, code="E362", file=path, fix=fix) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"the checkpoint cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}"
        raise CheckpointError(text, code="E361", file=path) from error
    if not isinstance(state, dict) or state.get("format") not in _FORMATS:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            "not a checkpoint of this program", code="E362", file=path, expected=" or ".join(_FORMATS), found=found
        )
    return state


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(8)
