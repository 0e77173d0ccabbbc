"""Cross-entropy weighted voxel by voxel with the U-Net paper's distance map, alone and with soft Dice.

The map w(x) comes from `medseg.transforms.boundary_weight_map`; without one both losses are the plain ones. Both
compute in float32 whatever the logits' type, so that bf16 and fp16 autocast are safe.

Source: Ronneberger, Fischer, Brox: U-Net: Convolutional Networks for Biomedical Image Segmentation, MICCAI 2015,
equations 1 and 2, doi:10.1007/978-3-319-24574-4_28. Soft Dice: Milletari, Navab, Ahmadi: V-Net, 3DV 2016,
doi:10.1109/3DV.2016.79, with the probabilities not squared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from medseg.errors import UsageError
from medseg.errors_arguments import checked
from medseg.losses.targets import align_target, align_weight

__all__ = ["DistanceWeightedCELoss", "DistanceWeightedDiceCELoss"]


class DistanceWeightedCELoss(nn.Module):
    """Weighted mean of the cross-entropy: sum of w(x) c(y(x)) CE(x) over sum of w(x) c(y(x)).

    Dividing by the sum of the weights keeps the loss's size, and so the learning rate, independent of w0 and of the
    share of voxels that are ignored.

    Args:
        class_weights: c, one positive number for each class (two for K = 1: background, foreground); None: all 1.
        label_smoothing: in [0, 1): this share of each target's mass is spread evenly over the classes.
        use_weight: False leaves the map out (for ablation) but still ignores voxels whose weight is 0.

    `forward(logits, target, weight=None)`: logits (B, K, *spatial), K = 1 for one sigmoid channel; target integer
    (B, 1, *spatial) or (B, *spatial); weight floating of the same shapes, 0 = ignore. Returns a float32 scalar; 0, with
    a gradient of 0, when every weight is 0.

    Raises:
        LabelError: floating (soft) targets, values that are no class. GeometryError: shapes that differ. UsageError:
            wrong arguments.

    >>> loss = DistanceWeightedCELoss()
    >>> logits = torch.tensor([[[[2.0, 0.0]], [[0.0, 0.0]]]])          # B=1, K=2, 1 x 2 voxels
    >>> target, weight = torch.tensor([[[0, 1]]]), torch.tensor([[[3.0, 1.0]]])
    >>> round(float(loss(logits, target, weight)), 4)                   # (3 x 0.1269 + 1 x 0.6931) / 4
    0.2685
    """

    @checked
    def __init__(
        self, *, class_weights: Sequence[float] | None = None, label_smoothing: float = 0.0, use_weight: bool = True
    ) -> None:
        super().__init__()
        shares = None if class_weights is None else list(class_weights)
        if shares is not None and (len(shares) < 2 or not all(0 < w < math.inf for w in shares)):
            raise UsageError("class weights are positive, one for each class", field="class_weights", found=shares)
        if not 0 <= label_smoothing < 1:
            raise UsageError(
                "label smoothing is a share", field="label_smoothing", expected="0 <= s < 1", found=label_smoothing
            )
        self.label_smoothing = label_smoothing
        self.use_weight = use_weight
        self.class_weights: torch.Tensor | None
        weights = None if shares is None else torch.tensor(shares, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The loss; see the class."""
        weight = align_weight(logits, weight)
        target = align_target(logits, target, weight)
        if weight is not None and not self.use_weight:
            weight = (weight > 0).float()
        each = self._cross_entropy(logits.float(), target)
        if self.class_weights is not None:
            if len(self.class_weights) != max(2, logits.shape[1]):
                raise UsageError(
                    "one weight for each class",
                    field="class_weights",
                    expected=max(2, logits.shape[1]),
                    found=len(self.class_weights),
                )
            by_class = self.class_weights[target]
            weight = by_class if weight is None else weight * by_class
        if weight is None:
            return each.mean()
        return (each * weight).sum() / weight.sum().clamp_min(torch.finfo(torch.float32).tiny)

    def _cross_entropy(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if logits.shape[1] > 1:
            return F.cross_entropy(logits, target, reduction="none", label_smoothing=self.label_smoothing)
        soft = target.float() * (1 - self.label_smoothing) + self.label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits[:, 0], soft, reduction="none")


class DistanceWeightedDiceCELoss(nn.Module):
    """`ce` x distance-weighted cross-entropy + `dice` x (1 - soft Dice).

    The soft Dice is taken per class over the whole batch, which keeps a patch without a class from deciding alone, or,
    with `per_image`, over each image of the batch by itself, and then averaged, so that small structures count as much
    as large ones (for scores that are means over pictures):

        D_k = (2 sum p_k t_k + smooth) / (sum p_k + sum t_k + smooth),  sums over voxels whose weight is not 0.

    A class that is in no voxel of the batch and not predicted has D = 1; one that is predicted all the same tends to
    smooth / (predicted + smooth), so false alarms cost. The map weighs the cross-entropy only: Dice is a count of
    voxels, which only the ignore mask (weight 0) changes.

    Args:
        dice, ce: shares of the two terms, not negative and not both 0.
        include_background: whether class 0 has a part in the mean of D.
        smooth: positive; added above and below.
        per_image: each image of the batch by itself instead of the batch as a whole.
        class_weights, label_smoothing, use_weight: as in `DistanceWeightedCELoss`.

    Shapes, types and errors as in `DistanceWeightedCELoss`.

    >>> loss = DistanceWeightedDiceCELoss(ce=0.0, smooth=1e-6)
    >>> target = torch.tensor([[[0, 1, 1, 0]]])[:, 0]
    >>> logits = 50 * torch.nn.functional.one_hot(target, 2).movedim(-1, 1).float()
    >>> round(float(loss(logits, target)), 4)                            # a perfect answer
    0.0
    """

    @checked
    def __init__(
        self,
        *,
        dice: float = 1.0,
        ce: float = 1.0,
        include_background: bool = False,
        smooth: float = 1.0,
        per_image: bool = False,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        use_weight: bool = True,
    ) -> None:
        super().__init__()
        if dice < 0 or ce < 0 or dice + ce == 0:
            raise UsageError("shares are not negative and not both 0", field="dice, ce", found=f"{dice}, {ce}")
        if smooth <= 0:
            raise UsageError("smooth is positive", field="smooth", found=smooth)
        self.dice, self.ce, self.smooth, self.include_background = dice, ce, smooth, include_background
        self.per_image = per_image
        self.cross_entropy = DistanceWeightedCELoss(
            class_weights=class_weights, label_smoothing=label_smoothing, use_weight=use_weight
        )

    def forward(self, logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The loss; see the class."""
        weight = align_weight(logits, weight)
        target = align_target(logits, target, weight)
        loss = (
            self.ce * self.cross_entropy(logits, target, weight)
            if self.ce
            else logits.new_zeros((), dtype=torch.float32)
        )
        if self.dice:
            loss = loss + self.dice * (1 - self._soft_dice(logits.float(), target, weight))
        return loss

    def _soft_dice(self, logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        kept = None if weight is None else weight != 0
        classes = logits.shape[1]
        shares = logits.softmax(1) if classes > 1 else logits.sigmoid()
        first = 0 if classes == 1 or self.include_background else 1
        scores = []
        for number in range(first, classes):
            share = shares[:, number]
            truth = target == (number if classes > 1 else 1)
            if kept is not None:
                share, truth = share * kept, truth & kept
            over = tuple(range(int(self.per_image), share.ndim))
            both, size = (share * truth).sum(over), share.sum(over) + truth.sum(over)
            scores.append((2 * both + self.smooth) / (size + self.smooth))
        return torch.stack(scores).mean()
