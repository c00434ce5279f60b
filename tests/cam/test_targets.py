"""Any score can be explained: a difference, a group, a regression, a token of a captioner, an answer of a VQA head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import camtrain as ct

B, L, WORDS = 2, 4, 7
LINEAR = ["hirescam", "gradcam", "respondcam", "xgradcam", "counterfactual", "lrp"]


def image():
    return torch.rand(B, 1, 5, 7, 6, generator=torch.Generator().manual_seed(1))


class Trunk(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act = nn.Conv3d(1, width, 3), nn.ReLU()
        self.second, self.last = nn.Conv3d(width, width, 2), nn.ReLU()

    def forward(self, image):
        return self.last(self.second(self.act(self.conv(image))))


class Classifier(nn.Module):
    def __init__(self, outputs=L):
        super().__init__()
        self.trunk = Trunk()
        self.fc = nn.Linear(6 * 2 * 4 * 3, outputs)

    def forward(self, image):
        return self.fc(self.trunk(image).flatten(1))


class Captioner(nn.Module):
    """Image features start a GRU that reads the words so far and gives the next word's logits at every place."""

    def __init__(self, hidden=5):
        super().__init__()
        self.trunk = Trunk()
        self.start, self.embed = nn.Linear(6, hidden), nn.Embedding(WORDS, hidden)
        self.rnn, self.word = nn.GRU(hidden, hidden, batch_first=True), nn.Linear(hidden, WORDS)
        self.caption = torch.tensor([[1, 4, 2], [3, 0, 6]])

    def forward(self, image):
        state = self.start(self.trunk(image).mean(dim=(2, 3, 4)))
        return self.word(self.rnn(self.embed(self.caption), state[None])[0])  # (B, T, WORDS)


class Answerer(nn.Module):
    """VQA: question and image features meet in a product; one logit per answer."""

    def __init__(self, answers=3):
        super().__init__()
        self.trunk = Trunk()
        self.question, self.answer = nn.Embedding(5, 6), nn.Linear(6, answers)
        self.asked = torch.tensor([2, 4])

    def forward(self, image):
        return {"answers": self.answer(self.trunk(image).mean(dim=(2, 3, 4)) * self.question(self.asked))}


@pytest.mark.parametrize("method", LINEAR)
def test_the_map_of_a_difference_is_the_difference_of_the_maps(method):
    """Maps before ReLU are linear in the score (class additivity)."""
    model = Classifier().double().eval()
    x = image().double()
    each = ct.explain(model, x, method, "trunk.last")
    both = ct.explain(model, x, method, "trunk.last", target=lambda y: y[:, 2] - y[:, 0])
    torch.testing.assert_close(both[:, 0], each[:, 2] - each[:, 0])
    group = ct.explain(model, x, method, "trunk.last", target=lambda y: y[:, 1:].mean(dim=1))
    torch.testing.assert_close(group[:, 0], each[:, 1:].mean(dim=1))


def slow_gradcam(model, x, score):
    kept = {}
    handle = model.trunk.last.register_forward_hook(lambda m, i, o: kept.update(a=o))
    values = score(model(x))
    handle.remove()
    rows = []
    for i in range(len(x)):
        (gradient,) = torch.autograd.grad(values[i], kept["a"], retain_graph=True)
        weights = gradient[i].mean(dim=(1, 2, 3))
        rows.append(sum(w * a for w, a in zip(weights, kept["a"][i].detach(), strict=True)))
    return torch.stack(rows)


SCORES = {
    "regression": (lambda: Classifier(outputs=1), lambda y: y[:, 0]),
    "token of a captioner": (Captioner, lambda y: y[torch.arange(B), 2, torch.tensor([4, 1])]),
    "log-probability of a whole caption": (Captioner, lambda y: y.log_softmax(-1).amax(-1).sum(-1)),
    "answer of a VQA head": (Answerer, lambda y: y["answers"][:, 1]),
}


@pytest.mark.parametrize("kind", SCORES)
def test_gradcam_of_any_score_against_a_loop(kind):
    make, score = SCORES[kind]
    torch.manual_seed(2)
    model = make().eval()
    maps = ct.explain(model, image(), "gradcam", "trunk.last", target=score)
    assert maps.shape == (B, 1, 2, 4, 3)
    torch.testing.assert_close(maps[:, 0], slow_gradcam(model, image(), score))
    assert maps.abs().max() > 0


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("method", [r.name for r in ct.methods() if r.name not in ("cam", "lrp", "relevancecam")])
def test_every_method_takes_every_score(kind, method):
    make, score = SCORES[kind]
    torch.manual_seed(2)
    options = {"progress": False} if method == "scorecam" else {}
    maps = ct.explain(make().eval(), image(), method, "trunk.last", target=score, **options)
    assert maps.shape[:2] == (B, 1)
    assert torch.isfinite(maps).all()


@pytest.mark.parametrize("kind", ["regression", "answer of a VQA head"])
@pytest.mark.parametrize("method", ["lrp", "relevancecam"])
def test_relevance_of_any_score(kind, method):
    make, score = SCORES[kind]
    torch.manual_seed(2)
    model = make().eval()
    maps = ct.explain(model, image(), method, "trunk.last", target=score)
    assert torch.isfinite(maps).all()
    if method == "lrp" and kind == "regression":
        torch.testing.assert_close(maps.flatten(1).sum(1), score(model(image())).detach(), rtol=1e-4, atol=1e-5)


def test_lrp_through_a_recurrent_head_is_refused():
    model = Captioner().eval()
    with pytest.raises(ct.InputError, match=r"rnn.*gradient"):
        ct.explain(model, image(), "lrp", "trunk.last", target=lambda y: y[:, 0, 1])


def test_a_target_that_gives_no_score_per_sample():
    for wrong in (lambda y: y.sum(), lambda y: y, lambda y: y[:1, 0], lambda y: 3.0):
        with pytest.raises(ct.InputError, match="one score per sample"):
            ct.explain(Classifier().eval(), image(), layer="trunk.last", target=wrong)


def test_a_contrast_beside_a_target_is_refused():
    with pytest.raises(ct.InputError, match="put the contrast into the target"):
        ct.explain(
            Classifier().eval(), image(), "relevancecam", "trunk.last", target=lambda y: y[:, 0], contrast="paper"
        )
