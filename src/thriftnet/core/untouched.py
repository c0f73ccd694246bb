"""Running a network and restoring its state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from thriftnet.core.width import slimmable_layers


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; on exit, modes, buffers, widths and the random state are restored.

    Attention runs unfused: not every release of torch has formulas for its fused kernels.
    """
    modes = [(module, module.training) for module in model.modules()]
    widths = [(layer, layer.width_index) for layer in slimmable_layers(model)]
    fused = torch.backends.mha.get_fastpath_enabled()
    with _restored_buffers(model), _restored_random_state(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for module, _ in modes:
                module.training = False  # eval() may be overridden to do more
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for module, mode in modes:
                module.training = mode
            for layer, index in widths:
                if layer.width_index != index:
                    layer.width_index = index


@contextmanager
def _restored_buffers(model: nn.Module) -> Iterator[None]:
    """Restore buffers; unchanged ones are not written to, so that autograd graphs stay valid."""
    saved = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    values = [None if b is None or b.is_inference() else (b.detach().clone(), b._version) for _, _, b in saved]
    try:
        yield
    finally:
        for (module, name, buffer), value in zip(saved, values, strict=True):
            module._buffers[name] = buffer
            if buffer is not None and value is not None and buffer._version != value[1]:
                with torch.no_grad():
                    buffer.copy_(value[0])


@contextmanager
def _restored_random_state(model: nn.Module) -> Iterator[None]:
    """Restore the random state of the CPU and of the network's devices."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    used = [device for device in devices if device.type not in ("cpu", "meta")]
    with torch.random.fork_rng(devices=used, device_type=used[0].type if used else "cuda"):
        yield
