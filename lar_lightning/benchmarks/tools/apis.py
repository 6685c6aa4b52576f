"""The worlds of BFCL: eight simulated APIs, which come as code with the wheel `bfcl-eval`.

The wheel pins dozens of packages that the APIs do not need, so it is installed without them. Calls
run in this process: the code is the wheel's, what comes from the model are plain values.
"""

import copy
import difflib
import functools
import gzip
import importlib
import importlib.metadata
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lar_lightning.benchmarks.tools.calls import Call
from lar_lightning.errors import SettingError

BFCL_VERSION = "2026.3.23"
CALL_SECONDS = 5.0
"""Longest time of one call; what runs on is left behind in its thread."""

MODULES = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "TwitterAPI": "posting_api",
    "VehicleControlAPI": "vehicle_control",
}
"""Class -> its module, which also names the file that documents its functions."""

_PACKAGE = "bfcl_eval.eval_checker.multi_turn_eval.func_source_code"
# These two keep numbers in module globals; episodes on other threads must not come between.
_LOCKS = {"MathAPI": threading.Lock(), "VehicleControlAPI": threading.Lock()}
# Whole numbers that decide how many digits are computed, in one step that nothing can interrupt.
_DIGITS = {
    "power": "exponent",
    "logarithm": "precision",
    "square_root": "precision",
    "round_number": "decimal_places",
}
_MAX_DIGITS = 1000


def find_data() -> Path:
    """Return the folder of the wheel's data files.

    Raises:
        SettingError: If the wheel is not installed.
    """
    try:
        distribution = importlib.metadata.distribution("bfcl-eval")
    except importlib.metadata.PackageNotFoundError:
        raise SettingError(
            "`benchmark` 'bfcl' must have the package bfcl-eval installed, got none. Install it "
            f"with: pip install --no-deps bfcl-eval=={BFCL_VERSION}"
        ) from None
    return Path(str(distribution.locate_file("bfcl_eval/data")))


def read_records(folder: Path, name: str) -> list[dict[str, Any]]:
    """Read the JSON lines of a data file.

    Args:
        folder: The wheel's folder, or one whose files have `__` in place of folders.
        name: In the wheel's folder, e.g. `possible_answer/BFCL_v4_multi_turn_base.json`.

    Raises:
        SettingError: If there is no such file, plain or gzipped.
    """
    names = (name, name.replace("/", "__"))
    files = [folder / (form + suffix) for form in names for suffix in ("", ".gz")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise SettingError(
            f"`path` must be a folder with the data files of bfcl-eval, got {str(folder)!r}, which "
            f"has no {name}. Leave it out to read the files of the package."
        )
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def read_answered(folder: Path, file: str) -> list[tuple[dict[str, Any], list[Any]]]:
    """Read the records of a data file, each with the calls that answer it.

    Raises:
        SettingError: If a file is missing, or holds no answer to a record of the other.
    """
    answers = {
        record["id"]: record["ground_truth"]
        for record in read_records(folder, f"possible_answer/{file}")
    }
    records = read_records(folder, file)
    missing = [record["id"] for record in records if record["id"] not in answers]
    if missing:
        raise SettingError(
            f"`path` must have the calls of each task in possible_answer, got {str(folder)!r} "
            f"without those of {missing[0]}. Take both files from one version of bfcl-eval."
        )
    return [(record, answers[record["id"]]) for record in records]


class World:
    """Instances of some of the APIs, whose public functions can be called by name."""

    def __init__(
        self,
        parameters: Mapping[str, Mapping[str, Sequence[str]]],
        initial: Mapping[str, Any],
        *,
        has_long_context: bool,
    ) -> None:
        """Make the instances and put them into their first state.

        Args:
            parameters: Class -> function -> its parameters in the order of the documentation.
            initial: Class -> what it begins with.
            has_long_context: Whether the APIs answer at length.
        """
        self.instances: dict[str, Any] = {}
        self.functions: dict[str, tuple[str, Sequence[str]]] = {}
        for class_name, functions in parameters.items():
            instance = _load_class(class_name)()
            if hasattr(instance, "_load_scenario"):
                scenario = copy.deepcopy(initial.get(class_name, {}))
                instance._load_scenario(scenario, long_context=has_long_context)
            self.instances[class_name] = instance
            self.functions |= {name: (class_name, order) for name, order in functions.items()}

    def run(self, call: Call) -> str:
        """Carry out a call and return its result, or what went wrong, as text."""
        if call.name not in self.functions:
            close = difflib.get_close_matches(call.name.rpartition(".")[2], self.functions, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            return f"Error during execution: there is no function {call.name!r}.{hint}"
        class_name, order = self.functions[call.name]
        arguments = dict(zip(order, call.positional, strict=False))
        twice = sorted(arguments.keys() & call.named.keys())
        if twice or len(call.positional) > len(order):
            problem = f"got {twice[0]!r} twice" if twice else f"takes {len(order)} arguments"
            return f"Error during execution: {call.name} {problem}."
        arguments |= call.named
        digits = arguments.get(_DIGITS.get(call.name, ""))
        if isinstance(digits, int) and abs(digits) > _MAX_DIGITS:
            return f"Error during execution: {_DIGITS[call.name]} is beyond {_MAX_DIGITS}."
        method = getattr(self.instances[class_name], call.name)

        def work() -> str:
            with _LOCKS.get(class_name, nullcontext()):
                try:
                    return _as_text(method(**arguments))
                except Exception as error:
                    return f"Error during execution: {error}"

        return _within_limit(work)

    def difference(self, other: "World") -> str | None:
        """Return the first public attribute of `other` that is not the same here."""
        for class_name, instance in other.instances.items():
            mine = vars(self.instances[class_name])
            for name, value in vars(instance).items():
                if not name.startswith("_") and not _is_same(mine, name, value):
                    return f"{class_name}.{name}"
        return None


@functools.cache
def _load_class(name: str) -> Any:
    find_data()
    return getattr(importlib.import_module(f"{_PACKAGE}.{MODULES[name]}"), name)


def _is_same(attributes: Mapping[str, Any], name: str, value: Any) -> bool:
    try:
        return name in attributes and bool(attributes[name] == value)
    except RecursionError:  # folders that hold each other
        return False


def _as_text(result: Any) -> str:
    """Return texts as they are, objects as JSON where they can be, the rest as Python shows it."""
    if isinstance(result, dict):
        try:
            return json.dumps(result)
        except (TypeError, ValueError):
            return str(result)
    return str(result)


def _within_limit(work: Callable[[], str]) -> str:
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(CALL_SECONDS)
    return results[0] if results else f"Error during execution: no result in {CALL_SECONDS:g} s."
