"""The lines of the comparison, and how each one's ranks are started."""

import secrets
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .arguments import FOLDER, geometric_runs
from .processes import Launch


@dataclass(frozen=True)
class Line:
    """One library with one setting."""

    name: str
    title: str
    family: str  # unisum, a peer, or reference
    transport: str
    settings: tuple = ()
    environment: tuple = ()

    @property
    def is_ours(self):
        return self.family == "unisum"

    @property
    def is_reference(self):
        return self.family == "reference"

    @property
    def is_peer(self):
        return not self.is_ours and not self.is_reference


OPENMPI = ("--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "--mca", "pml", "ob1")
OPENMPI_SHM = (*OPENMPI, "--mca", "btl", "vader,self")
OPENMPI_TCP = (*OPENMPI, "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "lo")
# Ranks of one host count as hosts of their own, else MPICH uses shared memory whatever UCX may do.
MPICH_TCP = (("MPIR_CVAR_NOLOCAL", "1"), ("UCX_TLS", "tcp,self"), ("UCX_NET_DEVICES", "lo"))
# With its worker thread a call costs 16 to 24 ms on few cores.
ONECCL = (
    ("CCL_WORKER_OFFLOAD", "0"),
    ("CCL_ATL_TRANSPORT", "ofi"),
    ("CCL_KVS_IFACE", "lo"),
    ("FI_PROVIDER", "tcp"),
    ("FI_TCP_IFACE", "lo"),
    ("CCL_LOG_LEVEL", "error"),
)

LINES = (
    Line("unisum-shm", "unisum shm", "unisum", "shm", ("-t", "shm")),
    Line("unisum-shm-private", "unisum shm, private memory", "unisum", "shm",
         ("-t", "shm", "--memory", "private")),
    Line("openmpi-shm", "Open MPI shm", "openmpi", "shm", OPENMPI_SHM),
    Line("openmpi-shm-yield", "Open MPI shm, yield", "openmpi", "shm",
         (*OPENMPI_SHM, "--mca", "mpi_yield_when_idle", "1")),
    Line("mpich-shm", "MPICH shm", "mpich", "shm"),
    Line("oneccl-shm", "oneCCL shm", "oneccl", "shm", (), (*ONECCL, ("CCL_ATL_SHM", "1"))),
    Line("one-pass", "one-pass reference", "reference", "shm"),
    Line("unisum-tcp", "unisum tcp", "unisum", "tcp", ("-t", "tcp")),
    Line("openmpi-tcp", "Open MPI tcp", "openmpi", "tcp", OPENMPI_TCP),
    Line("mpich-tcp", "MPICH tcp", "mpich", "tcp", (), MPICH_TCP),
    Line("gloo-tcp", "Gloo (torch) tcp", "gloo", "tcp"),
    Line("oneccl-tcp", "oneCCL tcp", "oneccl", "tcp", (), (*ONECCL, ("CCL_ATL_SHM", "0"))),
    Line("tcp-tree", "TCP tree reference", "reference", "tcp"),
)

BY_NAME = {line.name: line for line in LINES}


def chosen(peers):
    """Lines of ours, of the references, and of these peers."""
    return [line for line in LINES if not line.is_peer or line.family in peers]


def job_words(job):
    """The words that drivers and reference programs understand for a job."""
    words = ["--sizes", ",".join(map(str, job.get("sizes", [8])))]
    for name in ("seconds", "limit", "late-ms"):
        if name in job:
            words += [f"--{name}", str(job[name])]
    return words + [f"--{flag}" for flag in ("startup", "resident") if job.get(flag)]


def unisum_words(job):
    """The words of allreduce-bench for a job; sizes are a geometric run."""
    if job.get("startup"):
        return ["--startup", "--format", "json"]
    first, last, factor = geometric_runs(job["sizes"])[0]
    words = ["--format", "json", "-b", first, "-e", last, "-f", factor]
    if "late-ms" in job:
        return [*words, "--late-ms", job["late-ms"]]
    words += ["-a", job.get("algorithm", "auto"), "--seconds-per-size", job["seconds"]]
    return words + (["--warmup", job["warmup"]] if "warmup" in job else [])


class Launcher:
    """Knows where the programs are."""

    def __init__(self, bench, places):
        self.bench, self.places = bench, places
        self.meeting = tempfile.TemporaryDirectory(prefix="compare-")

    def fresh_path(self):
        return str(Path(self.meeting.name) / secrets.token_hex(8))

    def launches(self, line, ranks, job):
        """The launches, one after the other, that do a job."""
        if not line.is_ours or job.get("startup") or "late-ms" in job:
            return [self.launch(line, ranks, job)]
        parts = []
        for first, last, factor in geometric_runs(job["sizes"]):
            sizes = [size for size in job["sizes"] if first <= size <= last]
            parts.append(self.launch(line, ranks, {**job, "sizes": sizes}))
        return parts

    def launch(self, line, ranks, job):
        launch = getattr(self, line.family)(line, ranks, job)
        launch.environment = {**launch.environment, **dict(line.environment)}
        return launch

    def unisum(self, line, ranks, job):
        count = ["--startup", ranks] if job.get("startup") else ["-n", ranks]
        words = [word for word in unisum_words(job) if word != "--startup"]
        return Launch(
            [[self.bench, *count, *line.settings, *words]],
            {"UNISUM_TOKEN": secrets.token_hex(16)},
            is_rank=lambda arguments, leads: "--joined" in arguments,
        )

    def mpi(self, line, ranks, job, starter, driver):
        program = self.places.programs / driver
        words = ["--transport", line.transport, *job_words(job)]
        return Launch(
            [[starter, *line.settings, "-n", ranks, program, *words]],
            is_rank=lambda arguments, leads: arguments[0] == str(program),
        )

    def openmpi(self, line, ranks, job):
        return self.mpi(line, ranks, job, "mpirun.openmpi", "openmpi")

    def mpich(self, line, ranks, job):
        return self.mpi(line, ranks, job, "mpiexec.mpich", "mpich")

    def oneccl(self, line, ranks, job):
        meet, program = self.fresh_path(), self.places.programs / "oneccl"
        words = ["--transport", line.transport, "--ranks", ranks, "--meet", meet, *job_words(job)]
        return Launch(
            [[program, "--rank", rank, *words] for rank in range(ranks)],
            {"LD_LIBRARY_PATH": str(self.places.oneccl / "lib")},
            is_rank=lambda arguments, leads: arguments[0] == str(program),
        )

    def gloo(self, line, ranks, job):
        return self.gloo_on([[]], ranks, f"file://{self.fresh_path()}", "lo", job)

    def gloo_on(self, hosts, ranks, meet, interface, job):
        """Torch on hosts, each given by the words that run a command there."""
        local = ranks // len(hosts)
        python = self.places.torch / "bin" / "python"
        driver = FOLDER / "drivers" / "torch_gloo.py"
        words = ["--ranks", ranks, "--local", local, "--meet", meet, *job_words(job)]
        return Launch(
            [
                [*inside, python, driver, "--first", host * local, *words]
                for host, inside in enumerate(hosts)
            ],
            {
                "LD_LIBRARY_PATH": str(self.places.stubs),
                "GLOO_SOCKET_IFNAME": interface,
                "OMP_NUM_THREADS": "1",
            },
            # Ranks are forks of the process that imported torch.
            is_rank=lambda arguments, leads: str(driver) in arguments and not leads,
        )

    def reference(self, line, ranks, job):
        program = self.places.programs / line.name.replace("-", "_")
        return Launch([[program, "--ranks", ranks, *job_words(job)]])


def note(text):
    """Tells whoever watches; results go to files."""
    print(text, file=sys.stderr, flush=True)
