"""A new classifier for other classes: how a trained network begins to learn another data set."""

from __future__ import annotations

import copy
import dataclasses
import math

from torch import nn

from thriftnet.arguments import Classes, checked
from thriftnet.core.copied import copied
from thriftnet.core.history import history, record
from thriftnet.core.provenance import add_data_facts
from thriftnet.core.sites import ends, replace
from thriftnet.core.width import WidthAware
from thriftnet.errors import IncompatibleModelError


@checked
def replace_head(model: nn.Module, num_classes: Classes, *, inplace: bool = False) -> nn.Module:
    """The network with a new classifier, whose weights are random; all other layers keep theirs.

    Args:
        model: Any network whose last layer is a linear one, or a 1 x 1 convolution without a norm after it; a
            converted one, too.
        num_classes: Outputs of the new classifier.
        inplace: Change ``model`` itself.

    Returns:
        The network; it no longer knows names of classes.

    Raises:
        ConfigError: ``num_classes`` below 1.
        IncompatibleModelError: No classifier is found.

    Example:
        >>> from thriftnet.models import create_model
        >>> replace_head(create_model("resnet20", num_classes=10), 12).fc
        Linear(in_features=64, out_features=12, bias=True)
    """
    model = copied(model, inplace=inplace)
    head = classifier(model)
    replace(model, {id(head): _with_outputs(head, num_classes)})
    if hasattr(model, "num_classes"):
        setattr(model, "num_classes", num_classes)  # noqa: B010  # a Module's attributes are tensors to mypy
    add_data_facts(model, {"class_names": None})
    record(model, {"verb": "replace_head", "num_classes": num_classes})
    return model


def classifier(model: nn.Module) -> nn.Module:
    """The last layer, which gives a number for each class; an `IncompatibleModelError` where none is found."""
    _, head = ends(model)
    if head is None or "weight" not in head._parameters:
        found = "no linear layer or 1 x 1 convolution" if head is None else f"a {type(head).__name__}"
        raise IncompatibleModelError(f"{type(model).__name__} ends in {found}: its classifier cannot be replaced")
    return head


def outputs(model: nn.Module) -> int:
    """Number of classes that a network's classifier tells apart; 0 where none is found."""
    _, head = ends(model)
    weight = None if head is None else head._parameters.get("weight")
    return 0 if weight is None else len(weight)


def note_on(model: nn.Module) -> str:
    """For the user, if the last thing done to the network was `replace_head`; else ""."""
    last = history(model)[-1:]
    if not last or last[0]["verb"] != "replace_head":
        return ""
    return f"a new classifier for {last[0]['num_classes']} classes, with random weights; all other layers keep theirs"


def _with_outputs(head: nn.Module, count: int) -> nn.Module:
    """A layer like ``head``, at the same widths, with another number of outputs, initialised as `nn.Linear`."""
    new, weight = copy.deepcopy(head), head.get_parameter("weight").detach()
    bound = 1 / math.sqrt(weight[0].numel())
    for name, old in head._parameters.items():
        if old is not None:
            setattr(new, name, nn.Parameter(weight.new_empty(count, *old.shape[1:]).uniform_(-bound, bound)))
    setattr(new, "out_features" if weight.ndim == 2 else "out_channels", count)
    if isinstance(new, WidthAware) and new.width_spec is not None:
        new.width_spec = dataclasses.replace(new.width_spec, outs=(count,) * len(new.width_spec.outs))
    return new
