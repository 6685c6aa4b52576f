"""Read function calls that a model wrote as JSON: `{"name": "find", "arguments": {"path": "."}}`.

Wherever they stand, as engines' parsers together would read them: on lines of their own, in a list,
between the tags of Hermes' and Qwen's templates, in a fence.
"""

import json
import re
from typing import Any

from lar_lightning.benchmarks.tools.calls import MAX_CHARACTERS, Call, MalformedCallsError

FORMAT = '{"name": "the function", "arguments": {"parameter": "value"}}'
BEGINNING = '{"name"'

_BEGINNING = re.compile(r'\{\s*"name"\s*:')
_DECODER = json.JSONDecoder()


def parse_json_calls(action: str) -> tuple[Call, ...]:
    """Return the calls of an action; none where it has none.

    Args:
        action: The whole text, with or without a thought before `</think>`.

    Raises:
        MalformedCallsError: If there is something that begins like a call but cannot be read.
    """
    body = action[-MAX_CHARACTERS:].rpartition("</think>")[2]
    calls: list[Call] = []
    end = 0
    while found := _BEGINNING.search(body, end):
        try:
            record, end = _DECODER.raw_decode(body, found.start())
        except (ValueError, RecursionError) as error:
            raise MalformedCallsError(f"A call is not JSON ({error}).") from None
        calls.append(_read_call(record))
    return tuple(calls)


def _read_call(record: dict[str, Any]) -> Call:
    named = record.get("arguments", {})
    if not isinstance(record["name"], str) or not isinstance(named, dict):
        raise MalformedCallsError("A call is a name, a text, and arguments, an object.")
    return Call(name=record["name"], positional=(), named=named)
