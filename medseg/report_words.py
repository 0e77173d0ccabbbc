"""Scores and counts in plain words, for readers who know the anatomy and not the formulas."""

from __future__ import annotations

import re

__all__ = ["GLOSSARY", "normal_name", "plain_words"]

_WORDS = {
    "dice": "Overlap of prediction and reference: twice the shared part over the sum of both. 1 is perfect, 0 none.",
    "patient dice": "Dice of all slices of a patient taken together, then the mean over the patients. 1 is perfect.",
    "io u": "Overlap, stricter than Dice: the shared part over the part covered by either. 1 is perfect.",
    "jaccard": "Overlap, stricter than Dice: the shared part over the part covered by either. 1 is perfect.",
    "sensitivity": "Share of the true structure that was found. 1 means that nothing was left out.",
    "recall": "Share of the true structure that was found. 1 means that nothing was left out.",
    "specificity": "Share of everything else that was rightly left alone.",
    "precision": "Share of what was marked that is really the structure. 1 means that nothing too much was marked.",
    "accuracy": "Share of all voxels with the right answer; high by itself where the structure is small.",
    "pixel accuracy": "Share of all pixels with the right label, background included; high where that is most.",
    "hd": "The largest distance between the two surfaces: how far the worst point of the outline is off.",
    "hausdorff": "The largest distance between the two surfaces: how far the worst point of the outline is off.",
    "hd95": "Like the largest surface distance, but leaves out the worst 5 % of the outline. 0 is perfect.",
    "assd": "Average distance between the two surfaces. 0 is perfect.",
    "masd": "Average distance between the two surfaces, both directions weighted alike. 0 is perfect.",
    "rmsd": "Typical distance between the two surfaces in which large errors count more. 0 is perfect.",
    "msd": "The largest distance between the two surfaces: how far the worst point of the outline is off.",
    "surface dice": "Share of the outline that lies within the stated tolerance of the other outline. 1 is perfect.",
    "nsd": "Share of the outline that lies within the stated tolerance of the other outline. 1 is perfect.",
    "volume": "Size of the marked structure.",
    "signed volume error": "Predicted volume minus true volume: above 0 too much was marked, below 0 too little.",
    "volume error": "Predicted volume minus true volume: above 0 too much was marked, below 0 too little.",
    "absolute volume error": "How far the predicted volume is off, whichever way.",
    "rvd": "Relative volume difference: how much larger (above 0) or smaller (below 0) the prediction is.",
    "voe": "Share of the joint area that is not shared: 1 minus IoU. 0 is perfect.",
    "auc": "Chance that a voxel of the structure gets a higher value than one outside. 1 is perfect, 0.5 guessing.",
    "mcc": "Correlation of prediction and reference, fair also when the structure is small. 1 is perfect, 0 is chance.",
    "cl dice": "Overlap of centre lines: whether thin vessels are found and stay connected. 1 is perfect.",
    "ap50": "Share of objects found whose overlap is above one half, punished for extra ones. 1 is perfect.",
    "ap75": "Share of objects found whose overlap is above three quarters, punished for extra ones. 1 is perfect.",
    "ap": "Share of objects found and matched, punished for extra ones, at the stated overlap. 1 is perfect.",
    "m ap": "Share of objects found, punished for extra ones, averaged over overlaps from 0.5 to 0.95. 1 is perfect.",
    "pq": "Panoptic quality: how many objects are found times how well their outlines fit. 1 is perfect.",
    "aji": "Overlap of all objects with their partners, with every unmatched object counted as error. 1 is perfect.",
    "seg": "Mean overlap of each true object with its partner; objects without a partner count 0. 1 is perfect.",
    "v rand": "Whether pairs of pixels of one cell stay together and of two cells apart. 1 is perfect.",
    "v info": "Shared information between predicted and true cells. 1 is perfect.",
    "lesion precision": "Share of the marked lesions that are real ones.",
    "lesion recall": "Share of the real lesions that were found.",
    "lesion f1": "Balance of found lesions and false ones. 1 is perfect.",
    "count error": "Number of objects found minus the true number.",
    "share": "How far the share of one structure in another (tumour burden) is off.",
}

GLOSSARY = (
    (
        "95 % interval",
        "If the study were repeated with other patients like these, the mean would lie in this range in about 95 of "
        "100 repetitions (bootstrap, whole patients drawn where they are known). Few cases give a wide interval.",
    ),
    (
        "missed",
        "The structure is in the reference, and the prediction has none of it (or there is no prediction). It counts "
        "as the worst: Dice 0, distances as long as the image's diagonal.",
    ),
    (
        "false alarm",
        "The prediction has the structure, and the reference has none. It counts as the worst, as if missed.",
    ),
    ("both empty", "Neither has the structure: rightly nothing was marked. It counts as perfect."),
    (
        "error map",
        "Grey: both agree. Blue: missed by the prediction. Orange: marked too much. Pink: another label than the "
        "reference's.",
    ),
)


def plain_words(metric: str) -> str:
    """What a score says, in one or two sentences; empty for a score without words of its own.

    >>> plain_words("HD95")[:25]
    'Like the largest surface '
    """
    name = normal_name(metric)
    for candidate in (name, *_heads(name)):
        if candidate in _WORDS:
            return _WORDS[candidate]
    if name.startswith("pooled "):
        one = plain_words(metric[len("Pooled") :])
        return f"{one} Computed once over the voxels or objects of all cases together." if one else ""
    if name.startswith("detected lesion "):
        one = plain_words(metric[len("DetectedLesion") :])
        return f"{one} Only over lesions that were found." if one else ""
    return ""


def normal_name(metric: str) -> str:
    """A score's name in small letters with single spaces.

    >>> normal_name("SurfaceDice 2 mm"), normal_name("volume_error")
    ('surface dice 2 mm', 'volume error')
    """
    return re.sub(r"[^a-z0-9]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", metric.split("@")[0]).lower()).strip()


def _heads(name: str) -> list[str]:
    # "surface dice 2 mm" -> "surface dice"; "hausdorff distance" -> "hausdorff"
    words = name.split()
    return [" ".join(words[:count]) for count in range(len(words) - 1, 0, -1)]
