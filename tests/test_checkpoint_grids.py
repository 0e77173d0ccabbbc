"""Images on other grids than those of training are told of; those on the same are not."""

from __future__ import annotations

import numpy as np
import pytest

from medseg.checkpoint_grids import mixed_grids, seen_grids, unlike_grid


def turned(angle: float, spacing=(0.5, 0.5, 6.0)) -> np.ndarray:
    """Volumes as a scanner gives them: tilted about the first axis."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.block(
        [
            [np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ np.diag(spacing), np.zeros((3, 1))],
            [np.zeros((1, 3)), np.ones((1, 1))],
        ]
    )


SEEN = seen_grids([turned(0.0), turned(0.3), turned(-0.4, (0.6, 0.6, 5.0))])


@pytest.mark.parametrize("affine", [turned(0.1), turned(0.0, (0.45, 0.7, 7.0)), turned(-0.4)])
def test_grids_like_those_of_training_need_no_word(affine):
    assert unlike_grid(affine, SEEN) == []
    assert unlike_grid(affine, None) == []  # a run from before they were kept
    assert mixed_grids(SEEN) == []


@pytest.mark.parametrize(
    ("affine", "told"),
    [
        (turned(0.0)[[1, 0, 2, 3]], "its axes run ARS, in training RAS"),
        (turned(0.0) @ np.diag([1, -1, 1, 1]), "its axes run RPS, in training RAS"),
        (turned(0.0, (2, 2, 6)), "its voxels are 2 x 2 x 6 mm, in training 0.5-0.6 x 0.5-0.6 x 5-6 mm"),
        (turned(0.0, (0.5, 0.5, 1)), "its voxels are 0.5 x 0.5 x 1 mm"),
    ],
)
def test_other_axes_and_other_voxels_are_told(affine, told):
    (note,) = unlike_grid(affine, SEEN)
    assert note.startswith(told)


def test_training_images_that_differ_among_themselves_are_told():
    told = mixed_grids(seen_grids([turned(0.0), turned(0.0, (1.2, 1.2, 6)), turned(0.0) @ np.diag([-1, 1, 1, 1])]))
    assert told == [
        "the images' axes run differently (RAS in 2, LAS in 1): Orientationd in preprocess turns all alike",
        "the images have voxels of 0.5-1.2 x 0.5-1.2 x 6 mm: Spacingd in preprocess gives all the same",
    ]
