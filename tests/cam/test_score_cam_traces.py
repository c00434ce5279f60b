"""Score-CAM: precision, what it leaves behind, its progress bar, and wrong input."""

from __future__ import annotations

import weakref

import pytest
import torch
from score_cam_tools import L, Net, image

import camtrain as ct


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
