"""`camtrain methods` and `camtrain layers`: what there is to choose from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from camtrain._errors import InputError
from camtrain.cli import surroundings
from camtrain.cli.consoles import wide_console
from camtrain.cli.exits import Parser


def methods(args: Sequence[str]) -> None:
    """Print the table of attention methods."""
    Parser("camtrain methods", description="The attention methods: cost, guarantee, blind spot.").parse_args(list(args))
    from rich.table import Table

    from camtrain.cam.method_table import CELLS_NOT_EVIDENCE
    from camtrain.cam.method_table import methods as rows

    table = Table(title="n = labels that are asked for", title_justify="left", show_lines=True)
    for column in ("method", "trains", "forwards", "backwards", "grid", "guarantee", "blind spot", "reference"):
        table.add_column(column, overflow="fold")
    for row in rows():
        trains = "yes" if row.differentiable else "no"
        cells = (row.name, trains, row.forwards, row.backwards, row.grid, row.guarantee, row.blind_spot, row.reference)
        table.add_row(*cells)
    console = wide_console()
    console.print(table)
    console.print(CELLS_NOT_EVIDENCE, highlight=False)


def layers(args: Sequence[str]) -> None:
    """Print the layers of the model of a config or a checkpoint.

    Raises:
        InputError: Neither a config nor a checkpoint, or one of them is wrong.
    """
    parser = Parser(
        "camtrain layers",
        description="The layers that a map can be taken of. Other options are those of camtrain validate.",
    )
    parser.add_argument("--config", action="append", default=[], metavar="YAML", help="config; may be repeated")
    parser.add_argument("--ckpt_path", metavar="CKPT", help="checkpoint; alone it rebuilds model and data")
    parser.add_argument("--depth", type=int, default=2, help="levels of modules below the first branching (default: 2)")
    parser.add_argument("--no_seen", action="store_true", help="leave out the seen share (a backward pass per layer)")
    parser.add_argument("--trust", action="store_true", help="build classes outside camtrain that the checkpoint names")
    options, others = parser.parse_known_args(list(args))
    surroundings.prepare()
    if options.depth < 1:
        raise InputError(f"--depth expects 1 or more, got {options.depth}")
    if options.config:
        model, data = _from_config(options.config, options.ckpt_path, others)
    elif options.ckpt_path and not others:
        model, data = _from_checkpoint(options.ckpt_path, options.trust)
    else:
        raise InputError("camtrain layers expects --config or --ckpt_path" + (f", got {others[0]!r}" if others else ""))
    _print_layers(model, _first_batch(data), options.depth, not options.no_seen)


def _from_config(configs: Sequence[str], ckpt_path: str | None, others: Sequence[str]) -> tuple[Any, Any]:
    from camtrain.cli.lightning_cli import CamtrainCLI

    words = [word for file in configs for word in ("--config", file)] + list(others)
    cli = CamtrainCLI("validate", [*words, *(["--ckpt_path", ckpt_path] if ckpt_path else [])], until="built")
    if cli.datamodule is None:
        raise InputError("camtrain layers needs a batch: the config names no data module (data.class_path)")
    return cli.model, cli.datamodule


def _from_checkpoint(ckpt_path: str, trust: bool) -> tuple[Any, Any]:
    from camtrain.cli.checkpoint import read_checkpoint
    from camtrain.cli.rebuild import data_arguments, rebuild_data, rebuild_model

    checkpoint = read_checkpoint(ckpt_path)
    model = rebuild_model(checkpoint, ckpt_path, trust=trust)
    return model, rebuild_data(*data_arguments(checkpoint, None, ckpt_path))


def _first_batch(data: Any) -> Any:
    """One validation batch; without validation cases a training batch."""
    if hasattr(data, "cache_rate"):
        data.cache_rate = 0.0  # one batch is read, not the whole split
    data.prepare_data()
    data.setup("validate" if getattr(data, "val_split", "val") is not None else "fit")
    loader = data.val_dataloader() or data.train_dataloader()
    return next(iter(loader[0] if isinstance(loader, list | tuple) else loader))


def _print_layers(model: Any, raw: Any, depth: int, seen: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from camtrain._batch import read_batch
    from camtrain.cam.layer_table import layers as find_layers

    batch = read_batch(raw)
    if batch.image is None:
        raise InputError("camtrain layers expects batches with the key 'image'")
    rows = find_layers(model, batch.image, depth=depth, affine=batch.affine, seen=seen)
    image = " x ".join(map(str, batch.image.shape[1:]))
    table = Table(
        title=f"image {image}", title_justify="left", caption="* = taken by layer=None", caption_justify="left"
    )
    for column in ("layer", "class", "output", "cell (voxels)", "cell (mm)", "seen share"):
        table.add_column(column, overflow="fold", justify="left" if column in ("layer", "class") else "right")
    for row in rows:
        share = "-" if row.seen is None else f"{row.seen:.0%}"
        mark = "* " if row.default else "  "
        table.add_row(Text(mark + row.name), Text(row.kind), _by(row.shape), _by(row.cell), _by(row.cell_mm), share)
    console = wide_console()
    console.print(table)
    console.print("Seen share: part of the image that a central cell depends on.", highlight=False)


def _by(values: Sequence[float] | None) -> str:
    return (
        "-"
        if values is None
        else " x ".join(str(value) if isinstance(value, int) else f"{value:.3g}" for value in values)
    )
