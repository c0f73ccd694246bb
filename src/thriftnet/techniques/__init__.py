"""The techniques: one file and one line in `TECHNIQUES` each. Importing the table does not import torch.

Public names, text forms, the laws' cases, the documentation's pages and the demo follow from it.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, Union

from thriftnet.arguments import InputSize, checked
from thriftnet.core import spec
from thriftnet.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from thriftnet.core.plan import Plan
    from thriftnet.core.sites import Select
    from thriftnet.core.technique import Technique

TechniqueLike: TypeAlias = Annotated[
    Union["Technique", str, Mapping[str, Any]], "a technique's config or text, as 'soft-sharing(templates=2)'"
]


class Registry(Mapping[str, "type[Technique]"]):
    """Configs by their text names; the file ``soft_sharing.py`` of ``soft-sharing`` is imported on first use.

    Args:
        public: The public names of each file, its config first.
    """

    def __init__(self, public: dict[str, tuple[str, ...]]) -> None:
        self.public = public

    def __getitem__(self, name: str) -> type[Technique]:
        public = self.public[name]
        config: type[Technique] = getattr(self.module(name), public[0])
        return config

    def __iter__(self) -> Iterator[str]:
        return iter(self.public)

    def __len__(self) -> int:
        return len(self.public)

    def module(self, name: str) -> ModuleType:
        """The technique's file."""
        return importlib.import_module(self.file(name))

    def file(self, name: str) -> str:
        """Dotted name of the technique's file."""
        return f"{__name__}.{name.replace('-', '_')}"


TECHNIQUES = Registry(
    {
        "weight-sharing": ("WeightSharing",),
        "soft-sharing": (
            "SoftSharing",
            "TemplateBank",
            "SConv2d",
            "SLinear",
            "similarity",
            "recurrences",
            "fold_recurrence",
        ),
        "filter-basis": ("FilterBasis", "BasisConv2d", "BasisLinear"),
        "shift": ("Shift", "Shift2d", "ShiftConv2d", "DepthwiseShift2d"),
        "low-rank": ("LowRank", "LowRankConv2d", "LowRankLinear"),
        "slimmable": ("Slimmable",),
    }
)


def resolve(technique: TechniqueLike) -> Technique:
    """A technique's config from its text (``soft-sharing(templates=4)``) or JSON form; a config is returned unchanged.

    A mapping from regular expressions to techniques, or its text, becomes a `thriftnet.core.by_pattern.ByPattern`.

    Raises:
        ConfigError: Unknown technique or field, with close matches, or a value it refuses.
    """
    if isinstance(technique, str) and technique.lstrip().startswith("{"):
        return resolve(spec.parse_mapping(technique))
    if isinstance(technique, str):
        return spec.parse_spec(technique, TECHNIQUES)
    if isinstance(technique, Mapping) and "technique" not in technique:
        from thriftnet.core.by_pattern import ByPattern

        return ByPattern({pattern: None if each is None else resolve(each) for pattern, each in technique.items()})
    if isinstance(technique, Mapping):
        return spec.from_dict(technique, TECHNIQUES)
    if isinstance(technique, type):
        raise ConfigError(f"{technique.__name__} is a class: write {technique.__name__}() for its config")
    if not all(callable(getattr(technique, method, None)) for method in ("accepts", "group", "build")):
        raise ConfigError(
            f"expected a technique's config or text, got {technique!r}. Techniques: {', '.join(sorted(TECHNIQUES))}"
        )
    return technique


@checked
def convert(
    model: nn.Module,
    technique: TechniqueLike | Plan,
    *,
    select: Select | None = None,
    exclude: Select | None = None,
    inplace: bool = False,
    data: Iterable[Any] | None = None,
    input_size: InputSize | None = None,
    example: Any = None,
    progress: Callable[[int, int], object] | None = None,
) -> nn.Module:
    """Make a network small with a technique, starting from the weights it has.

    With ``data``, the new layers are then fitted to the outputs that the old ones give for its first images, and the statistics of batch
    norms are estimated again: the accuracy before any training is far higher.

    The result runs once beside the plain network, at each width and without computing anything (on the meta device): every new layer
    must run where the old one did, and outputs must keep their shapes.

    Args:
        model: Any network; it is left untouched unless ``inplace``.
        technique: A technique's config, its text or JSON form, a mapping from regular expressions on module names to these, or a
            plan made by `plan`.
        select: Which layers: a regular expression on module names, a list of names, or ``(name, module) -> bool``.
            By default, all except stem and classifier; "preset:all" takes these, too, and "preset:later-blocks" leaves out
            the first block of each stage.
        exclude: Which of them to leave alone, in the same forms.
        inplace: Replace the layers in ``model`` itself; if the conversion is refused, it is as before.
        data: Batches of images as the network sees them, or tuples that begin with them. Labels are not needed, and at most 1,024
            images are read.
        input_size: Channels, height and width of an image. Default: what the network states, or one that it runs on.
        example: What the network reads, if not images: a tensor, a tuple of arguments, or a dict of arguments by name.
        progress: Called with the groups of layers that are fitted, and their number.

    Returns:
        The converted network.

    Raises:
        ConfigError: ``select`` matches nothing, or names a layer that does not exist; or the network does not run on the given input.
        DataError: ``data`` has no images, some that the network does not run on, or for which it computes NaN.
        IncompatibleModelError: A listed layer that the technique cannot replace, nothing to convert, or a result that does not run as
            the plain network does.

    Example:
        >>> import thriftnet as tn
        >>> model = tn.create_model("resnet20")
        >>> shared = tn.convert(model, "soft-sharing(templates=2)", select="layer3")
    """
    from thriftnet.core import convert as core
    from thriftnet.core.batches import first_images
    from thriftnet.core.fit import IMAGES
    from thriftnet.core.plan import Plan
    from thriftnet.core.sites import without

    select = without(model, select, exclude)
    images = None if data is None else first_images(data, IMAGES, "a fit")
    common: Any = {"input_size": input_size, "example": example, "progress": progress}
    if isinstance(technique, Plan):
        planned = dataclasses.replace(technique, technique=resolve(technique.technique), then=None)
        converted = core.convert(model, planned, select=select, inplace=inplace, images=images, **common)
        if technique.then is None:
            return converted
        return convert(converted, technique.then, inplace=True, data=None if images is None else [images], **common)
    return core.convert(model, resolve(technique), select=select, inplace=inplace, images=images, **common)
