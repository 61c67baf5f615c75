"""Make nodes on one machine: network namespaces with an address each, on a bridge in another.

Nothing of it is in the network of the machine, and nothing stays behind.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tests.launch.processes import BIN, ROOT


def cannot() -> str:
    """Say why this machine cannot make namespaces, or return an empty text."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "network namespaces need ip and unshare"
    name = f"probe-{os.getpid()}"
    made = subprocess.run(
        ["ip", "netns", "add", name], capture_output=True, text=True, check=False
    )
    if made.returncode:
        return f"ip netns add: {made.stderr.strip()}"
    pair = [
        "ip",
        "-n",
        name,
        "link",
        "add",
        "one",
        "type",
        "veth",
        "peer",
        "name",
        "two",
    ]
    done = subprocess.run(pair, capture_output=True, text=True, check=False)
    _ip("netns", "del", name)
    return f"{' '.join(pair)}: {done.stderr.strip()}" if done.returncode else ""


class Nodes:
    """A node for each name. The interface of node "a" is "to-a", so no two have the same name."""

    def __init__(self, names: str, folder: Path) -> None:
        self.prefix, self.folder = f"nodes-{os.getpid()}-", folder
        self.address = {name: f"10.77.0.{i}" for i, name in enumerate(names, start=1)}
        self.started: list[subprocess.Popen[bytes]] = []
        self.made: list[str] = []

    def __enter__(self) -> Nodes:
        try:
            self._add("switch")
            switch = self.prefix + "switch"
            _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", switch, "link", "set", "bridge", "up")
            for name, address in self.address.items():
                self._add(name)
                own = self.prefix + name
                _ip(
                    "-n",
                    own,
                    "link",
                    "add",
                    f"to-{name}",
                    "type",
                    "veth",
                    "peer",
                    "name",
                    f"of-{name}",
                    "netns",
                    switch,
                )
                _ip("-n", switch, "link", "set", f"of-{name}", "master", "bridge", "up")
                _ip("-n", own, "address", "add", f"{address}/24", "dev", f"to-{name}")
                for interface in ("lo", f"to-{name}"):
                    _ip("-n", own, "link", "set", interface, "up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name in self.made:
            self.kill(name)
        for process in self.started:
            process.wait(timeout=30)
        for name in self.made:
            _ip("netns", "del", self.prefix + name)

    def _add(self, name: str) -> None:
        _ip("netns", "add", self.prefix + name)
        self.made.append(name)

    def inside(self, name: str) -> list[str]:
        """Return the words before a command that run it on the node."""
        return ["ip", "netns", "exec", self.prefix + name]

    def start(
        self, name: str, *words: str, **variables: str
    ) -> subprocess.Popen[bytes]:
        """Start a command in the background, from the repository's root; `said` has its output."""
        with self.log(name).open("ab") as out:
            process = subprocess.Popen(
                [*self.inside(name), *words],
                cwd=ROOT,
                env=environment(**variables),
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.txt"

    def said(self, name: str) -> str:
        return self.log(name).read_text(errors="replace")

    def pids(self, name: str) -> list[int]:
        found = subprocess.run(
            ["ip", "netns", "pids", self.prefix + name],
            capture_output=True,
            text=True,
            check=True,
        )
        return [int(word) for word in found.stdout.split()]

    def kill(self, name: str) -> None:
        """Every process there, by SIGKILL, until none is left."""
        deadline = time.monotonic() + 30
        while own := self.pids(name):
            assert time.monotonic() < deadline, own
            for pid in own:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in self.started:
                process.poll()  # a child that nobody waits for stays in the list
            time.sleep(0.02)

    def link(self, name: str, state: str) -> None:
        """Pull the node's cable ("down"), or put it back ("up")."""
        _ip("-n", self.prefix + "switch", "link", "set", f"of-{name}", state)


def environment(**variables: str) -> dict[str, str]:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, **variables}


def codes(processes: Sequence[subprocess.Popen[bytes]], *, timeout: float) -> list[int]:
    """Their exit codes; fails when one is not done in time."""
    deadline = time.monotonic() + timeout
    return [
        process.wait(timeout=max(0.1, deadline - time.monotonic()))
        for process in processes
    ]


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
