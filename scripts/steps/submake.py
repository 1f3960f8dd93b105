"""Run make from a step or a target of make. Standard library only.

A recipe that begins with + shares make's job server.  For any other recipe the flags of the job server are left out,
and the knobs that the user gave stay.
"""

import os
import subprocess
from typing import Any


def run_make(*words: str, jobs: bool = False, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run make with these words; with `jobs` it uses the job server of the make that runs this program."""
    environment = dict(os.environ)
    if not jobs:
        given = environment.pop("MAKEFLAGS", "").partition(" -- ")[2]
        environment |= {"MAKEFLAGS": f" -- {given}"} if given else {}
    command = [environment.get("MAKE_COMMAND", "make"), "--no-print-directory", *words]
    return subprocess.run(command, env=environment, close_fds=not jobs, text=True, check=False, **options)
