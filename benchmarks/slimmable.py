"""Networks that choose their width, against computing everything and masking, as the authors' dynamic mode does.

The network is DS-Net's supernet with a gate over the sub-networks 0, 4, 9 and 13; decisions are forced, alike in all variants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.masked import MaskedNetwork
from benchmarks.measuring import Case, Fact, Ratio, Settings, Target
from thriftnet.dynamic.network import DynamicNetwork
from thriftnet.models import create_model

TOPIC = "slimmable"
CHOICES = (0, 4, 9, 13)  # sub-networks of 132, 225, 391 and 564 million multiply-accumulates
P5 = Target("P5", "mixed decisions in a batch: masking against grouped", 12.0, "at least")
P5_FAST = Target("P5m", "the same with mallopt", 7.0, "at least")
P5B = Target("P5b", "one image: masking against the smallest", 8.0, "at least")
SPREAD = Target("P5b", "largest against smallest", 2.2, "at least")
GROUPING = Target("P5", "mixed decisions against the mean of its members", 1.05)


def cases(settings: Settings) -> Iterator[Case | Fact]:
    """The topic's cases."""
    if settings.sweep:
        return
    torch.manual_seed(0)
    size, batch = (64, 8) if settings.quick else (224, 64)
    model = create_model("slimmable_mobilenetv1", gate_choices=CHOICES).eval().to(settings.device)
    dynamic = DynamicNetwork(model, input_size=(3, size, size)).eval().to(memory_format=torch.channels_last)
    masking = MaskedNetwork(model).eval()
    images = torch.randn(batch, 3, size, size, device=settings.device)
    yield mixed_case(dynamic, masking, images)
    yield single_case(dynamic, masking, images[:1].clone())
    yield members_case(dynamic, images)


def mixed_case(dynamic: DynamicNetwork, masking: MaskedNetwork, images: Tensor) -> Case:
    """A batch in which every width is chosen equally often."""
    decisions = torch.arange(len(images), device=images.device) % len(CHOICES)
    variants: dict[str, Callable[[], object]] = {
        "masking": without_gradients(partial(masking, images, F.one_hot(decisions, len(CHOICES)).float())),
        "grouped": partial(dynamic.forced, last(images), decisions),
    }
    ratios = [Ratio("masking", "grouped", P5, "no mallopt"), Ratio("masking", "grouped", P5_FAST, "mallopt")]
    return Case(TOPIC, f"mixed decisions, batch {len(images)}", variants, ratios, 5, tolerance=1e-5)


def single_case(dynamic: DynamicNetwork, masking: MaskedNetwork, image: Tensor) -> Case:
    """One image, at the smallest width and at the largest."""
    smallest, largest = (torch.tensor([place], device=image.device) for place in (0, len(CHOICES) - 1))
    variants: dict[str, Callable[[], object]] = {
        "masking": without_gradients(partial(masking, image, F.one_hot(smallest, len(CHOICES)).float())),
        "smallest": partial(dynamic.forced, last(image), smallest),
        "largest": partial(dynamic.forced, last(image), largest),
    }
    ratios = [Ratio("masking", "smallest", P5B), Ratio("largest", "smallest", SPREAD)]
    return Case(TOPIC, "one image", variants, ratios, 25, apart=frozenset({"largest"}), tolerance=1e-5)


def members_case(dynamic: DynamicNetwork, images: Tensor) -> Case:
    """What grouping costs: a mixed batch against a quarter of it at each width by itself."""
    decisions = torch.arange(len(images), device=images.device) % len(CHOICES)
    whole, quarter = last(images), len(images) // len(CHOICES)
    alike = [torch.full((len(images),), place, device=images.device) for place in range(len(CHOICES))]

    def members() -> Tensor:
        """All images at every width: four times the work of a mixed batch on average."""
        return torch.cat([dynamic.forced(whole, each)[:quarter] for each in alike])

    def four_mixed() -> Tensor:
        return torch.cat([dynamic.forced(whole, decisions)[:quarter] for _ in CHOICES])

    variants: dict[str, Callable[[], object]] = {
        "four mixed batches": four_mixed,
        "a batch at each width": members,
        "largest": partial(dynamic.forced, whole, alike[-1]),
        "smallest": partial(dynamic.forced, whole, alike[0]),
    }
    ratios = [Ratio("four mixed batches", "a batch at each width", GROUPING), Ratio("largest", "smallest", SPREAD)]
    return Case(TOPIC, f"grouping, batch {len(images)}", variants, ratios, 5, apart=frozenset(variants))


def last(images: Tensor) -> Tensor:
    """In channels_last."""
    return images.contiguous(memory_format=torch.channels_last)


def without_gradients(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same under `torch.no_grad`."""
    return torch.no_grad()(run)
