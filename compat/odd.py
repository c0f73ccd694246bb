"""Networks that are written in ways that surprise: what people have, each with one oddity.

Each function builds one; its docstring says what is odd. All read images (2, 3, 16, 16) unless they say otherwise.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from compat.sample import Inputs, Sample

C = 16  # channels


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(C, C, 3, padding=1, **options)


def block(**options: Any) -> nn.Sequential:
    return nn.Sequential(conv(**options), nn.BatchNorm2d(C), nn.ReLU())


class Body(nn.Module):
    """Stem, four blocks, head: the common ground of the others."""

    def __init__(self, make: Callable[[], nn.Module] = block, depth: int = 4, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        self.blocks = nn.ModuleList(make() for _ in range(depth))
        self.head = nn.Linear(C, classes)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for each in self.blocks:
            x = x + each(x)
        return x

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x).mean((2, 3)))


# -- layers held elsewhere


class InList(Body):
    """The layers are also in a Python list, which is what runs."""

    def __init__(self) -> None:
        super().__init__(conv)
        self.layers = [*self.blocks]

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for each in self.layers:
            x = x + each(x).relu()
        return x


class InDict(Body):
    """The layers are also in a dict, which is what runs."""

    def __init__(self) -> None:
        super().__init__(conv)
        self.layers = {str(i): each for i, each in enumerate(self.blocks)}

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for each in self.layers.values():
            x = x + each(x).relu()
        return x


class OnlyInList(nn.Module):
    """Half of the layers are only in a Python list: no state dict has them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        self.a, self.b = conv(), conv()
        self.hidden = [conv(), conv()]
        self.head = nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for each in (self.a, *self.hidden, self.b):
            x = each(x).relu()
        return self.head(x.mean((2, 3)))


class BoundMethod(Body):
    """Bound methods of the layers are kept and called."""

    def __init__(self) -> None:
        super().__init__(conv)
        self.calls = [each.forward for each in self.blocks]

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for each in self.calls:
            x = each(x).relu()
        return x


class InPartial(Body):
    """A functools.partial over a layer is called."""

    def __init__(self) -> None:
        super().__init__(conv)
        self.last = partial(_applied, self.blocks[-1])

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for each in list(self.blocks)[:-1]:
            x = each(x).relu()
        return self.last(x)


def _applied(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


class InTuple(Body):
    """Pairs of layers are kept in a tuple of tuples."""

    def __init__(self) -> None:
        super().__init__(conv)
        self.pairs = ((self.blocks[0], self.blocks[1]), (self.blocks[2], self.blocks[3]))

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for first, second in self.pairs:
            x = x + second(first(x).relu())
        return x


class HiddenFromRegistration(Body):
    """A layer is kept in __dict__ past registration, beside its registered name."""

    def __init__(self) -> None:
        super().__init__(conv)
        self.__dict__["favourite"] = self.blocks[0]

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for each in (self.favourite, *self.blocks):
            x = each(x).relu()
        return x


# -- how modules are shared and reused


class UsedTwice(Body):
    """Each block runs twice."""

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for each in (*self.blocks, *self.blocks):
            x = x + each(x)
        return x


class SharedModule(Body):
    """One module is registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.blocks[1]

    def features(self, x: Tensor) -> Tensor:
        return self.again(super().features(x))


class SharedParameter(Body):
    """Two layers share a parameter, as language models tie embeddings."""

    def __init__(self) -> None:
        super().__init__(conv)
        self.blocks[1].weight = self.blocks[0].weight


class SharedWithHead(nn.Module):
    """The head uses the weight of a linear layer of the body."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        self.convs = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU())
        self.mix, self.head = nn.Linear(C, C), nn.Linear(C, C)
        self.head.weight = self.mix.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.convs(self.stem(x)).mean((2, 3))))


class Recurrent(Body):
    """A block of a ModuleList runs in a loop whose length is an attribute."""

    steps = 3

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for step in range(self.steps):
            x = x + self.blocks[step % 2](x)
        return self.blocks[3](self.blocks[2](x))


class Aliases(Body):
    """Names of another layout point at the same layers."""

    def __init__(self) -> None:
        super().__init__(conv)
        self.layer1, self.layer2 = nn.Sequential(*list(self.blocks)[:2]), nn.Sequential(*list(self.blocks)[2:])

    def features(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(self.stem(x)))


# -- weights used by hand


class Functional(Body):
    """The forward uses `.weight` and `.bias` of its layers with F.conv2d."""

    def __init__(self) -> None:
        super().__init__(conv)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for each in self.blocks:
            x = F.conv2d(x, each.weight, each.bias, padding=1).relu()
        return x


class StandardisedByHand(Body):
    """The forward standardises `.weight` of its layers."""

    def __init__(self) -> None:
        super().__init__(conv)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for each in self.blocks:
            weight = each.weight - each.weight.mean((1, 2, 3), keepdim=True)
            x = F.conv2d(x, weight, each.bias, each.stride, each.padding).relu()
        return x


class ReadsAttributes(Body):
    """The forward reads `.stride`, `.kernel_size`, `.padding` and `.weight.dtype` of its layers."""

    def __init__(self) -> None:
        super().__init__(conv)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for each in self.blocks:
            assert each.kernel_size[0] // 2 == each.padding[0]
            x = each(x.to(each.weight.dtype)).relu()[:, :, :: each.stride[0]]
        return x


class WeightPenalty(Body):
    """In training it returns a penalty of its weights beside the output."""

    def forward(self, x: Tensor) -> Any:
        penalty = sum(m.weight.square().sum() for m in self.modules() if isinstance(m, nn.Conv2d))
        return (super().forward(x), penalty) if self.training else super().forward(x)


class IsInstance(nn.Module):
    """The forward runs only what is an nn.Conv2d."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        self.layers = nn.ModuleList(conv() for _ in range(4))
        self.head = nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for each in self.layers:
            if isinstance(each, nn.Conv2d):
                x = each(x).relu()
        return self.head(x.mean((2, 3)))


class ExactType(IsInstance):
    """The forward runs only what is exactly an nn.Conv2d."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for each in self.layers:
            if type(each) is nn.Conv2d:
                x = each(x).relu()
        return self.head(x.mean((2, 3)))


class ByClassName(IsInstance):
    """The forward runs only what has "Conv2d" for its class's name."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for each in self.layers:
            if each.__class__.__name__ == "Conv2d":
                x = each(x).relu()
        return self.head(x.mean((2, 3)))


class ByParameterName(Body):
    """The forward looks parameters up by their names."""

    def __init__(self) -> None:
        super().__init__(conv)

    def features(self, x: Tensor) -> Tensor:
        weights = dict(self.named_parameters())
        x = self.stem(x)
        for i in range(4):
            x = F.conv2d(x, weights[f"blocks.{i}.weight"], weights[f"blocks.{i}.bias"], padding=1).relu()
        return x


# -- fixed numbers


class FixedView(Body):
    """The forward flattens with view(-1, C), which splits a narrower network's images."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)).view(-1, C))


class FixedReshape(nn.Module):
    """A reshape with fixed sizes between convolutions and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        self.convs = nn.Sequential(block(), block())
        self.pool, self.mix, self.head = nn.AdaptiveAvgPool2d(2), nn.Linear(C * 4, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.convs(self.stem(x))).reshape(x.shape[0], C * 4)
        return self.head(self.mix(x).relu())


class ChannelShuffle(Body):
    """Channels are split into groups of a fixed number and shuffled."""

    def features(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        x = self.stem(x).view(n, 2, C // 2, h, w).transpose(1, 2).reshape(n, C, h, w)
        for each in self.blocks:
            x = x + each(x)
        return x


class Split(Body):
    """Channels are halved with chunk, each half goes its way, and they are concatenated."""

    def __init__(self) -> None:
        super().__init__(lambda: nn.Conv2d(C // 2, C // 2, 3, padding=1))

    def features(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, dim=1)
        a, b, c, d = self.blocks
        return torch.cat([b(a(left).relu()), d(c(right).relu())], dim=1)


class FixedChannels(Body):
    """A buffer of one number per channel is multiplied in."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(1, C, 1, 1) + 0.5)

    def features(self, x: Tensor) -> Tensor:
        return super().features(x) * self.scale


class LayerScale(Body):
    """A parameter per channel scales each block."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.ParameterList(nn.Parameter(0.5 * torch.ones(C, 1, 1)) for _ in range(4))

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for gamma, each in zip(self.gamma, self.blocks, strict=True):
            x = x + gamma * each(x)
        return x


class Squeeze(nn.Module):
    """Squeeze and excite."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(bias=False), nn.BatchNorm2d(C)
        self.down, self.up = nn.Conv2d(C, 4, 1), nn.Conv2d(4, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Attention(nn.Module):
    """Attention by heads between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), nn.LayerNorm(C)
        self.attention = nn.MultiheadAttention(C, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        tokens = self.norm(y.flatten(2).transpose(1, 2))
        return self.attention(tokens, tokens, tokens)[0].transpose(1, 2).reshape(y.shape)


# -- hooks and the like


def forward_hook() -> nn.Module:
    """A layer has a forward hook that changes its output."""
    model = Body(conv)
    model.blocks[0].register_forward_hook(_doubled)
    return model


def _doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def _halved(module: nn.Module, args: Any) -> Any:
    return (args[0] / 2,)


def forward_pre_hook() -> nn.Module:
    """A layer has a forward pre-hook that changes its input."""
    model = Body(conv)
    model.blocks[0].register_forward_pre_hook(_halved)
    return model


def backward_hook() -> nn.Module:
    """A layer has a backward hook that clips gradients."""
    model = Body(conv)
    model.blocks[0].register_full_backward_hook(_clipped)
    return model


def _clipped(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return tuple(None if grad is None else grad.clamp(-1, 1) for grad in grad_input)


def state_dict_hook() -> nn.Module:
    """A layer has a hook that renames its keys in state dicts."""
    model = Body(conv)
    model.blocks[0]._register_state_dict_hook(_noted)
    return model


def _noted(module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
    state[prefix + "note"] = torch.zeros(1)


def load_hook() -> nn.Module:
    """A layer has a hook that reads old keys of state dicts."""
    model = Body(conv)
    model.blocks[0].register_load_state_dict_pre_hook(_old_keys)
    return model


def _old_keys(module: nn.Module, state: Any, prefix: str, *rest: Any) -> None:
    if prefix + "kernel" in state:
        state[prefix + "weight"] = state.pop(prefix + "kernel")


def network_hook() -> nn.Module:
    """The network itself and a container have forward hooks."""
    model = Body()
    model.register_forward_hook(_doubled)
    model.blocks[0].register_forward_hook(_doubled)
    return model


def parameter_hook() -> nn.Module:
    """A weight has a hook on its gradient."""
    model = Body(conv)
    model.blocks[0].weight.register_hook(_scaled)
    return model


def _scaled(grad: Tensor) -> Tensor:
    return 0.5 * grad


def replaced_forward() -> nn.Module:
    """The forward of a layer was replaced on the instance."""
    model = Body(conv)
    layer = model.blocks[0]
    layer.forward = partial(_replaced, layer)
    return model


def _replaced(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return 3 * F.conv2d(x, layer.weight, layer.bias, padding=1)


def extra_attributes() -> nn.Module:
    """Layers have attributes of the user's, and the network reads them."""
    model = _Scaled()
    for number, each in enumerate(model.blocks):
        each.gain = 0.5 + number
    return model


class _Scaled(Body):
    def __init__(self) -> None:
        super().__init__(conv)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for each in self.blocks:
            x = x + each.gain * each(x)
        return x


def old_weight_norm() -> nn.Module:
    """The old weight norm, which is a hook."""
    model = Body(conv)
    torch.nn.utils.weight_norm(model.blocks[0])
    return model


def weight_norm() -> nn.Module:
    """Weight norm as a parametrization of every layer."""
    return Body(lambda: parametrizations.weight_norm(conv()))


def spectral_norm() -> nn.Module:
    """Spectral norm as a parametrization of every layer."""
    return Body(lambda: parametrizations.spectral_norm(conv()))


def old_spectral_norm() -> nn.Module:
    """The old spectral norm, which is a hook with buffers."""
    return Body(lambda: torch.nn.utils.spectral_norm(conv()))


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.flip(-1)


def own_parametrization() -> nn.Module:
    """A parametrization of the user's makes filters symmetric."""
    model = Body(conv)
    parametrize.register_parametrization(model.blocks[0], "weight", Symmetric())
    return model


def pruned() -> nn.Module:
    """Layers are pruned with torch.nn.utils.prune."""
    from torch.nn.utils import prune

    model = Body(conv)
    for each in model.blocks:
        prune.l1_unstructured(each, "weight", amount=0.5)
    return model


# -- subclasses and wrappers


class ConvOfMyOwn(nn.Conv2d):
    """A subclass that only sets defaults."""

    def __init__(self) -> None:
        super().__init__(C, C, 3, padding=1)


class ConvSame(nn.Conv2d):
    """A subclass that pads by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class ConvStandardised(nn.Conv2d):
    """A subclass that standardises its weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / (
            self.weight.std((1, 2, 3), keepdim=True) + 1e-5
        )
        return self._conv_forward(x, weight, self.bias)


class ConvMasked(nn.Conv2d):
    """A subclass with a buffer that masks its weight."""

    def __init__(self) -> None:
        super().__init__(C, C, 3, padding=1)
        self.register_buffer("mask", (torch.rand(C, C, 3, 3) > 0.5).float())

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


def plain_subclass() -> nn.Module:
    """Layers are a subclass of nn.Conv2d that only sets defaults."""
    return Body(ConvOfMyOwn)


def padding_subclass() -> nn.Module:
    """Layers are a subclass of nn.Conv2d that pads by itself."""
    return Body(lambda: ConvSame(C, C, 3))


def standardised_subclass() -> nn.Module:
    """Layers are a subclass of nn.Conv2d that standardises its weight."""
    return Body(lambda: ConvStandardised(C, C, 3, padding=1))


def masked_subclass() -> nn.Module:
    """Layers are a subclass of nn.Conv2d that masks its weight."""
    return Body(ConvMasked)


class NormAct(nn.BatchNorm2d):
    """A batch norm with its activation, as timm's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def norm_activation() -> nn.Module:
    """Norms are a subclass of nn.BatchNorm2d that also activates."""
    return Body(lambda: nn.Sequential(conv(bias=False), NormAct(C)))


class FrozenNorm(nn.Module):
    """A batch norm of buffers only."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(C) + 0.5)
        self.register_buffer("bias", torch.rand(C))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None] + self.bias[:, None, None]


def frozen_norm() -> nn.Module:
    """Norms have buffers only, as torchvision's FrozenBatchNorm2d."""
    return Body(lambda: nn.Sequential(conv(), FrozenNorm(), nn.ReLU()))


def data_parallel() -> nn.Module:
    """Wrapped in DataParallel."""
    return nn.DataParallel(Body())


def averaged() -> nn.Module:
    """Wrapped in AveragedModel."""
    return torch.optim.swa_utils.AveragedModel(Body())


def compiled() -> nn.Module:
    """Wrapped by torch.compile."""
    return torch.compile(Body(), backend="eager")  # type: ignore[return-value]


class Wrapper(nn.Module):
    """Normalises images in front of a network."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3])[:, None, None])

    def forward(self, x: Tensor) -> Any:
        return self.model(x - self.mean)


def own_wrapper() -> nn.Module:
    """A wrapper of the user's normalises images."""
    return Wrapper(Body())


def scripted_child() -> nn.Module:
    """A child is scripted by torch.jit."""
    model = Body()
    model.pool = torch.jit.script(nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 1, 1)))
    model.forward = partial(_pooled, model)  # type: ignore[method-assign]
    return model


def _pooled(model: Body, x: Tensor) -> Tensor:
    return model.head(model.pool(model.features(x)).mean((2, 3)))


def scripted_layers() -> nn.Module:
    """Every block is scripted by torch.jit."""
    return Body(lambda: torch.jit.script(block().eval()))


def checkpointed() -> nn.Module:
    """Blocks run under gradient checkpointing."""
    return _Checkpointed()


class _Checkpointed(Body):
    def features(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        x = self.stem(x)
        for each in self.blocks:
            x = checkpoint(each, x, use_reentrant=False)
        return x


# -- types and devices


def half() -> nn.Module:
    """In float16."""
    return Body().half()


def bfloat16() -> nn.Module:
    """In bfloat16."""
    return Body().bfloat16()


class MixedTypes(Body):
    """Half of the layers are float64."""

    def __init__(self) -> None:
        super().__init__(conv)
        for each in list(self.blocks)[2:]:
            each.double()

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for each in self.blocks:
            x = each(x.to(each.weight.dtype)).relu()
        return x.to(self.head.weight.dtype)


class Complex(Body):
    """The layers have complex weights."""

    def __init__(self) -> None:
        super().__init__(lambda: conv(dtype=torch.complex64))

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x).to(torch.complex64)
        for each in self.blocks:
            x = each(x)
        return x.abs()


def on_meta() -> nn.Module:
    """On the meta device."""
    with torch.device("meta"):
        return Body()


def frozen() -> nn.Module:
    """No parameter is trained."""
    return Body().requires_grad_(False)


def partly_frozen() -> nn.Module:
    """Half of the layers are frozen."""
    model = Body()
    model.blocks[:2].requires_grad_(False)
    return model


def channels_last() -> nn.Module:
    """In the memory format channels_last."""
    return Body().to(memory_format=torch.channels_last)


def quantised() -> nn.Module:
    """Linear layers are quantised dynamically."""
    return torch.ao.quantization.quantize_dynamic(Body(), {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-any-return]


def quantisation_aware() -> nn.Module:
    """Prepared for quantisation-aware training: layers hold observers."""
    model = nn.Sequential(
        nn.Conv2d(3, C, 3, padding=1), block(), block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 5)
    )
    model.train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return torch.ao.quantization.prepare_qat(model)  # type: ignore[no-any-return]


class Lazy(nn.Module):
    """Lazy layers that never ran."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.LazyConv2d(C, 3, padding=1)
        self.layers = nn.Sequential(nn.LazyConv2d(C, 3, padding=1), nn.ReLU(), nn.LazyConv2d(C, 3, padding=1))
        self.head = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


def inference_tensors() -> nn.Module:
    """Built in inference mode, so that no parameter can be trained."""
    with torch.inference_mode():
        return Body()


# -- state


class ExtraState(Body):
    """The network has get_extra_state, which is JSON-ready."""

    def get_extra_state(self) -> Any:
        return {"steps": 3}

    def set_extra_state(self, state: Any) -> None:
        self.loaded = state


class TensorExtraState(Body):
    """The network has get_extra_state that gives a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = torch.tensor([3.0])

    def get_extra_state(self) -> Any:
        return self.steps

    def set_extra_state(self, state: Any) -> None:
        self.steps = state


class Lock(Body):
    """The network holds a lock, so it cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return super().forward(x)


class Generator(Body):
    """The network holds an open generator, so it cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = (number for number in range(10**9))


class Cache(Body):
    """The forward keeps what it computed, with its graph."""

    def features(self, x: Tensor) -> Tensor:
        self.kept = super().features(x)
        return self.kept


class Counter(Body):
    """A buffer counts forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def features(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().features(x)


class OwnFold(nn.Module):
    """Has a method `fold` of the user's, which means something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def fold(self, columns: Tensor) -> Tensor:
        return F.fold(columns, (16, 16), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


def own_fold() -> nn.Module:
    """Blocks have a method `fold` of the user's."""
    return Body(OwnFold)


class NamesOfOurs(nn.Module):
    """Has attributes that thriftnet's layers have: weight, groups, penalty_term, no_decay, moved_bytes."""

    no_decay = "yes"

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.width_index = 0
        self.in_channels = "eight"

    def penalty_term(self, weight: float) -> float:
        return weight

    def moved_bytes(self) -> int:
        return 0

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


def names_of_ours() -> nn.Module:
    """Blocks have methods and attributes of the names that thriftnet's layers use."""
    return Body(NamesOfOurs)


class Slots(nn.Module):
    """__slots__, properties and a __getattr__ of its own."""

    __slots__ = ("fast",)

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def __getattr__(self, name: str) -> Any:
        if name == "convolution":
            return self.conv
        return super().__getattr__(name)

    @property
    def channels(self) -> int:
        return self.convolution.out_channels  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x).relu()[:, : self.channels]


def slots() -> nn.Module:
    """Blocks have __slots__, properties and a __getattr__ of their own."""
    return Body(Slots)


def constructor_arguments() -> nn.Module:
    """The network is callable only with a keyword."""
    return _Keyword()


class _Keyword(Body):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


# -- outputs


Heads = namedtuple("Heads", ["classes", "boxes"])


class TwoHeads(Body):
    """Two heads, as a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes = nn.Linear(C, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.features(x).mean((2, 3))
        return self.head(x), self.boxes(x)


class NamedHeads(TwoHeads):
    """Two heads, as a named tuple."""

    def forward(self, x: Tensor) -> Any:
        return Heads(*super().forward(x))


class DictHeads(TwoHeads):
    """Two heads, as an ordered dict."""

    def forward(self, x: Tensor) -> Any:
        classes, boxes = super().forward(x)
        return OrderedDict(classes=classes, boxes=boxes)


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None = None


class DataclassOutput(Body):
    """The output is a dataclass, with None in it."""

    def forward(self, x: Tensor) -> Any:
        return Output(super().forward(x))


class FeaturesToo(Body):
    """The output is a list of the features of every block and the classes."""

    def forward(self, x: Tensor) -> Any:
        found = [self.stem(x)]
        for each in self.blocks:
            found.append(found[-1] + each(found[-1]))
        return [*found, self.head(found[-1].mean((2, 3)))]


class Pyramid(nn.Module):
    """A feature pyramid whose two maps go through one convolutional head; no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, C, 3, padding=1), nn.Conv2d(C, 2 * C, 3, 2, 1)
        self.lateral = nn.ModuleList([nn.Conv2d(C, C, 1), nn.Conv2d(2 * C, C, 1)])
        self.tower = nn.Sequential(block(), block())
        self.classes, self.boxes = nn.Conv2d(C, 5, 3, padding=1), nn.Conv2d(C, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        fine = self.stem(x).relu()
        coarse = self.lateral[1](self.down(fine).relu())
        fine = self.lateral[0](fine) + F.interpolate(coarse, scale_factor=2.0)
        return {str(i): (self.classes(t), self.boxes(t)) for i, t in enumerate(map(self.tower, (fine, coarse)))}


class UNet(nn.Module):
    """Down, up with transposed convolutions, concatenation; one value per pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, C, 3, padding=1),
            nn.Conv2d(C, 2 * C, 3, 2, 1),
            nn.Conv2d(2 * C, 2 * C, 3, padding=1),
        )
        self.up = nn.ConvTranspose2d(2 * C, C, 2, 2)
        self.d, self.out = nn.Conv2d(2 * C, C, 3, padding=1), nn.Conv2d(C, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.a(x).relu()
        low = self.c(self.b(high).relu()).relu()
        return self.out(self.d(torch.cat([high, self.up(low)], 1)).relu())


class Residuals(nn.Module):
    """Stages with strided shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, padding=1, bias=False)
        self.conv1, self.conv2 = nn.Conv2d(C, 2 * C, 3, 2, 1, bias=False), nn.Conv2d(2 * C, 2 * C, 3, 1, 1, bias=False)
        self.norm1, self.norm2, self.short = (
            nn.BatchNorm2d(2 * C),
            nn.BatchNorm2d(2 * C),
            nn.Conv2d(C, 2 * C, 1, 2, bias=False),
        )
        self.head = nn.Linear(2 * C, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())) + self.short(x)
        return self.head(x.relu().mean((2, 3)))


# -- control flow


class DataDependent(Body):
    """Which blocks run depends on the values."""

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for each in self.blocks:
            if x.mean() > -1e9:
                x = x + each(x)
        return x


class NeverRun(Body):
    """A branch never runs, but is trained elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Sequential(block(), block())


class OnlyInTraining(Body):
    """An auxiliary head runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Sequential(block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 5))

    def forward(self, x: Tensor) -> Any:
        x = self.features(x)
        out = self.head(x.mean((2, 3)))
        return (out, self.auxiliary(x)) if self.training else out


class StochasticDepth(Body):
    """Blocks are skipped at random in training."""

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for each in self.blocks:
            keep = (torch.rand(()) < 0.999) if self.training else True
            x = x + each(x) * float(keep)
        return x


class SwallowsErrors(Body):
    """The forward tries a block and goes on without it if it fails."""

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for each in self.blocks:
            try:
                x = x + each(x)
            except Exception:
                continue
        return x


class GetattrPaths(Body):
    """The forward finds its layers by getattr with composed names."""

    def __init__(self) -> None:
        super().__init__(conv, depth=0)
        for i in range(4):
            setattr(self, f"conv_{i}", conv())

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(4):
            x = getattr(self, f"conv_{i}")(x).relu()
        return x


def nested() -> nn.Module:
    """Sequentials nested five deep, with OrderedDict names and dots avoided by underscores."""
    inner: nn.Module = nn.Sequential(OrderedDict(first_conv=conv(), act=nn.ReLU(), second_conv=conv()))
    for _ in range(5):
        inner = nn.Sequential(OrderedDict(inner=inner))
    return nn.Sequential(nn.Conv2d(3, C, 3, padding=1), inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 5))


def bare_layer() -> nn.Module:
    """The network is one convolution."""
    return nn.Conv2d(3, C, 3, padding=1)


def bare_sequential() -> nn.Module:
    """Convolutions only: no norm, no head."""
    return nn.Sequential(nn.Conv2d(3, C, 3), nn.ReLU(), conv(), nn.ReLU(), conv())


def without_parameters() -> nn.Module:
    """No parameters at all."""
    return nn.Sequential(nn.AvgPool2d(2), nn.ReLU())


class ModuleDict(nn.Module):
    """Branches in a ModuleDict, chosen by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        self.branches = nn.ModuleDict({"3x3": block(), "1x1": nn.Conv2d(C, C, 1), "again": block()})
        self.head = nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(sum(branch(x) for branch in self.branches.values()).mean((2, 3)))


# -- other layers


def no_bias() -> nn.Module:
    """No bias anywhere."""
    return Body(lambda: block(bias=False))


def dilated() -> nn.Module:
    """Dilated layers."""
    return Body(lambda: nn.Conv2d(C, C, 3, padding=2, dilation=2))


def reflecting() -> nn.Module:
    """Layers pad by reflection."""
    return Body(lambda: conv(padding_mode="reflect"))


def same_padding() -> nn.Module:
    """Layers with padding="same"."""
    return Body(lambda: nn.Conv2d(C, C, 3, padding="same"))


def grouped() -> nn.Module:
    """Grouped layers."""
    return Body(lambda: conv(groups=2))


def depthwise() -> nn.Module:
    """Depthwise and pointwise layers."""
    return Body(lambda: nn.Sequential(conv(groups=C), nn.BatchNorm2d(C), nn.ReLU6(), nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)))


def multiplying_depthwise() -> nn.Module:
    """Depthwise layers with two filters per channel."""
    return Body(lambda: nn.Sequential(nn.Conv2d(C, 2 * C, 3, padding=1, groups=C), nn.ReLU(), nn.Conv2d(2 * C, C, 1)))


def even_kernels() -> nn.Module:
    """Kernels of 2 x 2 and 4 x 4."""
    return Body(lambda: nn.Sequential(nn.Conv2d(C, C, 4, padding=1), nn.ReLU(), nn.Conv2d(C, C, 2, padding=1)))


def flat_kernels() -> nn.Module:
    """Kernels of 1 x 5 and 5 x 1."""
    return Body(
        lambda: nn.Sequential(nn.Conv2d(C, C, (1, 5), padding=(0, 2)), nn.ReLU(), nn.Conv2d(C, C, (5, 1), padding=(2, 0)))
    )


def transposed() -> nn.Module:
    """Transposed convolutions that keep the size."""
    return Body(lambda: nn.Sequential(nn.ConvTranspose2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU()))


def odd_channels() -> nn.Module:
    """Prime numbers of channels."""
    layers = [nn.Conv2d(13, 13, 3, padding=1) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(3, 13, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(13, 5))


def instance_norms() -> nn.Module:
    """Instance norms."""
    return Body(lambda: nn.Sequential(conv(), nn.InstanceNorm2d(C, affine=True), nn.PReLU(C)))


def group_norms() -> nn.Module:
    """Group norms."""
    return Body(lambda: nn.Sequential(conv(), nn.GroupNorm(4, C), nn.GELU()))


def no_statistics() -> nn.Module:
    """Batch norms without running statistics, and without affine."""
    return Body(lambda: nn.Sequential(conv(), nn.BatchNorm2d(C, affine=False, track_running_stats=False), nn.ReLU()))


def local_response() -> nn.Module:
    """Local response norm and dropout."""
    return Body(lambda: nn.Sequential(conv(), nn.LocalResponseNorm(2), nn.Dropout2d(0.5), nn.ReLU()))


def squeeze_excite() -> nn.Module:
    """Squeeze and excite."""
    return Body(Squeeze)


def attention() -> nn.Module:
    """Attention between convolutions."""
    return Body(Attention)


def batch_of_one_number() -> nn.Module:
    """One class."""
    return Body(classes=1)


# -- inputs besides images


class OneDimensional(nn.Module):
    """1-d convolutions on signals."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, C, 5, padding=2)
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Conv1d(C, C, 3, padding=1), nn.BatchNorm1d(C), nn.ReLU()) for _ in range(3))
        )
        self.head = nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)).mean(2))


def signals() -> Any:
    """1-d convolutions on signals (2, 2, 40)."""
    return OneDimensional(), ((torch.randn(2, 2, 40),), {})


def volumes() -> Any:
    """3-d convolutions on volumes (2, 1, 8, 8, 8)."""
    layers = [nn.Sequential(nn.Conv3d(C, C, 3, padding=1), nn.BatchNorm3d(C), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(nn.Conv3d(1, C, 3, padding=1), *layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(C, 5))
    return model, ((torch.randn(2, 1, 8, 8, 8),), {})


def spectrograms() -> Any:
    """Images of one channel that are not square (2, 1, 20, 33)."""
    model = Body()
    model.stem = nn.Conv2d(1, C, 3, padding=1)
    return model, ((torch.randn(2, 1, 20, 33),), {})


class TwoInputs(Body):
    """An image and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, C)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(self.features(x).mean((2, 3)) + self.embed(vector))


def two_inputs() -> Any:
    """An image and a vector, the vector by name."""
    return TwoInputs(), ((torch.randn(2, 3, 16, 16),), {"vector": torch.randn(2, 6)})


class DictInput(Body):
    """A dict of tensors."""

    def forward(self, batch: Any) -> Tensor:  # type: ignore[override]
        return super().forward(batch["image"]) * batch["weight"][:, None]


def dict_input() -> Any:
    """A dict of tensors goes in."""
    return DictInput(), (({"image": torch.randn(2, 3, 16, 16), "weight": torch.rand(2)},), {})


class ListOfImages(Body):
    """A list of images of several sizes, as detectors read them."""

    def forward(self, images: Any) -> Any:  # type: ignore[override]
        return [super(ListOfImages, self).forward(image[None])[0] for image in images]


def list_of_images() -> Any:
    """A list of images of several sizes goes in."""
    return ListOfImages(), (([torch.randn(3, 16, 16), torch.randn(3, 20, 12)],), {})


class Tokens(nn.Module):
    """Words, embedded, through 1-d convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, C)
        self.layers = nn.Sequential(*(nn.Conv1d(C, C, 3, padding=1) for _ in range(3)))
        self.head = nn.Linear(C, 5)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(words).transpose(1, 2)).mean(2))


def tokens() -> Any:
    """Integers go in."""
    return Tokens(), ((torch.randint(0, 20, (2, 12)),), {})


def perceptron() -> Any:
    """Linear layers only (2, 12)."""
    layers = [nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(nn.Linear(12, 16), *layers, nn.Linear(16, 5)), ((torch.randn(2, 12),), {})


class LongShortTerm(nn.Module):
    """Convolutions in front of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.convs = nn.Conv2d(3, C, 3, padding=1), nn.Sequential(block(), block())
        self.lstm, self.head = nn.LSTM(C, C, batch_first=True), nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.convs(self.stem(x)).mean(2).transpose(1, 2))[0][:, -1])


class FixedSize(Body):
    """Runs on images of 20 x 24 only, and says so nowhere."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2:] == (20, 24)
        return super().forward(x)


def fixed_size() -> Any:
    """Runs on images of 20 x 24 only, and says so nowhere."""
    return FixedSize(), ((torch.randn(2, 3, 20, 24),), {})


class NoMeta(Body):
    """Leaves torch for numpy, so the meta device cannot run it."""

    def features(self, x: Tensor) -> Tensor:
        gain = float(x.detach().cpu().numpy().astype("float64").std())
        return super().features(x) * (1.0 if gain >= 0 else 0.0)


class Transformer(nn.Module):
    """A transformer of torch.nn on patches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


class Ensemble(nn.Module):
    """Two copies of a network, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList([Body(), copy.deepcopy(Body())])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members]).mean(0)


class Siamese(Body):
    """One network on two images: their distance."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return (super().forward(x) - super().forward(y)).square().sum(1)


def siamese() -> Any:
    """One network on two images."""
    return Siamese(), ((torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)), {})


ALL: tuple[Callable[[], Any], ...] = (
    InList, InDict, OnlyInList, BoundMethod, InPartial, InTuple, HiddenFromRegistration,
    UsedTwice, SharedModule, SharedParameter, SharedWithHead, Recurrent, Aliases, Ensemble, siamese,
    Functional, StandardisedByHand, ReadsAttributes, WeightPenalty, IsInstance, ExactType, ByClassName, ByParameterName,
    FixedView, FixedReshape, ChannelShuffle, Split, FixedChannels, LayerScale, squeeze_excite, attention, Transformer,
    forward_hook, forward_pre_hook, backward_hook, state_dict_hook, load_hook, network_hook, parameter_hook,
    replaced_forward, extra_attributes, old_weight_norm, weight_norm, spectral_norm, old_spectral_norm, own_parametrization,
    pruned, plain_subclass, padding_subclass, standardised_subclass, masked_subclass, norm_activation, frozen_norm,
    data_parallel, averaged, compiled, own_wrapper, scripted_child, scripted_layers, checkpointed,
    half, bfloat16, MixedTypes, Complex, on_meta, frozen, partly_frozen, channels_last, quantised, quantisation_aware, Lazy,
    inference_tensors, ExtraState, TensorExtraState, Lock, Generator, Cache, Counter, own_fold, names_of_ours, slots,
    constructor_arguments, TwoHeads, NamedHeads, DictHeads, DataclassOutput, FeaturesToo, Pyramid, UNet, Residuals,
    DataDependent, NeverRun, OnlyInTraining, StochasticDepth, SwallowsErrors, GetattrPaths, nested, bare_layer,
    bare_sequential, without_parameters, ModuleDict, no_bias, dilated, reflecting, same_padding, grouped, depthwise,
    multiplying_depthwise, even_kernels, flat_kernels, transposed, odd_channels, instance_norms, group_norms, no_statistics,
    local_response, batch_of_one_number, signals, volumes, spectrograms, two_inputs, dict_input, list_of_images, tokens,
    perceptron, LongShortTerm, fixed_size, NoMeta,
)  # fmt: skip


def samples() -> list[Sample]:
    """All of them."""
    return [Sample(f"odd:{make.__name__}", partial(_build, make), about=_about(make)) for make in ALL]


def _about(make: Callable[[], Any]) -> str:
    return (make.__doc__ or "").strip().splitlines()[0]


def _build(make: Callable[[], Any]) -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    built = make()
    if isinstance(built, tuple):
        return built
    types = {p.dtype for p in built.parameters() if not nn.parameter.is_lazy(p)} if list(built.parameters()) else set()
    dtype = next(iter(types)) if types in ({torch.float16}, {torch.bfloat16}) else torch.float32
    device = "meta" if any(p.is_meta for p in built.parameters() if not nn.parameter.is_lazy(p)) else "cpu"
    return built, ((torch.randn(2, 3, 16, 16).to(device, dtype),), {})
