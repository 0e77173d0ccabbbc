"""The training step: forward, loss, backward, clip, update, average; in the number type and layout that are fast.

    step = TrainStep(network, criterion, optimizer, hardware, accumulate=1, clip=12.0, ema=0.999)
    loss = step(batch, seed=..., divide=1, update=True)

The loss comes back as a tensor that nobody has waited for. A step whose gradient is not finite changes nothing; how
many came in a row is in `step.bad_steps()`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from medseg.batches import Batch
from medseg.component import build_component
from medseg.config import Pipeline
from medseg.engine_replicas import Replicas
from medseg.errors import ConfigError
from medseg.hardware import Hardware, fast_layout

__all__ = [
    "TrainStep",
    "build_network",
    "build_optimizer",
    "check_patch",
    "crop_margin",
    "supervised_loss",
]

Criterion = Callable[..., torch.Tensor]


def build_network(
    pipeline: Pipeline, *, in_channels: int, out_channels: int, seed: int | None = None, begun: bool = False
) -> nn.Module:
    """The pipeline's network, on the CPU in fp32; its weights follow from `seed` when one is given.

    `begun`: a checkpoint's weights come next, so that the file of `weights:` is not looked for.

    Raises:
        ConfigError: unknown network or arguments that it refuses.
    """
    facts = {"spatial_dims": len(pipeline.train.patch), "in_channels": in_channels, "out_channels": out_channels}
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        return build_component(pipeline.network.without("weights") if begun else pipeline.network, "network", **facts)


def check_patch(network: Any, patch: Sequence[int]) -> tuple[int, ...]:
    """The size of the network's output for this patch.

    Raises:
        ConfigError: E118, the network cannot take the patch; the nearest size that it can is told.
    """
    from medseg.errors import UsageError

    try:
        return tuple(int(n) for n in network.output_size(tuple(patch)))
    except UsageError as error:
        legal = list(network.legal_size(tuple(patch)))
        text = f"the network cannot take this patch: {error.message}"
        raise ConfigError(
            text, code="E118", field="train.patch", expected=f"for example {legal}", found=list(patch)
        ) from error


def crop_margin(patch: Sequence[int], output: Sequence[int]) -> tuple[int, ...]:
    """Voxels per side (rounded up) that an unpadded network cuts off.

    >>> crop_margin((572, 572), (388, 388))
    (92, 92)
    """
    return tuple(-(-(p - o) // 2) for p, o in zip(patch, output, strict=True))


def build_optimizer(pipeline: Pipeline, network: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The pipeline's optimizer over all parameters, in its fused form where there is one."""
    facts: dict[str, Any] = {"params": [p for p in network.parameters() if p.requires_grad]}
    if device.type in ("cpu", "cuda"):
        facts["fused"] = True
    return build_component(pipeline.optimizer, "optimizer", **facts)


def supervised_loss(
    criterion: Criterion,
    logits: torch.Tensor | Sequence[torch.Tensor],
    label: torch.Tensor,
    weight: torch.Tensor | None,
) -> torch.Tensor:
    """The loss of one output, or of several with deep supervision (weights 1, 1/2, 1/4 ..., their sum 1).

    Args:
        criterion: loss(logits, target, weight).
        logits: (B, K, *spatial'), or a sequence of them, full size first.
        label: (B, 1, *spatial); weight: the same shape, or None. Both are cropped in the middle to an unpadded
            network's output, and taken at every n-th voxel for coarser outputs.
    """
    outputs = [logits] if isinstance(logits, torch.Tensor) else list(logits)
    label = _crop(label, outputs[0].shape[2:])
    weight = None if weight is None else _crop(weight, outputs[0].shape[2:])
    total = sum(0.5**level for level in range(len(outputs)))
    loss = torch.zeros((), device=label.device)
    for level, output in enumerate(outputs):
        target, map_ = _thin(label, output.shape[2:]), None if weight is None else _thin(weight, output.shape[2:])
        loss = loss + (0.5**level / total) * criterion(output.float(), target, map_)
    return loss


class TrainStep:
    """One iteration of training.

    Args:
        network: on its device; a DistributedDataParallel when there are several processes.
        criterion: loss(logits, target, weight).
        optimizer: over the network's parameters.
        hardware: device and number type.
        clip: largest norm of the gradient, or None.
        ema: decay of the exponential moving average of the weights, or None.
        world: number of processes.
        forward: called instead of the network in training (its compiled form).
        replicas: parts of a batch that are computed side by side on a CPU (see engine_replicas).
    """

    def __init__(
        self,
        network: nn.Module,
        criterion: Criterion,
        optimizer: torch.optim.Optimizer,
        hardware: Hardware,
        *,
        clip: float | None = None,
        ema: float | None = None,
        world: int = 1,
        forward: Callable[..., Any] | None = None,
        replicas: int = 1,
    ) -> None:
        self.network, self.criterion, self.optimizer, self.hardware = network, criterion, optimizer, hardware
        self.forward = network if forward is None else forward  # a compiled module has no truth value
        self.clip, self.decay, self.world = clip, ema, world
        self.bare: nn.Module = getattr(network, "module", network)
        self.average = copy.deepcopy(self.bare) if ema is not None else None
        self.replicas = Replicas(self.bare, replicas, hardware) if replicas > 1 else None
        self._layout = fast_layout(self.bare, hardware)
        self._parameters = [p for p in self.bare.parameters() if p.requires_grad]
        self._bad = torch.zeros((), device=hardware.device)
        self._before: list[torch.Tensor] = []  # running statistics before the step that has begun
        # the scaler also skips a step with infinities on the GPU itself, without telling the CPU: with fp32 and bf16
        # it scales by 1
        self.scaler: torch.amp.GradScaler | None = None
        if hardware.device.type == "cuda":
            half = hardware.precision == "fp16"
            growth = {} if half else {"init_scale": 1.0, "growth_interval": 2**31 - 1, "backoff_factor": 1 - 1e-7}
            self.scaler = torch.amp.GradScaler("cuda", **growth)
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self, batch: Batch, *, seed: int, divide: int = 1, update: bool = True) -> torch.Tensor:
        """Forward, backward and, with `update`, the optimizer's step.

        Args:
            batch: from a BatchStream, on the device, finished (see `finish_targets`).
            seed: for what is random in the network (dropout).
            divide: iterations whose gradients make one step.
            update: this is the last of them.

        Returns:
            The loss of this process's samples, detached, on the device.
        """
        device = self.hardware.device
        torch.manual_seed(seed)
        self._before = self._before or [value.clone() for value in self.bare.buffers()]
        images = batch.tensors["image"].contiguous(memory_format=self._layout)
        waits = contextlib.nullcontext() if update or self.world == 1 else self.network.no_sync()  # pyright: ignore
        with waits:
            with _autocast(self.hardware):
                logits = self.forward(images) if self.replicas is None else self.replicas(images)
            loss = supervised_loss(self.criterion, logits, batch.tensors["label"], batch.tensors.get("weight"))
            # DistributedDataParallel takes the mean over processes, of losses that each divides by its own sums (of
            # weights, volumes); the shares may be unequal in an epoch's last batch
            scaled = loss * (batch.share * self.world / divide)
            (scaled if self.scaler is None else self.scaler.scale(scaled)).backward()
            if self.replicas is not None:
                self.replicas.backward()
        if update:
            self._update()
        return loss.detach().to(device)

    def bad_steps(self) -> int:
        """Steps in a row, up to now, whose gradient was not finite. Waits for the device."""
        return int(self._bad.item())

    def _update(self) -> None:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = torch.isfinite(norm)
        self._bad = torch.where(finite, torch.zeros_like(self._bad), self._bad + 1)
        if self.hardware.device.type != "cpu" or not bool(finite):  # on a CPU nothing is waited for
            # what is no number would stay in batch norm's running statistics for ever
            for value, before in zip(self.bare.buffers(), self._before, strict=True):
                value.copy_(torch.where(finite, value, before))
        self._before = []
        if self.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.clip, norm)
        if self.scaler is not None:
            first = not self.optimizer.state
            self.scaler.step(self.optimizer)
            self.scaler.update()
            # torch's fused SGD leaves the momentum of a first step that is skipped as it came from memory
            for state in self.optimizer.state.values() if first else ():
                if isinstance(momentum := state.get("momentum_buffer"), torch.Tensor):
                    momentum.copy_(torch.where(finite, momentum, 0.0))
        elif bool(finite):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None and self.decay is not None:
            with torch.no_grad():
                old: list[torch.Tensor] = [*self.average.parameters()]
                new: list[torch.Tensor] = [*self.bare.parameters()]
                torch._foreach_lerp_(old, new, 1 - self.decay)
                for kept, value in zip(self.average.buffers(), self.bare.buffers(), strict=True):
                    kept.copy_(value)

    @property
    def parts(self) -> int:
        """In how many parts a batch is computed side by side."""
        return 1 if self.replicas is None else len(self.replicas)

    @property
    def layout(self) -> str:
        """Of the network's tensors, in words."""
        return "contiguous" if self._layout == torch.contiguous_format else "channels last"

    @property
    def validated(self) -> nn.Module:
        """The network whose predictions count: the average of the weights if there is one."""
        return self.bare if self.average is None else self.average

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values from which training goes on exactly."""
        return {
            "network_state": _on_cpu(self.bare.state_dict()),
            "average_state": None if self.average is None else _on_cpu(self.average.state_dict()),
            "optimizer_state": self.optimizer.state_dict(),
            "scaler_state": None if self.scaler is None else self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.bare.load_state_dict(state["network_state"])
        if self.average is not None:
            self.average.load_state_dict(state["average_state"] or state["network_state"])
        self.optimizer.load_state_dict(state["optimizer_state"])
        if self.scaler is not None and state.get("scaler_state"):
            self.scaler.load_state_dict(state["scaler_state"])


def _autocast(hardware: Hardware) -> Any:
    if hardware.dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(hardware.device.type, dtype=hardware.dtype)


def _crop(values: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    starts = [(n - s) // 2 for n, s in zip(values.shape[2:], size, strict=True)]
    box = tuple(slice(a, a + s) for a, s in zip(starts, size, strict=True))
    return values[(slice(None), slice(None), *box)]


def _thin(values: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    if tuple(values.shape[2:]) == tuple(size):
        return values
    for axis, count in enumerate(size, start=2):
        step = -(-values.shape[axis] // count)
        # the voxel in the middle of each group, which nearest-neighbour interpolation would take
        index = (torch.arange(count, device=values.device) * step + step // 2).clamp(max=values.shape[axis] - 1)
        values = values.index_select(axis, index)
    return values


def _on_cpu(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # plain contiguous tensors: a file that does not depend on the device or on the memory layout
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}
