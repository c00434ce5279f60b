"""The gradient family of class activation maps as pure functions.

Every function takes what a layer gave and how a score depends on it, and returns one signed map per sample. Nothing
is rectified, normalised or enlarged here; only the ReLUs inside a formula are kept. All of them are rank-free (1D, 2D,
3D) and can be differentiated twice, which is what a loss on maps needs.

Symbols: A activations (B, K, *S), G = d score / d A of the same shape, Z number of positions, sums over positions
written <.>.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Below this share of sum |A|, a channel's signed sum no longer says how active the channel is (Respond-CAM).
SIGNED_SUM_FLOOR = 1e-3


def _space(activations: Tensor) -> tuple[int, ...]:
    return tuple(range(2, activations.ndim))


def weighted(weights: Tensor, activations: Tensor) -> Tensor:
    """Sum over channels of weight x activation.

    Args:
        weights: (B, K).
        activations: (B, K, *S).

    Returns:
        (B, *S).
    """
    shape = (activations.shape[0], *activations.shape[2:])
    return torch.einsum("bk,bks->bs", weights, activations.flatten(2)).reshape(shape)


def hires_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """HiResCAM: sum over channels of G * A, element by element.

    For a head that is one fully connected layer on the flattened activations, sum(map) + bias = score (Draelos and
    Carin, arXiv:2011.08891): the map is an exact account of the score, cell by cell.

    Args:
        activations: (B, K, *S).
        gradients: (B, K, *S).

    Returns:
        (B, *S), signed.

    Example:
        >>> A = torch.tensor([[[1.0, 2.0], [0.0, 3.0]]])  # one sample, two channels, two positions
        >>> G = torch.tensor([[[0.5, -1.0], [2.0, 1.0]]])
        >>> hires_cam(A, G)
        tensor([[0.5000, 1.0000]])
    """
    return (activations * gradients).sum(dim=1)


def grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM before its final ReLU: sum over channels of mean(G) * A (Selvaraju et al. 2017, eq. 1 and 2).

    Args:
        activations: (B, K, *S).
        gradients: (B, K, *S).

    Returns:
        (B, *S), signed. For a pool + FC head this is CAM divided by the number of positions.

    Example:
        >>> A = torch.tensor([[[1.0, 2.0], [0.0, 3.0]]])
        >>> G = torch.tensor([[[0.5, -1.0], [2.0, 1.0]]])
        >>> grad_cam(A, G)
        tensor([[-0.2500,  4.0000]])
    """
    return weighted(grad_cam_weights(activations, gradients), activations)


def grad_cam_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """Neuron importance of Grad-CAM: the mean gradient of each channel, (B, K) (Selvaraju et al. 2017, eq. 1)."""
    return gradients.mean(dim=_space(activations))


def counterfactual(activations: Tensor, gradients: Tensor) -> Tensor:
    """Counterfactual map before its final ReLU: Grad-CAM with the gradient's sign turned (Selvaraju et al. 2017, 3.3).

    Where it is positive, removing what the cells show would raise the score. The positive part of Grad-CAM minus that
    of this map is the signed Grad-CAM.

    Args:
        activations: (B, K, *S).
        gradients: (B, K, *S).

    Returns:
        (B, *S), signed.
    """
    return -grad_cam(activations, gradients)


def counterfactual_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """Minus the mean gradient of each channel, (B, K)."""
    return -grad_cam_weights(activations, gradients)


def grad_cam_pp(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM++ before its final ReLU (Chattopadhay et al. 2018, eq. 19, with the exponential as outer function).

    The paper's alpha = G^2 / (2 G^2 + <A> G^3) is 1 / (2 + <A> G) wherever G != 0, and ReLU(G) removes the rest, so
    no power of a small gradient is ever formed.

    Args:
        activations: (B, K, *S).
        gradients: (B, K, *S).

    Returns:
        (B, *S), signed only where activations are.
    """
    return weighted(grad_cam_pp_weights(activations, gradients), activations)


def grad_cam_pp_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """Channel weights of Grad-CAM++, (B, K)."""
    positive = gradients.clamp(min=0)
    total = activations.sum(dim=_space(activations), keepdim=True)
    denominator = 2 + total * positive
    # Only a signed layer can bring the denominator near zero; there the paper's formula has a pole.
    tiny = torch.finfo(denominator.dtype).eps
    denominator = torch.where(denominator.abs() < tiny, torch.full_like(denominator, tiny), denominator)
    return (positive / denominator).sum(dim=_space(activations))


def layer_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """LayerCAM before its final ReLU: sum over channels of ReLU(G) * A (Jiang et al. 2021, eq. 5 and 6).

    Args:
        activations: (B, K, *S).
        gradients: (B, K, *S).

    Returns:
        (B, *S), signed only where activations are.
    """
    return (activations * gradients.clamp(min=0)).sum(dim=1)


def respond_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Respond-CAM: channel weight <A G> / <A>, no ReLU (Zhao et al. 2018, eq. 3 and 4).

    sum(map) equals sum(HiResCAM) over the channels that respond at all. A channel without activation gets weight 0. On
    a signed layer <A> can vanish although the channel is active; the denominator is then held at a thousandth of
    <|A|>, so that one channel cannot drown the map.

    Args:
        activations: (B, K, *S); meant for layers whose output is non-negative.
        gradients: (B, K, *S).

    Returns:
        (B, *S), signed.
    """
    return weighted(respond_cam_weights(activations, gradients), activations)


def respond_cam_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """Channel weights of Respond-CAM, <A G> / <A>, with the denominator held away from 0, (B, K)."""
    space = _space(activations)
    total = activations.sum(dim=space)
    floor = SIGNED_SUM_FLOOR * activations.abs().sum(dim=space)
    dead = floor == 0
    sign = torch.where(total < 0, -torch.ones_like(total), torch.ones_like(total))
    denominator = sign * torch.maximum(total.abs(), floor)
    numerator = (activations * gradients).sum(dim=space)
    # A dead channel is divided by 1, not by 0: its weight is then exactly 0, and so is its gradient.
    return numerator / torch.where(dead, torch.ones_like(total), denominator)


def xgrad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """XGrad-CAM before its final ReLU: the weight of Respond-CAM, found again by axioms (Fu et al. 2020, eq. 8).

    Args:
        activations: (B, K, *S).
        gradients: (B, K, *S).

    Returns:
        (B, *S), signed.
    """
    return respond_cam(activations, gradients)


def cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """CAM: the weights of the one FC layer after global average pooling, times the activations (Zhou et al. 2016).

    Behind a pool + FC head the gradient is weight / Z everywhere, so the classical weight is Z times the gradient at
    any position. The engine refuses this method for every other head.

    Args:
        activations: (B, K, *S).
        gradients: (B, K, *S), constant over positions.

    Returns:
        (B, *S), signed; mean(map) + bias = score.
    """
    return weighted(cam_weights(activations, gradients), activations)


def cam_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """The weights of the FC layer behind the pool, (B, K)."""
    return gradients.flatten(2)[..., 0] * activations[0, 0].numel()
