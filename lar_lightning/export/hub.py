"""Putting an export on a model hub.

What can be known before is asked before any long work: a name, a log-in, a hub that answers.
"""

from pathlib import Path

from lar_lightning.errors import SettingError


def check_hub(repository: str) -> None:
    """Refuse a repository that an export could not be put into.

    Raises:
        SettingError: if the name is none, the hub is switched off or does not answer, or nobody is
        logged in.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    rule = "`push_to_hub` must name a repository of a hub that can be reached"
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise SettingError(
            f"`push_to_hub` must be a name such as organisation/model, got {repository!r} "
            f"({str(error).splitlines()[0]})."
        ) from error
    if constants.HF_HUB_OFFLINE:
        raise SettingError(
            f"{rule}, got {repository!r} while HF_HUB_OFFLINE is set. Unset it, or leave "
            "`--push_to_hub` out: the folder can be put there later."
        )
    if get_token() is None:
        raise SettingError(
            f"{rule}, got {repository!r} without a log-in. Run `hf auth login` or set HF_TOKEN, "
            "with a token that may write."
        )
    try:
        HfApi(endpoint=constants.ENDPOINT).whoami()
    except (HfHubHTTPError, OSError, RuntimeError) as error:
        raise SettingError(
            f"{rule}, got {repository!r}, but {constants.ENDPOINT} does not take the log-in "
            f"({_first_line(error)}). Check the token and the network."
        ) from error
    except Exception as error:
        if not _is_of_network(error):
            raise
        raise SettingError(
            f"{rule}, got {repository!r}, but {constants.ENDPOINT} does not answer "
            f"({_first_line(error)}). Check the network, or leave `--push_to_hub` out."
        ) from error


def push(folder: Path, repository: str) -> None:
    """Put a finished export into a repository; a new one is private.

    Raises:
        SettingError: if the hub does not take it; the export itself stays.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Export of lar_lightning"
        )
    except Exception as error:
        if not isinstance(error, HfHubHTTPError | OSError) and not _is_of_network(error):
            raise
        raise SettingError(
            f"`push_to_hub` must name a repository that can be written to, got {repository!r} "
            f"({_first_line(error)}). The export in {folder} is finished: the same command tries "
            "again and writes nothing anew."
        ) from error
    print(f"export: put {folder} into {repository} ({commit.commit_url})", flush=True)


def _is_of_network(error: Exception) -> bool:
    """Tell whether an error is of the client that the hub's package uses, whichever that is."""
    return type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3"))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
