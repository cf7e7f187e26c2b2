"""Machines on this one (Linux, root): network namespaces with names of their own, a switch, and cables to pull."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil  # accelerate brings it

_ADDRESS = "10.77.0.{}"
_CLONE_NEWNET = 0x40000000


class Nodes:
    """node0, node1 and so on, entered as a context; they see the same files and each other, and nothing else.

    folder: for their hosts file. Processes that start adds run until they end or the context does.
    """

    def __init__(self, folder: Path, count: int = 2) -> None:
        self._spaces = [f"esol-{os.getpid()}-{k}" for k in range(count)]
        self._switch = f"esol-{os.getpid()}-switch"
        self._hosts = folder / "hosts"
        self._processes: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Nodes:
        lines = [f"{_ADDRESS.format(k + 1)} node{k}\n" for k in range(len(self._spaces))]
        self._hosts.write_text("127.0.0.1 localhost\n" + "".join(lines))
        for space in (self._switch, *self._spaces):
            _ip("netns", "add", space)
        _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "switch", "up")
        for k, space in enumerate(self._spaces):
            port = (f"port{k}", "netns", self._switch)
            _ip("link", "add", "cable", "netns", space, "type", "veth", "peer", "name", *port)
            _ip("-n", self._switch, "link", "set", f"port{k}", "master", "switch", "up")
            _ip("-n", space, "addr", "add", f"{_ADDRESS.format(k + 1)}/24", "dev", "cable")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", "cable", "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            kill_tree(process)
        for space in (self._switch, *self._spaces):
            _ip("netns", "del", space)

    def start(self, node: int, command: Sequence[str], env: dict[str, str], **options: Any) -> subprocess.Popen[Any]:
        """Starts a command on a node; its process is the command's own."""
        name = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
        inside = ["unshare", "-m", "-u", "sh", "-c", name, "sh", f"node{node}", str(self._hosts), *command]
        env = env | {"GLOO_SOCKET_IFNAME": "cable", "TP_SOCKET_IFNAME": "cable"}
        enter = ["nsenter", f"--net=/run/netns/{self._spaces[node]}"]  # ip netns exec would hide /sys/fs/cgroup
        process = subprocess.Popen([*enter, *inside], env=env, start_new_session=True, **options)
        self._processes.append(process)
        return process

    def listening(self, node: int) -> socket.socket:
        """A socket of this process that listens on the node, at a port that is free there."""
        made: list[socket.socket] = []

        def make() -> None:  # in a thread: it is a thread that is in a network
            with open(f"/run/netns/{self._spaces[node]}") as space:
                if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            made.append(socket.create_server((_ADDRESS.format(node + 1), 0), backlog=64))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        return made[0]

    def pull(self, node: int = 1) -> None:
        """Packets from and to the node are lost from now on; no end hears of it."""
        _ip("-n", self._spaces[node], "link", "set", "cable", "down")

    def plug(self, node: int = 1) -> None:
        """The node's cable is whole again."""
        _ip("-n", self._spaces[node], "link", "set", "cable", "up")

    def sent(self, node: int) -> int:
        """Bytes that the node has put on the cable so far, headers too."""
        shown = subprocess.run(
            ["ip", "netns", "exec", self._spaces[node], "cat", "/sys/class/net/cable/statistics/tx_bytes"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        return int(shown.stdout)


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """kill -9 of a process and all that it started."""
    victims = []
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        victims = [*root.children(recursive=True), root]
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    with contextlib.suppress(ProcessLookupError):  # those whose parent had died before
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
