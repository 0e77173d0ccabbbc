"""What scores look at: one structure of one case, or all objects of one case. Costly parts are measured once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from medseg.errors import UsageError
from medseg.metrics.matching import InstanceOverlap, instance_overlap, label_components, merge_touching
from medseg.metrics.membranes import MembraneCurve, membrane_curve
from medseg.metrics.overlap import Confusion, confusion_of_masks
from medseg.metrics.surface import SurfaceDistances, surface_distances
from medseg.metrics.vessels import ProbabilityCounts, probability_counts

__all__ = ["CaseView", "RegionView", "is_one_structure"]


class RegionView:
    """One structure of one case: prediction and reference as masks, cut to the voxels that count.

    Attributes:
        prediction: (*spatial) boolean, false where voxels do not count.
        reference: likewise.
        valid: (*spatial) boolean, or None when all voxels count.
        spacing: size of a voxel on each axis.
        unit: of spacing, "mm" or "px".
        patient: whose it is; "" when that is not known.
    """

    def __init__(
        self,
        prediction: np.ndarray,
        reference: np.ndarray,
        valid: np.ndarray | None,
        spacing: tuple[float, ...],
        unit: str,
        probability: np.ndarray | None = None,
        patient: str = "",
    ) -> None:
        self.patient = patient
        self.prediction = prediction if valid is None else prediction & valid
        self.reference = reference if valid is None else reference & valid
        self.valid = valid
        self.spacing = spacing
        self.unit = unit
        self._probability = probability

    @cached_property
    def counts(self) -> Confusion:
        """Voxels that agree and disagree."""
        return confusion_of_masks(self.prediction, self.reference, self.valid)

    @cached_property
    def surface(self) -> SurfaceDistances:
        """Distances between the two surfaces."""
        return surface_distances(self.prediction, self.reference, self.spacing)

    @cached_property
    def lesions(self) -> tuple[np.ndarray, np.ndarray]:
        """Connected components of prediction and reference, numbered from 1."""
        return label_components(self.prediction), label_components(self.reference)

    @cached_property
    def lesion_overlap(self) -> InstanceOverlap:
        """Shared voxels of predicted and real lesions."""
        return instance_overlap(*self.lesions)

    @cached_property
    def merged_lesions(self) -> tuple[np.ndarray, np.ndarray]:
        """Lesions that overlaps connect, as one; see `merge_touching`."""
        return merge_touching(*self.lesions)

    def lesions_and_overlap(self, merge: bool) -> tuple[np.ndarray, np.ndarray, InstanceOverlap]:
        """Numbered lesions of prediction and reference, and their overlap; merged or as they are."""
        return (*self.merged_lesions, self._merged_overlap) if merge else (*self.lesions, self.lesion_overlap)

    @cached_property
    def _merged_overlap(self) -> InstanceOverlap:
        return instance_overlap(*self.merged_lesions)

    @property
    def voxel_volume(self) -> float:
        """Volume of a voxel in the unit that volumes are reported in: mL for mm in 3-D, mm² in 2-D, else voxels."""
        if self.unit != "mm":
            return 1.0
        size = float(np.prod(self.spacing))
        return size / 1000 if len(self.spacing) == 3 else size

    @property
    def probability(self) -> np.ndarray:
        """Predicted probability of the structure.

        Raises:
            UsageError: the case came without probabilities.
        """
        if self._probability is None:
            raise UsageError(
                "this score needs probabilities", field="probabilities", fix="predict with --save-probabilities"
            )
        return self._probability

    @cached_property
    def probability_counts(self) -> ProbabilityCounts:
        """How often each probability was given inside and outside the structure."""
        return probability_counts(self.probability, self.reference, self.valid)

    @property
    def status(self) -> str:
        """scored | missed | false_alarm | both_empty."""
        return self.counts.status


class CaseView:
    """One case as a whole: its objects, and its regions by name.

    Objects are the given instances, or the connected components of all that is not background.
    """

    def __init__(
        self,
        prediction: np.ndarray,
        reference: np.ndarray,
        valid: np.ndarray | None,
        regions: Mapping[str, Sequence[int]],
        instances: tuple[np.ndarray | None, np.ndarray | None],
        probabilities: Any,
        spacing: tuple[float, ...],
        unit: str,
        patient: str = "",
    ) -> None:
        self.patient = patient
        self._prediction, self._reference, self._valid = prediction, reference, valid
        self._regions, self._instances, self._probabilities = regions, instances, probabilities
        self.spacing, self.unit = spacing, unit

    def region(self, name: str) -> RegionView:
        """One structure of the case.

        Raises:
            UsageError: no region has that name.
        """
        if name not in self._regions:
            raise UsageError("no such region", field="region", expected=", ".join(self._regions), found=name)
        labels = self._regions[name]
        probability = None
        if self._probabilities is not None:
            if max(labels) >= len(self._probabilities):
                raise UsageError(
                    "fewer probabilities than labels", field="probabilities",
                    expected=f"a channel for label {max(labels)}", found=f"{len(self._probabilities)} channels",
                )  # fmt: skip
            probability = self._probabilities[labels[0]]
            for label in labels[1:]:  # one after the other: they may lie in a file
                probability = probability + self._probabilities[label]
        masks = [_mask(image, labels) for image in (self._prediction, self._reference)]
        return RegionView(masks[0], masks[1], self._valid, self.spacing, self.unit, probability, self.patient)

    def volume_share(self, part: str, whole: str) -> tuple[float, float]:
        """Voxels of one region over those of another, in prediction and reference; 0 where the other is empty."""
        first, second = self.region(part).counts, self.region(whole).counts
        predicted = first.predicted / second.predicted if second.predicted else 0.0
        return predicted, first.present / second.present if second.present else 0.0

    def right_voxels(self) -> tuple[int, int]:
        """Voxels that count whose label is the reference's, and how many count."""
        right = self._prediction == self._reference
        if self._valid is None:
            return int(np.count_nonzero(right)), right.size
        return int(np.count_nonzero(right & self._valid)), int(np.count_nonzero(self._valid))

    @cached_property
    def objects(self) -> InstanceOverlap:
        """Shared voxels of predicted and real objects."""
        numbered = []
        for image, instances in zip((self._prediction, self._reference), self._instances, strict=True):
            foreground = image != 0 if self._valid is None else (image != 0) & self._valid
            if instances is None:
                numbered.append(label_components(foreground))
            else:
                numbered.append(instances if self._valid is None else np.where(self._valid, instances, 0))
        return instance_overlap(numbered[0], numbered[1])

    @cached_property
    def membranes(self) -> MembraneCurve:
        """V_rand and V_info at each threshold; of the predicted labels alone if there are no probabilities."""
        return self.mask_membranes if self._probabilities is None else self._curve(1.0 - self._probabilities[0])

    @cached_property
    def mask_membranes(self) -> MembraneCurve:
        """V_rand and V_info of the predicted labels, the same at each threshold."""
        return self._curve(self._prediction != 0)

    def _curve(self, cells: np.ndarray) -> MembraneCurve:
        reference = self._reference != 0 if self._instances[1] is None else self._instances[1]
        if self._valid is not None:
            reference = np.where(self._valid, reference, 0).astype(reference.dtype)
        return membrane_curve(cells, reference)

    @property
    def status(self) -> str:
        """By whether there are objects: scored | missed | false_alarm | both_empty."""
        return self.objects.status


def _mask(image: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    mask = image == labels[0]
    for label in labels[1:]:
        mask |= image == label
    return mask


def is_one_structure(channels: int, labels: Collection[int]) -> bool:
    """Whether all channels of probabilities but the first make up label 1, as interior and border do.

    >>> is_one_structure(3, {1: "cell"}), is_one_structure(3, {1: "a", 2: "b"}), is_one_structure(2, {1: "cell"})
    (True, False, False)
    """
    return channels > 2 and set(labels) <= {0, 1}
