"""Run a server that holds code of others: without network and secrets, and with one folder that it may write to.

    python3 -sESB -m scripts.serve.sandbox FOLDER [--see PATH]... --port FD=PORT... -- COMMAND...

The command gets namespaces of its own (user, mounts, network, processes; man 7 namespaces). Linux gives them to every
user, unless its settings forbid that. The command sees the system (/usr and so on), each PATH and FOLDER; it may write
to FOLDER alone. It gets an empty /tmp and /dev/shm of its own, and a network with nothing but a loopback. Each FD is a
socket that listens outside: a connection to it is forwarded to 127.0.0.1:PORT inside.
Standard library only, and no other file of this project, because it runs by its path. Linux 5.12 or newer.
"""

import argparse
import ctypes
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import FrameType
from typing import NoReturn

LIBC = ctypes.CDLL(None, use_errno=True)
NEW_USER, NEW_MOUNTS, NEW_NETWORK, NEW_IPC, NEW_PROCESSES = 0x10000000, 0x00020000, 0x40000000, 0x08000000, 0x20000000
BIND, RECURSIVE, PRIVATE = 4096, 16384, 1 << 18
NOSUID, NODEV = 2, 4
DETACH = 2
PIVOT_ROOT, MOUNT_SETATTR = 155, 442  # x86-64
READ_ONLY, AT_RECURSIVE = 1, 0x8000
SET_DEATH, DROP_BOUND, NO_NEW_PRIVILEGES = 1, 24, 38
GET_FLAGS, SET_FLAGS, UP = 0x8913, 0x8914, 1  # of a network interface
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix", "/sys")
FILES = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "passwd", "group", "nsswitch.conf", "localtime")
DEVICES = ("null", "zero", "full", "random", "urandom")
BLOCK = 1 << 20


def call_libc(name: str, *arguments: object) -> None:
    """Call a function of the C library; OSError if it fails."""
    if getattr(LIBC, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount_folder(source: str, target: str, kind: str = "none", flags: int = 0, data: str = "") -> None:
    """Call mount(2); OSError if it is refused."""
    call_libc("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())


@cache
def explain_refusal() -> str:
    """Return the reason why this kernel gives no such namespaces, "" if it gives them."""
    with tempfile.TemporaryDirectory(prefix="chest-sandbox-") as folder:
        command = make_confined_command(["/bin/sh", "-c", ":"], Path(folder), [], {})
        run = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"})
    return "" if run.returncode == 0 else (run.stderr.strip().splitlines() or [f"status {run.returncode}"])[-1]


def make_confined_command(
    command: Sequence[str], folder: Path, see: Iterable[Path], ports: dict[int, int]
) -> list[str]:
    """Return the command that runs `command` in the sandbox. `ports`: FD of a listening socket -> port inside."""
    words = [word for path in dict.fromkeys(see) for word in ("--see", str(path))]
    words += [word for number, port in ports.items() for word in ("--port", f"{number}={port}")]
    return [sys.executable, "-sESB", str(Path(__file__).resolve()), str(folder), *words, "--", *command]


def list_python_folders(venv: Path) -> list[Path]:
    """Return the folders that an environment's Python needs: the environment, and the folders its links lead to."""
    found = [venv.absolute(), venv.resolve()]
    link = venv.resolve() / "bin/python3"
    for _ in range(40):
        home = link.parent.parent
        if home != Path("/") and not Path.home().is_relative_to(home):
            found.append(home)
        if not link.is_symlink():
            break
        link = link.parent / link.readlink()
    return found


def enter_namespaces() -> None:
    """Move this process into new namespaces, with the same user and group; OSError if that is refused."""
    user, group = os.geteuid(), os.getegid()
    call_libc("unshare", NEW_USER | NEW_MOUNTS | NEW_NETWORK | NEW_IPC)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        told = fcntl.ioctl(any_socket, GET_FLAGS, struct.pack("16sh14x", b"lo", 0))
        flags = struct.unpack("16sh14x", told)[1] | UP
        fcntl.ioctl(any_socket, SET_FLAGS, struct.pack("16sh14x", b"lo", flags))


def build_root(folder: Path, see: Iterable[Path]) -> None:
    """Run in the new process 1: make a root of the visible paths, read-only except `folder`, and change to it."""
    mount_folder("none", "/", flags=RECURSIVE | PRIVATE)
    root = os.path.realpath("/tmp")  # the new root is mounted here; no visible path may lie in it
    writable = os.open(folder, os.O_PATH)
    opened = {path: os.open(path, os.O_PATH) for path in [*list_places(see), *(f"/dev/{name}" for name in DEVICES)]}
    mount_folder("tmpfs", root, "tmpfs", NOSUID | NODEV, "mode=755,size=64m")
    for path, size in (("/tmp", "size=1g"), ("/dev/shm", "size=90%")):
        os.makedirs(f"{root}{path}")
        mount_folder("tmpfs", f"{root}{path}", "tmpfs", NOSUID | NODEV, f"mode=1777,{size}")
    for path in SYSTEM:
        if os.path.islink(path):
            os.symlink(os.readlink(path), f"{root}{path}")
    for path, number in opened.items():
        bind_mount(number, f"{root}{path}", os.path.isdir(f"/proc/self/fd/{number}"), writable=path.startswith("/dev/"))
    bind_mount(writable, f"{root}{folder}", True, writable=True)
    os.makedirs(f"{root}/proc")
    try:
        mount_folder("proc", f"{root}/proc", "proc", NOSUID | NODEV)
    except OSError:  # in a container that hides parts of /proc; other processes belong to another user namespace
        mount_folder("/proc", f"{root}/proc", flags=BIND | RECURSIVE)
    make_read_only(f"{root}/proc", recursive=True)  # root could change the kernel's settings, even without capabilities
    os.chdir(root)
    if LIBC.syscall(PIVOT_ROOT, b".", b"."):
        raise OSError(ctypes.get_errno(), f"pivot_root: {os.strerror(ctypes.get_errno())}")
    call_libc("umount2", b".", DETACH)
    make_read_only("/", recursive=False)
    os.chdir(folder)
    for number in (writable, *opened.values()):  # through an open folder and its .. the command could leave the root
        os.close(number)


def list_places(see: Iterable[Path]) -> list[str]:
    """Return each visible path, also with its links resolved; a folder comes before the paths in it."""
    system = [path for path in SYSTEM if os.path.isdir(path) and not os.path.islink(path)]
    named = [*system, *(f"/etc/{name}" for name in FILES), *map(str, see)]
    both = {way for path in named if os.path.exists(path) for way in (os.path.abspath(path), os.path.realpath(path))}
    return sorted(path for path in both if not any(path.startswith(f"{above}/") for above in system))


def bind_mount(number: int, target: str, folder: bool, writable: bool = False) -> None:
    """Mount the file or folder that is open as `number` at `target`."""
    os.makedirs(target if folder else os.path.dirname(target), exist_ok=True)
    if not folder and not os.path.exists(target):
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    mount_folder(f"/proc/self/fd/{number}", target, flags=BIND | RECURSIVE)
    if not writable:
        make_read_only(target, recursive=True)


def make_read_only(path: str, recursive: bool) -> None:
    """Make a mount read-only for everyone."""
    attributes = struct.pack("QQQQ", READ_ONLY, 0, 0, 0)
    if LIBC.syscall(MOUNT_SETATTR, -100, path.encode(), AT_RECURSIVE if recursive else 0, attributes, len(attributes)):
        raise OSError(ctypes.get_errno(), f"mount_setattr {path}: {os.strerror(ctypes.get_errno())}")


def give_up_rights() -> None:
    """Give up all capabilities at the next exec, for ever."""
    for capability in range(64):
        LIBC.prctl(DROP_BOUND, capability, 0, 0, 0)
    call_libc("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def forward_connections(listening: socket.socket, port: int) -> None:
    """Forward each connection to the port inside, for ever."""
    while True:
        outer, _ = listening.accept()
        threading.Thread(target=forward_connection, args=(outer, port), daemon=True).start()


def forward_connection(outer: socket.socket, port: int) -> None:
    """Copy bytes in both directions of a connection, until both sides have ended."""
    with outer, socket.socket() as inner, suppress(OSError):
        inner.connect(("127.0.0.1", port))
        for end in (outer, inner):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        back = threading.Thread(target=copy_bytes, args=(inner, outer), daemon=True)
        back.start()
        copy_bytes(outer, inner)
        back.join()


def copy_bytes(source: socket.socket, target: socket.socket) -> None:
    """Copy bytes from one side to the other, until it ends; then end the other side, too."""
    buffer = memoryview(bytearray(BLOCK))
    with suppress(OSError):
        while count := source.recv_into(buffer):
            target.sendall(buffer[:count])
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def run_confined(command: Sequence[str], folder: Path, see: Iterable[Path], ports: dict[int, int]) -> int:
    """Return the exit status of the command, or minus the signal that killed it.

    There are three processes. This one forwards connections. The second (keeper) makes the new process
    namespace; after that it cannot start threads. The third is process 1 there: when it ends, the command and all its
    children end.
    """
    enter_namespaces()
    call_libc("prctl", SET_DEATH, signal.SIGTERM, 0, 0, 0)  # enter_namespaces has unset it
    if not (keeper := os.fork()):
        exit_like(run_in_child(lambda: run_in_namespaces(command, folder, see, ports)))
    forward_signals(keeper)
    for number, port in ports.items():
        threading.Thread(target=forward_connections, args=(socket.socket(fileno=number), port), daemon=True).start()
    return os.waitstatus_to_exitcode(os.waitpid(keeper, 0)[1])


def run_in_namespaces(command: Sequence[str], folder: Path, see: Iterable[Path], ports: Iterable[int]) -> int:
    """Run in the second process: start process 1 of a new process namespace, and return how the command ended."""
    call_libc("prctl", SET_DEATH, signal.SIGKILL, 0, 0, 0)
    for number in ports:
        os.close(number)
    call_libc("unshare", NEW_PROCESSES)
    if not (child := os.fork()):
        run_in_child(lambda: start_command(command, folder, see))
    forward_signals(child)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return 128 - status if status > 128 else status  # process 1 cannot end by a signal; its status tells the signal


def start_command(command: Sequence[str], folder: Path, see: Iterable[Path]) -> int:
    """Run in process 1: start the command, forward signals to it, reap its orphans, exit with its status."""
    call_libc("prctl", SET_DEATH, signal.SIGKILL, 0, 0, 0)
    build_root(folder, see)
    give_up_rights()
    if not (child := os.fork()):
        os.execvp(command[0], list(command))
    forward_signals(child)
    while (ended := os.wait())[0] != child:
        pass
    status = os.waitstatus_to_exitcode(ended[1])
    os._exit(128 - status if status < 0 else status)


def run_in_child(action: Callable[[], int]) -> int:
    """Run `action` in a forked child. The child never continues the parent's code: on an error it exits with 125."""
    try:
        return action()
    except BaseException as error:
        print(f"sandbox: {error}", file=sys.stderr, flush=True)
        os._exit(125)


def forward_signals(child: int) -> None:
    """Forward to a child the signals that ask this process to stop."""

    def stop(number: int, _: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)


def exit_like(status: int) -> NoReturn:
    """End as the command did, by the same status or signal."""
    if status < 0:
        with suppress(OSError):  # SIGKILL has no handler to reset
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--see", type=Path, action="append", default=[])
    parser.add_argument("--port", action="append", default=[], metavar="FD=PORT")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    ports = {int(number): int(port) for number, _, port in (pair.partition("=") for pair in given.port)}
    try:
        status = run_confined(given.command, given.folder.resolve(), given.see, ports)
    except OSError as error:
        raise SystemExit(f"sandbox: {error.strerror}") from None
    sys.stdout.flush()
    exit_like(status)


if __name__ == "__main__":
    main()
