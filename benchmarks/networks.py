"""What the topics share: training steps, forwards, and networks whose norms are not at their start."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.core.penalty import penalty


def trained_step(
    model: nn.Module, x: Tensor, labels: Tensor, *, with_penalty: bool = False, autocast: torch.dtype | None = None
) -> Callable[[], Tensor]:
    """A training step without the optimizer: gradients dropped, forward, loss, backward. It gives the loss.

    Args:
        model: In training mode.
        x, labels: A batch.
        with_penalty: Add what the techniques ask to be added to the loss.
        autocast: Run the forward in this type.
    """

    def step() -> Tensor:
        for parameter in model.parameters():
            parameter.grad = None
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            loss = F.cross_entropy(model(x), labels)
        if with_penalty:
            loss = loss + penalty(model)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return step


def forward(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """One forward in eval mode without gradients; it gives the outputs."""
    model.eval()

    def run() -> Tensor:
        with torch.no_grad():
            out: Tensor = model(x)
        return out

    return run


def forward_backward(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """Output of a function, and gradient with respect to its input ``x``, which must take gradients."""

    def run() -> tuple[Tensor, Tensor]:
        out = function(x)
        return out.detach(), torch.autograd.grad(out, x, grad)[0]

    return run


@torch.no_grad()
def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The network with norms as after training: neither 0 nor 1, so that a wrong fold would show."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for name, tensor in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
                if tensor.is_floating_point():
                    is_scale = name.startswith("running_var") or name == "weight"
                    start = 0.7 if is_scale else -0.2
                    tensor.copy_(start + (0.6 if is_scale else 0.4) * torch.rand(tensor.shape, generator=generator))
    return model


def batch(count: int, side: int, classes: int = 10, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Images (count, 3, side, side) and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, side, side, generator=generator)
    return images.to(device), torch.randint(classes, (count,), generator=generator).to(device)
