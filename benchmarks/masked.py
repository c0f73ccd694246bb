"""What others compute, to measure against: the variants that the papers' own code has."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.core.conv import PlainConv2d
from thriftnet.core.linear import PlainLinear
from thriftnet.core.norm import PlainBatchNorm2d
from thriftnet.core.sites import replace
from thriftnet.core.width import Width, WidthAware, WidthSpec, set_width, width_index, widths
from thriftnet.dynamic.gate import gate_of
from thriftnet.errors import IncompatibleModelError


class MaskedChoice:
    """Which widths run for each image of the batch: (N, K) one-hot rows."""

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = tuple(indices)
        self.rows = torch.empty(0)


class MaskedNetwork(nn.Module):
    """A network with a gate as the Dynamic Slimmable Network's authors run it: all channels of all layers, and masks.

    Every layer behind the gate computes all of its channels for every image, and multiplies by a mask, one pass per width and
    more to remove NaN. What it costs does not depend on the decision. Gradients reach the decision through every mask.

    Shape: (N, C, H, W) images and (N, K) one-hot rows -> (N, classes).

    Args:
        model: A network with a gate, of convolutions, batch norms and linear layers only, without concatenation. Its parameters
            are shared, not copied.
        widths: What the rows choose among; left out, what the gate does.
    """

    def __init__(self, model: nn.Module, chosen: Sequence[Width] | None = None) -> None:
        super().__init__()
        _, gate = gate_of(model)
        possible = widths(model)
        self.choice = MaskedChoice([width_index(possible, width) for width in (gate.widths if chosen is None else chosen)])
        memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        network = copy.deepcopy(model, memo).eval()
        set_width(network, possible[self.choice.indices[0]])
        table: dict[int, nn.Module] = {}
        for module in network.modules():
            if isinstance(module, PlainConv2d) and self._varies(slim_of(module).ins, slim_of(module).outs):
                table[id(module)] = MaskedConv2d(module, self.choice)
            elif isinstance(module, PlainBatchNorm2d) and self._varies(slim_of(module).outs):
                table[id(module)] = MaskedBatchNorm2d(module, self.choice)
            elif isinstance(module, PlainLinear) and self._varies(slim_of(module).ins):
                table[id(module)] = MaskedLinear(module, self.choice)
        self.network = replace(network, table)

    def _varies(self, *channels: Sequence[int]) -> bool:
        return any(len({each[index] for index in self.choice.indices}) > 1 for each in channels)

    def forward(self, images: Tensor, rows: Tensor) -> Tensor:
        self.choice.rows = rows
        out: Tensor = self.network(images)
        return out


def slim_of(layer: WidthAware) -> WidthSpec:
    """The widths of a layer of a slimmable network.

    Raises:
        IncompatibleModelError: It has one width.
    """
    if layer.width_spec is None:
        raise IncompatibleModelError(f"{type(layer).__name__} has one width: only slimmable networks can be masked")
    return layer.width_spec


def masked(x: Tensor, rows: Tensor, channels: Sequence[int]) -> Tensor:
    """Channels that an image's width does not have become 0; one pass per width, as the authors do."""
    out = torch.zeros_like(x)
    for index, count in enumerate(channels):
        x = torch.where(torch.isnan(x), torch.zeros_like(x), x)
        out[:, :count] += x[:, :count] * rows[:, index, None, None, None].expand_as(x[:, :count])
    return out


class MaskedConv2d(nn.Module):
    """A convolution of all channels, masked.

    Shape: as `nn.Conv2d`.
    """

    def __init__(self, conv: PlainConv2d, choice: MaskedChoice) -> None:
        super().__init__()
        self.conv, self.choice = conv, choice
        self.ins = [slim_of(conv).ins[index] for index in choice.indices]
        self.outs = [slim_of(conv).outs[index] for index in choice.indices]
        self.full = max(slim_of(conv).outs)

    def forward(self, x: Tensor) -> Tensor:
        conv, weight, bias = self.conv, self.conv.weight, self.conv.bias
        groups = conv.groups
        if groups == 1:
            weight = weight[:, : x.shape[1]]
        elif x.shape[1] != conv.in_channels:
            raise ValueError("grouped layers read all channels")
        out = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, groups)
        return masked(out, self.choice.rows, self.outs) if len(set(self.outs)) > 1 else out


class MaskedBatchNorm2d(nn.Module):
    """A batch norm of all channels with the statistics of each image's width, masked.

    Shape: as `nn.BatchNorm2d`.
    """

    def __init__(self, norm: PlainBatchNorm2d, choice: MaskedChoice) -> None:
        super().__init__()
        self.norm, self.choice = norm, choice
        self.outs = [slim_of(norm).outs[index] for index in choice.indices]

    def forward(self, x: Tensor) -> Tensor:
        norm, rows = self.norm, self.choice.rows
        means, variances = (torch.zeros(len(self.outs), x.shape[1], dtype=x.dtype, device=x.device) for _ in range(2))
        for place, (index, count) in enumerate(zip(self.choice.indices, self.outs, strict=True)):
            norm.set_width_index(index)
            held = norm.statistics()
            for into, name in ((means, "running_mean"), (variances, "running_var")):
                statistic = held[name]
                if statistic is not None:
                    into[place, :count] += statistic[:count]
        mean, variance = ((rows @ each)[..., None, None].expand_as(x) for each in (means, variances))
        x = (x - mean) / torch.sqrt(variance + norm.eps)
        x = x * norm.weight[:, None, None].expand_as(x) + norm.bias[:, None, None].expand_as(x)
        return masked(x, rows, self.outs)


class MaskedLinear(nn.Module):
    """A linear layer that reads all channels.

    Shape: as `nn.Linear`.
    """

    def __init__(self, linear: PlainLinear, choice: MaskedChoice) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight[:, : x.shape[-1]], self.linear.bias)
