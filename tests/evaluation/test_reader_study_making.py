"""What a study asks, and what its page does not tell."""

from __future__ import annotations

import io
import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from camtrain._errors import InputError
from camtrain.evaluation.reader_study_cases import Contestant
from camtrain.evaluation.reader_study_choosing import Asked, Candidate, choose_agreed, choose_answers, choose_pairs
from camtrain.evaluation.reader_study_making import make_study, save_study
from camtrain.reporting.study_page import StudyPage, study_html

LABELS = ["nodule", "</script><b>mass</b>", "öd\"em; it's", "ef\u2028fusion,\n2"]


class Net(nn.Module):
    """Two convolutions and a flatten head; logits are shifted, so that what is present is found or missed."""

    def __init__(self, shift: float = 0.0, outputs: int = 4):
        super().__init__()
        self.conv, self.relu = nn.Conv3d(1, 3, 3, padding=1), nn.ReLU()
        self.head = nn.Linear(3 * 6 * 5 * 4, outputs)
        self.labels, self.shift = LABELS[:outputs], shift

    def forward(self, image):
        return self.head(self.relu(self.conv(image)).flatten(1)) + self.shift


def batches(cases=8, seed=0):
    """Cases of 6 x 5 x 4 with two to no findings; ids that would say something."""
    rng = torch.Generator().manual_seed(seed)
    label = (torch.rand(cases, 4, generator=rng) < 0.5).float()
    label[0] = torch.tensor([1.0, 1.0, 0.0, torch.nan])
    ids = [f"secret-patient-{i}<img src=x onerror=alert(1)>" for i in range(cases)]
    image = torch.rand(cases, 1, 6, 5, 4, generator=rng)
    return [{"image": image[i : i + 3], "label": label[i : i + 3], "id": ids[i : i + 3]} for i in range(0, cases, 3)]


def two(shifts=(5.0, 5.0)):
    made = []
    for i, (name, shift) in enumerate(zip("AB", shifts, strict=True)):
        torch.manual_seed(i)
        made.append(Contestant(name, Net(shift), {"test": batches()}))
    return made


@pytest.fixture(scope="module")
def made():
    return make_study(two(), methods=["hirescam", "gradcam"], cases=4, width=120, title="Chest <study>")


def page_data(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_the_page_tells_nothing(made, tmp_path):
    page, key = save_study(made, tmp_path)
    text = page.read_text(encoding="utf-8")
    without_pictures = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    said = key.read_text(encoding="utf-8")
    assert all(
        word in said for word in ("hirescam", "gradcam", "secret-patient", *made.key.settings["models"].values())
    )
    for secret in ("hirescam", "gradcam", "secret", "patient", "onerror", *made.key.settings["models"].values()):
        assert secret not in without_pictures.lower(), secret
    assert not re.search(r"\b[AB] (hirescam|gradcam|against)", text)
    assert "http:" not in text
    assert "https:" not in text
    task = {"id", "kind", "group", "choices", "finding", "pictures"}
    assert all(set(each) == task for each in page_data(text)["tasks"])


def test_pictures_are_of_one_length_and_hold_nothing_else(made):
    files = [p for task in made.page.tasks for p in task.pictures]
    assert len({len(f) for f in files}) == 1
    sizes = set()
    for file in files:
        with Image.open(io.BytesIO(file)) as picture:
            assert picture.format == "WEBP"
            picture.load()
            assert picture.info.get("xmp", b"").strip() == b""
            assert not set(picture.info) & {"exif", "icc_profile", "comment"}
            sizes.add(picture.size)
    assert len(sizes) == 1


def test_the_maps_of_one_finding_differ_only_in_the_map(made):
    """Choices and their order are the same for every method, so that they cannot tell methods apart."""
    by_finding = {}
    for name, task in made.key.tasks.items():
        if task.kind == "discrimination":
            shown = next(t for t in made.page.tasks if t.id == name)
            assert shown.choices == task.choices
            by_finding.setdefault((task.case, task.label), []).append((task.choices, shown.group))
    assert all(len(set(each)) == 1 and len(each) == 4 for each in by_finding.values())
    groups = [group for ((_, group), *_) in by_finding.values()]
    assert len(set(groups)) == len({case for case, _ in by_finding})


def test_what_the_key_says_is_true(made):
    truth = {i: row for batch in batches() for i, row in zip(batch["id"], batch["label"], strict=True)}
    for task in made.key.tasks.values():
        column = LABELS.index(task.label)
        assert truth[task.case][column] == 1
        if task.kind == "discrimination":
            assert task.label in task.choices
            assert set(task.present) == {LABELS[c] for c in range(4) if truth[task.case][c] == 1}
            assert all(not torch.isnan(truth[task.case][LABELS.index(c)]) for c in task.choices)
            assert task.chance_present == 1 / len(set(task.present) & set(task.choices))
        else:
            assert set(task.sources) in ({"A hirescam", "B hirescam"}, {"A gradcam", "B gradcam"})
            assert task.first.startswith("A ")
    assert {t.first == t.sources[0] for t in made.key.tasks.values() if t.kind == "trust"} == {True, False}


def test_the_pictures_are_those_of_the_key(made):
    """Redrawn from the key alone."""
    from camtrain.cam.explaining import explain
    from camtrain.reporting import telling_point
    from camtrain.reporting.study_pictures import blinded_pictures

    models = {c.name: c.model for c in two()}
    images = {i: image for batch in batches() for i, image in zip(batch["id"], batch["image"], strict=True)}
    for shown in made.page.tasks:
        task = made.key.tasks[shown.id]
        image = images[task.case]
        maps = []
        for source in task.sources:
            model, method = source.split()
            column = LABELS.index(task.label)
            maps.append(explain(models[model], image[None], method, labels=[column])[0, 0].numpy())
        point = telling_point((6, 5, 4), maps)
        drawn = blinded_pictures(image.numpy(), maps, point=point, width=120)
        assert len(drawn) == len(shown.pictures)
        for pixels, file in zip(drawn, shown.pictures, strict=True):
            decoded = np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)
            assert np.abs(decoded - pixels).mean() < 6


def test_labels_are_text_and_never_markup(made):
    text = study_html(made.page)
    assert "<b>mass" not in text
    assert "Chest &lt;study&gt;" in text
    assert text.count("</script>") == 2
    used = {c for t in page_data(text)["tasks"] for c in t["choices"]}
    assert used == set(LABELS)


def test_the_same_seed_gives_the_same_bytes_and_another_one_another_study(made):
    again = make_study(two(), methods=["hirescam", "gradcam"], cases=4, width=120, title="Chest <study>")
    assert study_html(again.page) == study_html(made.page)
    assert again.key == made.key
    other = make_study(two(), methods=["hirescam", "gradcam"], cases=4, width=120, seed=1)
    assert other.key.study != made.key.study


def test_making_a_study_leaves_the_models_alone():
    contestants = two()
    before = [{k: v.clone() for k, v in c.model.state_dict().items()} for c in contestants]
    contestants[0].model.train()
    make_study(contestants, cases=2, width=80)
    assert contestants[0].model.training
    for contestant, state in zip(contestants, before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in contestant.model.state_dict().items())
        assert all(p.grad is None for p in contestant.model.parameters())


def test_trust_only_where_both_are_right():
    with pytest.raises(InputError, match="every model rightly finds"):
        make_study(two((5.0, -5.0)), cases=2, width=80)
    only = make_study(two((5.0, -5.0)), cases=2, width=80, kinds=["discrimination"])
    assert {t.kind for t in only.page.tasks} == {"discrimination"}


def test_two_methods_of_one_model_are_set_against_each_other():
    made = make_study(two()[:1], methods=["hirescam", "gradcam", "layercam"], cases=2, width=80)
    contests = Counter(t.contest for t in made.key.tasks.values() if t.kind == "trust")
    assert contests == {"hirescam against gradcam": 2, "hirescam against layercam": 2}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"methods": ["hirescan"]}, "nearest: hirescam"),
        ({"labels": ["nodul"]}, "nearest: nodule"),
        ({"labels": ["nodule"]}, "at least two findings"),
        ({"kinds": ["trsut"]}, "nearest: trust"),
        ({"kinds": []}, "--kinds expects"),
        ({"split": "tset"}, "nearest: test"),
        ({"choices": 1}, "--choices expects"),
        ({"cases": 0}, "--cases expects"),
        ({"cut": 1.5}, "--cut expects"),
        ({"title": " "}, "--title expects"),
        ({"layer": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_options(options, says):
    with pytest.raises(InputError, match=says):
        make_study(two(), **{"cases": 2, "width": 80, **options})


def test_one_map_cannot_be_compared():
    with pytest.raises(InputError, match="give --against, or two --methods"):
        make_study(two()[:1], kinds=["trust"])
    assert {t.kind for t in make_study(two()[:1], cases=2, width=80).page.tasks} == {"discrimination"}


def test_models_of_other_data_are_refused():
    a, b = two()
    for data, says in (
        ({"test": batches(seed=1)}, "other cases"),
        ({"test": batches(cases=7)}, "unequal numbers of cases"),
    ):
        with pytest.raises(InputError, match=says):
            make_study([a, Contestant("B", b.model, data)], cases=2, width=80)
    with pytest.raises(InputError, match="of different names"):
        make_study([a, a])
    three = Net(outputs=3)
    with pytest.raises(InputError):
        make_study([a, Contestant("B", three, {"test": batches()})])


def test_pages_need_tasks():
    with pytest.raises(InputError, match="at least one task"):
        StudyPage([])


def candidates(rng, cases=30, labels=5):
    truth = (rng.random((cases, labels)) < 0.4).astype(float)
    truth[rng.random((cases, labels)) < 0.1] = np.nan
    return [Candidate(str(i), str(i), truth[i], rng.random((2, labels))) for i in range(cases)]


def test_pairs_are_present_balanced_and_prefer_two_findings():
    rng = np.random.default_rng(2)
    cases = candidates(rng)
    rich = [c for c in cases if (c.truth == 1).sum() >= 2]
    pairs = choose_pairs(cases, range(5), len(rich), rng)
    assert {p.case.id for p in pairs} == {c.id for c in rich}
    assert all(p.case.truth[p.column] == 1 for p in pairs)
    assert len({(p.case.id, p.column) for p in pairs}) == len(pairs) == 2 * len(rich)
    count = Counter(p.column for p in pairs)
    assert max(count.values()) - min(count.values()) <= 6
    assert len(choose_pairs(cases, range(5), 30, rng)) > len(pairs)


def test_agreed_pairs_are_found_by_all():
    rng = np.random.default_rng(3)
    cases = candidates(rng)
    pairs = choose_agreed(cases, range(5), 30, rng, cut=0.4)
    assert all(p.case.truth[p.column] == 1 and (p.case.probabilities[:, p.column] >= 0.4).all() for p in pairs)
    usable = [c for c in cases if ((c.truth == 1) & (c.probabilities >= 0.4).all(axis=0)).any()]
    assert {p.case.id for p in pairs} == {c.id for c in usable}


def test_choices_hold_the_finding_at_any_place():
    rng = np.random.default_rng(4)
    case = Candidate("a", "a", np.array([1.0, 0.0, 1.0, 0.0, 0.0, np.nan]), np.zeros((1, 6)))
    seen = [choose_answers(Asked(case, 0), range(6), 4, rng) for _ in range(200)]
    assert all(len(set(each)) == 4 and {0, 2} <= set(each) and 5 not in each for each in seen)
    places = Counter(each.index(0) for each in seen)
    assert set(places) == {0, 1, 2, 3}
    assert min(places.values()) > 25
    assert sorted(choose_answers(Asked(case, 0), range(6), 2, rng)) == [0, 2]  # the paper's form: the present ones
