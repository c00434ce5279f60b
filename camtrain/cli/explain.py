"""`camtrain explain`: where does a trained model look in one scan?"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from camtrain._errors import InputError, nearest
from camtrain.cli import surroundings
from camtrain.cli.exits import Parser
from camtrain.cli.folder import appearing
from camtrain.cli.segmenting import add_segment_options, check_segment_options, read_lesions, save_segmentations

if TYPE_CHECKING:
    from camtrain.anatomy.organ_table import OrganTable

_DESCRIPTION = """\
Attention maps of one scan by a trained model. Model and preprocessing come from the checkpoint. DIR then holds one
NIfTI file per label in the geometry of the scan (load both in 3D Slicer or ITK-SNAP), montage.png and scores.json. With
--grid layer the files hold the very cells of the layer, and with --organs the allowed cells beside them. --segment adds
a binary mask per label, always on the grid of the scan."""


@dataclass(frozen=True)
class Explained:
    """What a model says about one scan.

    Attributes:
        names: Labels that were asked for.
        logits: (n,).
        maps: (n, *S') signed, on the grid of the layer.
        layers: Dotted names of the layers that were taken.
        case: What `load_case` read.
    """

    names: list[str]
    logits: npt.NDArray[np.float64]
    maps: npt.NDArray[np.float32]
    layers: list[str]
    case: Mapping[str, Any]


def explain(args: Sequence[str]) -> None:
    """Write maps, picture and scores of one scan.

    Raises:
        InputError: An option, the checkpoint or a file is not as it should be.
    """
    options = _parser().parse_args(list(args))
    surroundings.prepare()
    from camtrain.reporting._files import distinct, file_stem

    check_segment_options(options.segment, options.lesions)

    with appearing(options.out, options.overwrite, made_by="camtrain explain") as folder:
        result, table = _explained(options)
        lesions = read_lesions(options.lesions, result.names, result.case)
        stems = distinct(file_stem(name) for name in result.names)
        files = [f"{stem}.nii.gz" for stem in stems]
        for name, file, values in zip(result.names, files, result.maps, strict=True):
            _save(folder / file, values, result.case, f"{options.method} {name}", options.grid)
        regions = _save_regions(folder, result, table, stems) if options.grid == "layer" else {}
        _save_montage(folder / "montage.png", result, _allowed(table, result.names, result.case), options)
        scores = _scores(result, options, files, regions)
        if options.segment:
            maps = dict(zip(result.names, result.maps, strict=True))
            for name, row in save_segmentations(folder, maps, stems, options.segment, result.case, lesions).items():
                scores["labels"][name]["segment"] = row
        (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    for name, row in scores["labels"].items():
        sys.stdout.write(f"{name}: p = {row['probability']:.3f}, {Path(options.out) / row['file']}\n")
    sys.stdout.write(f"picture: {Path(options.out) / 'montage.png'}\n")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("camtrain explain", _DESCRIPTION)
    add = parser.add_argument
    add("--ckpt_path", required=True, metavar="CKPT", help="checkpoint of a fit")
    add("--image", required=True, metavar="NIFTI", help="the scan (.nii, .nii.gz)")
    add("--out", required=True, metavar="DIR", help="folder to make; it appears whole or not at all")
    add("--labels", metavar="A,B", help="only these labels (default: all)")
    add("--method", default="hirescam", help="see camtrain methods (default: hirescam)")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="of the method; may be repeated")
    add("--layer", metavar="A[,B]", help="see camtrain layers (default: the last feature map); of several, the mean")
    add("--grid", choices=("scan", "layer"), default="scan", help="of the files: the scan's, or the layer's own cells")
    add("--organs", metavar="NIFTI", help="organs of the scan: a file, or a folder with one file per organ")
    add("--table", help="organ table, YAML or shipped name (default: that of the training)")
    add_segment_options(add)
    add("--config", action="append", default=[], metavar="YAML", help="config of the training; may be repeated")
    add("--trust", action="store_true", help="build classes outside camtrain that the checkpoint names")
    add("--overwrite", action="store_true", help="replace an earlier result in DIR")
    return parser


def _explained(options: argparse.Namespace) -> tuple[Explained, OrganTable | None]:
    import torch

    from camtrain.anatomy.organ_table import OrganTable
    from camtrain.cam.answering import read_options
    from camtrain.cam.explaining import explain as attention
    from camtrain.cam.fusing import fused
    from camtrain.cam.method_table import find_method
    from camtrain.cli.checkpoint import read_checkpoint
    from camtrain.cli.rebuild import data_arguments, preprocessing, rebuild_model
    from camtrain.data.manifest_transforms import load_case

    checkpoint = read_checkpoint(options.ckpt_path)
    config = _config(options.config)
    steps = preprocessing(*data_arguments(checkpoint, config.get("data"), options.ckpt_path))
    table = OrganTable.load(options.table) if options.table else steps.table
    case = load_case(options.image, steps.spacing, steps.size, steps.window, options.organs, table)
    model = rebuild_model(checkpoint, options.ckpt_path, config.get("model"), options.trust)
    with torch.no_grad():
        logits = _logits(model(case["image"]))
    names = _names(model, logits.shape[1])
    wanted = _wanted(options.labels, names)
    of_method = _method_options(options.option)
    read_options(find_method(options.method), of_method)  # before anything else could take one for its own
    asked = {"layer": _layers(options.layer), "labels": wanted, **of_method}
    each = attention(model, case["image"], options.method, **asked)
    maps = fused(list(each.values()))
    chosen = [names[index] for index in wanted]
    scores = logits[0, wanted].double().numpy()
    explained = Explained(chosen, scores, maps[0].float().numpy(), _full(model, each), case)
    return explained, table if options.organs else None


def _method_options(given: Sequence[str]) -> dict[str, Any]:
    """`contrast=paper` or `box=[0, 1]` -> option of the method, read as YAML."""
    import yaml

    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()):
            raise InputError(f"--option expects NAME=VALUE such as contrast=paper or 'box=[0, 1]', got {text!r}")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(
                f"--option {name}= cannot be read as YAML: {value!r}; a list is written as 'box=[0, 1]', with quotes"
            ) from None
    return found


def _layers(words: str | None) -> list[str | None]:
    """`--layer` as a list of names; None stands for the last feature map."""
    if words is None:
        return [None]
    names = [word.strip() for word in words.split(",")]
    if not all(names):
        raise InputError(f"--layer expects names separated by commas, got {words!r}; camtrain layers lists them")
    return list(names)


def _full(model: Any, names: Iterable[str]) -> list[str]:
    """Dotted names of the layers that were asked for, perhaps by the end of their names."""
    from camtrain.cam.layer_lookup import INPUT, find_layer, plain_name

    return [name if name == INPUT else plain_name(find_layer(model, name)[0]) for name in names]


def _config(files: Sequence[str]) -> dict[str, Any]:
    """`model` and `data` of the stacked configs, checked but not built."""
    if not files:
        return {}
    from camtrain.cli.lightning_cli import CamtrainCLI

    cli = CamtrainCLI("validate", [word for file in files for word in ("--config", file)], until="parsed")
    config = cli.config["validate"]
    return {key: config[key].as_dict() for key in ("model", "data") if config.get(key) is not None}


def _logits(output: Any) -> Any:
    from torch import Tensor

    if isinstance(output, Tensor) and output.ndim == 2:
        return output
    came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise InputError(
        f"camtrain explain expects a model that gives logits (B, L), got {came}: use ct.explain with logits="
    )


def _names(model: Any, outputs: int) -> list[str]:
    names = getattr(model, "labels", None)
    if not isinstance(names, list | tuple) or len(names) != outputs:
        return [f"label_{index}" for index in range(outputs)]
    return [str(name) for name in names]


def _wanted(words: str | None, names: Sequence[str]) -> list[int]:
    if words is None:
        return list(range(len(names)))
    chosen = list(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))
    if not chosen:
        raise InputError(f"--labels expects names separated by commas, got {words!r}{nearest(words, names)}")
    for word in chosen:
        if word not in names:
            raise InputError(f"--labels: the model has no label {word!r}{nearest(word, names)}")
    return [list(names).index(word) for word in chosen]


def _allowed(
    table: OrganTable | None, names: Sequence[str], case: Mapping[str, Any], size: Sequence[int] | None = None
) -> dict[str, npt.NDArray[np.bool_]]:
    """Region of each label that the table knows; without `size` at the network's resolution, for the picture."""
    import torch

    known = [name for name in names if table is not None and name in table.labels]
    if table is None or not known:
        return {}
    spacing = torch.linalg.vector_norm(case["affine"][:3, :3], dim=0)[None]
    regions = table.select(known).allowed(case["organs"], size=size, spacing=spacing)
    return {name: region.numpy() for name, region in zip(known, regions[0], strict=True)}


def _save(path: Path, values: npt.NDArray[Any], case: Mapping[str, Any], what: str, grid: str) -> None:
    """One map in the geometry of the scan, 0 where the network saw nothing; or on its own cells."""
    from camtrain.reporting import map_affine, resample_to, save_map

    if values.ndim != 3:
        raise InputError(f"expected maps with three axes for a scan, got shape {values.shape}: choose another --layer")
    affine = map_affine(case["affine"].numpy(), case["image"].shape[2:], values.shape)
    if grid == "scan":
        original = case["original_affine"].numpy()
        values, affine = resample_to(values, affine, case["original_shape"], original), original
    save_map(path, values, affine, descrip=f"camtrain {what}")


def _save_regions(folder: Path, result: Explained, table: OrganTable | None, stems: Sequence[str]) -> dict[str, str]:
    """Where each label may be read from, 1 or 0 on the cells of the maps: with the maps, all that the scores need."""
    files = {}
    regions = _allowed(table, result.names, result.case, result.maps.shape[1:])
    for name, stem in zip(result.names, stems, strict=True):
        if name in regions:
            files[name] = f"{stem}.allowed.nii.gz"
            _save(folder / files[name], regions[name].astype(np.float32), result.case, f"allowed {name}", "layer")
    return files


def _save_montage(
    path: Path, result: Explained, allowed: Mapping[str, npt.NDArray[np.bool_]], options: argparse.Namespace
) -> None:
    from PIL import Image

    from camtrain.reporting import compose_montage, geometry

    axes, spacing = geometry(result.case["affine"].numpy())
    captions = {n: f"p = {p:.2f}, {options.method}" for n, p in zip(result.names, _sigmoid(result.logits), strict=True)}
    picture = compose_montage(
        result.case["image"][0, 0].numpy(),
        dict(zip(result.names, result.maps, strict=True)),
        allowed,
        captions=captions,
        spacing=spacing,
        axes=axes,
        window=(0.0, 1.0),
    )
    Image.fromarray(picture).save(path)


def _sigmoid(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * logits)))


def _adds_up(method: str, options: Mapping[str, Any]) -> bool:
    """Does the method promise maps that add up to the logit, less biases?"""
    if method == "lrp":
        return bool(options.get("contrast", "none") == "none")
    return method in ("hirescam", "respondcam", "xgradcam")


def _scores(
    result: Explained, options: argparse.Namespace, files: Sequence[str], regions: Mapping[str, str]
) -> dict[str, Any]:
    """What scores.json holds. `rest` = logit - map_sum: the bias, where maps add up to the logit; null elsewhere."""
    adds_up = len(result.layers) == 1 and _adds_up(options.method, _method_options(options.option))
    sums = result.maps.reshape(len(result.names), -1).sum(axis=1, dtype=np.float64)
    rows = {
        name: {
            "probability": float(p),
            "logit": float(logit),
            "map_sum": float(total),
            "rest": float(logit - total) if adds_up else None,
            "file": file,
            **({"allowed": regions[name]} if name in regions else {}),
        }
        for name, p, logit, total, file in zip(
            result.names, _sigmoid(result.logits), result.logits, sums, files, strict=True
        )
    }
    return {
        "made_by": "camtrain explain",
        "checkpoint": str(options.ckpt_path),
        "image": str(options.image),
        "method": options.method,
        "layer": ",".join(result.layers),
        "grid": list(result.maps.shape[1:]),
        "labels": rows,
    }
