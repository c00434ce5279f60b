"""From trained models and their data to the page and the key of a reader study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from camtrain._errors import InputError, nearest
from camtrain.cam.asked import Asked as Method
from camtrain.cam.asked import read_asked
from camtrain.cam.explaining import explain
from camtrain.evaluation.case import Case
from camtrain.evaluation.fingerprints import fingerprint
from camtrain.evaluation.reader_study import KINDS, TRUST_ANSWERS, KeyTask, Kind, StudyKey, save_key
from camtrain.evaluation.reader_study_cases import Contestant, read_candidates, shown_cases
from camtrain.evaluation.reader_study_choosing import Asked, choose_agreed, choose_answers, choose_pairs
from camtrain.reporting import geometry, telling_point
from camtrain.reporting.study_page import StudyPage, StudyTask, write_study
from camtrain.reporting.study_pictures import Pixels, blinded_pictures, equally_long, webp_bytes

Map = npt.NDArray[np.floating]


@dataclass(frozen=True)
class MadeStudy:
    """A study before it is written.

    Attributes:
        page: What readers get.
        key: What they must not get.
        notes: What could not be asked as wished.
    """

    page: StudyPage
    key: StudyKey
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Plan:
    """What was asked for, checked.

    Attributes:
        contestants: One or two.
        methods: At least one.
        layer: Of the maps.
        split: Of the data.
        cases: At most.
        choices: Of a discrimination.
        cut: Found means probability >= cut.
        width: Of a picture.
        names: Label names.
        columns: Labels that may be asked about.
        rng: Of all choices.
    """

    contestants: Sequence[Contestant]
    methods: Sequence[Method]
    layer: str | None
    split: str
    cases: int
    choices: int
    cut: float
    width: int
    names: Sequence[str]
    columns: Sequence[int]
    rng: np.random.Generator

    def source(self, contestant: Contestant, method: Method) -> str:
        """Model and method in words; the model's name where there are two."""
        return f"{contestant.name} {method.key}" if len(self.contestants) > 1 else method.key

    def sources(self) -> dict[str, tuple[Contestant, Method]]:
        """All maps of a finding."""
        return {self.source(c, m): (c, m) for c in self.contestants for m in self.methods}

    def contests(self) -> dict[str, tuple[str, str]]:
        """What is set side by side: two models under each method, or else the first method and each other one."""
        if len(self.contestants) > 1:
            a, b = self.contestants
            return {f"{a.name} against {b.name}, {m.key}": (self.source(a, m), self.source(b, m)) for m in self.methods}
        first, *others = (m.key for m in self.methods)
        return {f"{first} against {other}": (first, other) for other in others}


@dataclass
class _Draft:
    """Tasks while they are made: what readers see, and what the key says."""

    seen: list[tuple[Kind, int, tuple[str, ...], str, list[bytes]]] = field(default_factory=list)
    known: list[KeyTask] = field(default_factory=list)

    def add(self, task: KeyTask, group: int, pictures: Sequence[Pixels]) -> None:
        trust = task.kind == "trust"
        choices = () if trust else task.choices
        self.seen.append((task.kind, group, choices, task.label if trust else "", [webp_bytes(p) for p in pictures]))
        self.known.append(task)

    def finished(self, rng: np.random.Generator, title: str, settings: Mapping[str, Any]) -> tuple[StudyPage, StudyKey]:
        """In random order, under names that say nothing, with pictures of one length."""
        files = iter(equally_long([file for *_, pictures in self.seen for file in pictures]))
        padded = [tuple(next(files) for _ in pictures) for *_, pictures in self.seen]
        digits = len(str(len(self.seen)))
        tasks, known = [], {}
        for number, i in enumerate(rng.permutation(len(self.seen)), start=1):
            kind, group, choices, finding, _ = self.seen[i]
            name = f"t{number:0{digits}d}"
            tasks.append(
                StudyTask(id=name, kind=kind, group=group, choices=choices, finding=finding, pictures=padded[i])
            )
            known[name] = self.known[i]
        page = StudyPage(tasks, title)
        return page, StudyKey(page.study, known, settings)


def make_study(
    contestants: Sequence[Contestant],
    *,
    methods: Sequence[str | Mapping[str, Any]] = ("hirescam",),
    layer: str | None = None,
    split: str = "test",
    cases: int = 20,
    labels: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
    choices: int = 4,
    cut: float = 0.5,
    seed: int = 0,
    limit: int | None = None,
    title: str = "Reader study",
    width: int = 600,
) -> MadeStudy:
    """A reader study as in the Grad-CAM paper (Selvaraju et al. 2017, section 5): class discrimination, and trust.

    Discrimination: the map of one finding of a case, and the question which finding it shows, among the present ones
    and absent ones up to `choices`. Trust: two maps of a finding that every model rightly finds, and the question which
    is the more reasonable.

    Args:
        contestants: One model, or two (the first is the one whose preference counts as positive).
        methods: Names, or dicts with the key `name` and the method's options.
        layer: Of the maps; None = the last feature map.
        split: Of the data.
        cases: Cases of each kind of task at most.
        labels: Findings to ask about and to choose among; None = all.
        kinds: `discrimination`, `trust`; None = both, trust only where there are two things to compare.
        choices: Of a discrimination, at least 2.
        cut: Found means probability >= cut.
        seed: Of every choice.
        limit: Cases of the split to look at, at most.
        title: Heading of the page; it must not tell what is compared.
        width: Of a picture, in pixels.

    Returns:
        Page and key.

    Raises:
        InputError: An unknown name, nothing to compare, or no case that can be asked about.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
        >>> batch = {"image": torch.rand(3, 1, 8, 8), "label": torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])}
        >>> made = make_study([Contestant("A", model, [batch])], methods=["hirescam", "gradcam"], kinds=KINDS[:1])
        >>> len(made.page.tasks), made.key.study == made.page.study
        (6, True)
    """
    asked_kinds = _kinds(kinds, len(contestants) * len(methods))
    _check(contestants, cases, choices, cut, title)
    rng = np.random.default_rng(seed)
    names, candidates = read_candidates(contestants, split, limit)
    columns = _columns(labels, names)
    plan = _Plan(contestants, read_asked(methods), layer, split, cases, choices, cut, width, names, columns, rng)
    groups = {case.id: int(number) for case, number in zip(candidates, rng.permutation(len(candidates)), strict=True)}
    told = choose_pairs(candidates, columns, cases, rng) if "discrimination" in asked_kinds else []
    agreed = choose_agreed(candidates, columns, cases, rng, cut) if "trust" in asked_kinds else []
    notes = _notes(asked_kinds, told, agreed, plan)
    draft = _Draft()
    wanted = {pair.case.id for pair in (*told, *agreed)}
    for id, shown in shown_cases(contestants, split, limit, wanted):
        for pair in (p for p in told if p.case.id == id):
            _add_discrimination(draft, plan, pair, groups[id], shown)
        for pair in (p for p in agreed if p.case.id == id):
            _add_trust(draft, plan, pair, groups[id], shown)
    page, key = draft.finished(rng, title, _settings(plan, asked_kinds, seed, title))
    return MadeStudy(page, key, notes)


def save_study(made: MadeStudy, out: Path) -> tuple[Path, Path]:
    """Write `study.html` for readers and `key.json`, which stays at home.

    Returns:
        Both paths.
    """
    return write_study(made.page, out / "study.html"), save_key(made.key, out / "key.json")


def _kinds(kinds: Sequence[str] | None, sources: int) -> list[Kind]:
    if kinds is None:
        return list(KINDS) if sources > 1 else ["discrimination"]
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"--kinds: there is no kind of task {kind!r}{nearest(kind, KINDS)}")
    if "trust" in kinds and sources < 2:
        raise InputError("a trust task sets two maps side by side: give --against, or two --methods")
    if not kinds:
        raise InputError(f"--kinds expects {' or '.join(KINDS)}, got none")
    return [kind for kind in KINDS if kind in kinds]


def _check(contestants: Sequence[Contestant], cases: int, choices: int, cut: float, title: str) -> None:
    if not 1 <= len(contestants) <= 2 or len({c.name for c in contestants}) != len(contestants):
        raise InputError(f"expected one model, or two of different names, got {[c.name for c in contestants]}")
    if cases < 1:
        raise InputError(f"--cases expects 1 or more, got {cases}")
    if choices < 2:
        raise InputError(f"--choices expects at least 2, got {choices}")
    if not 0 < cut < 1:
        raise InputError(f"--cut expects a probability between 0 and 1, got {cut:g}")
    if not title.strip():
        raise InputError("--title expects words, got none")


def _columns(labels: Sequence[str] | None, names: Sequence[str]) -> list[int]:
    for label in labels or ():
        if label not in names:
            raise InputError(f"--labels: the model has no label {label!r}{nearest(label, names)}")
    columns = list(range(len(names))) if labels is None else [list(names).index(n) for n in dict.fromkeys(labels)]
    if len(columns) < 2:
        raise InputError(f"a study needs at least two findings to choose among, got {len(columns)}: name more labels")
    return columns


def _notes(kinds: Sequence[Kind], told: Sequence[Asked], agreed: Sequence[Asked], plan: _Plan) -> tuple[str, ...]:
    """Refuse an empty study, and say where it is smaller than wished."""
    notes = []
    for kind, pairs in (("discrimination", told), ("trust", agreed)):
        if kind not in kinds:
            continue
        reason = "a present finding" if kind == "discrimination" else "a finding that every model rightly finds"
        if not pairs:
            raise InputError(
                f"no case of {plan.split} has {reason}: another split or labels, or --kinds without {kind}"
            )
        count = len({pair.case.id for pair in pairs})
        if count < plan.cases:
            notes.append(f"{kind}: only {count} of {plan.cases} cases have {reason}")
    single = len({p.case.id for p in told if np.sum(p.case.truth[list(plan.columns)] == 1) < 2})
    if single:
        notes.append(f"discrimination: {single} cases have only one present finding")
    return tuple(notes)


def _map(plan: _Plan, source: str, column: int, shown: Mapping[str, Case]) -> Map:
    contestant, method = plan.sources()[source]
    maps = explain(
        contestant.model, shown[contestant.name].image, method.name, plan.layer, labels=[column], **method.options
    )
    found: Map = maps[0, 0].float().cpu().numpy()
    return found


def _pictures(plan: _Plan, shown: Mapping[str, Case], maps: Sequence[Map]) -> list[Pixels]:
    case = shown[plan.contestants[0].name]
    image = case.image[0].float().cpu().numpy()
    axes, spacing = (None, None) if case.affine is None else geometry(case.affine[0].cpu().numpy())
    # Through the maps alone: planes through the lesion or its organ would tell the answer.
    point = telling_point(image.shape[1:], maps)
    return blinded_pictures(image, maps, point=point, spacing=spacing, axes=axes, width=plan.width)


def _add_discrimination(draft: _Draft, plan: _Plan, pair: Asked, group: int, shown: Mapping[str, Case]) -> None:
    """One task per model and method; all of them offer the same choices in the same order."""
    offered = choose_answers(pair, plan.columns, plan.choices, plan.rng)
    present = tuple(plan.names[c] for c in plan.columns if pair.case.truth[c] == 1)
    for source in plan.sources():
        task = KeyTask(
            "discrimination",
            case=pair.case.id,
            unit=pair.case.unit,
            label=plan.names[pair.column],
            sources=(source,),
            choices=tuple(plan.names[c] for c in offered),
            present=present,
        )
        draft.add(task, group, _pictures(plan, shown, [_map(plan, source, pair.column, shown)]))


def _add_trust(draft: _Draft, plan: _Plan, pair: Asked, group: int, shown: Mapping[str, Case]) -> None:
    for contest, (first, second) in plan.contests().items():
        sides = [first, second] if plan.rng.random() < 0.5 else [second, first]
        task = KeyTask(
            "trust",
            case=pair.case.id,
            unit=pair.case.unit,
            label=plan.names[pair.column],
            sources=tuple(sides),
            choices=TRUST_ANSWERS,
            first=first,
            contest=contest,
        )
        draft.add(task, group, _pictures(plan, shown, [_map(plan, side, pair.column, shown) for side in sides]))


def _settings(plan: _Plan, kinds: Sequence[Kind], seed: int, title: str) -> dict[str, Any]:
    return {
        "title": title,
        "models": {c.name: fingerprint(c.model) for c in plan.contestants},
        "sources": list(plan.sources()),
        "layer": plan.layer,
        "split": plan.split,
        "cases": plan.cases,
        "labels": [plan.names[c] for c in plan.columns],
        "kinds": list(kinds),
        "choices": plan.choices,
        "cut": plan.cut,
        "seed": seed,
    }
