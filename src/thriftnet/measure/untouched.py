"""Running a network without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from thriftnet.core.width import slimmable_layers


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Everything in eval mode, no gradients; afterwards modes, buffers, widths and random state are as before.

    Attention runs in its plain form meanwhile: fused forms have no formula in the operation counter, or not in every
    release of torch.
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
    """Buffers get their values back. Those that did not change are not written to, so that a graph stays valid."""
    buffers = [(module, name) for module in model.modules() for name in module._buffers]
    saved = [(module, name, module._buffers[name]) for module, name in buffers]
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
    """The random state of the CPU and of the devices that the network is on is put back."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    used = [device for device in devices if device.type not in ("cpu", "meta")]
    with torch.random.fork_rng(devices=used, device_type=used[0].type if used else "cuda"):
        yield
