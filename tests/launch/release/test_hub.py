"""push(): private by default, never into a public repository by mistake, one-line errors."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import huggingface_hub
import pytest

from launch.release.hub import PushError, check_repo_id, push

SECRET = "hf_abcdefghijkl"


@dataclass
class Hub:
    """In the place of huggingface_hub.HfApi: remembers what it is asked."""

    there: bool | None = None  # whether an existing repository is private
    asked: list = field(default_factory=list)

    def __call__(self) -> Hub:
        return self

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        self.asked.append(("create", repo_id, private))
        self.there = private if self.there is None else self.there
        return f"https://huggingface.co/{repo_id}"

    def repo_info(self, repo_id: str) -> object:
        return type("Info", (), {"private": self.there})()

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str
    ) -> None:
        self.asked.append(
            (
                "upload",
                repo_id,
                sorted(f.name for f in folder_path.rglob("*") if f.is_file()),
            )
        )


def online(
    monkeypatch: pytest.MonkeyPatch,
    hub: Hub | None = None,
    *,
    token: str | None = SECRET,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    if hub is not None:
        monkeypatch.setattr(huggingface_hub, "HfApi", hub)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out/transformer").mkdir(parents=True)
    (tmp_path / "out/README.md").touch()
    (tmp_path / "out/transformer/config.json").touch()
    return tmp_path / "out"


CREATED, UPLOADED = (
    ("create", "me/lora"),
    ("upload", "me/lora", ["README.md", "config.json"]),
)


@pytest.mark.parametrize(
    ("there", "public"),
    [(None, False), (None, True), (True, False), (True, True), (False, True)],
)
def test_push_creates_repository_and_uploads_all_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, there: bool | None, public: bool
) -> None:
    online(monkeypatch, hub := Hub(there))
    assert push(folder, "me/lora", public=public) == "https://huggingface.co/me/lora"
    assert hub.asked == [(*CREATED, not public), UPLOADED]


def test_push_to_existing_public_repository_needs_public(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(monkeypatch, hub := Hub(there=False))
    with pytest.raises(PushError, match="--public"):
        push(folder, "me/lora", public=False)
    assert hub.asked == [(*CREATED, True)]


class Refusing(BaseHTTPRequestHandler):
    """A hub that lets nobody create anything, and remembers who asked for what."""

    asked: ClassVar[list] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, self.headers["Authorization"], body))
        self.send_response(403)
        self.end_headers()
        self.wfile.write(b"no")

    def log_message(self, *args: object) -> None:
        pass


def test_hub_client_requests_a_private_repository(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    Thread(target=server.serve_forever, daemon=True).start()
    online(monkeypatch)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(
        huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    with pytest.raises(PushError, match="403") as caught:
        push(folder, "me/lora", public=False)
    server.shutdown()
    server.server_close()
    ((path, who, body),) = Refusing.asked
    assert (path, who) == ("/api/repos/create", f"Bearer {SECRET}")
    assert (body["name"], body["organization"]) == ("lora", "me")
    assert body.get("private") is True or body.get("visibility") == "private"
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)


def test_check_repo_id_accepts_owner_and_name_only() -> None:
    check_repo_id("me/lora-1.3B")
    for name in ("lora", "a/b/c", "me/lo ra", "me/", "/tmp"):
        with pytest.raises(ValueError, match=r"me|lora|/"):
            check_repo_id(name)
