"""A Slurm cluster of two nodes on one machine, with its own munge key and ports."""

import os
import subprocess
import time

import sandbox

NODES = sandbox.HOSTS[:2]
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={head}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
KillWait=2
SlurmctldPort=36817
SlurmdPort=36818
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1
"""


class Cluster:
    """Daemons on `head`, `n1` and `n2`."""

    def __init__(self, place):
        self.place = place
        folder = place.path("slurm")
        os.mkdir(folder)
        os.mkdir(os.path.join(folder, "state"))
        os.mkdir(os.path.join(folder, "tmp"))
        self.configuration = os.path.join(folder, "slurm.conf")
        text = CONFIGURATION.format(
            folder=folder, head=sandbox.HEAD, address=sandbox.ADDRESSES[sandbox.HEAD]
        )
        for host in NODES:
            address = sandbox.ADDRESSES[host]
            text += f"NodeName={host} NodeHostname={host} NodeAddr={address} CPUs=4\n"
        text += "PartitionName=all Nodes=ALL Default=YES State=UP OverSubscribe=FORCE:4\n"
        place.write("slurm/slurm.conf", text)
        self.daemons = []
        self.start_munge(folder)
        self.start("slurmctld -D")
        for host in NODES:
            # Each with its own TmpFS, where PMIx makes folders that are named after the step.
            own = f"mount -t tmpfs tmpfs {folder}/tmp && exec slurmd -D -N {host}"
            self.start(f"{place.on_command(host)} unshare --mount sh -c '{own}'")
        self.wait_until_idle()

    def start(self, command):
        self.daemons.append(subprocess.Popen(
            ["sh", "-c", f"exec {command}"], env=self.environment(), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        ))

    def start_munge(self, folder):
        key = os.path.join(folder, "munge.key")
        with open(key, "wb") as file:
            file.write(os.urandom(1024))
        os.chmod(key, 0o600)
        names = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        files = " ".join(f"--{option}={folder}/munge.{end}" for option, end in names.items())
        self.start(f"munged --foreground --force --key-file={key} {files}")
        deadline = time.monotonic() + 60
        while not os.path.exists(f"{folder}/munge.socket"):
            if time.monotonic() > deadline:
                raise OSError("munged has not made its socket within 60 s")
            time.sleep(0.05)

    def environment(self):
        return self.place.environment(SLURM_CONF=self.configuration)

    def wait_until_idle(self):
        deadline = time.monotonic() + 180
        while True:
            told = self.ask("sinfo -h -N -o %T")
            if told.split() == ["idle"] * len(NODES):
                return
            if time.monotonic() > deadline:
                raise OSError(f"slurm's nodes are not idle within 180 s: {told}")
            time.sleep(0.2)

    def ask(self, command):
        """What a command says, whether it succeeds or not."""
        return subprocess.run(
            ["sh", "-c", command], env=self.environment(), capture_output=True, text=True,
            timeout=60,
        ).stdout

    def logs(self):
        """The last lines of the nodes' logs."""
        return self.ask(f"tail -n 20 {self.place.path('slurm')}/slurmd-*.log")

    def close(self):
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
