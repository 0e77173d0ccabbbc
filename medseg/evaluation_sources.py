"""Masks that bear the name of a case and were made from another image: what predict's records beside them tell."""

from __future__ import annotations

from collections.abc import Sequence

from medseg.errors import counted, listed
from medseg.evaluation_pairs import Pair
from medseg.inference.sources import made_from_others

__all__ = ["tell_other_images"]


def tell_other_images(pairs: Sequence[Pair]) -> list[str]:
    """A note on masks of `medseg predict` that it made from other files than the images of the cases of their names."""
    masks = [pair for pair in pairs if pair.prediction is not None]
    other = [p.case for p in masks if p.prediction and made_from_others(p.prediction, p.images)]
    if not other:
        return []
    return [
        f"{len(other)} of {counted(len(masks), 'mask')}: predicted from other files than the images of their cases "
        f"({listed(other)}): where these show something else, the scores mean nothing."
    ]
