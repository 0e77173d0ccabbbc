"""Whether labels, masks and further channels of a new data set lie on their images' grids, from headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medseg.data_case import Case
from medseg.errors import MedsegError
from medseg.volumes import Geometry, check_pair, read_geometry

__all__ = ["unlike_grids"]


def unlike_grids(images: Sequence[tuple[Case, Geometry]], dims: int, affine: str) -> list[MedsegError]:
    """What does not fit: each case's label, field of view, further channels and first mask against its first image.

    Of masks with a file for each object `data check` reads the others.
    """
    problems: list[MedsegError] = []
    for case, geometry in images:
        for what, path in _others(case):
            try:
                check_pair(geometry, read_geometry(path, dims=dims, affine=affine)[0], case=case.id)
            except MedsegError as error:
                for problem in error.problems:
                    problem.case, problem.file = case.id, problem.file or str(path)
                    problem.message = problem.message.replace("image and label have", f"image and {what} have")
                    problem.fix = problem.fix and problem.fix.replace("the label", f"the {what}")
                    problems.append(problem)
    return problems


def _others(case: Case) -> list[tuple[str, Path]]:
    found = [("further channel", path) for path in case.images[1:]]
    found += [(what, path) for what, path in (("label", case.label), ("field of view", case.fov)) if path is not None]
    return found + [("mask", path) for path in case.instances[:1]]
