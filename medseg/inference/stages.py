"""The stages of one case: read and preprocess, predict, write. `medseg predict` runs them side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medseg import files, volumes
from medseg.cache_steps import run_step
from medseg.checkpoint_grids import unlike_grid
from medseg.checkpoint_model import hash_weights
from medseg.cohort import SlabQueue
from medseg.component import Component, build_component
from medseg.data import load_image_sample
from medseg.errors import DataError, MedsegError, ResourceError
from medseg.files_atomic import temporary_name
from medseg.inference.case import predict_case
from medseg.inference.folding import fold_norms
from medseg.inference.intensity import unlike_range
from medseg.inference.large import POINTWISE, open_large
from medseg.inference.memory import memory_with_swap, resident_bytes
from medseg.inference.outputs import Job, header_of, probability_file, record, remove, replaced

__all__ = ["Work"]

_COPIES = 3  # float32 copies of an image that reading and preprocessing hold at once, for deciding to read ahead
_NAME = "medseg label"
# steps in POINTWISE run slab by slab, because MONAI's hold three float32 copies of what they are given
_MAPPED = 2**28  # voxels of a result beyond which it lies in a file that is mapped into memory
_SLAB = 2**24  # voxels


class Work:
    """The loaded model and what each stage does with a case."""

    def __init__(
        self,
        model: Any,
        device: Any,
        series: str | None,
        probabilities: bool,
        max_ram: int | None,
        max_vram: int | None,
        format: str | None,
        precision: str | None = None,
    ) -> None:
        # weights in the layout of the windows: a tenth to a fifth faster on a CPU, measured
        networks = [network.to(device).eval() for network in _networks(model)]
        self.networks = [_fast_layout(fold_norms(network)) for network in networks]
        self.pipeline, self.spec, self.device, self.series = model.pipeline, model.dataset, device, series
        self.probabilities, self.max_ram, self.max_vram = probabilities, max_ram, max_vram
        facts = getattr(model, "metadata", None) or {}
        self.threshold = facts.get("threshold")
        self.seen = [member.get("seen") for member in facts.get("members", [facts])]
        self.preprocess = [build_component(part, "transform") for part in self.pipeline.preprocess]
        self.postprocess = [build_component(part, "postprocess") for part in self.pipeline.postprocess]
        self.options = {"probabilities": probabilities, "format": format, "series": series}
        given = {} if precision is None else {"precision": precision}
        self.inference = Component(self.pipeline.inference.name, {**self.pipeline.inference.arguments, **given})
        self.identity = _identity(networks, self.pipeline, self.inference, self.threshold)

    def inferer(self, reserved: int = 0) -> Any:
        """The pipeline's inferer, with what is left of the memory for its windows."""
        inferer = build_component(self.inference, "inferer")
        if self.max_ram is not None:
            left = self.max_ram - resident_bytes() - reserved
            if left <= 0:
                raise ResourceError(
                    "the program, the model and the image alone need more memory than is allowed",
                    code="E522",
                    field="max_ram",
                    expected=f"more than {(self.max_ram - left) / 2**30:.1f} GB",
                    found=f"{self.max_ram / 2**30:.1f} GB",
                    fix="allow more memory",
                )
            inferer.max_ram = left
        if self.max_vram is not None:
            inferer.max_vram = self.max_vram
        return inferer

    def _free(self) -> int:
        """Bytes that preprocessing may take."""
        free = memory_with_swap()
        return free if self.max_ram is None else min(free, self.max_ram - resident_bytes())

    def reads_ahead(self, jobs: Sequence[Job]) -> bool:
        """Reading the next case needs memory of its own; under a limit it has to fit into a quarter of it."""
        if self.max_ram is None:
            return True
        needed = 0
        for job in jobs:
            try:
                geometry, channels, _ = volumes.read_geometry(
                    job.source, dims=self.spec.dims, series=self.series, affine=self.spec.affine
                )
            except MedsegError:
                continue
            needed = max(needed, _COPIES * 4 * channels * math.prod(geometry.shape))
        return needed < self.max_ram / 4

    def read(self, job: Job) -> dict[str, Any]:
        try:
            before = job.state()
        except OSError:
            before = ""  # refused below, with the reader's message
        large = None if job.more else open_large(job.source, self.spec, self.pipeline.preprocess, case=job.case)
        if large is not None:
            sample: dict[str, Any] = {"image": large, "native": large.native, "picture": large.preview}
            sample |= {"channels": large.shape[0], "stride": large.stride, "notes": ("read in windows",)}
            sample["notes"] += tuple(unlike_range(large.preview, self.pipeline.preprocess))
        else:
            sources = (job.source, *job.more) if job.more else job.source
            sample = load_image_sample(sources, self.spec, case=job.case, series=self.series)
        if before and job.state() != before:
            message, fix = "the file changed while it was read", "predict it again once it is written completely"
            raise DataError(message, code="E302", case=job.case, file=job.source, fix=fix)
        volumes.check_suffix(job.output, sample["native"].kind, volumes.find_format(job.source))
        if job.output.suffix == ".dcm":
            volumes.check_segmentable(job.source, series=self.series)
        sample["state"] = before
        if large is not None:
            return sample
        sample["channels"] = int(sample["image"].shape[0])
        if sample["native"].kind == "picture":
            sample["picture"] = sample["image"].as_tensor().numpy().copy()  # the overlay is drawn over it
        sample["notes"] = (
            *sample["notes"],
            *unlike_range(sample["image"].as_tensor().numpy(), self.pipeline.preprocess),
        )
        for part, transform in zip(self.pipeline.preprocess, self.preprocess, strict=True):
            step = partial(_in_slabs, transform) if part.name in POINTWISE else transform
            sample = run_step(part.name, step, sample, case=job.case, free=self._free)
        if sample["native"].kind == "volume":
            told = [unlike_grid(np.asarray(sample["image"].affine), seen) for seen in self.seen]
            sample["notes"] = (*sample["notes"], *(told[0] if all(told) else ()))  # of an ensemble: unlike all of them
        return sample

    def compute(self, job: Job, sample: dict[str, Any]) -> dict[str, Any]:
        native, image = sample["native"], sample.pop("image")
        affine = np.asarray(image.affine, dtype=np.float64)
        like = header_of(job.source, native, sample["channels"], self.spec.affine)
        voxels = math.prod(native.shape)
        streams = not self.postprocess and job.output.suffix != ".dcm"
        kind = np.uint8 if self.spec.out_channels <= 256 else np.int16
        with ExitStack() as stack:
            sink = probability_sink = None
            if streams:
                writer = stack.enter_context(volumes.open_label_writer(job.output, like, kind, description=_NAME))
                sink = stack.enter_context(SlabQueue(lambda start, slab: _write(writer, start, slab)))
            if self.probabilities:
                probability_sink = stack.enter_context(probability_file(job.probabilities, native.shape))
            label = predict_case(
                self.networks,
                image.as_tensor(),
                inferer=self.inferer(min(voxels, _MAPPED) if kind is np.uint8 else 2 * voxels),
                affine_pre=affine,
                native=native,
                mask=sample.get("fov"),
                postprocess=self.postprocess,
                threshold=self.threshold,
                device=self.device,
                sink=sink,
                probability_sink=probability_sink,
                out=stack.enter_context(_mapped(job.output.parent, native.shape)) if voxels > _MAPPED else None,
            )
            notes = (*sample.get("notes", ()), *replaced(job, sample["state"]))
            # before the new mask appears: beside it, what an earlier run wrote of this case would pass for its own,
            # and its record for that of the new mask, were this process killed before it writes another
            job.record.unlink(missing_ok=True)
            if not self.probabilities:
                remove(job.probabilities)
            if sample.get("picture") is None:
                remove(job.overlay)
        return {
            "label": None if streams and "picture" not in sample else label,
            "like": like,
            "written": streams,
            "picture": sample.get("picture"),
            "notes": notes,
            "state": sample["state"],
            "stride": sample.get("stride", 1),
        }

    def finish(self, job: Job, result: dict[str, Any]) -> dict[str, Any]:
        outputs = [job.output, *([job.probabilities] if self.probabilities else [])]
        if not result["written"]:
            if job.output.suffix == ".dcm":
                from medseg.volumes_seg import write_segmentation

                image = volumes.read_image(job.source, series=self.series, case=job.case)
                write_segmentation(job.output, result["label"], image, self.spec.labels, model=_NAME)
            else:
                volumes.write_label(job.output, result["label"], result["like"], description=_NAME)
        if result["picture"] is not None:
            job.overlay.parent.mkdir(parents=True, exist_ok=True)
            step = result["stride"]  # of large pictures a smaller one is shown
            volumes.write_overlay(job.overlay, result["picture"], _sampled(result["label"], step))
            outputs.append(job.overlay)
        record(job, self.identity, self.options, outputs, result["state"])
        return {"notes": result["notes"]}


def _write(writer: Any, start: int, slab: np.ndarray) -> None:
    writer.write_slab(start, slab)
    files.put_aside(slab)  # of a mapped label: what is written is not looked at before the end


def _sampled(label: np.ndarray, step: int) -> np.ndarray:
    """label[::step, ::step], a few rows at a time: the system maps in much more of a file than is touched."""
    parts = []
    for first in range(0, label.shape[0], 64 * step):
        parts.append(label[first : first + 64 * step : step, ::step].copy())
        files.put_aside(label)
    return np.concatenate(parts)


@contextmanager
def _mapped(folder: Path, shape: Sequence[int]) -> Iterator[np.ndarray]:
    """Zeros (*shape), uint8, in a temporary file: the system can put aside what does not fit into memory.

    The file has no name any more when the block begins, or loses it when it ends (Windows); the array stays usable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files.require_space(folder, math.prod(shape))
    temporary = folder / temporary_name()
    try:
        array = np.memmap(temporary, np.uint8, "w+", shape=tuple(shape))
        with suppress(OSError):
            temporary.unlink()
        yield array
    finally:
        with suppress(OSError):
            temporary.unlink()


def _in_slabs(transform: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """`transform` applied to the image in place, slab by slab; every voxel gets the very same value."""
    image = sample["image"].as_tensor()
    step = max(1, _SLAB * image.shape[1] // max(1, image.numel()))
    for first in range(0, image.shape[1], step):
        part = image[:, first : first + step]
        part.copy_(torch.as_tensor(transform({"image": part.clone()})["image"]))
    return sample


def _fast_layout(network: Any) -> Any:
    layouts = {2: torch.channels_last, 3: torch.channels_last_3d}
    layout = layouts.get(getattr(network, "spatial_dims", 0))
    return network if layout is None else network.to(memory_format=layout)


def _networks(model: Any) -> list[Any]:
    several = getattr(model, "networks", None)
    return list(several) if several else [model.network]


def _identity(networks: Sequence[Any], pipeline: Any, inference: Component, threshold: float | None) -> str:
    """Hash of the weights and of all that turns an image into labels."""
    digest = hash_weights(networks)
    parts = [
        [repr(part) for part in group]
        for group in (pipeline.preprocess, (pipeline.network, inference), pipeline.postprocess)
    ]
    digest.update(json.dumps([parts, threshold]).encode())
    return digest.hexdigest()
