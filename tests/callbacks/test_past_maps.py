"""What a picture knows of the epochs before: coarse maps, a few epochs, the same after a resume."""

from __future__ import annotations

import io

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import camtrain as ct
from camtrain.callbacks._panel import PanelEntry
from camtrain.callbacks._past_maps import CELLS, PastMaps, spread
from camtrain.callbacks._pictures import grow
from camtrain.reporting.case_picture import case_scenes
from camtrain.reporting.epoch_strip import COLUMNS

SHAPE = (12, 16, 20)


def entry(values, case="a", label="nodule", axes="RAS"):
    image = np.zeros(SHAPE, np.float32)
    region = np.zeros(SHAPE, bool)
    region[3:9, 4:12, 2:6] = True
    maps = {"hirescam": np.asarray(values, np.float32)}
    scenes = case_scenes(image, maps, region, axes=axes)
    return PanelEntry(case, label, True, 0.5, SHAPE, scenes, maps, None)


@given(st.integers(1, 400), st.integers(2, 9))
def test_the_epochs_shown_are_the_first_the_last_and_some_at_equal_distances(count, most):
    epochs = list(range(0, 3 * count, 3))
    shown = spread(epochs, most)
    assert min(count, 1 + most // 2) <= len(shown) <= max(2, most)
    assert (shown[0], shown[-1]) == (epochs[0], epochs[-1])
    gaps = np.diff(shown)
    assert len(set(gaps[:-1])) <= 1
    assert (gaps[-1:] <= gaps[:1]).all()  # the last is as near as the run has come
    # Of the next pass's, all but the last one are of these: nothing is asked for that was let go.
    assert set(spread([*epochs, 3 * count], most)[:-1]) <= set(shown)


@pytest.mark.parametrize("axes", [None, "LPS", "SRA"])
def test_a_map_of_a_layer_is_kept_as_it_is(axes):
    values = np.random.default_rng(0).standard_normal((5, 7, 3)).astype(np.float32)
    shown = PastMaps().add("val", [entry(values, axes=axes)], 3)[0]["hirescam"]["epoch 3"]
    np.testing.assert_array_equal(shown, values)


def test_undefined_cells_do_not_spread_where_a_fine_map_is_averaged():
    values = np.ones((32, 32, 32), np.float32)
    values[:2, :2, :2] = np.nan
    (shown,) = PastMaps().add("val", [entry(values)], 0)
    kept = shown["hirescam"]["epoch 0"]
    assert kept.shape == (16, 16, 16)
    np.testing.assert_allclose(kept.ravel()[1:], 1.0, rtol=1e-6)
    assert kept[0, 0, 0] == 0


def test_a_long_run_keeps_a_few_maps_and_a_checkpoint_brings_them_back():
    past, rng = PastMaps(), np.random.default_rng(0)
    fine = rng.standard_normal((8, 200, 90))
    for epoch in range(50):
        shown = past.add("val", [entry(fine * epoch), entry(fine[:2, :2], case="b")], epoch)
    maps = shown[0]["hirescam"]
    assert list(maps) == [f"epoch {epoch}" for epoch in (0, 16, 32, 48, 49)]
    assert all(values.size <= CELLS for values in maps.values())
    file = io.BytesIO()
    torch.save(past.state(), file)
    assert file.tell() < 2 * COLUMNS * CELLS * 4 + 20_000
    file.seek(0)
    again = PastMaps()
    again.load(torch.load(file, weights_only=True))
    more = [each.add("val", [entry(fine)], 50)[0]["hirescam"] for each in (past, again)]
    assert list(more[0]) == list(more[1])
    assert all(np.array_equal(more[0][e], more[1][e]) for e in more[0])
    for name, values in more[1].items():
        epoch = int(name.removeprefix("epoch "))
        np.testing.assert_allclose(values, more[1]["epoch 50"] * (1 if epoch == 50 else epoch), rtol=1e-4, atol=1e-4)


def test_what_a_development_version_has_kept_is_left_out():
    past = PastMaps()
    past.load({"epochs": {"val": [0]}, "planes": [["val", "a", "nodule", "hirescam", {0: torch.ones(4, 4)}]]})
    (shown,) = past.add("val", [entry(np.ones((4, 4, 4)))], 1)
    assert list(shown["hirescam"]) == ["epoch 1"]


def test_an_abandoned_future_and_another_layer_are_forgotten():
    past = PastMaps()
    for epoch in range(5):
        past.add("val", [entry(np.full((4, 4, 4), epoch))], epoch)
    again = past.add("val", [entry(np.full((4, 4, 4), 7))], 2)[0]["hirescam"]
    assert {name: float(values[0, 0, 0]) for name, values in again.items()} == {
        "epoch 0": 0,
        "epoch 1": 1,
        "epoch 2": 7,
    }
    assert list(past.add("val", [entry(np.ones((6, 8, 10)))], 3)[0]["hirescam"]) == ["epoch 3"]
    assert list(past.add("test", [entry(np.ones((6, 8, 10)))], 4)[0]["hirescam"]) == ["epoch 4"]


def test_outside_a_fit_the_network_stands_beside_the_epochs_and_nothing_is_kept():
    past = PastMaps()
    for epoch in range(8):
        past.add("val", [entry(np.full((4, 4, 4), epoch)), entry(np.ones((4, 4, 4)), case="b")], epoch)
    before = str(past.state())
    now = [entry(np.full((4, 4, 4), 9)), entry(np.ones((2, 2, 2)), case="b"), entry(np.ones((4, 4, 4)), case="c")]
    shown, *others = past.beside("val", now)
    columns = {name: float(values[0, 0, 0]) for name, values in shown["hirescam"].items()}
    assert columns == {"epoch 0": 0, "epoch 2": 2, "epoch 4": 4, "epoch 6": 6, "epoch 7": 7, "now": 9}
    assert others == [{}, {}]  # alone there is nothing to compare with
    assert past.beside("test", now) == [{}, {}, {}]
    assert str(past.state()) == before


def test_a_map_that_was_not_computed_is_no_map_of_zeros():
    past = PastMaps()
    for epoch in range(3):
        (shown,) = past.add("val", [entry(np.full((4, 4, 4), np.nan if epoch == 1 else 2.0))], epoch)
        assert list(shown.get("hirescam", {})) == [["epoch 0"], [], ["epoch 0", "epoch 2"]][epoch]


@pytest.mark.parametrize("nothing", [0.0, np.nan])
def test_maps_of_nothing_leave_the_scale_alone(nothing):
    scale = {}
    grow(scale, [entry(np.full((4, 4, 4), nothing))])
    assert scale == {}
    grow(scale, [entry(np.full((4, 4, 4), 0.004))])
    grow(scale, [entry(np.full((4, 4, 4), nothing))])
    assert scale == {"hirescam": 2.0**-7}


class Louder(ct.AttentionMonitor):
    """Before each validation of a fit the last layer says eight times as much: the end of the colours must grow."""

    def on_validation_start(self, trainer, pl_module):
        if trainer.state.fn == "fit":
            with torch.no_grad():
                pl_module.net.head[-1].weight.mul_(8.0)


def colourful(pixels):
    """How much colour there is, apart from the rim of the region."""
    values = pixels.astype(int)
    rim = (values[..., 1] > 180) & (values[..., 0] < 120)
    return float(np.where(rim, 0, values.max(-1) - values.min(-1)).mean())


def strip(run, epoch, case, columns):
    """Tiles of the organ's strip in one picture: the lowest block of the page but for epochs and legend."""
    (path,) = run.epoch_path(epoch).glob(f"{case}_*.png")
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return pixels, tiles_of(pixels, columns)


def tiles_of(pixels, columns):
    """Parts of the lowest planes, those on the left side: it has half of the page but for margins and a gap."""
    step = ((840 - 12 - 8) // 2 + 4) // COLUMNS
    return [pixels[-110:-55, 6 + i * step :][:, : step - 4] for i in range(columns)]


@pytest.mark.slow
def test_each_picture_shows_the_epochs_before_on_its_own_scale_also_after_a_resume(kit, tmp_path):
    def fit(epochs, ckpt_path=None):
        monitor = Louder(kit.LAYER, kit.TABLE, panel_cases=1, labels_per_case=1, alarms=[])
        trainer = kit.make_trainer(tmp_path, monitor, max_epochs=epochs)
        data = kit.loader(kit.make_cases())
        trainer.fit(kit.make_lit(kit.make_net()), data, data, ckpt_path=ckpt_path, weights_only=True)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return monitor

    ends = [fit(2).publisher._scale["hirescam"]]
    second = fit(4, tmp_path / "last.ckpt")
    run = second.publisher.run_dir
    ends.append(second.publisher._scale["hirescam"])
    assert ends[1] >= 8 * ends[0]
    (case,) = {row["case"] for row in run.read_panel()["cases"]}
    first, (alone,) = strip(run, 0, case, 1)
    last, tiles = strip(run, 3, case, 4)
    assert first.shape == last.shape
    found = [colourful(tile) for tile in tiles]
    # The first epoch's own picture is colourful; on the last one's scale next to nothing was there.
    assert colourful(alone) > 8
    assert found[0] < colourful(alone) / 8
    assert found[3] > 8 * found[1]
    (kept,) = second.publisher._past._maps.values()
    assert list(kept) == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_checkpoint_that_is_validated_takes_no_epochs_place(kit, tmp_path):
    """A Trainer that only validates counts from 0, and would write over the fit's first epoch."""

    def monitor():
        return Louder(kit.LAYER, kit.TABLE, panel_cases=1, labels_per_case=1, alarms=[])

    data, first = kit.loader(kit.make_cases()), monitor()
    keep = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer = kit.make_trainer(tmp_path, first, keep, max_epochs=4, enable_checkpointing=True)
    trainer.fit(kit.make_lit(kit.make_net()), data, data)
    run, end = first.publisher.run_dir, first.publisher._scale["hirescam"]

    def files():
        return {p: p.read_bytes() for p in sorted(run.path.rglob("epochs/*/*")) if p.suffix == ".png"}

    (picture,) = run.epoch_path(0).glob("case*.png")
    before, maps = files(), run.maps_path(0).read_bytes()
    for epoch, monitoring in ((3, monitor()), (1, monitor()), (1, first)):
        other = kit.make_trainer(tmp_path, monitoring)
        path = tmp_path / f"epoch={epoch}.ckpt"
        other.validate(kit.make_lit(kit.make_net()), data, ckpt_path=path, weights_only=True, verbose=False)
        assert monitoring.publisher.run_dir.path == run.path
        changed = {path.parent.name for path, content in files().items() if content != before.get(path)}
        assert changed <= {f"{epoch:04d}"}
        assert run.maps_path(0).read_bytes() == maps
        saved = torch.load(path, weights_only=True)["callbacks"][first.state_key]["scale"]["hirescam"]
        assert saved < end or epoch == 3
        assert monitoring.publisher._scale["hirescam"] == (end if monitoring is first else saved)
        kept = list(range(epoch + 1))
        assert [list(maps) for maps in monitoring.publisher._past._maps.values()] == [kept]
        assert {row.epoch for row in run.read_scores()} == {0, 1, 2, 3}
        # The fit's own last columns, and what is there now.
        pixels = np.asarray(Image.open(run.epoch_path(epoch) / picture.name).convert("RGB"))
        tiles = tiles_of(pixels, epoch + 2)
        assert colourful(tiles[-1]) == pytest.approx(colourful(tiles[-2]), abs=0.5)
        # On the whole fit's scale the first epochs are grey.
        assert (colourful(tiles[-1]) > 1) == (monitoring is not first)
        before = files()


@pytest.mark.slow
def test_a_checkpoint_between_two_validations_leaves_all_of_the_fit_as_it_is(kit, tmp_path):
    def monitor():
        return ct.AttentionMonitor(kit.LAYER, kit.TABLE, panel_cases=1, labels_per_case=1, alarms=[])

    data, first = kit.loader(kit.make_cases()), monitor()
    keep = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2)
    trainer = kit.make_trainer(tmp_path, first, keep, max_epochs=3, enable_checkpointing=True)
    trainer.fit(kit.make_lit(kit.make_net()), data, data)
    run = first.publisher.run_dir

    def written():
        files = {p: p.read_bytes() for p in sorted(run.path.rglob("epochs/*/*"))}
        return files, {row[:-1]: row.value for row in run.read_scores()}

    assert {row.step for row in run.read_scores()} == {3, 6, 9}
    # Step 2 comes before any validation: nothing says which run it is of, and it has one of its own. The others are
    # between two; step 6 is saved before the validation of its weights, and does not know of it.
    for step, epoch in ((2, 0), (4, 3), (8, 4), (6, 5)):
        files, rows = written()
        other, path = kit.make_trainer(tmp_path, added := monitor()), tmp_path / f"step={step}.ckpt"
        other.validate(kit.make_lit(kit.make_net()), data, ckpt_path=path, weights_only=True, verbose=False)
        now, more = written()
        assert all(now[p] == content for p, content in files.items())
        own = added.publisher.run_dir
        assert (own.path == run.path) == (step != 2)
        assert {row[:2] for row in own.read_scores()} - {row[:2] for row in rows} == {(epoch, step)}
        assert {p.parent.name for p in now.keys() - files.keys()} == ({f"{epoch:04d}"} if step != 2 else set())
        assert all(more[row] == value for row, value in rows.items())
