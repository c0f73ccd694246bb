"""Networks as they run when training is over: eager as they were trained, folded into plain layers, and packed for a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.measuring import Case, Fact, Ratio, Settings
from benchmarks.networks import forward, settled
from thriftnet.core.fold import fold
from thriftnet.kernels.pack import pack
from thriftnet.models import create_model

TOPIC = "deploy"
NETWORKS = {  # the plain network of CIFAR, and one of each technique that changes what is computed
    "resnet20": "ResNet-20",
    "shiftresnet20": "ShiftResNet-20, expansion 1",
    "shiftresnet20_e9": "ShiftResNet-20, expansion 9",
    "resnet56_single_shared": "ResNet-56 with bases",
    "swrn16_1_2": "SWRN-16-1-2",
}
MANY = 64


def cases(settings: Settings) -> Iterator[Case | Fact]:
    """The topic's cases."""
    if settings.sweep:
        yield from (layer_case(channels) for channels in (16, 32, 64, 128, 256, 512, 1024))
        return
    torch.manual_seed(0)
    for name in list(NETWORKS)[:2] if settings.quick else NETWORKS:
        for batch in (1, 4 if settings.quick else MANY):
            yield forward_case(name, batch)


def forward_case(name: str, batch: int) -> Case:
    """One image, or many."""
    model = settled(create_model(name)).eval()
    images = torch.randn(batch, 3, 32, 32)
    networks = {"eager": model, "folded": fold(model), "packed": pack(model, input_size=(3, 32, 32))}
    variants = {variant: forward(network, images) for variant, network in networks.items()}
    ratios = [Ratio("eager", "folded"), Ratio("eager", "packed")]
    return Case(TOPIC, f"{NETWORKS[name]}, batch {batch}", variants, ratios, 25 if batch == 1 else 9, tolerance=1e-4)


def layer_case(channels: int) -> Case:
    """One 1 x 1 convolution and its activation. What must be read and written at least is the floor."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(channels, channels, 1)
    layer = nn.Sequential(convolution, nn.ReLU()).eval()
    images = torch.randn(1, channels, 14, 14).contiguous(memory_format=torch.channels_last)
    variants = {
        "copies of maps and weight": lambda: (images.clone(), convolution.weight.detach().clone()),
        "torch": forward(layer, images),
        "thriftnet, packed": forward(pack(layer, input_size=(channels, 14, 14)), images),
    }
    ratios = [Ratio(name, "copies of maps and weight") for name in list(variants)[1:]]
    apart = frozenset({"copies of maps and weight"})
    return Case(TOPIC, f"1 x 1 convolution, {channels} channels", variants, ratios, 9, apart, 1e-4, size=channels)
