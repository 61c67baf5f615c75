"""What may be asked of the Hugging Face hub; its own libraries take any path for a name and then ask the network."""

from __future__ import annotations


def require_hub_name(path: str, file: str) -> None:
    """FileNotFoundError for what is no folder and cannot be a hub name either (owner/name), or is one that is not in
    the cache while HF_HUB_OFFLINE is set.

    file  one that every model of the kind has
    """
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise FileNotFoundError(f"{path} does not exist")
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(path, file), str):
        raise FileNotFoundError(
            f"{path} is no folder here, and as a hub name it is not in the cache {constants.HF_HUB_CACHE}; "
            "HF_HUB_OFFLINE keeps it from being downloaded"
        )
