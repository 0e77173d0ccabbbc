"""Random transforms on a batch of patches, each sample with random numbers of its own.

A transform that has `apply_batch` (medseg's elastic deformation and its kin) treats the whole batch at once, on the
device where it is; others, MONAI's among them, are called sample by sample.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from monai.data.meta_obj import get_track_meta, set_track_meta
from monai.transforms import Randomizable

from medseg.component import Component, build_component
from medseg.errors import DataError, MedsegError
from medseg.patches import derive_seed

__all__ = ["Augmentation", "finish_targets"]

_WORD = 2**32 - 1  # MONAI seeds are 32 bits


class Augmentation:
    """The pipeline's `augment` list.

    Args:
        components: names and arguments of random transforms.

    Raises:
        ConfigError: unknown transform or wrong arguments.
    """

    def __init__(self, components: Sequence[Component]) -> None:
        self.components = tuple(components)
        self.transforms: list[Any] = [build_component(component, "transform") for component in self.components]

    def context(
        self, patch: Sequence[int], room: Sequence[int], spacings: Sequence[Sequence[float]] = ()
    ) -> tuple[int, ...]:
        """Voxels per side to read around each patch, so that the image itself is turned in and not its mirror image.

        Only for a transform that asks for it (`reach`) and comes first: what is done before it would be done to all of
        that. At most half a patch, in 3-D a quarter, so that four times a patch's voxels are read at most, and no more
        than there is; () for none.

        Args:
            patch: voxels per axis.
            room: voxels per axis that the largest image has beyond a patch.
            spacings: sizes of voxels of the samples that may come.

        >>> turn = Augmentation([Component("RandElasticDeformationd", {"sigma": 0.0, "rotate": 90})])
        >>> turn.context((101, 101), (500, 8)), turn.context((101, 101), (0, 0))
        ((21, 8), ())
        """
        if not self.transforms or not hasattr(self.transforms[0], "reach"):
            return ()
        reach, part = self.transforms[0].reach(patch, spacings), 2 if len(patch) < 3 else 4
        around = tuple(min(r, p // part, max(0, n)) for r, p, n in zip(reach, patch, room, strict=True))
        return around if any(around) else ()

    def __call__(
        self,
        batch: Mapping[str, torch.Tensor],
        seeds: Sequence[int],
        spacings: Sequence[Sequence[float]] | None = None,
        context: Sequence[int] = (),
    ) -> dict[str, torch.Tensor]:
        """Transformed batch: tensors (B, C, *patch), on the device of the given ones.

        Args:
            batch: name -> (B, C, *(patch + 2 * context)).
            seeds: one per sample; equal seeds give equal results, whatever the other samples are.
            spacings: size of a voxel of each sample; rotations happen in millimetres.
            context: as `context` gave it for these patches.
        """
        result = dict(batch)
        with _without_meta():
            for number, transform in enumerate(self.transforms):
                own = [derive_seed(seed, number) for seed in seeds]
                try:
                    if hasattr(transform, "apply_batch"):
                        around = {"context": tuple(context)} if context and number == 0 else {}
                        result = _at_once(transform, result, own, spacings, **around)
                    else:
                        result = _one_by_one(transform, result, own)
                except (MedsegError, MemoryError, torch.OutOfMemoryError):  # a GPU's memory: training tells what helps
                    raise
                except Exception as error:
                    name = self.components[number].name
                    text = f"{name} fails: {type(error).__name__}: {error}".splitlines()[0]
                    raise DataError(text, code="E372", field="augment") from error
        return result


def finish_targets(
    batch: Mapping[str, torch.Tensor], ignore: int | None, outside_fov: str = "unknown"
) -> dict[str, torch.Tensor]:
    """Give weight 0 to voxels of which nothing is known: `ignore` (its label becomes 0), outside of the field of view.

    With `outside_fov="background"` only labels other than 0 out there have weight 0: an annotation that leaves the
    field of view is neither right nor wrong.

    Returns:
        image float32, label int64, and weight float32 if any voxel may have a weight other than 1.
    """
    label = batch["label"].long()
    weight = batch.get("weight")
    voids = [] if ignore is None else [label == ignore]
    if "fov" in batch:
        outside = batch["fov"] == 0
        voids.append(outside & (label != 0) if outside_fov == "background" else outside)
    for void in voids:
        weight = torch.ones_like(label, dtype=torch.float32) if weight is None else weight
        weight = weight.masked_fill(void, 0.0)
    if ignore is not None:
        label = label.masked_fill(label == ignore, 0)
    finished = {"image": batch["image"].float(), "label": label}
    if weight is not None:
        finished["weight"] = weight.float()
    return finished


def _at_once(
    transform: Any,
    batch: dict[str, torch.Tensor],
    seeds: list[int],
    spacings: Sequence[Sequence[float]] | None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    kinds = {tuple(map(float, spacing)) for spacing in spacings or ()}
    if len(kinds) <= 1:
        if kinds and _takes_spacing(transform):
            options["spacing"] = next(iter(kinds))
        return dict(transform.apply_batch(batch, seeds, **options))
    parts = []
    for position, (seed, spacing) in enumerate(zip(seeds, spacings or (), strict=True)):
        one = {name: values[position : position + 1] for name, values in batch.items()}
        parts.append(_at_once(transform, one, [seed], [spacing], **options))
    return {name: torch.cat([part[name] for part in parts]) for name in batch}


def _takes_spacing(transform: Any) -> bool:
    return "spacing" in inspect.signature(transform.apply_batch).parameters


def _one_by_one(transform: Any, batch: dict[str, torch.Tensor], seeds: Sequence[int]) -> dict[str, torch.Tensor]:
    samples, random = [], isinstance(transform, Randomizable)
    for position, seed in enumerate(seeds):
        if random:
            transform.set_random_state(seed=seed & _WORD)
        samples.append(transform({name: values[position] for name, values in batch.items()}))
    return {name: torch.stack([_plain(sample[name]) for sample in samples]) for name in batch}


def _plain(value: Any) -> torch.Tensor:
    tensor = torch.as_tensor(value)
    return tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor


@contextlib.contextmanager
def _without_meta() -> Iterator[None]:
    # patches need no affine; keeping one costs more than many of the transforms
    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)
