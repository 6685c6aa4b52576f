"""The one exception for what a user can put right.

It is printed as one line, without a traceback.
"""

import difflib
from collections.abc import Iterable


class SettingError(ValueError):
    """A setting, file or combination of them that cannot work.

    The message names the setting, the rule, the value that was found, and the way out.
    """


class EngineFailure(SettingError):
    """An engine that did not start, or died; what was finished before is kept."""


class NothingToLearn(SettingError):
    """What a model wrote holds too little for a method to learn from; others can still be tried."""


def unknown_name(setting: str, rule: str, name: str, known: Iterable[str]) -> SettingError:
    """Return the error for a name that is none of those known, with the one that may be meant."""
    names = list(known)
    close = difflib.get_close_matches(name.lower(), names)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return SettingError(
        f"`{setting}` must {rule} {', '.join(map(repr, names))}, got {name!r}.{hint}"
    )


def one_of(setting: str, value: str, known: Iterable[str]) -> str:
    """Return `value`, which must be one of those known."""
    names = list(known)
    if value not in names:
        raise unknown_name(setting, "be one of", value, names)
    return value
