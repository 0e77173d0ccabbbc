"""Out of memory while training: told with numbers, the options that help, and the largest patch that fits."""

from __future__ import annotations

import gc
import math
from typing import Any

import torch

from medseg.engine_session import Session
from medseg.errors import MedsegError, ResourceError, UsageError
from medseg.hardware import peak_memory
from medseg.inference.passes import is_out_of_memory

__all__ = ["largest_patch", "memory_error"]


def memory_error(error: BaseException, session: Session) -> MedsegError | None:
    """A ResourceError that says what helps, if `error` is about memory; else None."""
    if isinstance(error, MedsegError) or not is_out_of_memory(error):
        return None
    train = session.train
    peak = ", ".join(f"{name} {value:.0f} MB" for name, value in peak_memory(session.hardware.device).items())
    patch = largest_patch(session)
    smaller = f"train.patch={list(patch)} fits; or " if patch is not None else ""
    return ResourceError(
        "out of memory while training",
        code="E523",
        field="train.patch, train.batch",
        found=f"patch {list(train.patch)}, batch {train.batch}; most used: {peak}",
        fix=f"{smaller}train.batch={max(1, train.batch // 2)} with train.accumulate={train.accumulate * 2}; "
        "or train.checkpoint_activations=true; or precision bf16",
    )


def largest_patch(session: Session) -> tuple[int, ...] | None:
    """The largest legal patch, by halving the voxels, for which forward and backward pass succeed; None if none."""
    step, train = session.step, session.train
    patch = tuple(train.patch)
    for _ in range(6):
        smaller = _smaller(step.bare, patch)
        if smaller is None or math.prod(smaller) >= math.prod(patch):
            return None
        patch = smaller
        step.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if session.hardware.device.type == "cuda":
            torch.cuda.empty_cache()
        if _fits(session, patch):
            return patch
    return None


def _smaller(network: Any, patch: tuple[int, ...]) -> tuple[int, ...] | None:
    """The largest legal size with about half of the voxels."""
    factor = 0.5 ** (1 / len(patch))
    wanted = [max(1, int(n * factor)) for n in patch]
    for _ in range(64):
        try:
            legal = tuple(network.legal_size(tuple(wanted)))
        except UsageError:
            return None
        if all(a <= b for a, b in zip(legal, patch, strict=True)) and legal != patch:
            return legal
        wanted = [max(1, n - max(1, n // 16)) for n in wanted]
    return None


def _fits(session: Session, patch: tuple[int, ...]) -> bool:
    device = session.hardware.device
    shape = (-(-session.train.batch // session.group.world), session.channels["in_channels"], *patch)
    try:
        images = torch.zeros(shape, device=device)
        output = session.step.bare(images)
        outputs = output if isinstance(output, tuple | list) else [output]
        sum(part.float().sum() for part in outputs).backward()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        session.step.optimizer.zero_grad(set_to_none=True)
    return True
