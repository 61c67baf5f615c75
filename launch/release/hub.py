"""A written folder, pushed to the Hugging Face hub: private unless its owner says otherwise."""

from __future__ import annotations

from pathlib import Path

from common.run_record import hide_secrets


class PushError(RuntimeError):
    """Nothing, or not everything, was pushed. The message is one line."""


def check_repo_id(repo_id: str) -> None:
    """ValueError unless it is OWNER/NAME as the hub has them."""
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    if repo_id.count("/") != 1:
        raise ValueError(f"--push {repo_id!r} must be OWNER/NAME")


def push(folder: Path, repo_id: str, *, public: bool) -> str:
    """Upload everything in ``folder``, and return the address. The token is the user's own (`hf auth login`, HF_TOKEN).

    PushError when the hub cannot be reached or refuses, and when the repository is there already and is public while
    ``public`` is False: creating it once more as a private one would change nothing.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HTTPError

    if constants.HF_HUB_OFFLINE:
        raise PushError("HF_HUB_OFFLINE is set, so nothing is sent")
    if get_token() is None:
        raise PushError("there is no token: `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=not public, exist_ok=True)
        if not public and not api.repo_info(repo_id).private:
            raise PushError(
                f"{repo_id} exists and is public; --public if that is meant"
            )
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Export")
    except (OSError, ValueError, HTTPError) as error:
        raise PushError(f"{type(error).__name__}: {_first_line(error)}") from error
    return str(url)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return hide_secrets(lines[0]) if lines else "no message"
