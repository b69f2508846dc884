"""Installs the peers into a cache folder, and says of each one why it is missing if it is."""

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from . import stubs
from .libraries import note

TORCH = "torch==2.15.0"
TORCH_NEEDS = ["filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "numpy",
               "setuptools"]
ONECCL_VERSION = "2022.1.2"
ONECCL = [f"oneccl-cpu=={ONECCL_VERSION}", f"oneccl-cpu-devel=={ONECCL_VERSION}",
          "impi-rt==2021.18.1"]
# A library that the CPU package links but leaves to its sister for GPUs.
ONECCL_SISTER = f"oneccl=={ONECCL_VERSION}"
SISTER_FILES = "libccl.so.2"
APT = {
    "openmpi": ["openmpi-bin", "libopenmpi-dev"],
    "mpich": ["mpich", "libmpich-dev"],
}
STARTERS = {
    "openmpi": ("mpicc.openmpi", "mpirun.openmpi"),
    "mpich": ("mpicc.mpich", "mpiexec.mpich"),
}
INSTALL_TIMEOUT_S = 900


@dataclass
class Places:
    """Where everything is."""

    cache: Path
    missing: dict = field(default_factory=dict)  # peer to reason
    versions: dict = field(default_factory=dict)

    @property
    def programs(self):
        return self.cache / "bin"

    @property
    def torch(self):
        return self.cache / "torch"

    @property
    def stubs(self):
        return self.cache / "stubs"

    @property
    def oneccl(self):
        return self.cache / "oneccl"


def command(*words, **options):
    return subprocess.run(
        [str(word) for word in words],
        check=True, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, **options,
    ).stdout


def reason_of(error):
    """One line about why something could not be had."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or error.stdout or "").strip().splitlines() or [""]
        return f"{Path(str(error.cmd[0])).name} failed: {lines[-1]}"
    return str(error)


def install(peers, cache, may_install):
    """Makes what it can and notes what it cannot."""
    cache.mkdir(parents=True, exist_ok=True)
    places = Places(cache)
    makers = {"openmpi": mpi, "mpich": mpi, "gloo": gloo, "oneccl": oneccl}
    for peer in peers:
        try:
            makers[peer](peer, places, may_install)
        except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
            places.missing[peer] = reason_of(error)
            note(f"{peer} is left out: {places.missing[peer]}")
    return places


def mpi(peer, places, may_install):
    absent = [name for name in STARTERS[peer] if not shutil.which(name)]
    if absent and not may_install:
        raise ValueError(f"{', '.join(absent)} not found")
    if absent:
        note(f"installing {peer}")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        command("apt-get", "update", env=environment)
        command("apt-get", "install", "-y", "--no-install-recommends", *APT[peer],
                env=environment)
    if peer == "openmpi":
        places.versions[peer] = command("mpirun.openmpi", "--version").splitlines()[0]
    else:
        lines = command("mpichversion").splitlines()
        places.versions[peer] = " ".join(" ".join(lines[at].split()) for at in (0, 2))


def environment_with(folder, packages, may_install):
    """A virtual environment with these packages and nothing that they depend on."""
    done = folder / "installed"
    if done.is_file() and done.read_text(encoding="utf-8") == "\n".join(packages):
        return False
    if not may_install:
        raise ValueError(f"{folder} is not installed")
    note(f"installing {', '.join(packages)}")
    command(sys.executable, "-m", "venv", "--clear", folder)
    command(folder / "bin" / "pip", "install", "-q", "--no-deps", *packages)
    return done


def gloo(peer, places, may_install):
    packages = [TORCH]
    fresh = environment_with(places.torch, packages, may_install)
    python = places.torch / "bin" / "python"
    if fresh:
        # Pure Python, whose own needs are welcome; matplotlib draws the plots.
        command(places.torch / "bin" / "pip", "install", "-q", *TORCH_NEEDS, "matplotlib")
        library = next((places.torch / "lib").glob("python*/site-packages/torch/lib"))
        shutil.rmtree(places.stubs, ignore_errors=True)
        stubs.make(library, places.stubs)
        fresh.write_text("\n".join(packages), encoding="utf-8")
    check = "import torch; assert torch.distributed.is_gloo_available(); print(torch.__version__)"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(places.stubs)}
    places.versions[peer] = f"torch {command(python, '-c', check, env=environment).strip()}"


def oneccl(peer, places, may_install):
    fresh = environment_with(places.oneccl, ONECCL, may_install)
    if fresh:
        download = places.oneccl / "download"
        pip = places.oneccl / "bin" / "pip"
        command(pip, "download", "-q", "--no-deps", "-d", download, ONECCL_SISTER)
        for wheel in download.glob("*.whl"):
            take_files(wheel, SISTER_FILES, places.oneccl / "lib")
        shutil.rmtree(download)
        fresh.write_text("\n".join(ONECCL), encoding="utf-8")
    places.versions[peer] = f"oneCCL {ONECCL_VERSION}"


def take_files(wheel, prefix, into):
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            name = Path(member).name
            if name.startswith(prefix):
                (into / name).write_bytes(archive.read(member))


def plotting_python(places, may_install):
    """A Python with matplotlib; the one with torch if there is one."""
    for folder in (places.torch, places.cache / "plots"):
        python = folder / "bin" / "python"
        if python.exists():
            return python
    if not may_install:
        raise ValueError("matplotlib is not installed")
    folder = places.cache / "plots"
    command(sys.executable, "-m", "venv", folder)
    command(folder / "bin" / "pip", "install", "-q", "matplotlib")
    return folder / "bin" / "python"
