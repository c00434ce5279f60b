"""LightningCLI for camtrain: any module, any data module, every Trainer option, one sentence for a wrong config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import yaml
from pytorch_lightning.callbacks import ProgressBar, RichProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.utilities import rank_zero_info
from typing_extensions import override

from camtrain._errors import InputError
from camtrain.callbacks import ExactResume
from camtrain.cli.checkpoint import check_fits, find_checkpoint, read_checkpoint
from camtrain.cli.last import LAST, last_checkpoint
from camtrain.reporting import open_loggers

Until = Literal["parsed", "built", "done"]
_SKIP = {
    "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
    "validate": {"model", "dataloaders", "datamodule"},
    "test": {"model", "dataloaders", "datamodule"},
}


class SaveRunConfig(SaveConfigCallback):
    """Writes the whole config of a fit beside its logs; a file of an earlier fit stays as it is."""

    path: Path | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self.path is None:
            # Every process must ask: log_dir is a broadcast.
            folder = Path(trainer.log_dir or trainer.default_root_dir)
            if trainer.is_global_zero:
                folder.mkdir(parents=True, exist_ok=True)
                self.path = _free(folder, self.config_filename)
                self.parser.save(self.config, str(self.path), skip_none=False, overwrite=False, multifile=False)


def _free(folder: Path, name: str) -> Path:
    """`config.yaml`, or `config_2.yaml` and so on where another fit has written into the same folder."""
    path, number = folder / name, 2
    while path.exists():
        path, number = folder / f"{Path(name).stem}_{number}{Path(name).suffix}", number + 1
    return path


class CamtrainCLI(LightningCLI):
    """One command of `camtrain` on LightningCLI.

    The label names of the data module are handed to the model's `labels`; a config or a checkpoint that says other
    names is refused. A checkpoint is compared with the model before the Trainer sees it.

    Args:
        command: `fit`, `validate` or `test`.
        args: Words after the command.
        until: `parsed`: only read the config. `built`: make data module and model as well. `done`: run the command.

    Raises:
        InputError: The model's labels are not those of the data, or a checkpoint does not fit.
        argparse.ArgumentError: The config or an option is wrong.
    """

    def __init__(self, command: str, args: Sequence[str], until: Until = "done") -> None:
        self._until, self._command = until, command
        self._loaded: dict[str, Any] | None = None
        # One parser instead of three: each takes about a second to make.
        self.subcommands = lambda: {command: set(_SKIP[command])}  # type: ignore[method-assign]
        super().__init__(
            pl.LightningModule,
            subclass_mode_model=True,
            save_config_callback=SaveRunConfig if command == "fit" else None,
            seed_everything_default=0,
            parser_kwargs={"prog": "camtrain", "exit_on_error": False, command: {"exit_on_error": False}},
            args=[command, *args],
            auto_configure_optimizers=False,
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"model": {"class_path": "camtrain.models.LitClassifier"}})
        # For all commands: a fit's config is also that of its tests.
        parser.add_argument(
            "--exact_resume",
            type=bool,
            default=True,
            help="fit: end where a run without interruption ends (docs/faults.md)",
        )
        parser.link_arguments("data", "model.init_args.labels", compute_fn=self._labels_of_data, apply_on="instantiate")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # Without LightningCLI's warning about args= beside sys.argv: this is the command line.
        _check_yaml(args)
        self.config = parser.parse_args(args)

    @override
    def _parse_ckpt_path(self) -> None:
        """The config decides what the model is; Lightning would silently take the checkpoint's arguments instead."""
        if self.config[self.config.subcommand].get("model") is None:
            raise InputError("expected a model, got none: name one with --config or --model")

    @override
    def instantiate_classes(self) -> None:
        if self._until == "parsed":
            return
        self._read_checkpoint()
        super().instantiate_classes()
        self._find_last()
        if self._loaded is not None:
            check_fits(self._loaded, self.model, self._get(self.config_init, "ckpt_path"))

    def build(self) -> None:
        """Make data module and model after all, where only the config was read.

        Raises:
            InputError: One of them cannot be made, or they do not fit.
        """
        self._until = "built"
        self.instantiate_classes()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        if self._until != "done":
            return None  # type: ignore[return-value]
        _add_rich_bar(self._get(self.config_init, "trainer"))
        trainer: Any = super().instantiate_trainer(**kwargs)
        if self._command == "fit" and self._get(self.config, "exact_resume"):
            trainer.callbacks.insert(0, ExactResume())
        return trainer  # type: ignore[no-any-return]

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        if self._until == "done":
            open_loggers(self.trainer.loggers, self._loaded if self._command == "fit" else None)
            super()._run_subcommand(subcommand)

    def _read_checkpoint(self) -> None:
        """Open the checkpoint before anything is built: a wrong path shall not cost the reading of the data."""
        path = find_checkpoint(self._get(self.config, "ckpt_path"))
        if path is not None:
            self._loaded = read_checkpoint(path, weights_only=self._get(self.config, "weights_only") is not False)

    def _find_last(self) -> None:
        """Name the file that `last` stands for; where there is none, Lightning says so and starts a new run."""
        if self._until != "done" or str(self._get(self.config, "ckpt_path")) != LAST:
            return
        if (path := last_checkpoint(self.trainer)) is not None:
            rank_zero_info(f"camtrain: --ckpt_path last goes on from {path}")
            self.config_init[self._command]["ckpt_path"] = str(path)
            self._loaded = read_checkpoint(path, weights_only=self._get(self.config, "weights_only") is not False)

    def _labels_of_data(self, data: Any) -> list[str] | None:
        """The data module's labels, after a check that nobody says otherwise."""
        stated = self._stated_labels()
        labels = getattr(data, "labels", None)
        if labels is None:
            return stated
        labels = [str(name) for name in labels]
        if stated is not None and stated != labels:
            raise InputError(
                f"model.labels states {_short(stated)}, but the data has {_short(labels)}: leave model.labels out "
                "(the command line takes the data's), or choose the labels with data.labels"
            )
        saved = (self._loaded or {}).get("hyper_parameters", {}).get("labels")
        if saved is not None and list(saved) != labels:
            raise InputError(
                f"the checkpoint was trained on {_short(saved)}, but the data has {_short(labels)}: "
                "use the config that it was trained with, or choose the labels with data.labels"
            )
        return labels

    def _stated_labels(self) -> list[str] | None:
        model = self._get(self.config, "model")
        stated = model.get("init_args", {}).get("labels") if model is not None else None
        return [str(name) for name in stated] if isinstance(stated, list | tuple) else stated


def _add_rich_bar(trainer: Any) -> None:
    """Rich's bar, unless the user has one or wants none: Lightning takes tqdm's by itself before 2.5.3."""
    given = trainer.get("callbacks")
    callbacks = given if isinstance(given, list) else [] if given is None else [given]
    unwanted = trainer.get("enable_progress_bar") is False or trainer.get("barebones")
    if not unwanted and not any(isinstance(callback, ProgressBar) for callback in callbacks):
        trainer["callbacks"] = [*callbacks, RichProgressBar()]


def _check_yaml(args: Sequence[str]) -> None:
    """A config that is no YAML: jsonargparse's complaint would not name the file."""
    for word, following in zip(args, [*args[1:], ""], strict=True):
        given = following if word in ("--config", "-c") else word.removeprefix("--config=")
        if given == word or not Path(given).is_file():
            continue
        try:
            content = yaml.safe_load(Path(given).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{given} is not readable as YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise InputError(
                f"{given}: expected the keys data, model, trainer, got {type(content).__name__}: see configs/"
            )


def _short(names: Sequence[str], most: int = 6) -> str:
    return f"{len(names)} labels ({', '.join(names[:most])}{', ...' if len(names) > most else ''})"
