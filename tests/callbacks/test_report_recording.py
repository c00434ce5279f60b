"""What the monitor keeps for its report: the maps of `ct.explain`, of present and absent labels, without a trace."""

from __future__ import annotations

import copy
import csv
import html
import inspect
import json
import shlex
import sys
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml

import camtrain as ct
from camtrain.callbacks import _recording
from camtrain.callbacks._run_facts import _without_secrets
from camtrain.callbacks._settings import plain, read_config, settings
from camtrain.metrics import energy_inside
from camtrain.reporting.panel_files import read_maps, read_volume


def fit(kit, folder, net, epochs=1, cases=None, lit=None, trainer=None, callbacks=(), **options):
    added = ct.AttentionMonitor(**{"layer": kit.LAYER, "table": kit.TABLE, **options})
    trainer = kit.make_trainer(folder, added, *callbacks, max_epochs=epochs, **(trainer or {}))
    data = kit.loader(cases or kit.make_cases())
    trainer.fit(lit or kit.make_lit(net), data, data)
    return added, trainer


def stored(added, epoch=0, split="val"):
    about, maps = read_maps(added.publisher.run_dir.maps_path(epoch, split))
    return about, {(m.case, m.label, m.method, m.layer): m for m in maps}


@pytest.mark.slow
@pytest.mark.parametrize("head", ["flatten", "mlp"])
def test_maps_are_those_of_explain_for_every_label(kit, tmp_path, head):
    cases, net = kit.make_cases(), kit.make_net(head)
    added, _ = fit(kit, tmp_path, net, cases=cases, methods=["hirescam", "layercam"])
    about, maps = stored(added)
    assert about == {"epoch": 0, "step": 3, "split": "val"}
    shown = {case for case, *_ in maps}
    assert shown == set(added.panels["val"].choice.pairs) or shown == {
        e["case"] for e in added.publisher.run_dir.read_panel()["cases"]
    }
    assert {(method, layer) for *_, method, layer in maps} == {("hirescam", ""), ("layercam", ""), ("gradcam", "")}
    for case in cases:
        if case["id"] not in shown:
            continue
        image = case["image"][None]
        allowed = ct.OrganTable.load(kit.TABLE).allowed(case["organs"][None], size=(3, 4, 5))
        probability = torch.sigmoid(net(image))[0].tolist()
        for method in ("hirescam", "layercam", "gradcam"):
            expected = ct.explain(net, image, method=method, layer=kit.LAYER)
            inside = energy_inside(expected, allowed, torch.ones(1, 3))[0].tolist()
            for index, label in enumerate(kit.LABELS):
                each = maps[case["id"], label, method, ""]
                assert each.truth == case["label"][index]
                assert each.probability == pytest.approx(probability[index], abs=1e-5)
                values = expected[0, index].numpy()
                np.testing.assert_allclose(each.values(), values, atol=np.abs(values).max() / 250 + 1e-9)
                assert each.inside == (None if np.isnan(inside[index]) else pytest.approx(inside[index], abs=1e-4))


@pytest.mark.slow
def test_volumes_have_the_case_and_its_regions(kit, tmp_path):
    affine = torch.diag(torch.tensor([-2.0, -2.0, 3.0, 1.0]))
    cases = [{**case, "affine": affine} for case in kit.make_cases()]
    added, _ = fit(kit, tmp_path, kit.make_net(), cases=cases)
    case = cases[0]
    volume = read_volume(added.publisher.run_dir.volume_path(case["id"]))
    assert (volume.axes, volume.spacing, volume.shape) == ("LPS", (2, 2, 3), kit.SIZE)
    low, high = volume.window
    expected = case["image"][0].numpy().clip(low, high)
    np.testing.assert_allclose(low + volume.image * (high - low) / 255, expected, atol=0.51 * (high - low) / 255)
    allowed = ct.OrganTable.load(kit.TABLE).allowed(case["organs"][None])[0].numpy()
    assert set(volume.region_of) == set(kit.LABELS)
    for index, label in enumerate(kit.LABELS):
        np.testing.assert_array_equal(volume.regions[volume.region_of[label]], allowed[index])


@pytest.mark.slow
def test_the_report_is_there_every_epoch_and_the_run_is_told(kit, tmp_path):
    loss = ct.MaskLossCallback(kit.LAYER, kit.TABLE, weight=0.5)
    options = {"epochs": 3, "every_n_epochs": 2, "methods": ["hirescam", "gradcam"], "callbacks": [loss]}
    added, _ = fit(kit, tmp_path / "a b", kit.make_net(), **options)
    run = added.publisher.run_dir
    assert [p.parent.name for p in sorted(run.path.glob("epochs/*/maps.npz"))] == ["0000", "0002"]
    text = run.report_path.read_text(encoding="utf-8")
    assert text.count('class="maps"') == 2
    assert '"epochs":[0,1,2]' in text  # curves are those of every epoch
    facts = json.loads(run.facts_path.read_text())
    assert facts["labels"] == kit.LABELS
    assert facts["methods"] == ["hirescam", "gradcam"]
    assert facts["layers"] == [kit.LAYER]
    assert 0 < facts["seen"][kit.LAYER] < 1
    assert facts["table"]["labels"]["stent"] == ["heart"]
    assert facts["config"]["trainer"]["max_epochs"] == 3
    assert facts["config"]["callbacks"]["AttentionMonitor"]["layer"] == kit.LAYER
    assert facts["config"]["callbacks"]["MaskLossCallback"]["weight"] == 0.5
    assert shlex.split(facts["command"]) == sys.orig_argv
    assert "saved_config" not in facts
    assert "The whole config of this run" not in text


@pytest.mark.slow
def test_all_settings_are_told_those_that_are_no_defaults_first(kit, tmp_path):
    alarms = [{"name": "reliance", "threshold": 0.4, "every_n_epochs": 3}, "empty_maps"]
    options = {"alarms": alarms, "stop_on": ["empty_maps"], "every_n_epochs": 2, "panel_cases": 3, "mode": "any"}
    second = ct.AttentionMonitor(kit.LAYER, kit.TABLE, name="second", report=False, alarms=[], keys={"label": "label"})
    loss = ct.MaskLossCallback(kit.LAYER, kit.TABLE, weight=0.25, ramp_steps=4)
    added, _ = fit(kit, tmp_path, kit.make_net(), callbacks=[second, loss, ct.ExactResume(seed=7)], **options)
    run = added.publisher.run_dir
    callbacks = json.loads(run.facts_path.read_text())["config"]["callbacks"]
    found = callbacks["AttentionMonitor"]
    assert set(found) == set(inspect.signature(ct.AttentionMonitor.__init__).parameters) - {"self"}
    assert {name: found[name] for name in options} == options
    assert found["table"] == "a mapping"
    assert found["max_label_keys"] == 20
    assert set(list(found)[: len(options) + 2]) == {*options, "layer", "table"}
    assert callbacks["AttentionMonitor second"]["alarms"] == []
    assert callbacks["AttentionMonitor second"]["keys"] == {"label": "label"}
    assert list(callbacks["MaskLossCallback"])[:4] == ["layer", "table", "weight", "ramp_steps"]
    assert callbacks["ExactResume"] == {"seed": 7}
    text = html.unescape(run.report_path.read_text(encoding="utf-8"))
    for name, value in (*options.items(), ("max_label_keys", 20)):
        assert f"<dt>AttentionMonitor.{name}</dt><dd>{value}</dd>" in text
    assert text.index("AttentionMonitor.stop_on<") < text.index("AttentionMonitor.max_label_keys<")


def test_what_was_given_is_told_in_words(kit):
    net = kit.make_net()
    monitor = ct.AttentionMonitor([net.features[1], net.features[3]], adapter=lambda batch: batch, reshape=torch.relu)
    found = settings(monitor)
    assert found["layer"] == ["ReLU", "ReLU"]
    assert found["adapter"].endswith("<lambda>")
    assert found["reshape"].endswith("relu")
    assert json.loads(json.dumps(found)) == found
    again = copy.deepcopy(ct.OutsideSwap(p=0.5))
    assert settings(again)["p"] == 0.5
    assert next(iter(settings(again))) == "p"
    assert settings(object()) == {}

    class Notifier:
        def __init__(self, api_key, channel="training"):
            self.api_key, self.channel = api_key, channel

    assert settings(Notifier("abc")) == {"api_key": "(not shown)", "channel": "training"}


def test_the_config_of_lightningcli_is_kept_and_named(kit, tmp_path):
    """A config file of the user's may change; the one that LightningCLI saves is that of the run."""

    class SaveConfigCallback(pl.Callback):
        config_filename = "config.yaml"

    folder = tmp_path / "a b"
    folder.mkdir()
    content = {"model": {"lr": 0.5, "api_key": "abc"}, "trainer": {"callbacks": [{"init_args": {"max_label_keys": 7}}]}}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    added, _ = fit(kit, folder, kit.make_net(), callbacks=[SaveConfigCallback()])
    run = added.publisher.run_dir
    facts = json.loads(run.facts_path.read_text())
    assert facts["saved_config"] == str(folder / "config.yaml")
    assert facts["cli_config"] == {**content, "model": {"lr": 0.5, "api_key": "(not shown)"}}
    text = run.report_path.read_text(encoding="utf-8")
    assert f"<code>{folder / 'config.yaml'}</code>" in text
    assert "abc" not in json.dumps(facts)
    (folder / "config.yaml").write_text("model: !!python/name:os.system")
    assert read_config(folder / "config.yaml") == {}


def test_layers_one_by_one(kit, tmp_path):
    cases, net = kit.make_cases(), kit.make_net()
    added, _ = fit(kit, tmp_path, net, cases=cases, layer=["features.1", kit.LAYER])
    _, maps = stored(added)
    case = cases[0]
    each = ct.explain(net, case["image"][None], layer=["features.1", kit.LAYER])
    for layer, expected in each.items():
        values = expected[0, 1].numpy()
        found = maps[case["id"], "stent", "hirescam", layer].values()
        np.testing.assert_allclose(found, values, atol=np.abs(values).max() / 250)
    assert maps[case["id"], "stent", "hirescam", ""].cells.shape == (6, 8, 10)


@pytest.mark.slow
def test_paid_methods_are_not_asked_again(kit, tmp_path):
    net = kit.make_net()
    plain, _ = fit(kit, tmp_path / "a", net, report=False, methods=["hirescam", {"name": "scorecam", "channels": 2}])
    calls, net.calls = net.calls, 0
    added, _ = fit(kit, tmp_path / "b", net, methods=["hirescam", {"name": "scorecam", "channels": 2}])
    # One more forward: the seen share of the layer, once per run.
    assert net.calls == calls + 1
    _, maps = stored(added)
    score = [m for m in maps.values() if m.method == "scorecam"]
    assert score
    assert all(m.truth == 1 for m in score)
    assert not (plain.publisher.run_dir.path / "report.html").exists()
    assert not list(plain.publisher.run_dir.path.rglob("*.npz"))


@pytest.mark.slow
def test_nothing_changes_for_the_training(kit, tmp_path):
    states, draws, scores = [], [], []
    for report in (True, False):
        torch.manual_seed(3)
        net = kit.make_net("mlp")
        _, trainer = fit(kit, tmp_path / str(report), net, epochs=2, report=report)
        states.append(net)
        draws.append(torch.rand(3))
        scores.append(dict(trainer.callback_metrics))
        assert kit.hooks_of(net) == {}
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters())
    kit.same_weights(*states, rtol=0, atol=0)
    assert torch.equal(*draws)
    assert scores[0].keys() == scores[1].keys()
    assert all(torch.equal(scores[0][key], scores[1][key]) for key in scores[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["validate", "test"])
def test_under_inference_mode_and_beside_an_earlier_fit(kit, tmp_path, method):
    added, trainer = fit(kit, tmp_path, kit.make_net())
    command = json.loads(added.publisher.run_dir.facts_path.read_text())
    getattr(trainer, method)(trainer.lightning_module, kit.loader(kit.make_cases(seed=1)), verbose=False)
    split = "val" if method == "validate" else "test"
    about, maps = stored(added, 1, split)
    assert about["split"] == split
    assert maps
    assert json.loads(added.publisher.run_dir.facts_path.read_text()) == command
    assert added.publisher.run_dir.report_path.read_text().count('class="maps"') == 2


@pytest.mark.slow
def test_many_labels_keep_the_present_and_the_likeliest(kit, tmp_path):
    labels = [f"l{i}" for i in range(11)]
    cases = kit.make_cases(labels=11)
    table = {**kit.TABLE, "labels": {name: ["lungs"] if i % 2 else ["heart"] for i, name in enumerate(labels)}}
    net = kit.make_net(outputs=11)
    added, _ = fit(kit, tmp_path, net, cases=cases, table=table, names=labels, epochs=2)
    case = cases[0]
    first = [label for c, label, method, _ in stored(added, 0)[1] if c == case["id"] and method == "hirescam"]
    second = [label for c, label, method, _ in stored(added, 1)[1] if c == case["id"] and method == "hirescam"]
    assert first == second
    assert len(first) == 8
    assert {labels[i] for i in case["label"].nonzero()[:, 0].tolist()[:8]} <= set(first)
    volume = read_volume(added.publisher.run_dir.volume_path(case["id"]))
    assert set(volume.region_of) == set(first)
    assert len(volume.regions) == 2
    state = added.state_dict()
    again = ct.AttentionMonitor(kit.LAYER, table)
    again.load_state_dict(state)
    assert again.recorder.state() == added.recorder.state() != []


def test_without_organs_and_without_ids(kit, tmp_path):
    cases = [{k: v for k, v in case.items() if k in ("image", "label")} for case in kit.make_cases()]
    added, _ = fit(kit, tmp_path, kit.make_net(), cases=cases, table=None, names=kit.LABELS)
    _, maps = stored(added)
    assert maps
    assert all(m.inside is None for m in maps.values())
    text = added.publisher.run_dir.report_path.read_text(encoding="utf-8")
    assert "The run has no organ table" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("odd"), "the report is not complete (ValueError: odd)"),
        (OSError(28, "No space left"), "the report is not complete (OSError: [Errno 28] No space left)"),
    ],
)
def test_what_goes_wrong_is_said_once_and_stops_nothing(kit, tmp_path, monkeypatch, error, says):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(_recording, "write_maps", fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        added, trainer = fit(kit, tmp_path, kit.make_net(), epochs=3)
    (said,) = [str(w.message) for w in caught if type(error).__name__ in str(w.message)]
    assert says in said
    assert trainer.current_epoch == 3
    rows = list(csv.DictReader(added.publisher.run_dir.scores_path.open()))
    assert {row["epoch"] for row in rows} == {"0", "1", "2"}


def test_nothing_is_written_where_nothing_should_be(kit, tmp_path):
    fit(kit, tmp_path, kit.make_net(), trainer={"fast_dev_run": True})
    assert not list(tmp_path.rglob("report.html"))
    assert not list(tmp_path.rglob("*.npz"))


def test_secrets_stay_where_they_are():
    words = ["camtrain", "fit", "--x.api_key=abc", "--token", "abc", "--lr", "1", "--password", "--y=2"]
    words += ["--data.credentials.user=me", "--data.secret.id", "abc", "--z.monkeys.lr=1"]
    shown = "camtrain fit --x.api_key=(not shown) --token (not shown) --lr 1 --password --y=2"
    shown += " --data.credentials.user=(not shown) --data.secret.id (not shown) --z.monkeys.lr=1"
    assert " ".join(_without_secrets(words)) == shown
    assert plain({"a": {"wandb_token": 1}, "b": float("nan")}) == {"a": {"wandb_token": "(not shown)"}, "b": "nan"}
