"""A real Slurm from Debian's packages, on this machine: nodes that declare GPUs, with folders and ports of its own."""

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
CONF = """
ClusterName=chest-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SchedulerParameters=batch_sched_delay=0
TaskProlog={folder}/prolog.sh
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/spool-%n
"""
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")
# As the administrators of a cluster do, this tells the jobs of each node how containers get the GPU
PROLOG = """#!/bin/bash
if [[ -f {folder}/$SLURMD_NODENAME.docker ]]; then echo "export DOCKER_GPUS=$(cat {folder}/$SLURMD_NODENAME.docker)"; fi
"""


class Slurm:
    """munged, slurmctld, and for each kind of GPU one slurmd, on a node of that name."""

    def __init__(self, kinds: list[str]) -> None:
        # in /tmp, because the path of a socket has to be short
        self.folder = Path(tempfile.mkdtemp(prefix="chest-slurm-test-", dir="/tmp"))
        self.kinds, self.daemons = kinds, dict[str, "subprocess.Popen[bytes]"]()
        self.conf = self.folder / "slurm.conf"
        host = socket.gethostname().partition(".")[0]
        ports = free_ports(1 + len(kinds))
        text = CONF.format(host=host, ports=ports, user=getpass.getuser(), folder=self.folder)
        for kind, port in zip(kinds, ports[1:], strict=True):
            node = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={port} RealMemory=1000 Gres=gpu:{kind}:1"
            text += f"NodeName={kind} {node}\n"
        self.conf.write_text(f"{text}PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n")
        gres = "".join(
            f"NodeName={kind} Name=gpu Type={kind} File={DEVICES[n]} Count=1\n" for n, kind in enumerate(kinds)
        )
        (self.folder / "gres.conf").write_text(gres)
        (self.folder / "prolog.sh").write_text(PROLOG.format(folder=self.folder))
        (self.folder / "prolog.sh").chmod(0o755)
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (self.folder / "munge.key").chmod(0o600)

    def start(self) -> None:
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.folder}/munge.{end}" for option, end in files.items()]
        self.run_daemon("munged", "--foreground", "--force", *options)
        until((self.folder / "munge.socket").exists, "munged")
        self.run_daemon("slurmctld", "-D", "-f", str(self.conf))
        for kind in self.kinds:
            self.start_node(kind)
        until(lambda: self.ask("sinfo", "--noheader", "--format=%T").split() == ["idle"], "Slurm")

    def start_node(self, kind: str) -> None:
        self.run_daemon(kind, "-D", "-f", str(self.conf), "-N", kind, program="slurmd")

    def run_daemon(self, name: str, *arguments: str, program: str = "") -> None:
        found = shutil.which(program or name, path=PATH)
        assert found
        with (self.folder / f"{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                [found, *arguments], stdout=output, stderr=output, start_new_session=True
            )

    def ask(self, *command: str) -> str:
        """Run one of Slurm's commands; return what it printed."""
        run = subprocess.run(command, env=os.environ | {"SLURM_CONF": str(self.conf)}, capture_output=True, text=True)
        return run.stdout

    def jobs(self, *states: str) -> list[str]:
        """Return the ids of all jobs, or of those in these states."""
        return self.ask("squeue", "--noheader", f"--states={','.join(states) or 'all'}", "--format=%i").split()

    def active(self) -> list[str]:
        return self.jobs("pending", "running", "completing", "configuring")

    def cancel_all(self) -> None:
        self.ask("scancel", "--user", getpass.getuser())
        until(lambda: not self.active(), "the jobs' end")

    def kill_node(self, kind: str) -> None:
        """Kill (-9) the daemon of a node and every process of its jobs, as a power cut does; then tell the controller.

        Otherwise the controller would notice only after SlurmdTimeout, 300 s.
        """
        for pid in [self.daemons[kind].pid, *self.list_processes(kind)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.daemons.pop(kind).wait()
        self.ask("scontrol", "update", f"nodename={kind}", "state=down", "reason=power cut")

    def revive_node(self, kind: str) -> None:
        self.start_node(kind)
        self.ask("scontrol", "update", f"nodename={kind}", "state=resume")
        until(lambda: self.ask("sinfo", "--noheader", "--nodes", kind, "--format=%T").strip() == "idle", kind)

    def list_processes(self, kind: str) -> list[int]:
        """Return the processes of a node's jobs, each slurmstepd before the processes that it watches."""
        marks, found = {f"SLURMD_NODENAME={kind}".encode(), f"SLURM_CONF={self.conf}".encode()}, []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if marks <= set((process / "environ").read_bytes().split(b"\0")):
                    parent = int((process / "stat").read_text().rpartition(") ")[2].split()[1])
                    stepd = (Path("/proc") / str(parent) / "comm").read_text().startswith("slurmstepd")
                    found = [*([parent] if stepd else []), *found, int(process.name)]
        return found

    def stop(self) -> None:
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder)


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


def until(there: Callable[[], bool], what: str) -> None:
    """Wait until `there` returns true; the test fails after 120 s."""
    end = time.monotonic() + 120
    while not there():
        assert time.monotonic() < end, f"{what}: waited for 120 s"
        time.sleep(0.1)
