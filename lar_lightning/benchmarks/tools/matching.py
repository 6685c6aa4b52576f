"""Whether calls are those that BFCL allows, by the rules of its official AST checker for Python.

Written anew; `tests/test_bfcl_single.py` holds them to the wheel's own code.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lar_lightning.benchmarks.tools.calls import Call

Answer = Mapping[str, Mapping[str, Sequence[Any]]]
"""A function's name -> the allowed values of each parameter; "" among them: may be left out."""

_TYPES: dict[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}


def match_calls(
    calls: Sequence[Call], answers: Sequence[Answer], documents: Sequence[Mapping[str, Any]]
) -> str:
    """Return why `calls` are not the expected ones, in any order; "" where they are.

    Args:
        calls: As the policy wrote them.
        answers: One for each expected call.
        documents: Records of the functions that were offered.
    """
    if len(calls) != len(answers):
        return f"{len(calls)} calls, expected {len(answers)}"
    by_name = {document["name"]: document for document in documents}
    left = list(calls)
    for answer in answers:
        ((name, allowed),) = answer.items()
        reasons = [_mismatch(call, name, allowed, by_name[name]) for call in left]
        if "" not in reasons:
            return reasons[0]
        del left[reasons.index("")]
    return ""


def _mismatch(
    call: Call, name: str, allowed: Mapping[str, Sequence[Any]], document: Mapping[str, Any]
) -> str:
    if call.name != name:
        return f"{call.name} called, expected {name}"
    properties = document["parameters"]["properties"]
    missing = [
        key
        for key in dict.fromkeys([*document["parameters"]["required"], *allowed])
        if key not in call.named
        and (key in document["parameters"]["required"] or "" not in allowed[key])
    ]
    if missing:
        return f"{name} without {missing[0]}"
    for key, value in call.named.items():
        if key not in properties or key not in allowed:
            return f"{name} has no parameter {key}"
        if not _is_allowed(value, allowed[key], properties[key]):
            return f"wrong {key} of {name}"
    return ""


def _is_allowed(value: Any, allowed: Sequence[Any], schema: Mapping[str, Any]) -> bool:
    outer = _TYPES[schema["type"]]
    inner = _TYPES[schema["items"]["type"]] if schema["type"] in ("array", "tuple") else None
    if schema["type"] == "float" and type(value) is int:
        value = float(value)
    has_type, is_variable = _check_type(value, allowed, outer, inner)
    if not has_type:
        return False
    if is_variable:  # the name of something, where a value of the documented type is expected
        return value in allowed
    if outer is dict:
        return any(_matches_dict(value, each) for each in allowed if each != "")
    if outer is list and inner is dict:
        return any(_matches_dicts(value, each) for each in allowed)
    if outer is str:
        return _plain(value) in [_plain(each) for each in allowed if isinstance(each, str)]
    if outer is list:
        return list(map(_plain, value)) in [list(map(_plain, each)) for each in allowed]
    return value in allowed


def _check_type(
    value: Any, allowed: Sequence[Any], outer: type, inner: type | None
) -> tuple[bool, bool]:
    """Return whether a value has a type that is allowed, and whether that is a variable's."""
    kind = next((type(each) for each in allowed if each != ""), None)
    is_variable = kind is not None and kind is not outer
    if type(value) is not outer:
        return type(value) is kind, True
    if inner is None:
        return True, is_variable
    fits = any(
        not isinstance(each, list) or all(_check_type(item, each, inner, None)[0] for item in value)
        for each in allowed
    )
    return fits, is_variable


def _matches_dict(value: Any, allowed: Mapping[str, Sequence[Any]]) -> bool:
    return (
        isinstance(value, dict)
        and all(
            key in allowed and _plain(each) in list(map(_plain, allowed[key]))
            for key, each in value.items()
        )
        and all(key in value or "" in choices for key, choices in allowed.items())
    )


def _matches_dicts(values: Sequence[Any], allowed: Sequence[Any]) -> bool:
    return len(values) == len(allowed) and all(map(_matches_dict, values, allowed))


def _plain(value: Any) -> Any:
    """Return a text without case, spaces and light punctuation: `April 1, 2024`, `april12024`."""
    if not isinstance(value, str):
        return value
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"')
