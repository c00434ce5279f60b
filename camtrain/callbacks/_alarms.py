"""The alarms of one monitor: what the rules say after each epoch, and who is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pytorch_lightning.utilities import rank_zero_warn

from camtrain._errors import InputError, nearest
from camtrain.callbacks._alarm_board import AlarmBoard
from camtrain.callbacks._alarm_questions import FixedQuestions
from camtrain.callbacks._alarm_rules import read_alarms
from camtrain.callbacks._alarm_seen import Values
from camtrain.callbacks._scores import Score, ScoreBook
from camtrain.cam.asked import Asked
from camtrain.cam.engine import Reshape
from camtrain.reporting.alarm_log import AlarmEvent, alert


class Alarms:
    """Watches the validation passes of a fit.

    Args:
        given: The monitor's `alarms=`.
        stop_on: Names of alarms that end the training when they are raised.
        method: The monitor's first method.
        reshape: Makes (B, K, *S') of the tapped layer's output.

    Raises:
        InputError: An unknown alarm or option, or a name in `stop_on` that is not among the alarms.
    """

    def __init__(
        self,
        given: Sequence[str | Mapping[str, Any]] | None,
        stop_on: Sequence[str],
        method: Asked,
        reshape: Reshape | None,
    ) -> None:
        rules = read_alarms(given)
        names = [rule.name for rule in rules]
        self.stop_on = [stop_on] if isinstance(stop_on, str) else list(stop_on)
        for name in self.stop_on:
            if name not in names:
                raise InputError(f"stop_on= names {name!r}, which is not among the alarms{nearest(str(name), names)}")
        self.board = AlarmBoard(rules)
        self.questions = FixedQuestions(rules, method, reshape)
        self.events: list[AlarmEvent] = []
        self.values: dict[str, Values] = {}
        self.epoch: int | None = None  # the last that was judged
        self._method = method

    @property
    def active(self) -> bool:
        """Is there any alarm at all?"""
        return bool(self.board.alarms)

    def setup(self) -> None:
        """A fit begins; a checkpoint that is loaded later says what was before."""
        self.board = AlarmBoard(self.board.alarms)
        self.events, self.values, self.epoch = [], {}, None
        self.questions.setup()

    def begin(self, trainer: Any) -> None:
        """A pass begins."""
        self.events = []
        self.questions.begin(trainer)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain values."""
        return {"board": self.board.state(), "questions": self.questions.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on with an earlier run."""
        self.board.load(state.get("board", {}))
        self.questions.load(state.get("questions", {}))

    def judge(self, trainer: Any, split: str, scores: Sequence[Score], book: ScoreBook) -> list[Score]:
        """Let the rules look at one split of a fit (all processes must call it together).

        Args:
            trainer: The Trainer.
            split: Its name.
            scores: All scores of the split.
            book: Where they come from; it knows a few figures more.

        Returns:
            `alarm/<name>`: for how many labels each alarm is raised now.
        """
        if trainer.state.fn == "fit":
            self.epoch = int(trainer.current_epoch)
        if not self.active or trainer.state.fn != "fit":
            return []
        now = book.beside()
        for score in scores:
            if score.label is not None and score.method in (None, self._method.name):
                now.setdefault(score.measure, {})[score.label] = score.value
        self.values[split] = now
        fresh = self.board.take(int(trainer.current_epoch), split, now)
        self.events += fresh
        if self.stop_on:
            raised = any(event.state == "raised" and event.alarm in self.stop_on for event in fresh)
            if trainer.strategy.reduce_boolean_decision(raised, all=False):
                trainer.should_stop = True
        counts = [(alarm.name, len(self.board.raised(split, alarm.name))) for alarm in self.board.alarms]
        return [Score(f"alarm/{name}", None, None, float(count)) for name, count in counts]

    def publish(self, trainer: Any, write: Callable[[Sequence[AlarmEvent]], None], name: str | None) -> None:
        """Tell what is new, once, and hand it on to be written (rank zero)."""
        if not self.active or trainer.state.fn != "fit":
            return
        for title, sentence in self.board.news(self.events):
            ends = any(title.startswith(f"{word} (") for word in self.stop_on)
            tail = " Training stops here (stop_on)." if ends else ""
            rank_zero_warn(f"camtrain: alarm {title}, epoch {trainer.current_epoch}: {sentence}.{tail}")
            if trainer.is_global_zero and not trainer.fast_dev_run:
                alert(trainer.loggers, f"camtrain{f' {name}' if name else ''}: {title}", sentence)
        write(self.events)
