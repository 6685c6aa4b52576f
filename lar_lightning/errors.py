"""The one exception for what a user can put right.

It is printed as one line, without a traceback.
"""


class SettingError(ValueError):
    """A setting, file or combination of them that cannot work.

    The message names the setting, the rule, the value that was found, and the way out.
    """
