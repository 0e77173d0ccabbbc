"""Official sets of scores, by name: what each challenge measures, on which structures, and where that is written down.

A protocol only chooses scores and regions; the scores themselves are those of METRICS. Where medseg differs from the
official code, `notes` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from medseg.errors import UsageError
from medseg.metrics.catalogue import parse_metrics

__all__ = ["PROTOCOLS", "Protocol", "get_protocol"]


@dataclass(frozen=True)
class Protocol:
    """A named set of scores.

    Attributes:
        name: as written in datasets.yaml or given to `medseg evaluate --protocol`.
        title: in words.
        metrics: entries for `measure_case`.
        regions: name -> labels; None when every label is a structure.
        threshold: "training" when predictions are to be thresholded at the best value on the training images.
        fov: scores count only voxels inside the field of view; cases without one count whole.
        optional: scores that are left out where a case has no probabilities.
        source: paper, DOI, code.
        notes: differences from the official code.
        arguments: what `get_protocol` takes.
    """

    title: str
    metrics: tuple[Any, ...]
    source: str
    name: str = ""
    regions: Mapping[str, tuple[int, ...]] | None = None
    threshold: str | None = None
    fov: bool = False
    optional: tuple[str, ...] = ()
    notes: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)


_BURDEN = {"part": "tumour", "whole": "liver"}
_MERGED = {"region": "tumour", "merge": True}


def _named(**protocols: Protocol) -> dict[str, Protocol]:
    return {name: replace(protocol, name=name) for name, protocol in protocols.items()}


PROTOCOLS: dict[str, Protocol] = _named(
    lits=Protocol(
        title="Liver Tumor Segmentation Benchmark",
        regions={"liver": (1, 2), "tumour": (2,)},
        metrics=(
            *("Dice", "PooledDice", "VOE", "RVD", "ASSD", "HD", "RMSD"),
            *({f"Lesion{name}": {"iou": 0.5, **_MERGED}} for name in ("Precision", "Recall", "F1")),
            *(
                {f"PooledLesion{name}": {"iou": iou, **_MERGED}}
                for iou in (0.0, 0.5)
                for name in ("Precision", "Recall", "F1")
            ),
            *({f"DetectedLesion{name}": _MERGED} for name in ("Dice", "VOE", "RVD", "ASSD", "HD", "RMSD")),
            *({name: _BURDEN} for name in ("ShareError", "ShareRMSE", "ShareMaximum")),
        ),
        source="Bilic et al. 2023, doi:10.1016/j.media.2022.102680; code lits-challenge-scoring (P. Christ)",
        notes=(
            "Liver is labels 1 and 2 together. MSD, the largest symmetric surface distance, is named HD. As in the "
            "official code, lesions that one object of the other image connects are merged first, and a (merged) "
            "lesion is detected when its IoU with the (merged) prediction is above 0.5, or above 0. What is missed "
            "costs the image's diagonal here and 9001 there; RVD is signed here and absolute there."
        ),
    ),
    msd=Protocol(
        title="Medical Segmentation Decathlon",
        metrics=("Dice", {"SurfaceDice": {"tolerance": 1}}, {"SurfaceDice": {"tolerance": 2}}),
        source="Antonelli et al. 2022, doi:10.1038/s41467-022-30695-9",
        notes=(
            "The task's own tolerance (mm) is an argument, `msd: {tolerance: 7}`: brain 5, heart 4, hippocampus 1, "
            "liver 7, lung 2, prostate 4, pancreas 5, colon 4, hepatic vessels 3, spleen 3. "
            "Empty masks follow medseg's policy."
        ),
        arguments={"tolerance": None},
    ),
    drive=Protocol(
        title="Digital Retinal Images for Vessel Extraction",
        metrics=(
            *("Dice", "Sensitivity", "Specificity", "Accuracy", "AUC", "MCC", "clDice"),
            *("PooledDice", "PooledSensitivity", "PooledSpecificity", "PooledAccuracy", "PooledAUC", "PooledMCC"),
        ),
        threshold="training",
        fov=True,
        optional=("AUC", "PooledAUC"),
        source="Staal et al. 2004, doi:10.1109/TMI.2004.825627",
        notes=(
            "Only pixels inside the field of view count. The threshold is the one of the run: put "
            "`Threshold: {value: training}` into the pipeline's postprocess (`drive` has it), and the one with the "
            "best Dice on the training images is stored and used; the report names it, or says that it is missing. "
            "AUC comes from probabilities; without them it is left out. `--observer` scores a second observer's masks "
            "by the same code."
        ),
    ),
    ctc=Protocol(
        title="Cell Tracking Challenge, segmentation",
        metrics=("SEG", "PooledSEG", "CountError"),
        source="Maška et al. 2014, doi:10.1093/bioinformatics/btu080; Ulman et al. 2017, doi:10.1038/nmeth.4473",
        notes="The official SEG is PooledSEG: the mean over all reference objects of all frames.",
    ),
    isbi_em=Protocol(
        title="ISBI 2012 segmentation of neuronal structures in EM stacks",
        metrics=("V_rand", "V_info", "PooledV_rand", "PooledV_info", "Dice"),
        source="Arganda-Carreras et al. 2015, doi:10.3389/fnana.2015.00142",
        notes=(
            "Official are PooledV_rand and PooledV_info: mean over the slices at the threshold where it is best. "
            "Membranes are thinned to no width (every pixel goes to its nearest cell), officially to one pixel; only "
            "pixels of the reference's cells are compared in both."
        ),
    ),
    dsb2018=Protocol(
        title="2018 Data Science Bowl, nuclei",
        metrics=("mAP", "AP50", "AP75", "PQ", "AJI", "CountError"),
        source="Caicedo et al. 2019, doi:10.1038/s41592-019-0612-7",
        notes="Objects match at an IoU strictly above the threshold.",
    ),
)


def get_protocol(name: str | Mapping[str, Any], **arguments: Any) -> Protocol:
    """A protocol by name, with its arguments put in.

    Args:
        name: one of PROTOCOLS; or `{name: {argument: value}}`, as it is written in datasets.yaml.
        arguments: of the protocol: `tolerance` (mm, one number or several) for `msd`.

    Raises:
        UsageError: unknown protocol or argument, or a value that it cannot have.

    >>> get_protocol("msd", tolerance=7).metrics
    ('Dice', {'SurfaceDice': {'tolerance': 7}}, {'SurfaceDice': {'tolerance': 1}}, {'SurfaceDice': {'tolerance': 2}})
    """
    if isinstance(name, Mapping) and len(name) == 1 and all(isinstance(given, Mapping) for given in name.values()):
        name, given = next(iter(name.items()))
        arguments = {**given, **arguments}
    if not isinstance(name, str) or name not in PROTOCOLS:
        raise UsageError("unknown protocol", field="protocol", expected=", ".join(PROTOCOLS), found=name)
    protocol = PROTOCOLS[name]
    unknown = set(arguments) - set(protocol.arguments)
    if unknown:
        expected = ", ".join(protocol.arguments) or "no arguments"
        raise UsageError(f"protocol {name} has no argument {', '.join(sorted(unknown))}", expected=expected)
    tolerance = arguments.get("tolerance")
    if tolerance is None:
        return protocol
    tolerances = [*(tolerance if isinstance(tolerance, list | tuple) else [tolerance]), 1, 2]
    chosen = ({"SurfaceDice": {"tolerance": value}} for value in dict.fromkeys(tolerances))
    metrics = ("Dice", *chosen)
    parse_metrics(metrics)
    return replace(protocol, metrics=metrics, arguments=dict(arguments))
