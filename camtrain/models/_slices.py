"""A volume as a stack of 2D pictures: the trunk that AxialNet and BodyCAM share, and the way in and out of it.

Every `group` adjacent slices are the colour channels of one picture, which a 2D ResNet reads; the feature maps of all
pictures are put back on top of each other. A cell therefore sees `group` slices and no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Literal

import torch
from monai.networks.nets import ResNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from camtrain._errors import InputError, nearest

Variant = Literal["full", "small"]
IMAGE_SIZE = {"full": 420, "small": 48}


class SliceTrunk(nn.Module):
    """2D ResNet and the custom convolutions of AxialNet: (P, group, h, w) pictures -> (P, K, h', w') maps >= 0.

    `full` is the paper's: torchvision's ResNet-18 (as MONAI builds it, under torchvision's names) up to its last stage,
    then convolutions 512 -> 64 -> 32 -> 16 -> 16 without padding; 420 x 420 becomes 14 x 14, then 6 x 6.
    `small` is for phantoms: two stages of one block (16 and 32 channels), then 32 -> 32 -> 16 with padding; 48 x 48
    becomes 6 x 6.

    Args:
        variant: `"full"` or `"small"`.
        image_size: (h, w) of a picture.
        group: Slices per picture.
        custom_convs: False leaves the convolutions after the ResNet out (ablation "NoCustomConv" of the paper).
        activation_checkpointing: Recompute the stem and the stages in the backward pass instead of storing them.

    Raises:
        InputError: An unknown variant, or pictures so small that no cell is left.
    """

    def __init__(
        self,
        variant: Variant,
        image_size: tuple[int, int],
        group: int = 3,
        custom_convs: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if variant not in IMAGE_SIZE:
            raise InputError(f"variant= expects 'full' or 'small', got {variant!r}{nearest(str(variant), IMAGE_SIZE)}")
        full = variant == "full"
        planes = [64, 128, 256, 512] if full else [16, 32, 8, 8]
        resnet = ResNet(
            block="basic",
            layers=[2, 2, 2, 2] if full else [1, 1, 1, 1],
            block_inplanes=planes,
            spatial_dims=2,
            n_input_channels=group,
            conv1_t_size=7 if full else 3,
            conv1_t_stride=2,
            bias_downsample=False,
            feed_forward=False,
        )
        self.conv1, self.bn1, self.act, self.maxpool = resnet.conv1, resnet.bn1, resnet.act, resnet.maxpool
        self.stages = ("layer1", "layer2", "layer3", "layer4") if full else ("layer1", "layer2")
        for stage in self.stages:
            setattr(self, stage, getattr(resnet, stage))
        widths = [planes[len(self.stages) - 1]]
        if custom_convs:
            widths += [64, 32, 16, 16] if full else [32, 16]
        self.convs = _custom_convs(widths, padding=0 if full else 1)
        self.channels = widths[-1]
        self.activation_checkpointing = activation_checkpointing
        lost = 2 * (len(widths) - 1) if full else 0
        self.cells = _cells(image_size, halvings=1 + len(self.stages), lost=lost, variant=variant)

    def forward(self, pictures: Tensor) -> Tensor:
        """Maps (P, K, h', w') of pictures (P, group, h, w)."""
        maps = self._run("stem", pictures)
        for stage in self.stages:
            maps = self._run(stage, maps)
        activations: Tensor = self.convs(maps)
        return activations

    def _run(self, part: str, maps: Tensor) -> Tensor:
        run = self._stem if part == "stem" else getattr(self, part)
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            computed: Tensor = run(maps)
            return computed
        recomputed: Tensor = checkpoint(run, maps, use_reentrant=False, context_fn=self._checkpoint_contexts)
        return recomputed

    def _stem(self, pictures: Tensor) -> Tensor:
        stem: Tensor = self.maxpool(self.act(self.bn1(self.conv1(pictures))))
        return stem

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _frozen_statistics(self)

    def load_torchvision(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take the weights of torchvision's `resnet18`, whose `fc` is left out.

        Args:
            state_dict: What `torchvision.models.resnet18(...).state_dict()` gives, or its saved file.

        Raises:
            InputError: A key is missing, is one too many, or has another shape.
        """
        own = {k: v for k, v in self.state_dict().items() if not k.startswith("convs.")}
        given = {k: v for k, v in state_dict.items() if not k.startswith("fc.")}
        # Files written before BatchNorm counted its batches lack this entry; it has no influence on the maps.
        own_required = {k for k in own if not k.endswith("num_batches_tracked")}
        wrong = sorted(own_required - given.keys()) or sorted(given.keys() - own.keys())
        wrong = wrong or [k for k in given if given[k].shape != own[k].shape]
        if wrong:
            raise InputError(
                f"expected the state dict of torchvision's resnet18 ({len(own_required)} entries besides fc), "
                f"got one that differs at {wrong[0]!r}: "
                "pass torchvision.models.resnet18(...).state_dict() to the full variant"
            )
        self.load_state_dict({**self.state_dict(), **given})


class StackSlices(nn.Module):
    """Put the maps of single slice groups back into volumes: the layer to tap.

    Args:
        axis: Spatial axis, 0 to 2, on which the slice groups lie.

    Example:
        >>> StackSlices(axis=2)(torch.zeros(2 * 9, 16, 6, 5), groups=9).shape
        torch.Size([2, 16, 6, 5, 9])
    """

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, maps: Tensor, groups: int) -> Tensor:
        """(B * groups, K, h, w) -> (B, K, *S'), with the groups on spatial axis `axis`."""
        return maps.reshape(-1, groups, *maps.shape[1:]).movedim(1, 2 + self.axis)


def pictures_of(image: Tensor, group: int, axis: int, image_size: tuple[int, int]) -> tuple[Tensor, int]:
    """Cut volumes into pictures of `group` adjacent slices.

    Args:
        image: (B, 1, *S), or the authors' (B, N, group, h, w) where `axis` is 0.
        group: Slices per picture.
        axis: Spatial axis along which the slices lie.
        image_size: Expected (h, w): the two other axes in their order.

    Returns:
        (B * N, group, h, w), and N.

    Raises:
        InputError: Another shape.

    Example:
        >>> pictures, groups = pictures_of(torch.zeros(2, 1, 20, 18, 12), group=3, axis=2, image_size=(20, 18))
        >>> pictures.shape, groups
        (torch.Size([8, 3, 20, 18]), 4)
    """
    if image.ndim == 5 and image.shape[1] > 1 and image.shape[2] == group and axis == 0:
        slices = image.flatten(1, 2)
    elif image.ndim == 5 and image.shape[1] == 1:
        slices = image[:, 0].movedim(1 + axis, 1)
    else:
        raise InputError(
            f"expected images of shape (B, 1, *S) with three spatial axes, or (B, N, {group}, h, w) with slice_axis=0, "
            f"got {tuple(image.shape)}: AxialNet and BodyCAM read volumes of one channel"
        )
    if tuple(slices.shape[2:]) != image_size:
        raise InputError(
            f"the net was built for slices of {image_size} voxels, got {tuple(slices.shape[2:])} with slices along "
            f"spatial axis {axis}: set image_size= and slice_axis= to those of the data"
        )
    if slices.shape[1] == 0 or slices.shape[1] % group:
        raise InputError(
            f"expected a number of slices along spatial axis {axis} that divides by group={group}, "
            f"got {slices.shape[1]}: crop or pad the volume"
        )
    return slices.reshape(-1, group, *image_size), slices.shape[1] // group


def _custom_convs(widths: list[int], padding: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Conv2d(inputs, outputs, kernel_size=3, padding=padding), nn.ReLU()]
    return nn.Sequential(*layers)


def _cells(image_size: tuple[int, int], halvings: int, lost: int, variant: str) -> tuple[int, int]:
    """Grid of the maps: every halving rounds up (padded kernels), the unpadded convolutions lose `lost` cells."""
    rows, columns = (-(-n // 2**halvings) - lost for n in image_size)
    if min(rows, columns) < 1:
        least = 2**halvings * lost + 1
        raise InputError(
            f"image_size={image_size} leaves no cell in variant={variant!r}: at least {least} voxels are needed "
            "along both axes; for small volumes take variant='small'"
        )
    return rows, columns


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """The recomputation must not update BatchNorm's running statistics a second time."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # Not track_running_stats=False: the recomputation must save the same tensors as the forward pass did.
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
