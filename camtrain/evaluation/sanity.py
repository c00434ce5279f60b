"""`sanity_check`: do attention maps depend on the weights that they are said to explain?

After Adebayo et al. (2018, arXiv:1810.03292): the weights are randomised from the head to the first layer, and the maps
before and after are compared. A method whose maps stay as they were shows the image and not the network. Whether the
test can tell at all is shown by controls: methods that are known to fail.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from camtrain._batch import read_batch
from camtrain._errors import InputError, nearest
from camtrain.cam.asked import Asked, read_asked
from camtrain.cam.engine import Reshape
from camtrain.cam.explaining import checked_image, checked_model, explain
from camtrain.cam.logits import PickLogits
from camtrain.cam.question import Layer, WantedLayer
from camtrain.cam.several import Layers, listed
from camtrain.evaluation._reading import columns_of
from camtrain.evaluation.predicting import logits_of
from camtrain.evaluation.randomising import Cascade
from camtrain.evaluation.sanity_table import Likeness, SanityTable, label_rows
from camtrain.evaluation.similarity import spearman, ssim

METHODS = ("hirescam", "gradcam", "respondcam", "layercam", "relevancecam")
CONTROLS = ("guided_backprop",)
Methods = Sequence[str | Mapping[str, Any]]
OwnMethod = Callable[[nn.Module, Tensor], Tensor]
Maps = dict[tuple[str, str], Tensor]
# A bar for what takes less would only flicker.
_LONG = 5.0


def sanity_check(
    model: nn.Module,
    image: Tensor,
    methods: Methods = METHODS,
    layer: Layer | Layers = None,
    labels: Any = None,
    stages: int | None = None,
    seed: int = 0,
    label: Tensor | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    controls: Methods = CONTROLS,
    own: Mapping[str, OwnMethod] | None = None,
    names: Sequence[str] | None = None,
    draws: int = 1,
    independent: bool = False,
    logits: PickLogits | None = None,
    reshape: Reshape | None = None,
    chunk: int = 8,
    progress: bool = True,
) -> SanityTable:
    """Randomise a model's weights module by module, and compare the maps of every method before and after.

    The model is only read: copies lose their weights. Trained weights matter: on a fresh network every method shows the
    same as after randomising, up to the draw.

    Args:
        model: Any module whose output contains logits (B, L).
        image: (B, C, *S): the cases to average over.
        methods: Names of `ct.methods()`, or dicts with the key `name` and the method's options.
        layer: Dotted name, module, "input", None for the last feature map, or a list of these.
        labels: Columns or names to explain, or a bool for every label; None = all.
        stages: Evaluate that many stages, evenly spread, the first and the last among them; None = every one.
        seed: Of the random weights.
        label: (B, L) truth: only (case, label) pairs with 1 are explained, as a map of an absent finding shows little.
        options: Method -> options, for methods and controls given by name alone.
        controls: Methods that are known to fail, listed like methods; they show that the test can tell.
        own: Title -> callable(model, image) -> (B, L, *S'), for methods that camtrain does not have.
        names: Label names; None = the model's `labels` if their number fits.
        draws: Cascades with weights of their own, to average over: seed, seed + 1, ...
        independent: Randomise one module at a time instead of more and more of them. There are no verdicts then.
        logits: Callable that picks (B, L) from the model's output.
        reshape: Callable that makes (B, K, *S') of a layer's output.
        chunk: Cases explained at once.
        progress: Show a bar on stderr when this takes more than seconds.

    Returns:
        A table that prints, with a row per stage, method, layer and label.

    Raises:
        InputError: An unknown method, option, layer or label, no pair to explain, a method that this network cannot
            be explained by, or a model that cannot be copied.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
        >>> table = sanity_check(model, torch.rand(3, 1, 18), ["hirescam"], progress=False)
        >>> [(row.stage, row.module, row.method, row.n) for row in table.means() if not row.control]
        [(1, '3', 'hirescam', 6), (2, '0', 'hirescam', 6)]
    """
    for name, count in {"stages": stages, "draws": draws, "chunk": chunk}.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise InputError(f"{name}= expects a whole number from 1 on, got {count!r}")
    asker = MapAsker.make(model, image, methods, controls, layer, labels, label, options, own, names, logits, reshape,
                          chunk)  # fmt: skip
    start = time.perf_counter()
    before = asker.maps(model)
    once = time.perf_counter() - start
    cascades = [Cascade(model, asker.image, independent=independent, seed=seed + draw) for draw in range(draws)]
    numbers = spread_stages(len(cascades[0]), stages)
    found: dict[int, list[dict[tuple[str, str], Likeness]]] = {number: [] for number in numbers}
    places: dict[int, tuple[int, str, float]] = {}
    with Progress(
        console=Console(stderr=True), transient=True, disable=not progress or once * draws * len(numbers) < _LONG
    ) as bar:
        task = bar.add_task("randomising", total=draws * len(numbers))
        for cascade in cascades:
            for number in numbers:
                stage = cascade.stage(number)
                found[number].append(asker.compare(before, stage.model))
                places[number] = (stage.number, stage.module, stage.share)
                bar.advance(task)
    rows = [row for n in numbers for row in label_rows(places[n], found[n], asker.pairs, asker.names, asker.controls)]
    return SanityTable(tuple(rows), independent)


def spread_stages(total: int, wanted: int | None) -> list[int]:
    """Which stages to evaluate: the head, all weights, and others evenly spread between them.

    Example:
        >>> spread_stages(9, 4), spread_stages(3, None), spread_stages(9, 1)
        ([1, 4, 6, 9], [1, 2, 3], [9])
    """
    if wanted is None or wanted >= total:
        return list(range(1, total + 1))
    if wanted == 1:
        return [total]
    return [1 + round(i * (total - 1) / (wanted - 1)) for i in range(wanted)]


@dataclass(frozen=True)
class MapAsker:
    """The same question to several models: which pairs, which methods, which layers.

    Attributes:
        image: (B, C, *S), cases with a pair only.
        pairs: (B, L) bool: what is explained.
        asked: Methods, the controls behind the others.
        own: The user's own methods.
        layers: By name, so that they are found in a copy too.
        names: Label names.
        controls: Titles of the controls.
        logits: Picks (B, L) from the model's output.
        reshape: Makes (B, K, *S') of a layer's output.
        chunk: Cases explained at once.
    """

    image: Tensor
    pairs: Tensor
    asked: tuple[Asked, ...]
    own: Mapping[str, OwnMethod]
    layers: tuple[WantedLayer, ...]
    names: tuple[str, ...]
    controls: frozenset[str]
    logits: PickLogits | None
    reshape: Reshape | None
    chunk: int

    @staticmethod
    def make(
        model: nn.Module,
        image: Tensor,
        methods: Methods,
        controls: Methods,
        layer: Layer | Layers,
        labels: Any,
        label: Tensor | None,
        options: Mapping[str, Mapping[str, Any]] | None,
        own: Mapping[str, OwnMethod] | None,
        names: Sequence[str] | None,
        logits: PickLogits | None,
        reshape: Reshape | None,
        chunk: int,
    ) -> MapAsker:
        """Check and resolve the arguments of `sanity_check`."""
        image = checked_image(image, checked_model(model))
        usual, known_to_fail = (_asked(group, options or {}) for group in (methods, controls))
        _check_options(options or {}, [*usual, *known_to_fail])
        titles = {each.key for each in usual}
        outputs = logits_of(model, image[:1], logits).shape[1]
        names = _names(model, names, outputs)
        pairs = _pairs(labels, label, names, len(image)).to(image.device)
        cases = pairs.any(dim=1)
        wanted = tuple(WantedLayer.of(model, image[:1], one) for one in listed(layer))
        return MapAsker(
            image=image[cases],
            pairs=pairs[cases],
            asked=(*usual, *(each for each in known_to_fail if each.key not in titles)),
            own=dict(own or {}),
            layers=wanted,
            names=tuple(names),
            controls=frozenset(each.key for each in known_to_fail),
            logits=logits,
            reshape=reshape,
            chunk=chunk,
        )

    def maps(self, model: nn.Module) -> Maps:
        """(title, layer) -> the maps of all pairs, (P, 1, *S').

        Raises:
            InputError: A method does not work on this model; the message names it.
        """
        found: Maps = {}
        for title, layer, ask in self._questions(model):
            parts = zip(torch.split(self.image, self.chunk), torch.split(self.pairs, self.chunk), strict=True)
            try:
                found[title, layer] = torch.cat([ask(image, pairs)[pairs][:, None] for image, pairs in parts])
            except InputError as error:
                what = "controls= names other methods, options= sets theirs" if title in self.controls else ""
                raise InputError(f"{title}: {error}{'; ' if what else ''}{what}") from error
        return found

    def compare(self, before: Maps, model: nn.Module) -> dict[tuple[str, str], Likeness]:
        """How alike the maps of another model are, pair by pair."""
        with warnings.catch_warnings():
            # What a method has to say about the network was said of the first one.
            warnings.simplefilter("ignore")
            after = self.maps(model)
        return {key: _likeness(maps, after[key]) for key, maps in before.items()}

    def _questions(self, model: nn.Module) -> Iterator[tuple[str, str, Callable[[Tensor, Tensor], Tensor]]]:
        """Title, layer, and callable(image, pairs) -> (B, L, *S')."""
        for each in self.asked:
            # Guided backprop has one map whatever the layer.
            for wanted in (None,) if each.name == "guided_backprop" else self.layers:
                yield each.key, "input" if wanted is None else wanted.key, partial(self._explain, model, each, wanted)
        for title, method in self.own.items():
            yield title, "own", partial(_own_maps, model, method)

    def _explain(
        self, model: nn.Module, asked: Asked, wanted: WantedLayer | None, image: Tensor, pairs: Tensor
    ) -> Tensor:
        layer, call = ("input", None) if wanted is None else (wanted.name, wanted.call)
        maps: Tensor = explain(
            model,
            image,
            asked.name,
            layer,
            pairs,
            logits=self.logits,
            reshape=self.reshape,
            call=call,
            **dict(asked.options),
        )
        return maps


def _likeness(before: Tensor, after: Tensor) -> Likeness:
    """All measures of P pairs; a pair without one of them has none."""
    each = torch.stack([spearman(before, after), spearman(before, after, absolute=True), ssim(before, after)]).squeeze(
        2
    )
    rho, absolute, structure = torch.where(each.isnan().any(dim=0), torch.nan, each).cpu()
    return Likeness(rho, absolute, structure)


def _asked(methods: Methods, options: Mapping[str, Mapping[str, Any]]) -> list[Asked]:
    """The methods, with the options given by name."""
    if not methods and not isinstance(methods, str):
        return []
    asked = read_asked(methods)
    # A key that is more than the name holds options of its own.
    return [
        read_asked([{"name": each.name, **options[each.name]}])[0]
        if each.name in options and each.key == each.name
        else each
        for each in asked
    ]


def _check_options(options: Mapping[str, Mapping[str, Any]], asked: Sequence[Asked]) -> None:
    known = {each.name for each in asked}
    if unused := [name for name in options if name not in known]:
        raise InputError(f"options= names {unused[0]!r}, which is not among the methods{nearest(unused[0], known)}")


def _names(model: nn.Module, names: Sequence[str] | None, outputs: int) -> list[str]:
    if names is not None and len(names) != outputs:
        raise InputError(f"names= has {len(names)} labels but the network gives {outputs} outputs: name them all")
    known = getattr(model, "labels", None) if names is None else names
    if isinstance(known, list | tuple) and len(known) == outputs:
        return [str(name) for name in known]
    return [f"label {i}" for i in range(outputs)]


def _pairs(labels: Any, label: Tensor | None, names: Sequence[str], cases: int) -> Tensor:
    """(B, L) bool: the pairs to explain."""
    pairs = torch.zeros(cases, len(names), dtype=torch.bool)
    pairs[:, list(range(len(names))) if labels is None else columns_of(labels, names)] = True
    if label is not None:
        truth = read_batch({"label": label}, outputs=len(names)).label
        if truth is None or len(truth) != cases:
            raise InputError(f"label= expects one row for each of the {cases} images, got {tuple(label.shape)}")
        pairs &= truth.cpu() == 1
    if not bool(pairs.any()):
        raise InputError("no (case, label) pair to explain: none of the labels= is present in label=; give more cases")
    return pairs


def _own_maps(model: nn.Module, method: OwnMethod, image: Tensor, pairs: Tensor) -> Tensor:
    maps = method(model, image)
    if not isinstance(maps, Tensor) or maps.ndim < 3 or maps.shape[:2] != pairs.shape:
        came = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise InputError(f"expected maps of shape ({len(pairs)}, {pairs.shape[1]}, *S) from an own method, got {came}")
    return maps.detach()
