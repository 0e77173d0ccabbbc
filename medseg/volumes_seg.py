"""DICOM Segmentation objects (SEG) through highdicom: a label image that a PACS shows over its series.

This is the only place in medseg that copies the patient's module (name, id, birth date): the standard demands that a
segmentation carries that of its images. Needs the extra `dicom`. Source: DICOM PS3.3 A.51, C.8.20.2.
"""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg.errors import DataError, MedsegError, ResourceError, UsageError
from medseg.files import atomic_path
from medseg.volumes_dicom import series_files
from medseg.volumes_geometry import Volume

__all__ = ["check_segmentable", "write_segmentation"]

_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")


def check_segmentable(path: str | Path, *, series: str | int | None = None) -> None:
    """Refuse a series that no DICOM SEG can refer to, before any work is done for it.

    Args:
        path: folder of a DICOM series, or file.
        series: which one, where there are several.

    Raises:
        ResourceError: E506, highdicom is not installed.
        DataError: E340, the series lacks attributes (UIDs) that a reference needs; as `read_image`.
    """
    if importlib.util.find_spec("highdicom") is None:
        raise _not_installed()
    import pydicom

    path = Path(path)
    found = series_files(path, series=series)
    _check_attributes(
        path, [pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_NEEDED)) for file in found]
    )


def write_segmentation(
    path: str | Path,
    array: np.ndarray,
    like: Volume,
    labels: Mapping[int, str],
    *,
    model: str = "medseg",
    version: str = "0",
) -> None:
    """Write a label volume as a binary DICOM SEG that refers to the slices of the series it was made from.

    Segments are those labels that occur; of an empty label all, and none has a voxel.

    Args:
        path: output file, `.dcm`.
        array: (i, j, k) integers on the grid of `like`; 0 is background.
        like: the series as read by `read_image`; its files must still be there.
        labels: name of each index that may occur, background left out.
        model: what made the segmentation, for the header.
        version: its version.

    Raises:
        UsageError: E101, `like` is no DICOM series, another shape, an index without a name.
        DataError: E340, the series lacks attributes (UIDs) that a reference needs.
        ResourceError: E506, highdicom is not installed; E501, E502.
    """
    try:
        import highdicom
        import pydicom
        from highdicom.seg import SegmentAlgorithmTypeValues, SegmentationTypeValues, SegmentDescription
        from pydicom.sr.codedict import codes
    except ImportError:
        raise _not_installed() from None
    path = Path(path)
    names = {int(index): name for index, name in labels.items() if int(index) != 0}
    present = sorted(int(v) for v in np.unique(array) if v)
    if like.format != "dicom" or array.shape != like.geometry.shape or not set(present) <= set(names):
        expected = f"indices {sorted(names)} on the grid {like.geometry.shape} of a DICOM series"
        found = f"indices {present}, shape {array.shape}, {like.format}"
        raise UsageError("the label does not fit the series", field="array", expected=expected, found=found)
    present = present or sorted(names)  # nothing found: highdicom keeps empty frames then
    folder = like.path if like.path.is_dir() else like.path.parent
    sources = [pydicom.dcmread(folder / name) for name in like.header["files"]]
    _check_attributes(like.path, sources)
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=model[:64], version=version[:64], family=codes.DCM.ArtificialIntelligence
    )
    described = [
        SegmentDescription(
            segment_number=number,
            segment_label=names[index][:64],
            segmented_property_category=codes.SCT.Organ,
            segmented_property_type=highdicom.sr.CodedConcept(f"LABEL{index}", "99MEDSEG", names[index][:64]),
            algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, index in enumerate(present, start=1)
    ]
    # frames are (slice, row, column); segments are numbered from 1 without gaps
    lookup = np.zeros(max(present) + 1, np.uint8 if len(present) < 256 else np.uint16)
    lookup[present] = np.arange(1, len(present) + 1)
    frames = np.ascontiguousarray(lookup[array].transpose(2, 1, 0))
    # UIDs follow from content and source, so that the same prediction gives the same object
    digest = hashlib.sha256(frames.tobytes() + sources[0].SeriesInstanceUID.encode() + version.encode()).hexdigest()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            segmentation = highdicom.seg.Segmentation(
                source_images=sources,
                pixel_array=frames,
                segmentation_type=SegmentationTypeValues.BINARY,
                segment_descriptions=described,
                series_instance_uid=pydicom.uid.generate_uid(entropy_srcs=["series", digest]),
                series_number=9000,
                sop_instance_uid=pydicom.uid.generate_uid(entropy_srcs=["instance", digest]),
                instance_number=1,
                manufacturer="medseg",
                manufacturer_model_name=model[:64],
                software_versions=version[:64],
                device_serial_number="0",
                series_description="medseg segmentation",
                omit_empty_frames=True,
            )
    except MedsegError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        message, fix = "the series cannot be the source of a DICOM SEG", "write the label as NIfTI"
        raise DataError(message, code="E340", file=like.path, found=type(error).__name__, fix=fix) from error
    with atomic_path(path, suffix=".dcm") as temporary:
        segmentation.save_as(temporary)


def _not_installed() -> ResourceError:
    message, fix = "DICOM SEG needs the package highdicom", 'pip install "medseg[dicom]"'
    return ResourceError(message, code="E506", fix=fix)


def _check_attributes(path: Path, sources: Sequence[Any]) -> None:
    missing = sorted({tag for tag in _NEEDED for source in sources if not source.get(tag)})
    if missing:
        message, fix = "the series lacks attributes that a DICOM SEG refers to", "write the label as NIfTI"
        raise DataError(message, code="E340", file=path, found=", ".join(missing), fix=fix)
