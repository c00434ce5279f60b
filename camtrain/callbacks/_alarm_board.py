"""Which alarms are raised: history of the figures, patience counters, and the events of an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from camtrain.callbacks._alarm_rules import read_alarms
from camtrain.callbacks._alarm_seen import ALL, Alarm, Seen, Values
from camtrain.reporting.alarm_log import AlarmEvent

HISTORY = 50  # epochs that are kept; no rule looks further back
_SHOWN = 5  # labels that a sentence names


class AlarmBoard:
    """Takes the figures of each epoch and says which alarms are raised and cleared by them.

    An alarm of a label is raised when its rule has spoken in `patience` epochs in a row, and cleared when it no longer
    does. An epoch without the figures (a label without cases, a check that was not due) changes nothing. Of several
    validations in one epoch the last one counts.

    Args:
        alarms: The rules.
    """

    def __init__(self, alarms: Sequence[Alarm]) -> None:
        self.alarms = list(alarms)
        self._counts: dict[tuple[str, str, str], int] = {}
        self._judged: dict[tuple[str, str, str], tuple[int, int]] = {}  # in which epoch, and the count before it
        self._taken: dict[str, int] = {}
        self._raised: set[tuple[str, str, str]] = set()
        self._history: dict[str, list[Values]] = {}
        self._told: set[tuple[str, str, str]] = set()

    def take(self, epoch: int, split: str, now: Values) -> list[AlarmEvent]:
        """The events of one validation; a second one of an epoch takes the place of the first.

        It is judged by what was there before its epoch, and its events are what it changes.

        Args:
            epoch: Epoch of the Trainer.
            split: `val`, ...
            now: The figures.
        """
        measures = {measure for alarm in self.alarms for measure in alarm.measures}
        kept = {measure: dict(values) for measure, values in now.items() if measure in measures}
        history = self._history.setdefault(split, [])
        earlier = history.pop() if history and self._taken.get(split) == epoch else {}
        events = [event for alarm in self.alarms for event in self._judge(alarm, epoch, split, Seen(kept, history))]
        history.append({**earlier, **kept})
        del history[:-HISTORY]
        self._taken[split] = epoch
        return events

    def _judge(self, alarm: Alarm, epoch: int, split: str, seen: Seen) -> Iterable[AlarmEvent]:
        for said in alarm.judge(seen):
            key = (split, alarm.name, said.label)
            at, before = self._judged.get(key, (None, 0))
            before = before if at == epoch else self._counts.get(key, 0)
            self._judged[key] = (epoch, before)
            count = before + 1 if said.speaks else 0
            self._counts[key] = min(count, alarm.patience)
            if (count >= alarm.patience) == (key in self._raised) or (count > 0 and key in self._raised):
                continue
            state = "raised" if count else "cleared"
            (self._raised.add if count else self._raised.discard)(key)
            sentence = f"{alarm.what} is {said.value:.2f} (limit {said.threshold:.2f})"
            sentence += f". {alarm.means} Try: {alarm.tries}" if count else " again"
            yield AlarmEvent(epoch, split, alarm.name, said.label, said.value, said.threshold, state, sentence)

    def raised(self, split: str, name: str) -> list[str]:
        """Labels for which an alarm is raised at present."""
        return [label for at, alarm, label in sorted(self._raised) if (at, alarm) == (split, name)]

    def by_label(self, split: str) -> dict[str, list[str]]:
        """Label -> names of the alarms that are raised for it, in the order of the rules."""
        found: dict[str, list[str]] = {}
        for alarm in self.alarms:
            for label in self.raised(split, alarm.name):
                found.setdefault(label, []).append(alarm.name)
        return found

    def news(self, events: Iterable[AlarmEvent]) -> list[tuple[str, str]]:
        """What was never told before, alarm by alarm: (alarm and split, sentence). Told once, also after a resume."""
        fresh: dict[tuple[str, str], list[AlarmEvent]] = {}
        for event in events:
            key = (event.split, event.alarm, event.label)
            if event.state == "raised" and key not in self._told:
                self._told.add(key)
                fresh.setdefault((event.split, event.alarm), []).append(event)
        return [(f"{alarm} ({split})", self._sentence(found)) for (split, alarm), found in fresh.items()]

    def _sentence(self, events: Sequence[AlarmEvent]) -> str:
        alarm = next(alarm for alarm in self.alarms if alarm.name == events[0].alarm)
        worst = sorted(events, key=lambda event: abs(event.value - event.threshold), reverse=True)
        named = ", ".join(
            f"{'all labels' if event.label == ALL else event.label} {event.value:.2f} (limit {event.threshold:.2f})"
            for event in worst[:_SHOWN]
        )
        more = f" and {len(events) - _SHOWN} more labels" if len(events) > _SHOWN else ""
        return f"{alarm.what}: {named}{more}. {alarm.means} Try: {alarm.tries}"

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain lists, strings and numbers."""
        return {
            "counts": [[*key, count] for key, count in self._counts.items() if count],
            "judged": [[*key, *found] for key, found in self._judged.items()],
            "taken": dict(self._taken),
            "raised": [list(key) for key in sorted(self._raised)],
            "told": [list(key) for key in sorted(self._told)],
            "history": {split: [_plain(row) for row in rows] for split, rows in self._history.items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where an earlier run was. What is raised by an alarm that this run does not have is forgotten."""
        names = {alarm.name for alarm in self.alarms}
        self._counts = {(s, a, label): int(n) for s, a, label, n in state.get("counts", []) if a in names}
        self._judged = {
            (s, a, label): (int(at), int(n)) for s, a, label, at, n in state.get("judged", []) if a in names
        }
        self._taken = {split: int(epoch) for split, epoch in state.get("taken", {}).items()}
        self._raised = {(s, a, label) for s, a, label in state.get("raised", []) if a in names}
        self._told = {(s, a, label) for s, a, label in state.get("told", [])}
        self._history = {split: [_plain(row) for row in rows] for split, rows in state.get("history", {}).items()}


def replay_alarms(
    history: Sequence[Values], alarms: Sequence[str | Mapping[str, Any]] | None = None, split: str = "val"
) -> list[AlarmEvent]:
    """What alarms would have said of figures that are known: for other thresholds, or of a finished run.

    Args:
        history: Of each validation measure -> label -> value, as a checkpoint keeps it
            (`monitor.state_dict()["alarms"]["board"]["history"]["val"]`).
        alarms: As for `AttentionMonitor`.
        split: What to write into the events.

    Returns:
        The events; their epoch is the place in the history.

    Raises:
        InputError: An unknown alarm or option.

    Example:
        >>> rates = [{"empty_map_rate": {"nodule": value}} for value in (0.0, 0.1, 0.6, 0.7, 0.1)]
        >>> [(e.epoch, e.state) for e in replay_alarms(rates, [{"name": "empty_maps", "patience": 2}])]
        [(3, 'raised'), (4, 'cleared')]
    """
    board = AlarmBoard(read_alarms(alarms))
    return [event for epoch, now in enumerate(history) for event in board.take(epoch, split, now)]


def _plain(row: Values) -> dict[str, dict[str, float]]:
    return {measure: {label: float(value) for label, value in values.items()} for measure, values in row.items()}
