"""`python -m lar_lightning VERB --config FILE`.

Each verb is one stage of the run that the file describes.

`fit validate test predict` are Lightning's and take all of its options. The others read what they
need from the same file and import only what they use, so that their `--help` is instant.
"""

import sys
from collections.abc import Callable

from lar_lightning.errors import SettingError
from lar_lightning.recovery.faults import explained

TRAINER_VERBS = {
    "fit": "roll out, mine and train; goes on where an earlier run stopped",
    "validate": "loss and horizon on held-out trajectories",
    "test": "the same, under the name test",
    "predict": "the loss of every row",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a verb and return the exit status.

    2 for what the user can put right, said in one line.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    from lar_lightning.verbs import VERBS

    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(VERBS))
        return 0 if arguments else 2
    verb = arguments[0]
    try:
        if verb in TRAINER_VERBS:
            from lar_lightning.recovery.requeue import held_signals

            with held_signals():  # until a callback listens: imports take seconds
                from lar_lightning.cli import run_trainer_verb

                run_trainer_verb(arguments)
        elif verb in VERBS:
            from lar_lightning.verbs import run_verb

            run_verb(verb, arguments[1:])
        else:
            known = ", ".join([*TRAINER_VERBS, *VERBS])
            raise SettingError(
                f"the verb must be one of {known}, got {verb!r}. See `python -m lar_lightning "
                "--help`."
            )
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError, MemoryError) as error:
        reason = explained(error)
        if reason is None:
            raise
        print(f"error: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted: what was finished is kept; the same command goes on from there",
            file=sys.stderr,
        )
        return 130
    return 0


def usage(verbs: dict[str, Callable[..., None]]) -> str:
    """Return the list of verbs."""
    lines = {
        **TRAINER_VERBS,
        **{name: (verb.__doc__ or "").splitlines()[0] for name, verb in verbs.items()},
    }
    listed = "\n".join(f"  {name:<10} {line}" for name, line in lines.items())
    head = "usage: python -m lar_lightning VERB --config FILE [--option value ...]"
    return f"{head}\n\n{listed}\n\nVERB --help lists options."


if __name__ == "__main__":
    sys.exit(main())
