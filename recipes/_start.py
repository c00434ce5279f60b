"""How recipes begin: options are checked before anything is trained, and a refusal is one sentence. Not a recipe."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from camtrain import InputError
from camtrain.cli.exits import guarded
from camtrain.cli.folder import check_writable
from camtrain.data import make_voc_tree


def start(main: Callable[[], None]) -> None:
    """Run `main`; as on the command line, wrong input becomes one line and code 2, and a defect keeps its traceback."""
    quiet()
    sys.exit(guarded(main))


def quiet() -> None:
    """No lines of Lightning's about each of many trainings."""
    # Where both packages are installed, the messages of either come from the one that was imported last.
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=name.replace(".", r"\."))


def count(text: str) -> int:
    """An option's whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def out_folder(text: str) -> Path:
    """`--out`, made now: who may not write there learns it before hours of training."""
    folder = Path(text)
    try:
        check_writable(folder)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--out ")) from error
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def voc_tree(text: str) -> Path:
    """A folder that looks like PASCAL VOC; a mistyped one must not be filled with drawn pictures."""
    missing = [name for name in ("JPEGImages", "Annotations", "ImageSets") if not (Path(text) / name).is_dir()]
    if missing:
        raise argparse.ArgumentTypeError(
            f"expected a VOC tree with the folders JPEGImages, Annotations, ImageSets, got {text} without "
            f"{missing[0]}: name the folder that holds them, such as VOCdevkit/VOC2012, or leave the option out"
        )
    return Path(text)


def with_networks(text: str) -> Path:
    """`--models`: the folder of an earlier study of depth."""
    if not (Path(text) / "models").is_dir():
        raise argparse.ArgumentTypeError(
            f"expected the --out folder of relevance_cam.py, with its networks in models/, got {text}: run that recipe "
            "first, or leave --models out to train here"
        )
    return Path(text)


def drawn_tree(root: Path, **settings: Any) -> Path:
    """The tree of drawn pictures at `root`, made where it is missing; an interruption leaves none, not a part."""
    if not root.exists():
        part = root.with_name(f"{root.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        make_voc_tree(part, **settings)
        part.rename(root)
    return root


def keep(state: dict[str, Any], path: Path) -> None:
    """Save weights; the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    torch.save(state, part)
    part.replace(path)
