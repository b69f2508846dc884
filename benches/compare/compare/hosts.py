"""Hosts on one machine, four unless it says otherwise: network namespaces, joined by veth pairs and
a bridge, each link limited to 1 Gbit/s both ways by a token bucket."""

import os
import secrets
import subprocess

from . import processes
from .libraries import BY_NAME, note, unisum_words
from .processes import Launch

HOSTS = 4
RATE = "1gbit"
# Room for a few of the 64 KiB segments that veth passes on whole.
BURST = "256kb"
LATENCY = "50ms"
SIZES = (1 << 20, 16 << 20, 64 << 20)
LOCAL_RANKS = (1, 4)
STREAM_BYTES = 64 << 20
TIMEOUT_S = 120


def sh(*words):
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    if done.returncode != 0:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")


class Hosts:
    """The namespaces; gone when the block is left."""

    def __init__(self, count=HOSTS):
        self.count = count
        self.prefix = f"compare-{os.getpid()}"
        self.made = []

    def name(self, host):
        return f"{self.prefix}-{host}"

    @staticmethod
    def address(host):
        return f"10.78.0.{host + 1}"

    def inside(self, host):
        """Words that run a command on a host."""
        return ["ip", "netns", "exec", self.name(host)]

    def __enter__(self):
        try:
            self.set_up()
        except OSError:
            self.__exit__()
            raise
        return self

    def set_up(self):
        switch = "switch"
        for host in [switch, *range(self.count)]:
            sh("ip", "netns", "add", self.name(host))
            self.made.append(host)
            sh("ip", "-n", self.name(host), "link", "set", "lo", "up")
        sh("ip", "-n", self.name(switch), "link", "add", "br0", "type", "bridge")
        sh("ip", "-n", self.name(switch), "link", "set", "br0", "up")
        for host in range(self.count):
            name, port = self.name(host), f"port{host}"
            sh("ip", "-n", name, "link", "add", "eth0", "type", "veth",
               "peer", "name", port, "netns", self.name(switch))
            sh("ip", "-n", self.name(switch), "link", "set", port, "master", "br0", "up")
            sh("ip", "-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            sh("ip", "-n", name, "link", "set", "eth0", "up")
            self.limit(name, "eth0")
            self.limit(self.name(switch), port)

    @staticmethod
    def limit(name, device):
        sh("tc", "-n", name, "qdisc", "add", "dev", device, "root", "tbf",
           "rate", RATE, "burst", BURST, "latency", LATENCY)

    def __exit__(self, *_):
        for host in self.made:
            subprocess.run(["ip", "netns", "del", self.name(host)], check=False)


def port(number):
    """A port that no earlier world of this run has used: the namespaces are ours alone."""
    return 20000 + number


def unisum_on(hosts, bench, ranks, at, job):
    """One process per rank; those of one host find each other by themselves."""
    return world(hosts, ranks, at, [bench, *(str(word) for word in unisum_words(job))])


def world(hosts, ranks, at, words):
    """A program of unisum's as so many ranks, as many on each host."""
    local = ranks // hosts.count
    common = {
        "UNISUM_WORLD": str(ranks),
        "UNISUM_RENDEZVOUS": f"tcp://{hosts.address(0)}:{at}",
        "UNISUM_TOKEN": secrets.token_hex(16),
        "UNISUM_INTERFACE": "",
    }
    commands = [[*hosts.inside(rank // local), "env", f"UNISUM_RANK={rank}", *words]
                for rank in range(ranks)]
    return Launch(commands, common)


def stream(hosts, places, at):
    """Goodput of a plain stream from host 1 to host 0, in GB/s."""
    program, where = places.programs / "tcp", f"{hosts.address(0)}:{at}"
    amount = ["--bytes", STREAM_BYTES]
    return Launch([
        [*hosts.inside(0), program, "--listen", where, *amount],
        [*hosts.inside(1), program, "--connect", where, *amount],
    ])


def measure(options, launcher, places, results, skips):
    """unisum and Gloo in turns, with a plain stream before each round."""
    if os.geteuid() != 0:
        skips.add("hosts", HOSTS, "network namespaces need root")
        return
    try:
        with Hosts() as hosts:
            for number in range(options.rounds):
                one_round(hosts, launcher, places, results, skips, number)
    except OSError as error:
        skips.add("hosts", HOSTS, f"no network namespaces: {error}")


def one_round(hosts, launcher, places, results, skips, number):
    ports = iter(range(port(10 * number), port(10 * number + 10)))
    outcome = processes.run(stream(hosts, places, next(ports)), TIMEOUT_S)
    results["hosts"] += [{"round": number, **record} for record in outcome.records]
    if outcome.failure:
        skips.add("hosts stream", HOSTS, outcome.failure)
    job = {"sizes": list(SIZES), "seconds": 0.2, "limit": 60}
    for local in LOCAL_RANKS:
        ranks = HOSTS * local
        for name in ("unisum-auto", "gloo-tcp"):
            at = next(ports)
            launches = launches_of(name, hosts, launcher, ranks, at, job)
            for launch in launches:
                outcome = processes.run(launch, TIMEOUT_S)
                results["hosts"] += [
                    {"line": name, "local": local, "round": number, **record}
                    for record in outcome.records if "p50_us" in record
                ]
                if outcome.failure:
                    skips.add(f"hosts {name}", ranks, outcome.failure)
            note(f"  round {number + 1}, {HOSTS} hosts, {local} ranks on each: {name}")


def launches_of(name, hosts, launcher, ranks, at, job):
    if name == "unisum-auto":
        # 1, 16 and 64 MiB are no geometric run: two worlds.
        parts = ([SIZES[0], SIZES[1]], [SIZES[2]])
        return [unisum_on(hosts, launcher.bench, ranks, at + 1000 * (part + 1),
                          {**job, "sizes": sizes}) for part, sizes in enumerate(parts)]
    if BY_NAME[name].family in launcher.places.missing:
        return []
    inside = [hosts.inside(host) for host in range(HOSTS)]
    meet = f"tcp://{hosts.address(0)}:{at}"
    return [launcher.gloo_on(inside, ranks, meet, "eth0", job)]
