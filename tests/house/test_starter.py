"""The tests run alike however they are started: in the background, by cron, or with a user's own settings."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

ENVIRONMENT = """
import json, locale, os, pathlib, signal, sys, time
sys.path.insert(0, "tests")
import conftest
numbers = signal.valid_signals() & {1, 2, 3, 15, 17, 20}
ignored = [number.name for number in numbers if signal.getsignal(number) == signal.SIG_IGN]
umask = os.umask(0o777)
print(json.dumps({
    "ignored": ignored, "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    "umask": umask, "zone": time.tzname[0], "home": sorted(os.listdir(os.environ["HOME"])),
    "variables": sorted(os.environ.keys() & set(sys.argv[1:])), "direct": os.environ["NO_PROXY"].split(",")[-2:],
}))
"""
HABITS = {
    "LC_ALL": "ru_RU.KOI8-R", "LANG": "tr_TR.UTF-8", "LANGUAGE": "ru", "TZ": "Asia/Kathmandu", "COLUMNS": "20",
    "http_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "127.0.0.1:9", "MAKEFLAGS": "n", "CT_OPSET": "9",
    "ACCEPT": "1", "GIT_DIR": "/nowhere", "YANDEX_DISK_API": "http://127.0.0.1:9", "FORCE_COLOR": "1",
}  # fmt: skip


def worst_case() -> None:
    """Change this process as a shell without a terminal does with `(trap '' INT; umask 077; …) <&- &`."""
    os.setsid()
    for number in signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGUSR1])
    os.umask(0o077)
    os.close(0)


def test_signals_umask_locale_clock_proxy_and_home_are_the_same_however_tests_are_started(tmp_path: Path) -> None:
    (tmp_path / ".gitconfig").write_text("[core]\n\tautocrlf = true\n")
    for home in {"HOME": str(tmp_path)}, {"HOME": ""}, {}:
        environment = {name: value for name, value in os.environ.items() if name != "HOME"} | HABITS | home
        run = subprocess.run(
            [sys.executable, "-c", ENVIRONMENT, *HABITS], cwd=ROOT, env=environment, preexec_fn=worst_case,
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        assert json.loads(run.stdout) == {
            "ignored": [], "blocked": [], "umask": 0o022, "zone": "UTC", "home": [],
            "variables": ["LC_ALL", "TZ"], "direct": ["127.0.0.1", "localhost"],
        }  # fmt: skip
