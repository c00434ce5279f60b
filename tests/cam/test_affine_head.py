"""The proof that a head is affine: what it accepts, what it refuses, and that its weights are the gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from camtrain.cam import affine_head as module
from camtrain.cam.affine_head import affine_head, slopes
from camtrain.cam.engine import attention_maps

B, K, L = 2, 4, 3
GRIDS = {1: (5,), 2: (5, 6), 3: (5, 6, 7)}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOL = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


def acts(grid, dtype=torch.float64, batch=B, channels=K):
    torch.manual_seed(0)
    return torch.randn(batch, channels, *grid, dtype=dtype).requires_grad_()


class PerSlice(nn.Module):
    """One linear layer per slice (a convolution as large as the slice), then the mean over slices: AxialNet."""

    def __init__(self, rank, labels=L):
        super().__init__()
        grid = GRIDS[rank]
        self.fc = CONV[rank](K, labels, kernel_size=(1, *grid[1:]))

    def forward(self, activations):
        scores = self.fc(activations)  # (B, L, N, 1, ...)
        return scores.flatten(2).mean(dim=2)


class GlobalMean(nn.Module):
    def __init__(self, keepdim, bias=True):
        super().__init__()
        self.keepdim, self.fc = keepdim, nn.Linear(K, L, bias=bias)

    def forward(self, activations):
        pooled = activations.mean(dim=tuple(range(2, activations.ndim)), keepdim=self.keepdim)
        return self.fc(pooled.flatten(1))


class NegativeAxes(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(K, L)

    def forward(self, activations):
        for _ in range(activations.ndim - 2):
            activations = activations.mean(dim=-1)
        return self.fc(activations)


class Bottleneck(nn.Module):
    """A strided and padded convolution, whose border cells no kernel position reaches, before the flatten."""

    def __init__(self, rank):
        super().__init__()
        self.conv = CONV[rank](K, 6, kernel_size=2, stride=3, padding=1, dilation=2, groups=2)
        probe = self.conv(torch.zeros(1, K, *GRIDS[rank]))
        self.fc = nn.Linear(probe[0].numel(), L)

    def forward(self, activations):
        return self.fc(self.conv(activations).flatten(1))


def heads(rank):
    grid = GRIDS[rank]
    size = K * torch.Size(grid).numel()
    return {
        "pool": nn.Sequential(POOL[rank](1), nn.Flatten(), nn.Linear(K, L)),
        "flatten": nn.Sequential(nn.Flatten(), nn.Linear(size, L)),
        "flatten without bias": nn.Sequential(nn.Flatten(), nn.Linear(size, L, bias=False)),
        "two linears": nn.Sequential(nn.Flatten(), nn.Linear(size, 6), nn.Linear(6, L)),
        "pool, dropout": nn.Sequential(POOL[rank](1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(K, L)).eval(),
        "per slice": PerSlice(rank),
        "global mean": GlobalMean(keepdim=False),
        "global mean kept": GlobalMean(keepdim=True),
        "global mean without bias": GlobalMean(keepdim=False, bias=False),
        "mean axis by axis": NegativeAxes(),
        "convolution": Bottleneck(rank),
    }


CASES = [(rank, name) for rank in (1, 2, 3) for name in heads(2) if (rank, name) != (1, "pool")]


@pytest.mark.parametrize(("rank", "name"), CASES)
def test_weights_are_the_gradient_of_every_sample(rank, name):
    head, activations = heads(rank)[name].double(), acts(GRIDS[rank])
    logits = head(activations)
    weights = affine_head(logits, activations)
    assert weights is not None, "not proved"
    for label in range(L):
        (gradient,) = torch.autograd.grad(logits[:, label].sum(), activations, retain_graph=True)
        assert gradient.abs().max() > 0
        torch.testing.assert_close(weights[label].expand_as(gradient), gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("rank", "name"), CASES)
def test_weights_are_differentiable_with_respect_to_the_parameters(rank, name):
    """d (loss on the gradient) / d parameter, through the closed form and through double backward."""
    head, activations = heads(rank)[name].double(), acts(GRIDS[rank])
    logits = head(activations)
    weights = affine_head(logits, activations)
    parameters = [p for p in head.parameters() if p.ndim > 1]
    direct = torch.autograd.grad((weights.expand(L, *activations.shape[1:]) ** 3).sum(), parameters, retain_graph=True)
    rows = [torch.autograd.grad(logits[0, label], activations, create_graph=True)[0][0] for label in range(L)]
    twice = torch.autograd.grad((torch.stack(rows) ** 3).sum(), parameters)
    for a, b in zip(direct, twice, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("name", ["pool", "flatten", "per slice", "two linears"])
def test_gradcheck_of_the_closed_form(name):
    head, activations = heads(2)[name].double(), acts(GRIDS[2], batch=1)
    shapes = dict(head.named_parameters())

    def hires(*values):
        logits = torch.func.functional_call(head, dict(zip(shapes, values, strict=True)), (activations,))
        return (affine_head(logits, activations) * activations).sum(dim=(1, 2))

    values = tuple(p.detach().clone().requires_grad_() for p in shapes.values())
    assert gradcheck(hires, values, fast_mode=True)
    assert gradgradcheck(hires, values, fast_mode=True)


def test_pooling_gives_one_weight_per_channel():
    activations = acts((5, 6, 7))
    head = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(K, L)).double()
    assert affine_head(head(activations), activations).shape == (L, K, 1, 1, 1)


def test_a_frozen_head_is_proved_too():
    activations = acts((5, 6))
    head = heads(2)["flatten"].double().requires_grad_(False)
    weights = affine_head(head(activations), activations)
    torch.testing.assert_close(weights.flatten(1), head[1].weight)
    assert not weights.requires_grad


def test_activations_inside_a_graph():
    torch.manual_seed(0)
    conv, head = nn.Conv2d(1, K, 3), nn.Linear(K, L)
    activations = conv(torch.rand(B, 1, 6, 7))
    weights = affine_head(head(activations.clone().mean(dim=(2, 3))), activations)
    torch.testing.assert_close(weights[:, :, 0, 0], head.weight / 20)


def test_autocast_reads_bf16_weights_and_computes_in_float32():
    activations = acts((5, 6), dtype=torch.float32)
    head = heads(2)["two linears"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(activations)
    assert logits.dtype == torch.bfloat16
    weights = affine_head(logits, activations)
    assert weights.dtype == torch.float32
    exact = head[2].weight.bfloat16().float() @ head[1].weight.bfloat16().float()
    torch.testing.assert_close(weights.flatten(1), exact)
    weights.sum().backward()
    assert head[1].weight.grad is not None


@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    labels=st.integers(1, 4),
    grid=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    pool=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_also_where_sizes_coincide(batch, channels, labels, grid, pool):
    activations = acts(tuple(grid), batch=batch, channels=channels)
    features = activations.mean(dim=tuple(range(2, activations.ndim))) if pool else activations.flatten(1)
    head = nn.Linear(features.shape[1], labels).double()
    logits = head(features)
    weights = affine_head(logits, activations)
    assert weights is not None
    assert weights.ndim == activations.ndim
    contributions = (weights * activations[:, None]).flatten(2)
    torch.testing.assert_close(contributions.sum(dim=2) + head.bias, logits)


# Numbers that were drawn --------------------------------------------------------------------------------------------


def drawn(draw, head, A):
    """An active dropout at three places, as a product (CPU) or as the one operator that a GPU takes."""
    pooled = head[0](draw(A).mean(dim=(2, 3))) * 2
    return draw(head[1](draw(pooled)))


DRAWS = {
    "product": lambda x: F.dropout(x, 0.4, training=True),
    "one operator": lambda x: torch.native_dropout(x, 0.4, True)[0],
    "whole channels": lambda x: F.dropout2d(x, 0.4, training=True) if x.ndim == 4 else x,
    "everything dropped": lambda x: torch.native_dropout(x, 1.0, True)[0],
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("method", ["hirescam", "gradcam", "layercam"])
def test_an_active_dropout_has_slopes_of_its_own_for_every_sample(name, method, monkeypatch):
    """Maps, and what a loss on them teaches the head, are those of double backward with the same drawn numbers."""
    activations = acts((3, 5), batch=4)
    head = nn.Sequential(nn.Linear(K, 5), nn.Linear(5, L)).double()
    logits = drawn(DRAWS[name], head, activations)
    found = slopes(logits, activations)
    assert found.shape[:3] == (1 if name == "whole channels" and found.shape[0] == 1 else 4, L, K)
    for label in range(L):
        (gradient,) = torch.autograd.grad(logits[:, label].sum(), activations, retain_graph=True)
        torch.testing.assert_close(found[:, label].expand_as(gradient), gradient, rtol=1e-10, atol=1e-14)
    results = []
    for closed in (True, False):
        if not closed:
            monkeypatch.setattr("camtrain.cam.engine.slopes", lambda *_: None)
        for labels in (None, [2, 0], torch.tensor([[0], [1], [2], [0]])):
            maps = attention_maps(activations, logits, method, labels)
            loss = F.softplus(maps * 9).sum()
            results.append(
                (
                    maps,
                    *torch.autograd.grad(loss, [activations, *head.parameters()], retain_graph=True, allow_unused=True),
                )
            )
    for mine, theirs in zip(results[:3], results[3:], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert (a is None) == (b is None) or not torch.any(b if a is None else a)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


def test_slopes_of_every_sample_are_not_written_out_where_they_are_too_many(monkeypatch):
    activations = acts((3, 5))
    head = nn.Linear(15 * K, L).double()
    logits = head(F.dropout(activations, 0.4, training=True).flatten(1))
    assert slopes(logits, activations).shape == (B, L, K, 3, 5)
    monkeypatch.setattr(module, "_MOST", B * L * K * 15 - 1)
    assert slopes(logits, activations) is None


# What must not be proved ---------------------------------------------------------------------------------------------


class Refused:
    """Heads that are not affine in the activations, or treat a sample not by itself."""

    fc = nn.Linear(K, L).double()
    square = nn.Linear(K, K, bias=False).double()
    mixer = nn.Parameter(torch.rand(K, K, dtype=torch.float64))

    @classmethod
    def relu_after(cls, A):
        return cls.fc(A.relu().mean(dim=(2, 3)))

    @classmethod
    def relu_behind_the_pool(cls, A):
        return cls.fc(A.mean(dim=(2, 3)).relu())

    @classmethod
    def sigmoid_on_top(cls, A):
        return cls.fc(A.mean(dim=(2, 3))).sigmoid()

    @classmethod
    def max_pool(cls, A):
        return cls.fc(A.amax(dim=(2, 3)))

    @classmethod
    def active_dropout(cls, A):
        return cls.fc(F.dropout(A.mean(dim=(2, 3)), 0.5, training=True))

    @classmethod
    def two_branches(cls, A):
        return cls.fc(A.mean(dim=(2, 3))) + cls.fc(A[:, :, 0, 0])

    @classmethod
    def batch_mean_removed(cls, A):
        return cls.fc((A - A.mean(0)).mean(dim=(2, 3)))

    @classmethod
    def batch_mean(cls, A):
        return cls.fc(A.mean(dim=(0, 2, 3), keepdim=True).flatten(1).expand(len(A), -1))

    @classmethod
    def batch_and_channels_swapped(cls, A):
        return cls.fc(A.transpose(0, 1).mean(dim=(2, 3)))

    @classmethod
    def batch_mixed_by_a_matrix(cls, A):
        return torch.mm(cls.mixer, A.mean(dim=(2, 3)))

    @classmethod
    def batch_mixed_by_a_matrix_with_bias(cls, A):
        return torch.addmm(torch.zeros(K, dtype=torch.float64), cls.mixer, A.mean(dim=(2, 3)))

    @classmethod
    def gated_by_itself(cls, A):
        return cls.fc((A * A.mean(dim=(2, 3), keepdim=True)).mean(dim=(2, 3)))

    @classmethod
    def weights_made_of_the_activations(cls, A):
        return A.mean(dim=(2, 3)) @ A.mean(dim=(0, 2, 3)).expand(K, K)

    @classmethod
    def convolution_with_the_activations_as_kernel(cls, A):
        return F.conv2d(torch.ones(len(A), K, *A.shape[2:], dtype=A.dtype), A).flatten(1)

    @classmethod
    def train_mode_batch_norm(cls, A):
        return cls.fc(F.batch_norm(A, None, None, training=True).mean(dim=(2, 3)))

    @classmethod
    def logits_without_batch(cls, A):
        return cls.fc(A.mean(dim=(2, 3)))[0]


@pytest.mark.parametrize(
    "name", [n for n in vars(Refused) if callable(getattr(Refused, n)) and n[0] != "_" and n not in ("fc", "square")]
)
def test_refused(name):
    activations = acts((3, 5), batch=K)  # B == K, so that no refusal rests on a shape that happens to differ
    assert affine_head(getattr(Refused, name)(activations), activations) is None


def test_a_reshape_across_samples_is_refused():
    activations = acts((3, 5))
    mixed = activations.reshape(K, B, 3, 5).mean(dim=(2, 3)).reshape(B, K)
    assert affine_head(Refused.fc(mixed), activations) is None


def test_logits_of_another_tensor_are_refused():
    a, b = acts((3, 5)), acts((3, 5))
    assert affine_head(Refused.fc(a.mean(dim=(2, 3))), b) is None
    assert affine_head(torch.rand(B, L), a) is None


def test_the_other_half_of_a_split_is_refused():
    activations = acts((3, 5), channels=2 * K)
    first, second = (activations * 1).chunk(2, dim=1)
    assert affine_head(Refused.fc(first.mean(dim=(2, 3))), first) is not None
    assert affine_head(Refused.fc(second.mean(dim=(2, 3))), first) is None
