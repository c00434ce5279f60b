"""Score-CAM against a loop written from the paper; what it costs; what it refuses."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import camtrain as ct
from camtrain.cam.score_cam import ScoreCAMOptions, masked, unit_masks

B, K, L = 3, 7, 4
SIZES = {1: (11,), 2: (11, 8), 3: (7, 10, 8)}
MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


class Net(nn.Module):
    """Two convolutions with a stride, a hidden layer behind the pool; counts what it is given."""

    def __init__(self, rank=3, channels=K):
        super().__init__()
        torch.manual_seed(rank)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        self.one, self.two = conv(2, 5, 3, padding=1), conv(5, channels, 3, stride=2, padding=1)
        self.norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](channels)
        nn.init.uniform_(self.norm.running_mean, -0.2, 0.2)
        self.act, self.hidden, self.fc = nn.ReLU(inplace=True), nn.Linear(channels, 6), nn.Linear(6, L)
        self.seen = []

    def forward(self, image):
        self.seen.append(len(image))
        features = self.act(self.norm(self.two(self.one(image).relu())))
        return 20 * self.fc(torch.tanh(self.hidden(features.flatten(2).mean(dim=2))))


def image(rank=3, batch=B):
    torch.manual_seed(9)
    return torch.rand(batch, 2, *SIZES[rank])


def reference(model, x, layer, background=0.0, keep=None):
    """Sample by sample, channel by channel, label by label, with the base score that cancels."""
    kept = []
    handle = dict(model.named_modules())[layer].register_forward_hook(lambda *a: kept.append(a[2].detach().clone()))
    model(x)
    handle.remove()
    activations, rank = kept[0], x.ndim - 2
    result = torch.zeros(len(x), L, *activations.shape[2:], dtype=x.dtype)
    for b in range(len(x)):
        base = model(torch.full_like(x[b : b + 1], background))[0].detach()
        increase, used = [], []
        for k in range(activations.shape[1]):
            a = activations[b, k]
            if a.max() == a.min() or (keep is not None and k not in keep[b]):
                continue
            up = nn.functional.interpolate(a[None, None], x.shape[2:], mode=MODES[rank], align_corners=False)
            mask = (up - up.min()) / (up.max() - up.min())
            increase.append(model(background + mask * (x[b : b + 1] - background))[0].detach() - base)
            used.append(k)
        if used:
            weights = torch.stack(increase).softmax(dim=0)
            for label in range(L):
                result[b, label] = sum(w * activations[b, k] for w, k in zip(weights[:, label], used, strict=True))
    return result


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("background", [0.0, -0.7])
def test_equals_the_loop(rank, background):
    model, x = Net(rank).double().eval(), image(rank).double()
    for layer in ("norm", "one"):
        maps = ct.explain(model, x, "scorecam", layer, background=background)
        assert maps.dtype == torch.float64
        torch.testing.assert_close(maps, reference(model, x, layer, background), rtol=1e-10, atol=1e-12)
        if layer == "norm":
            assert (maps < 0).any(), "no outer ReLU"


def test_the_weights_are_positive_and_sum_to_one():
    """The channels of a net whose features are one-hot in space can be read off its map."""
    model, x = Net(2).eval(), image(2)
    ones = ct.explain(model, x, "scorecam", "two")
    with torch.no_grad():
        model.two.bias += 3.0  # every channel + 3: so is every map
        model.norm.running_mean += 3.0
    torch.testing.assert_close(ct.explain(model, x, "scorecam", "two"), ones + 3, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_chunks_do_not_matter_and_bound_the_forward(chunk):
    model, x = Net().double().eval(), image().double()
    expected = ct.explain(model, x, "scorecam", "norm", chunk=5)
    model.seen.clear()
    maps = ct.explain(model, x, "scorecam", "norm", chunk=chunk)
    torch.testing.assert_close(maps, expected, rtol=1e-10, atol=1e-12)
    first, *masks = model.seen
    assert first == B
    assert max(masks) <= chunk
    assert sum(masks) == B * K
    assert len(masks) == -(-B * K // chunk)


def test_labels_cost_nothing():
    model, x = Net().eval(), image()
    ct.explain(model, x, "scorecam", "act", labels=[0])
    one = list(model.seen)
    model.seen.clear()
    ct.explain(model, x, "scorecam", "act")
    assert model.seen == one
    model.seen.clear()
    assert ct.explain(model, x, "scorecam", "act", labels=[]).shape == (B, 0, 4, 5, 4)
    none = ct.explain(model, x, "scorecam", "act", labels=torch.zeros(B, L).bool())
    assert none.shape == (B, L, 4, 5, 4)
    assert none.isnan().all()
    assert model.seen == [B, B], "where nothing is asked, no mask is tried"


def test_no_tensor_of_all_masks():
    """Nothing of B x K images, nor of B x K masks, is ever made: sizes of all results of operators are watched."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    Watch.largest = max(Watch.largest, tensor.numel())
            return out

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(1, 64, 5, stride=4), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, L)).eval()
    x = torch.rand(2, 1, 20, 24, 16)
    with Watch():
        ct.explain(model, x, "scorecam", "0", chunk=3)
    assert 3 * x[0].numel() <= Watch.largest < 4 * x[0].numel()


# channels ------------------------------------------------------------------------------------------------------------


def test_top_channels_by_standard_deviation():
    model, x = Net().double().eval(), image().double()
    with torch.no_grad():
        model.two.weight *= torch.tensor([0.1, 9, 1, 4, 0.5, 2, 3]).reshape(-1, 1, 1, 1, 1)
        features = model.two(model.one(x).relu())
    keep = features.flatten(2).std(dim=2).topk(3, dim=1).indices.tolist()
    maps = ct.explain(model, x, "scorecam", "two", channels=3)
    torch.testing.assert_close(maps, reference(model, x, "two", keep=keep), rtol=1e-10, atol=1e-12)
    model.seen.clear()
    ct.explain(model, x, "scorecam", "two", channels=3, chunk=4)
    assert sum(model.seen) == B + 3 * B
    full = ct.explain(model, x, "scorecam", "two")
    for many in (K, K + 5):
        torch.testing.assert_close(ct.explain(model, x, "scorecam", "two", channels=many), full)


class Planted(nn.Module):
    """Its layer returns what it is told; the logits read the image's two halves."""

    def __init__(self, features):
        super().__init__()
        self.layer, self.features = nn.Identity(), features

    def forward(self, image):
        features = self.features if self.features is not None else image
        kept = self.layer(features[: len(image)] + 0 * image.sum())
        half = image.flatten(2).chunk(2, dim=2)
        return torch.stack([h.sum(dim=(1, 2)) for h in half], dim=1) + 0 * kept.sum()


def test_a_channel_that_covers_the_evidence_gets_the_weight():
    left = torch.tensor([5.0, 5, 0, 0])
    model = Planted(torch.stack([left, left.flip(0)])[None])
    maps = ct.explain(model, torch.full((1, 1, 16), 20.0), "scorecam", "layer")
    # Half the image is worth 8 x 20 in one logit, so that the softmax is all or nothing.
    torch.testing.assert_close(maps[0], torch.stack([left, left.flip(0)]), rtol=1e-5, atol=1e-5)
    # On an image of which the background takes nothing away all channels are worth the same.
    even = ct.explain(model, torch.full((1, 1, 16), 20.0), "scorecam", "layer", background=20.0)
    torch.testing.assert_close(even[0], torch.full((2, 4), 2.5))


def test_constant_channels_count_for_nothing():
    features = torch.rand(2, 4, 5, 3)
    features[0, 1] = 4.0
    features[0, 2] = 0.0
    features[1] = torch.arange(4.0).reshape(4, 1, 1)
    model = Planted(features)
    x = torch.rand(2, 1, 10, 6)
    maps = ct.explain(model, x, "scorecam", "layer")
    alone = ct.explain(Planted(features[:1, [0, 3]]), x[:1], "scorecam", "layer")
    torch.testing.assert_close(maps[:1], alone)
    assert torch.equal(maps[1], torch.zeros_like(maps[1])), "all channels constant: no map, and no NaN"
    for options in ({"channels": 1}, {"target": lambda y: y[:, 0]}):
        again = ct.explain(model, x, "scorecam", "layer", **options)
        assert torch.isfinite(again).all()
        assert not again[1].any()
        assert again[0].any()


def test_a_channel_that_is_constant_but_for_rounding_is_constant():
    features = torch.rand(1, 3, 6)
    features[0, 0] = 1e6
    features[0, 0, 2] = torch.nextafter(torch.tensor(1e6), torch.tensor(2e6))
    maps = ct.explain(Planted(features), torch.rand(1, 1, 12), "scorecam", "layer", channels=2)
    without = ct.explain(Planted(features[:, 1:]), torch.rand(1, 1, 12), "scorecam", "layer")
    assert maps.abs().max() <= 1, "the weight of the large channel is exactly 0, and it took no other's place"
    assert without.shape == maps.shape


def test_a_layer_of_one_cell_gives_zero():
    model = Net(2).eval()
    assert not ct.explain(model, torch.rand(B, 2, 1, 1), "scorecam", "two").any()


# who asks what -------------------------------------------------------------------------------------------------------


def test_labels_forms():
    model, x = Net().double().eval(), image().double()
    full = ct.explain(model, x, "scorecam", "act")
    torch.testing.assert_close(ct.explain(model, x, "scorecam", "act", labels=[3, 0]), full[:, [3, 0]])
    own = torch.tensor([[3, 1], [0, 0], [2, 3]])
    expected = torch.stack([full[b, own[b]] for b in range(B)])
    torch.testing.assert_close(ct.explain(model, x, "scorecam", "act", labels=own), expected)
    mask = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]]).bool()
    maps = ct.explain(model, x, "scorecam", "act", labels=mask)
    assert maps[~mask].isnan().all()
    torch.testing.assert_close(maps[mask], full[mask])
    with pytest.raises(ct.InputError, match=r"0\.\.3"):
        ct.explain(model, x, "scorecam", "act", labels=[4])


def test_target_runs_whole_batches():
    """A target may tell the samples of the batch apart, so that they must stay together and in order."""
    model, x = Net().double().eval(), image().double()
    full = ct.explain(model, x, "scorecam", "norm")
    columns = torch.tensor([2, 0, 3])
    model.seen.clear()
    maps = ct.explain(model, x, "scorecam", "norm", target=lambda y: y[torch.arange(B), columns], chunk=1)
    assert model.seen == [B] * (K + 1)
    torch.testing.assert_close(maps[:, 0], full[torch.arange(B), columns])
    difference = ct.explain(model, x, "scorecam", "norm", target=lambda y: y[:, 1] - y[:, 1])
    with torch.no_grad():
        features = model.norm(model.two(model.one(x).relu()))
    # No difference: all channels are worth the same.
    torch.testing.assert_close(difference[:, 0], features.mean(dim=1))


@given(batch=st.integers(1, 4), chunk=st.integers(1, 9), channels=st.one_of(st.none(), st.integers(1, 9)))
@settings(max_examples=15, deadline=None)
def test_samples_do_not_see_each_other(batch, chunk, channels):
    model, x = NET, image(1, batch).double()
    together = ct.explain(model, x, "scorecam", "norm", chunk=chunk, channels=channels)
    each = [ct.explain(model, x[b : b + 1], "scorecam", "norm", channels=channels) for b in range(batch)]
    torch.testing.assert_close(together, torch.cat(each), rtol=1e-9, atol=1e-11)


NET = Net(1).double().eval()


def test_several_layers_and_sizes():
    model, x = Net().eval(), image()
    maps = ct.explain(model, x, "scorecam", layer=["act", "one"])
    for name in maps:
        torch.testing.assert_close(maps[name], ct.explain(model, x, "scorecam", name))
    assert ct.explain(model, x, "scorecam", layer=["act", "one"], fuse="mean").shape == (B, L, *SIZES[3])
    assert ct.explain(model, x, "scorecam", size="image").shape == (B, L, *SIZES[3])


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.mix, self.fc = nn.Conv2d(2, K, 3, stride=3), nn.Linear(K, K), nn.Linear(K, L)

    def forward(self, image):
        tokens = self.mix(self.patch(image).flatten(2).transpose(1, 2))
        return self.fc(tokens.relu().mean(dim=1))


def test_tokens_by_reshape():
    model, x = Tokens().eval(), torch.rand(B, 2, 12, 9)
    back = lambda t: t.transpose(1, 2).reshape(B, K, 4, 3)  # noqa: E731
    assert ct.explain(model, x, "scorecam", "mix", reshape=back).shape == (B, L, 4, 3)
    with pytest.raises(ct.InputError, match="as many as the image has"):
        ct.explain(model, x, "scorecam", "mix", reshape=lambda t: t.transpose(1, 2))


def test_slices_folded_into_the_batch_are_refused():
    class Slices(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv1d(2, K, 1), nn.Linear(K, L)

        def forward(self, image):
            folded = self.conv(image.transpose(1, 2).flatten(0, 1))
            return self.fc(folded.unflatten(0, (len(image), -1)).mean(dim=(1, 3)))

    with pytest.raises(ct.InputError, match=r"reshape="):
        ct.explain(Slices(), image(2), "scorecam", "conv")
    with pytest.raises(ct.InputError, match=r"\(33, 7, 8\) for 3 images.*reshape="):
        ct.explain(Slices(), image(2), "scorecam", "conv", reshape=lambda t: t)


# precision, traces, progress -----------------------------------------------------------------------------------------


def test_reduced_precision():
    model, x = Net().eval(), image()
    exact = ct.explain(model, x, "scorecam", "act")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = ct.explain(model, x, "scorecam", "act")
    half = ct.explain(Net().bfloat16().eval(), x.bfloat16(), "scorecam", "act")
    for low in (mixed, half):
        assert low.dtype == torch.float32
        assert (low - exact).norm() < 0.03 * exact.norm()


def test_no_graph_and_no_output_is_kept():
    model, x = Net().eval(), image()
    alive = []
    model.register_forward_hook(lambda *a: alive.append(weakref.ref(a[2])))
    maps = ct.explain(model, x, "scorecam", "act")
    assert maps.grad_fn is None
    assert not maps.requires_grad
    assert len(alive) > 2
    assert all(ref() is None for ref in alive)


def test_masked_forwards_record_nothing():
    model, x = Net().eval(), image()
    modes = []
    model.register_forward_hook(lambda *a: modes.append(torch.is_grad_enabled() or a[2].requires_grad))
    ct.explain(model, x, "scorecam", "act")
    assert modes[0], "the graph from the layer of the one plain forward"
    assert not any(modes[1:])


class Failing(Net):
    def forward(self, image):
        if len(self.seen) == 3:
            raise ValueError("the user's own error")
        return super().forward(image)


def test_an_exception_in_the_middle_leaves_no_trace():
    model = Failing().train()
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    x, rng = image(), torch.get_rng_state()
    statistics = model.norm.running_mean.clone()
    with torch.enable_grad(), pytest.raises(ValueError, match="the user's own error"):
        ct.explain(model, x, "scorecam", "act")
    assert torch.is_grad_enabled()
    assert model.training
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(model.norm.running_mean, statistics)
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_any_grad_mode(mode):
    model, x = Net().train(), image()
    expected = ct.explain(model, x, "scorecam", "act")
    with mode():
        torch.testing.assert_close(ct.explain(model, x, "scorecam", "act"), expected)


def test_a_model_that_rewrites_its_image():
    class Greedy(Net):
        def forward(self, image):
            return super().forward(image.mul_(2))

    x = image()
    kept = x.clone()
    maps = ct.explain(Greedy().eval(), x, "scorecam", "act")
    assert torch.equal(x, kept)

    class Polite(Net):
        def forward(self, image):
            return super().forward(image * 2)

    torch.testing.assert_close(maps, ct.explain(Polite().eval(), x, "scorecam", "act"))


def test_progress_only_on_a_terminal_and_when_it_takes_long(monkeypatch, capsys):
    model, x = Net(1, channels=30).eval(), image(1)
    ct.explain(model, x, "scorecam", "norm", chunk=1)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    ct.explain(model, x, "scorecam", "norm", chunk=1, progress=False)
    ct.explain(model, x, "scorecam", "norm", chunk=8)
    assert capsys.readouterr() == ("", "")
    ct.explain(model, x, "scorecam", "norm", chunk=1)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Score-CAM" in err


# wrong input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": 0}, "channels= expects .* 1 or more, or None, got 0"),
        ({"channels": 2.0}, "channels="),
        ({"channels": True}, "channels="),
        ({"chunk": 0}, "chunk= expects .* 1 or more, got 0"),
        ({"chunk": None}, "chunk="),
        ({"background": float("nan")}, "background= expects one finite intensity"),
        ({"background": "air"}, "got 'air'"),
        ({"progress": "yes"}, "progress="),
        ({"chanels": 3}, "chanels=.*nearest: channels"),
        ({"layer": "input"}, "mask the image by itself"),
        ({"layer": ["act", "input"]}, "mask the image by itself"),
    ],
)
def test_wrong_options(options, words):
    model = Net().eval()
    with pytest.raises(ct.InputError, match=words):
        ct.explain(model, image(), "scorecam", **{"layer": "act", **options})
    assert not model.seen, "before any forward"


def test_scores_that_overflow():
    class Overflows(Net):
        def forward(self, image):
            y = super().forward(image)
            return y / 0 if len(self.seen) > self.after else y

    model = Overflows().eval()
    for model.after, words in ((1, "for a masked image holds NaN or Inf"), (0, "for the unmasked image holds")):
        model.seen.clear()
        with pytest.raises(ct.InputError, match=words):
            ct.explain(model, image(), "scorecam", "act")


def test_activations_that_overflow():
    model = Net().eval()
    with torch.no_grad():
        model.one.bias[0] = torch.inf
    with pytest.raises(ct.InputError, match="NaN or Inf"):
        ct.explain(model, image(), "scorecam", "two", logits=lambda y: torch.zeros(len(y), L, requires_grad=True))


def test_the_pieces():
    masks = unit_masks(torch.randn(2, 3, 4, 5), (7, 9))
    assert masks.amin() == 0
    assert masks.amax() == 1
    assert masks.shape == (2, 3, 7, 9)
    x = torch.rand(2, 1, 7, 9, dtype=torch.bfloat16)
    assert masked(x, torch.ones(2, 1, 7, 9), -3.0).equal(x)
    assert masked(x, torch.zeros(2, 1, 7, 9), -3.0).eq(-3).all()
    assert ScoreCAMOptions() == ScoreCAMOptions(None, 8, 0.0, True)
