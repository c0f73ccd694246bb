"""Wide ResNets with soft sharing: per stage, the convolutions of all blocks but the first mix one bank of templates.

Source: Savarese & Maire, Learning Implicitly Recurrent CNNs Through Parameter Sharing, ICLR 2019, section 4.
"""

from __future__ import annotations

from thriftnet.arguments import Classes, Depth, Factor, ImageChannels, Templates, checked
from thriftnet.core.sites import replace, sites
from thriftnet.core.technique import Technique
from thriftnet.models.wrn import WideResNet
from thriftnet.techniques.soft_sharing import SoftSharing


@checked
def swrn(
    depth: Depth = 28, width: Factor = 10, templates: Templates = 6, num_classes: Classes = 10, in_chans: ImageChannels = 3
) -> WideResNet:
    """A wide ResNet whose stages each share a bank of templates, depth 6n + 4, for 32 x 32 images.

    The first block of a stage changes the shape and keeps its own weights, so that depth 10 shares nothing. Stages have
    2n - 2 sharing layers; with more templates than that nothing is saved.

    Args:
        depth: Layers: 10, 16, 22, 28, 40, ...
        width: Factor of the channels 16, 32, 64.
        templates: Templates per bank.
        num_classes, in_chans: Outputs, and channels of the image.

    Shape: (N, in_chans, H, W) -> (N, num_classes).

    Raises:
        ConfigError: An impossible depth, width or number of templates.

    Source: Savarese & Maire, section 4.1. Templates start as Kaiming's, coefficients of a stage orthogonal.
    """
    technique: Technique = SoftSharing(templates=templates, init="random", pointwise=False, linear=False)
    model = WideResNet(depth, width, num_classes, in_chans)
    for stage in (model.layer1, model.layer2, model.layer3):
        # the group is the paper's, whatever the number of templates: SoftSharing.group would leave small stages alone
        group = sites(stage[1:], lambda _, module: technique.accepts(module))
        if group:
            replace(stage, {id(old): new for old, new in technique.build(group)})
    return model
