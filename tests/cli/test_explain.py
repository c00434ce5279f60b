"""explain and layers: the checkpoint alone is enough, and maps lie exactly where the scan lies."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import camtrain as ct
from camtrain.cli import rebuild
from camtrain.cli.checkpoint import read_checkpoint
from camtrain.cli.folder import appearing
from camtrain.data import PhantomDataModule
from camtrain.models import LitClassifier

CT = Path(__file__).parents[2].parent / "shared" / "data" / "ct_abdomen"


def scan(trained, name="test-00000"):
    return trained.manifest.parent / f"{name}_ct.nii.gz"


def organs(trained, name="test-00000"):
    return trained.manifest.parent / f"{name}_organs.nii.gz"


@pytest.mark.slow
def test_checkpoint_alone(trained, run, tmp_path):
    result = run("explain", "--ckpt_path", trained.checkpoint, "--image", scan(trained), "--out", tmp_path / "maps")
    assert result.code == 0, result.err
    out = tmp_path / "maps"
    names = {"effusion.nii.gz", "nodule.nii.gz", "montage.png", "scores.json"}
    assert {p.name for p in out.iterdir()} == names
    assert [p.name for p in tmp_path.iterdir()] == ["maps"]
    assert Image.open(out / "montage.png").width == 1200
    said = json.loads((out / "scores.json").read_text())["labels"]
    model = LitClassifier.load_from_checkpoint(trained.checkpoint).eval()
    data = PhantomDataModule(labels=["effusion", "nodule"], cases=4, test_cases=1, size=(24, 18, 30))
    image = next(iter(data.test_dataloader()[0]))["image"]
    logits = model(image)[0].detach()
    maps = ct.explain(model, image)[0]
    for index, name in enumerate(["effusion", "nodule"]):
        # The file holds whole Hounsfield units, the module exact ones.
        assert said[name]["logit"] == pytest.approx(float(logits[index]), abs=2e-3)
        assert said[name]["probability"] == pytest.approx(float(logits[index].sigmoid()), abs=1e-3)
        assert said[name]["map_sum"] == pytest.approx(float(maps[index].sum()), abs=2e-3)
        assert said[name]["rest"] == pytest.approx(float(model.net.head.bias[index].detach()), abs=1e-5)
        written = nib.load(out / f"{name}.nii.gz")
        original = nib.load(scan(trained))
        assert written.shape == original.shape
        np.testing.assert_allclose(written.affine, original.affine)
        assert written.get_data_dtype() == np.float32
        # In the middle of a cell of 6 voxels, the two voxels beside the centre average to the cell's value.
        grid = written.get_fdata()
        blocks = np.stack([grid[i::6, j::6, k::6] for i in (2, 3) for j in (2, 3) for k in (2, 3)]).mean(axis=0)
        assert np.corrcoef(blocks.ravel(), maps[index].numpy().ravel())[0, 1] > 0.99
        assert f"{name}: p = " in result.out


def test_labels_layer_method_and_organs(trained, run, tmp_path):
    result = run(
        *("explain", "--ckpt_path", trained.checkpoint, "--image", scan(trained), "--organs", organs(trained)),
        *("--labels", "nodule", "--method", "layercam", "--layer", "net.features.1", "--out", tmp_path / "a" / "b"),
    )
    assert result.code == 0, result.err
    said = json.loads((tmp_path / "a" / "b" / "scores.json").read_text())
    assert list(said["labels"]) == ["nodule"]
    model = LitClassifier.load_from_checkpoint(trained.checkpoint).eval()
    maps = ct.explain(model, torch.zeros(1, 1, 24, 18, 30), "layercam", "net.features.1")
    assert said["grid"] == list(maps.shape[2:])
    assert b"layercam nodule" in bytes(nib.load(tmp_path / "a" / "b" / "nodule.nii.gz").header["descrip"])


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["LPS", "SRA", "PIL"])
def test_same_map_in_any_orientation(trained, run, tmp_path, axes):
    """A scan that is stored in another order gets the same map, stored in that order."""
    original = nib.load(scan(trained))
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(original.affine), nib.orientations.axcodes2ornt(axes)
    )
    nib.save(original.as_reoriented(turn), tmp_path / "turned.nii.gz")
    maps = []
    for number, file in enumerate([scan(trained), tmp_path / "turned.nii.gz"]):
        out = tmp_path / str(number)
        assert run("explain", "--ckpt_path", trained.checkpoint, "--image", file, "--out", out).code == 0
        written, given = nib.load(out / "nodule.nii.gz"), nib.load(file)
        assert written.shape == given.shape
        np.testing.assert_allclose(written.affine, given.affine, atol=1e-5)
        np.testing.assert_allclose(written.get_sform(), written.get_qform(), atol=1e-4)
        maps.append(nib.as_closest_canonical(written).get_fdata())
    np.testing.assert_allclose(maps[0], maps[1], atol=1e-5)
    assert np.ptp(maps[0]) > 0


def test_zero_outside_of_what_the_network_saw(trained, run, tmp_path):
    """A wide, finely sampled scan: the network sees its middle 320 x 240 x 300 mm, the rest of the map is 0."""
    affine = np.diag([-7.0, 5.0, 9.0, 1.0])
    affine[:3, 3] = [200.0, -30.0, 70.0]
    shape = (70, 60, 40)
    rng = np.random.default_rng(0)
    nib.save(nib.Nifti1Image(rng.integers(-900, 600, shape).astype(np.int16), affine), tmp_path / "wide.nii.gz")
    result = run(
        "explain", "--ckpt_path", trained.checkpoint, "--image", tmp_path / "wide.nii.gz", "--out", tmp_path / "m"
    )
    assert result.code == 0, result.err
    written = nib.load(tmp_path / "m" / "nodule.nii.gz")
    assert written.shape == shape
    np.testing.assert_allclose(written.affine, affine)
    inside = written.get_fdata() != 0
    extent = [
        (np.ptp(np.nonzero(inside.any(axis=tuple({0, 1, 2} - {a})))[0]) + 1) * abs(affine[a, a]) for a in range(3)
    ]
    np.testing.assert_allclose(extent, (320, 240, 300), atol=30)
    where = np.argwhere(inside)
    middle = written.affine[:3, :3] @ ((where.min(axis=0) + where.max(axis=0)) / 2) + written.affine[:3, 3]
    centre = written.affine[:3, :3] @ ((np.array(shape) - 1) / 2) + written.affine[:3, 3]
    np.testing.assert_allclose(middle, centre, atol=15)


@pytest.mark.slow
@pytest.mark.skipif(not CT.exists(), reason="the real CT is not here")
def test_real_scan_through_manifest_training(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = "\n".join(f"{s},{CT}/ct.nii.gz,{CT}/organs.nii.gz,{s},1,0" for s in ["train"])
    (tmp_path / "m.csv").write_text(f"id,image,organs,split,liver_lesion,kidney_lesion\n{rows}\n")
    table = {
        "organs": {"liver": 5, "kidney_left": 3},
        "labels": {"liver_lesion": ["liver"], "kidney_lesion": ["kidney_left"]},
    }
    from camtrain.anatomy.organ_table import OrganTable

    known = OrganTable.load("totalsegmentator_abdomen").to_dict()["organs"]
    table["organs"] = known
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
    net = {"class_path": "camtrain.models.FlattenNet", "init_args": {"size": [60, 48, 18], "widths": [3, 3, 3, 3]}}
    config = {
        "data": {
            "class_path": "camtrain.data.ManifestDataModule",
            "init_args": {
                "manifest": "m.csv",
                "table": "table.yaml",
                "spacing": [5, 6, 5],
                "size": [60, 48, 18],
                "val_split": None,
            },
        },
        "model": {"class_path": "camtrain.models.LitClassifier", "init_args": {"net": net}},
        "trainer": {
            "max_steps": 2,
            "accelerator": "cpu",
            "logger": False,
            "callbacks": [{"class_path": "camtrain.callbacks.MaskLossCallback"}],
        },
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    fitted = run("fit", "--config", "c.yaml")
    assert fitted.code == 0, fitted.err
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    (tmp_path / "m.csv").unlink()  # the checkpoint alone knows spacing, size, window and table
    (tmp_path / "table.yaml").unlink()
    result = run(
        *("explain", "--ckpt_path", checkpoint, "--image", CT / "ct.nii.gz"),
        *("--organs", CT / "organs.nii.gz", "--out", "maps"),
    )
    assert result.code == 0, result.err
    written, original = nib.load("maps/liver_lesion.nii.gz"), nib.load(CT / "ct.nii.gz")
    assert written.shape == original.shape
    np.testing.assert_array_equal(written.affine, original.affine)
    assert np.ptp(written.get_fdata()) > 0


# --------------------------------------------------------------------------------------------------------- wrong input


def test_wrong_words(trained, refused, tmp_path):
    words = ["explain", "--ckpt_path", trained.checkpoint, "--image", scan(trained), "--out", tmp_path / "maps"]
    assert "'nodle'; nearest: nodule" in refused(*words, "--labels", "nodle")
    assert "'hirescm'; nearest: hirescam" in refused(*words, "--method", "hirescm")
    assert "nearest: net.relu" in refused(*words, "--layer", "net.rellu")
    assert "spatial" in refused(*words, "--layer", "net.head")
    assert "absent.nii.gz" in refused(*words[:3], "--image", tmp_path / "absent.nii.gz", *words[5:])
    assert "train-00000_ct" in refused(*words, "--organs", scan(trained, "train-00000"))
    assert "required" in refused("explain", "--image", scan(trained))
    assert "--ouch" in refused(*words, "--ouch")
    assert "phantm" in refused(*words, "--organs", organs(trained), "--table", "phantm")
    assert list(tmp_path.iterdir()) == []


def test_nan_truncated_and_foreign_grid(trained, refused, tmp_path):
    words = ["explain", "--ckpt_path", trained.checkpoint, "--out", tmp_path / "maps", "--image"]
    good = nib.load(scan(trained))
    data = good.get_fdata().astype(np.float32)
    data[0, 0, 0] = np.inf
    nib.save(nib.Nifti1Image(data, good.affine), tmp_path / "inf.nii.gz")
    assert "inf.nii.gz" in refused(*words, tmp_path / "inf.nii.gz")
    (tmp_path / "cut.nii.gz").write_bytes(scan(trained).read_bytes()[:500])
    assert "cut.nii.gz" in refused(*words, tmp_path / "cut.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((9, 9, 9), np.uint8), np.eye(4)), tmp_path / "grid.nii.gz")
    assert "one voxel grid" in refused(*words, scan(trained), "--organs", tmp_path / "grid.nii.gz")
    assert not (tmp_path / "maps").exists()


def test_taken_folder(trained, run, refused, tmp_path):
    words = ["explain", "--ckpt_path", trained.checkpoint, "--image", scan(trained), "--out", tmp_path / "maps"]
    assert run(*words).code == 0
    assert "is not empty" in refused(*words)
    assert run(*words, "--overwrite", "--labels", "nodule").code == 0
    assert not (tmp_path / "maps" / "effusion.nii.gz").exists()
    (tmp_path / "maps" / "thesis.tex").write_text("mine")
    assert "other files" in refused(*words, "--overwrite")
    assert (tmp_path / "maps" / "thesis.tex").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["maps"]


def test_nothing_half_written(tmp_path):
    def interrupted():
        with appearing(tmp_path / "out", False, "x") as folder:
            (folder / "half").write_text("")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ct.InputError, match="the file"), appearing(tmp_path / "file", True, "x"):
        pass


def foreign_net() -> dict:
    arguments = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "block_config": [1, 1], "init_features": 4}
    return {"class_path": "monai.networks.nets.DenseNet", "init_args": arguments}


@pytest.mark.slow
def test_foreign_classes_need_config_or_trust(write, run, refused, trained, tmp_path):
    config = write(model__init_args__net=foreign_net(), trainer__callbacks=[])
    assert run("fit", "--config", config, "--trainer.max_steps=1").code == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    words = ["explain", "--ckpt_path", checkpoint, "--image", scan(trained)]
    line = refused(*words, "--out", "maps")
    assert "monai.networks.nets.DenseNet" in line
    assert "--trust" in line
    assert run(*words, "--out", "maps", "--trust").code == 0
    shown = run(*words, "--out", "maps2", "--config", config)
    assert shown.code == 0, shown.err
    one, two = (json.loads(Path(d, "scores.json").read_text())["labels"] for d in ("maps", "maps2"))
    assert one == two
    assert "DenseNet" in refused(*words, "--out", "maps3", "--config", trained.config)


def test_a_name_inside_camtrain_that_leads_elsewhere_is_foreign():
    assert rebuild.is_own_class("camtrain.models.lit_classifier.LitClassifier")
    assert not rebuild.is_own_class("camtrain.models.lit_classifier.nn.Module")
    assert not rebuild.is_own_class("camtrain.models.flatten_net.nn")
    assert not rebuild.is_own_class("camtrain.data.phantom_export.export_phantom")
    assert not rebuild.is_own_class("FlattenNet")


@pytest.mark.slow
def test_checkpoint_made_in_python(run, refused, trained, tmp_path, monkeypatch):
    """Without the command line: camtrain's own nets and modules are known, others need a config."""
    import pytorch_lightning as pl

    from camtrain.models import FlattenNet

    monkeypatch.chdir(tmp_path)
    data = PhantomDataModule(labels=["effusion", "nodule"], cases=4, size=(24, 18, 30), batch_size=2)
    model = LitClassifier(FlattenNet(size=(24, 18, 30), widths=(4, 8, 8, 6)), labels=data.labels)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_steps=1, limit_val_batches=0, default_root_dir=tmp_path, **quiet)
    trainer.fit(model, data)
    trainer.save_checkpoint("python.ckpt")
    result = run("explain", "--ckpt_path", "python.ckpt", "--image", scan(trained), "--out", "maps")
    assert result.code == 0, result.err
    content = read_checkpoint("python.ckpt")
    del content["hyper_parameters"]["net"]
    torch.save(content, "bare.ckpt")
    words = ("explain", "--image", scan(trained), "--ckpt_path")
    assert "how its network is built" in refused(*words, "bare.ckpt", "--out", "maps2")
    assert run(*words, "bare.ckpt", "--out", "maps2", "--config", trained.config).code == 0
    del content["datamodule_hyper_parameters"]
    torch.save(content, "bare.ckpt")
    assert "how images were read" in refused(*words, "bare.ckpt", "--out", "maps3")


# -------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.slow
def test_layers_of_a_config_and_of_a_checkpoint(trained, run):
    for words in (["--config", trained.config], ["--ckpt_path", trained.checkpoint]):
        shown = run("layers", *words)
        assert shown.code == 0, shown.err
        (default,) = [line for line in shown.out.splitlines() if "* " in line and "layer=None" not in line]
        assert "net.relu" in default
        assert "6 x 4 x 3 x 5" in default
        assert "80 x 80 x 60" in default  # 320 / 4, 240 / 3, 300 / 5 mm
        assert "%" in default


@pytest.mark.slow
def test_layers_takes_other_options_and_depth(trained, run, refused):
    words = ("layers", "--config", trained.config, "--no_seen")
    assert "2 x 4 x 3 x 5" in run(*words, "--model.net.widths=[2,2,2,2]").out
    deep, flat = run(*words, "--depth", "3").out, run(*words, "--depth", "1").out
    assert "net.features.0.0" in deep
    assert "net.features.0" not in flat
    assert "1 or more" in refused(*words, "--depth", "0")
    assert "--config or --ckpt_path" in refused("layers")
    assert "net.features" in refused(*words, "--model.net.widths=[2,2,2,2]", "--ckpt_path", trained.checkpoint)


@pytest.mark.parametrize("method", [row.name for row in ct.methods() if row.name != "cam"])
def test_every_method(trained, run, tmp_path, method):
    arguments = ["--ckpt_path", trained.checkpoint, "--image", scan(trained), "--out", tmp_path / "maps"]
    result = run("explain", *arguments, "--method", method, "--labels", "nodule")
    assert result.code == 0, result.err
    assert np.isfinite(nib.load(tmp_path / "maps" / "nodule.nii.gz").get_fdata()).all()


def test_options_of_a_method_and_several_layers(trained, run, tmp_path):
    arguments = ["--ckpt_path", trained.checkpoint, "--image", scan(trained), "--layer", "features.3,relu"]
    sums = {}
    for contrast in ("paper", "others"):
        out = tmp_path / contrast
        result = run("explain", *arguments, "--out", out, "--method", "lrp", "--option", f"contrast={contrast}")
        assert result.code == 0, result.err
        sums[contrast] = json.loads((out / "scores.json").read_text())["labels"]["nodule"]["map_sum"]
    assert sums["paper"] != sums["others"]


@pytest.mark.slow
def test_rest_is_told_only_where_maps_add_up(trained, run, tmp_path):
    arguments = ["--ckpt_path", trained.checkpoint, "--image", scan(trained), "--labels", "nodule"]

    def said(name, *words):
        result = run("explain", *arguments, "--out", tmp_path / name, *words)
        assert result.code == 0, result.err
        scores = json.loads((tmp_path / name / "scores.json").read_text())
        return scores["layer"], scores["labels"]["nodule"]

    for method in ("hirescam", "respondcam", "xgradcam", "lrp"):
        layer, row = said(method, "--method", method)
        assert layer == "net.relu"
        assert row["rest"] == pytest.approx(row["logit"] - row["map_sum"])
    assert said("none", "--method", "lrp", "--option", "contrast=none")[1]["rest"] is not None
    assert said("contrast", "--method", "lrp", "--option", "contrast=others")[1]["rest"] is None
    for method in ("gradcam", "gradcam++", "layercam", "scorecam", "relevancecam"):
        assert said(f"not {method}", "--method", method)[1]["rest"] is None
    layer, row = said("two", "--layer", " features.3 , net.relu ")
    assert (layer, row["rest"]) == ("net.features.3,net.relu", None)
    assert said("input", "--layer", "input")[0] == "input"


def test_several_layers_are_their_mean(trained, run, tmp_path):
    result = run(
        *("explain", "--ckpt_path", trained.checkpoint, "--image", scan(trained), "--out", tmp_path / "maps"),
        *("--layer", "features.3,relu", "--labels", "nodule"),
    )
    assert result.code == 0, result.err
    said = json.loads((tmp_path / "maps" / "scores.json").read_text())
    model = LitClassifier.load_from_checkpoint(trained.checkpoint).eval()
    data = PhantomDataModule(labels=["effusion", "nodule"], cases=4, test_cases=1, size=(24, 18, 30))
    image = next(iter(data.test_dataloader()[0]))["image"]
    maps = ct.explain(model, image, layer=["features.3", "relu"], labels=[1], fuse="mean")
    assert said["grid"] == list(maps.shape[2:])
    assert said["labels"]["nodule"]["map_sum"] == pytest.approx(float(maps.sum()), abs=2e-3)


@pytest.mark.parametrize("words", ["", "relu,,features.3", " , ", "relu,"])
def test_empty_layer_names(trained, refused, tmp_path, words):
    arguments = ["--ckpt_path", trained.checkpoint, "--image", scan(trained), "--out", tmp_path / "maps"]
    assert "--layer expects names separated by commas" in refused("explain", *arguments, "--layer", words)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("contrast", "NAME=VALUE"),
        ("contrast=papr", "paper"),
        ("contrst=paper", "contrast"),
        ("box=[0", "YAML"),
        ("box", "'box=[0, 1]'"),
        ("box=[0", "'box=[0, 1]'"),
    ],
)
def test_wrong_options_of_a_method(trained, refused, tmp_path, option, says):
    arguments = ["--ckpt_path", trained.checkpoint, "--image", scan(trained), "--out", tmp_path / "maps"]
    assert says in refused("explain", *arguments, "--method", "lrp", "--option", option)
