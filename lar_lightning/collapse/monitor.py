"""A sequential test on each signal, with a state that a checkpoint can hold."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import isfinite, sqrt
from statistics import fmean
from typing import Any

from lar_lightning.collapse.cusum import Rule
from lar_lightning.collapse.signals import Signal
from lar_lightning.errors import SettingError


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """What was found."""

    signal: str
    step: int
    since: int
    """First step of the values that led here."""
    value: float
    reference: float
    """What it is held against."""
    is_limit: bool

    def __str__(self) -> str:
        """Say it in a line."""
        if not isfinite(self.value):
            return f"{self.signal} is not finite ({self.value}) at step {self.step}"
        against = "its limit is" if self.is_limit else "its best was"
        return (
            f"{self.signal} is {self.value:.4g}, {against} {self.reference:.4g}; "
            f"since step {self.since}, noticed at step {self.step}"
        )


STANDARD_ERRORS = 3.0
"""By which the best window's mean is taken back: of many it is the best by chance as well."""
WINDOWS_OF_MEMORY = 10
"""Over which noise is averaged."""


class SignalTest:
    """The test on one signal.

    Noise is half the mean squared difference of neighbours (von Neumann 1941), of steps to the
    worse alone: those to the better may be what training does. Under suspicion none count.
    """

    def __init__(self, signal: Signal) -> None:
        """Begin with nothing seen."""
        self.signal = signal
        self.rule = Rule(patience=signal.patience)
        self.recent: list[float] = []
        self.best: float | None = None
        """Mean of the best window; None before the first is full."""
        self.noise = 0.0
        """Variance."""
        self.num_worse = 0
        self.total = 0.0
        self.since = 0
        self.is_silent = False
        """After an alarm, until a value is as good as the reference again."""
        self.num_values = 0

    def observe(self, value: float, step: int) -> Alarm | None:
        """Take in a value."""
        signal = self.signal
        if signal.skips_repeats and self.recent[-1:] == [value]:
            return None
        self.num_values += 1
        if not isfinite(value):
            return self._alarm(value, step, step)
        level = self._level()
        found = self._test(value, step, *level) if level else None
        worse = self._sign * (value - self.recent[-1]) if self.recent else 0.0
        if worse > 0 and self.total == 0 and not self.is_silent:
            self.num_worse = min(self.num_worse + 1, WINDOWS_OF_MEMORY * signal.window)
            self.noise += (worse**2 / 2 - self.noise) / self.num_worse
        self.recent = [*self.recent, value][-signal.window :]
        if len(self.recent) == signal.window:
            mean = fmean(self.recent)
            if self.best is None or self._sign * (mean - self.best) < 0:
                self.best = mean
        return found

    def _level(self) -> tuple[float, float] | None:
        """Return what a value is held against, and the unit of its distance."""
        signal = self.signal
        if signal.limit is not None:
            return signal.limit, max(signal.min_spread * abs(signal.limit), signal.floor)
        if self.best is None:
            return None
        spread = sqrt(self.noise)
        chance = STANDARD_ERRORS * spread / sqrt(signal.window)
        unit = max(spread, signal.min_spread * abs(self.best), signal.floor)
        return self.best + self._sign * chance, unit

    def _test(self, value: float, step: int, level: float, unit: float) -> Alarm | None:
        deviation = self._sign * (value - level) / unit
        if self.is_silent:
            self.is_silent = deviation > 0
            return None
        if self.total == 0:
            self.since = step
        self.total = self.rule.next_sum(self.total, deviation)
        return self._alarm(value, step, self.since) if self.rule.is_alarm(self.total) else None

    def _alarm(self, value: float, step: int, since: int) -> Alarm | None:
        was_silent, self.is_silent, self.total = self.is_silent, True, 0.0
        if was_silent:
            return None
        against = self.signal.limit if self.signal.limit is not None else self.best
        return Alarm(
            signal=self.signal.name,
            step=step,
            since=since,
            value=value,
            reference=float("nan") if against is None else against,
            is_limit=self.signal.limit is not None,
        )

    @property
    def _sign(self) -> int:
        return 1 if self.signal.bad == "up" else -1

    def rearm(self) -> None:
        """Forget what led to an alarm, and keep the reference."""
        self.total, self.is_silent = 0.0, False

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {name: value for name, value in vars(self).items() if name not in ("signal", "rule")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        for name, value in state.items():
            setattr(self, name, value)


class Monitor:
    """The tests on all signals."""

    def __init__(self, signals: Iterable[Signal]) -> None:
        """Set up the tests; of two signals with one name the later counts.

        Raises:
            SettingError: if there is none.
        """
        self.tests = {signal.name: SignalTest(signal) for signal in signals}
        if not self.tests:
            raise SettingError("`signals` must name at least one metric to watch, got none.")

    def observe(self, values: Mapping[str, float], step: int) -> list[Alarm]:
        """Take in what is known at a step, by name, and return what it makes certain."""
        found = [
            self.tests[name].observe(values[name], step) for name in self.tests & values.keys()
        ]
        return [alarm for alarm in found if alarm is not None]

    def names(self, when: str) -> list[str]:
        """Return the signals read at one kind of time, in their order."""
        return [name for name, test in self.tests.items() if test.signal.when == when]

    def rearm(self) -> None:
        """Forget what led to alarms, and keep references: after weights have been put back."""
        for test in self.tests.values():
            test.rearm()

    def restart(self) -> None:
        """Forget all: what is trained has become another."""
        self.tests = {name: SignalTest(test.signal) for name, test in self.tests.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return plain values, with the settings that they belong to."""
        return {
            name: {"signal": asdict(test.signal), **test.state_dict()}
            for name, test in self.tests.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; a signal that is watched otherwise now begins anew."""
        for name, test in self.tests.items():
            stored = dict(state.get(name, {}))
            if stored.pop("signal", None) == asdict(test.signal):
                test.load_state_dict(stored)
