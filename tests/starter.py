"""Run the tests alike for everyone: the same signals, umask, locale, clock, proxies, home, terminal and variables."""

import atexit
import os
import re
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

# Variables that change what make, its scripts or their programs do; a test sets those that it needs
STEERING = re.compile(
    r"MAKE.*|MFLAGS|CT_.*|ACCEPT|CACHE|CACHE_MODE|PYTHON|EXPLAIN|SLOW|NETWORK|ADDRESS|(HTTP|GRPC|METRICS)_PORT|IMAGE"
    r"|YANDEX_.*|FETCH_.*|NGC_.*|TRITON_.*|TENSORRT_.*|DOCKER_GPUS|COMPOSE_.*|SLURM_.*|NVIDIA_TF32_OVERRIDE"
    r"|LC_.*|LANG|LANGUAGE|TZ|TERM|COLUMNS|LINES|NO_COLOR|(PY|FORCE|CLI)_?COLOR.*|XDG_(CONFIG|CACHE|DATA|STATE)_HOME"
    r"|GIT_(DIR|WORK_TREE|INDEX_FILE|AUTHOR_.*|COMMITTER_.*|CONFIG.*|CEILING.*|TEMPLATE_DIR)"
    r"|PYTHON(PATH|HOME|WARNINGS|UTF8|IOENCODING|OPTIMIZE|HASHSEED|STARTUP|SAFEPATH)|BASH_ENV|ENV|CDPATH|POSIXLY_CORRECT"
)


def start_alike() -> None:
    """Give this process, and all programs that tests start, the same environment."""
    # A shell starts background programs with Ctrl-C ignored, and every program of the tests would inherit this
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD, signal.SIGTSTP:
        signal.signal(number, signal.SIG_DFL)
    os.umask(0o022)
    for name in filter(STEERING.fullmatch, list(os.environ)):
        del os.environ[name]
    os.environ |= {"LC_ALL": "C.UTF-8", "TZ": "UTC", "TERM": "dumb"}
    time.tzset()
    drop_dead_proxies()
    use_an_empty_home()


def drop_dead_proxies() -> None:
    """Remove each proxy whose address does not answer; use no proxy for addresses of this machine."""
    for name in [name for name in os.environ if re.fullmatch("(https?|ftp|all)_proxy", name.lower())]:
        proxy = os.environ[name]
        try:
            parts = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
            socket.create_connection((parts.hostname, parts.port or 80), timeout=3).close()
        except (OSError, ValueError):
            del os.environ[name]
    for name in "no_proxy", "NO_PROXY":
        others = os.environ.get(name, "")
        os.environ[name] = ",".join(filter(None, [others, "127.0.0.1", "localhost"]))


def use_an_empty_home() -> None:
    """Let HOME be an empty folder; keep only the user's settings of pip and Docker."""
    user = Path("~").expanduser()
    configs = [user / ".config/pip/pip.conf", user / ".pip/pip.conf"]
    kept = {"PIP_CONFIG_FILE": configs, "PIP_CACHE_DIR": [user / ".cache/pip"], "DOCKER_CONFIG": [user / ".docker"]}
    for name, places in kept.items():
        if name not in os.environ and (there := [str(place) for place in places if os.access(place, os.R_OK)]):
            os.environ[name] = there[0]
    home = tempfile.mkdtemp(prefix="home-of-tests-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    os.environ["HOME"] = home
