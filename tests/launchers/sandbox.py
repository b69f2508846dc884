"""Namespaces in which launchers and their daemons run: nothing of them is seen outside, or left."""

import os
import signal
import subprocess

UNSHARE = [
    "unshare", "--mount", "--pid", "--net", "--uts", "--ipc", "--fork", "--kill-child",
    "--mount-proc",
]
HOSTS = ["n1", "n2", "n3", "n4"]
HEAD = "head"
ADDRESSES = {HEAD: "10.78.0.254"} | {host: f"10.78.0.{at + 1}" for at, host in enumerate(HOSTS)}
# By which pods find the first of them.
NAMES = "unisum-0.unisum unisum-0.unisum.default unisum-ranks-0-0.unisum unisum-master-0 " \
    "unisum-node-0-0.unisum"


class Sandbox:
    """Host `head`, where this process is, and four more hosts on a network with it, which `build`
    builds; before that, it has only its files."""

    def __init__(self, folder):
        self.folder = folder
        os.chmod(folder, 0o755)
        for name in ("run", "home", "other-home"):
            os.mkdir(self.path(name), mode=0o700)
        self.write("hosts", "127.0.0.1 localhost\n" + "".join(
            f"{address} {host}\n" for host, address in ADDRESSES.items()
        ) + f"{ADDRESSES[HOSTS[0]]} {NAMES}\n")
        # As ssh and rsh are called: [OPTION...] HOST COMMAND...
        self.remote = self.write("remote", f"""#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
host=$1; shift
exec {self.on_command('$host')} sh -c "$*"
""")
        os.chmod(self.remote, 0o755)

    def build(self):
        self.sh("mount --make-rprivate /")
        self.sh(f"mount --bind {self.path('hosts')} /etc/hosts")
        self.sh(f"hostname {HEAD}; ip link set lo up; ip link add br0 type bridge")
        self.sh(f"ip addr add {ADDRESSES[HEAD]}/24 dev br0; ip link set br0 up")
        self.sh("mkdir -p /run/netns; mount -t tmpfs tmpfs /run/netns")
        for host in HOSTS:
            self.sh(f"ip netns add {host}; ip -n {host} link set lo up")
            self.sh(f"ip link add to-{host} type veth peer name eth0 netns {host}")
            self.sh(f"ip link set to-{host} master br0 up")
            self.sh(f"ip -n {host} addr add {ADDRESSES[host]}/24 dev eth0")
            self.sh(f"ip -n {host} link set eth0 up")

    def path(self, name):
        return os.path.join(self.folder, name)

    def write(self, name, text):
        with open(self.path(name), "w", encoding="utf-8") as file:
            file.write(text)
        return self.path(name)

    @staticmethod
    def on_command(host):
        """What comes before a command to run it on a host."""
        named = f"unshare --uts sh -c 'hostname \"$0\"; exec \"$@\"' {host}"
        return f"nsenter --net=/run/netns/{host} {named}"

    @staticmethod
    def sh(command):
        subprocess.run(["sh", "-ec", command], check=True, timeout=120)

    def environment(self, **more):
        """Nothing of the caller's but where programs are."""
        path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        kept = {"PATH": path, "LANG": "C.UTF-8", "USER": "root"}
        folders = {"HOME": self.path("home"), "XDG_RUNTIME_DIR": self.path("run")}
        # Short, for the sockets in it.
        return kept | folders | {"TMPDIR": self.folder} | more

    def start(self, command, **more):
        """Starts a shell command line in a process group of its own."""
        return subprocess.Popen(
            ["sh", "-c", command], env=self.environment(**more), cwd=self.folder, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )

    @staticmethod
    def end(process):
        """Ends what was started, if it still runs."""
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    def finish(self, process, seconds):
        """Status, output and errors of what was started; ends it when the time is up."""
        try:
            out, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as late:
            self.end(process)
            late.cmd = f"{late.cmd}\n{late.output}\n{late.stderr}"
            raise
        return process.returncode, out, errors
