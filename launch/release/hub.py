"""Push an exported folder to the Hugging Face hub, into a private repository by default."""

from __future__ import annotations

from pathlib import Path

from common.run_record import hide_secrets


class PushError(RuntimeError):
    """The push failed, perhaps after a part of the files. The message is a single line."""


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError unless the name is OWNER/NAME, by the hub's rules."""
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    # The hub's rules also allow a name without an owner.
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} must be OWNER/NAME")


def push(folder: Path, repo_id: str, *, public: bool) -> str:
    """Upload everything in ``folder`` with the user's token (`hf auth login`, HF_TOKEN).

    Returns the repository's address. PushError when the hub cannot be reached or refuses, and when
    the repository exists and is public although ``public`` is False.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HTTPError

    # Name the two usual mistakes before anything is sent.
    if constants.HF_HUB_OFFLINE:
        raise PushError("HF_HUB_OFFLINE is set, so nothing is sent")
    if get_token() is None:
        raise PushError("there is no token: run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=not public, exist_ok=True)
        # The hub does not make an existing repository private.
        if not public and not api.repo_info(repo_id).private:
            raise PushError(
                f"{repo_id} exists and is public; give --public to push to it"
            )
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Export")
    except (OSError, ValueError, HTTPError) as error:
        reason = str(error).strip().partition("\n")[0]
        message = hide_secrets(f"{type(error).__name__}: {reason}")
        raise PushError(message) from error
    return str(url)
