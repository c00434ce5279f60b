"""Model and preprocessing out of a checkpoint alone, or with the help of the config that it was trained with."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.cli import instantiate_module

from camtrain._errors import InputError
from camtrain.anatomy.organ_table import OrganTable
from camtrain.cli.checkpoint import check_fits

_OWN_MODULE = "camtrain.models.LitClassifier"
_OWN_DATA = {"manifest": "camtrain.data.ManifestDataModule", "shortcut": "camtrain.data.PhantomDataModule"}


@dataclass(frozen=True)
class Preprocessing:
    """How a scan becomes the network's input.

    Attributes:
        spacing: Voxel size in mm, or None for the scan's own.
        size: Voxels after cropping or padding, or None.
        window: HU that become 0 and 1.
        table: Organ table of the training, or None.
    """

    spacing: Any
    size: Any
    window: Sequence[float]
    table: OrganTable | None


def rebuild_model(
    checkpoint: Mapping[str, Any], path: str | Path, config: Mapping[str, Any] | None = None, trust: bool = False
) -> pl.LightningModule:
    """The trained model, in eval mode on the CPU.

    Args:
        checkpoint: From `read_checkpoint`.
        path: Its file, for messages.
        config: `model` of a config (class_path, init_args); wins over what the checkpoint says of its classes.
        trust: Build classes outside camtrain that the checkpoint names.

    Raises:
        InputError: The checkpoint names foreign classes without `trust`, does not say how its network is built, or
            does not fit the model of the config.
    """
    saved = dict(checkpoint.get("hyper_parameters", {}))
    arguments = _from_config(config, saved) if config is not None else _from_checkpoint(checkpoint, saved, path, trust)
    model = instantiate_module(pl.LightningModule, arguments)
    check_fits(checkpoint, model, path)
    model.load_state_dict(checkpoint["state_dict"], strict=bool(getattr(model, "strict_loading", True)))
    return model.eval()


def _from_config(config: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    arguments = dict(config.get("init_args") or {})
    if arguments.get("labels") is None and saved.get("labels") is not None:
        arguments["labels"] = list(saved["labels"])
    return {"_class_path": config["class_path"], **arguments}


def _from_checkpoint(
    checkpoint: Mapping[str, Any], saved: dict[str, Any], path: str | Path, trust: bool
) -> dict[str, Any]:
    saved.pop("_instantiator", None)
    if "_class_path" not in saved and "camtrain_net" in checkpoint:
        saved["_class_path"] = _OWN_MODULE
    if "_class_path" not in saved or (is_own_class(saved["_class_path"]) and saved.get("net") is None):
        raise InputError(
            f"{path} does not say how its network is built (it was built in Python): give --config with the model"
        )
    foreign = [name for name in dict.fromkeys(_class_names(saved)) if not is_own_class(name)]
    if foreign and not trust:
        raise InputError(
            f"{path} names classes outside camtrain ({', '.join(foreign[:3])}), whose code would run: give --config "
            "with the config that it was trained with, or --trust if you trust the file"
        )
    return saved


def _class_names(value: Any, key: str = "") -> Iterator[str]:
    """Every name that would be imported: class paths at any depth, and plain names where a network or loss stands."""
    if isinstance(value, Mapping):
        for word, inner in value.items():
            yield from _class_names(inner, str(word))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _class_names(inner, key)
    elif isinstance(value, str) and key in ("class_path", "_class_path", "net", "loss"):
        yield value


def is_own_class(name: str) -> bool:
    """Does the dotted name lead to a class that camtrain itself defines?

    Example:
        >>> is_own_class("camtrain.models.FlattenNet"), is_own_class("monai.networks.nets.DenseNet121")
        (True, False)
    """
    module, _, last = name.rpartition(".")
    if module.split(".")[0] != "camtrain":
        return False
    try:
        found = getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError):
        return False
    return isinstance(found, type) and found.__module__.split(".")[0] == "camtrain"


def data_arguments(
    checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None, path: str | Path
) -> tuple[str, dict[str, Any]]:
    """Class and arguments of one of camtrain's data modules, from the checkpoint or else from a config's `data`.

    Raises:
        InputError: Neither tells.
    """
    saved = dict(checkpoint.get("datamodule_hyper_parameters", {}))
    saved.pop("_instantiator", None)
    name = saved.pop("_class_path", None)
    if name is None:
        name = next((known for word, known in _OWN_DATA.items() if word in saved), None)
    if name is None and config is not None:
        name, saved = config["class_path"], dict(config.get("init_args") or {})
    if name is None or name not in _OWN_DATA.values():
        raise InputError(
            f"{path} does not say how images were read ({name or 'no data module'}): give --config whose data is a "
            "camtrain.data.ManifestDataModule with the spacing, size and window of the training"
        )
    return name, saved


def preprocessing(name: str, arguments: Mapping[str, Any]) -> Preprocessing:
    """What must be done to a scan, from the class and arguments of a data module.

    Example:
        >>> preprocessing("camtrain.data.PhantomDataModule", {"size": 40}).spacing
        [8.0, 6.0, 7.5]
    """
    if name == _OWN_DATA["manifest"]:
        table = arguments.get("table")
        return Preprocessing(
            spacing=arguments.get("spacing"),
            size=arguments.get("size"),
            window=arguments.get("window") or (-1000.0, 800.0),
            table=None if table is None else OrganTable.load(table),
        )
    from camtrain.data.phantom import DEFAULT_SIZE, WINDOW
    from camtrain.data.phantom_frame import FIELD_OF_VIEW

    given = arguments.get("size") or DEFAULT_SIZE
    size = [given] * 3 if isinstance(given, int) else list(given)
    spacing = [extent / n for extent, n in zip(FIELD_OF_VIEW, size, strict=True)]
    return Preprocessing(spacing, size, WINDOW, OrganTable.load("phantom"))


def rebuild_data(name: str, arguments: Mapping[str, Any]) -> Any:
    """The data module itself.

    Raises:
        InputError: Its files are not there any more, or an argument is wrong.
    """
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)(**arguments)
