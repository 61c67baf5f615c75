"""Addresses of reward servers, checked before anything is loaded or written."""

from __future__ import annotations

from urllib.parse import urlsplit


def check_address(name: str, url: str) -> None:
    """Raise ValueError unless a server's address is http://host:port without a password.

    The address is written to the run's config, so that it must not hold a secret.
    """
    key = f"rewards.{name}.url"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{key} is no address: {error}") from error
    # the password itself must not be repeated
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            f"{key} holds a user name or password: leave them out, and put the server's token "
            "into the environment variable of options.token_env"
        )
    printable = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not parts.hostname or not printable:
        raise ValueError(f"{key} must be http://host:port, got {url!r}")
    if port == 0:
        raise ValueError(f"{key} has the port 0")
