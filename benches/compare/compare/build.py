"""Builds the drivers, the floor programs, the reference programs and allreduce-bench."""

import os
import subprocess

from .arguments import FOLDER, ROOT, target_folder
from .install import command, reason_of
from .libraries import note

C = ["-O3", "-march=native", "-std=c11", "-Wall", "-Wextra"]
CXX = ["-O3", "-march=native", "-std=c++17", "-Wall", "-Wextra"]
RULE = FOLDER / "drivers" / "rule.c"
WORLD = FOLDER / "floors" / "world.c"
FLOORS = ("memory", "latency", "tcp")
REFERENCES = ("one_pass", "tcp_tree")


def build(places, peers):
    """Builds all there is; a peer whose driver cannot be built is noted as missing."""
    places.programs.mkdir(parents=True, exist_ok=True)
    rule = places.programs / "rule.o"
    command("gcc", *C, "-c", RULE, "-o", rule)
    for name in FLOORS + REFERENCES:
        source = FOLDER / "floors" / f"{name}.c"
        command("gcc", *C, source, WORLD, rule, "-o", places.programs / name)
    for peer in peers:
        if peer in places.missing or peer == "gloo":
            continue
        try:
            driver(peer, places, rule)
        except (OSError, subprocess.SubprocessError) as error:
            places.missing[peer] = reason_of(error)
            note(f"{peer} is left out: {places.missing[peer]}")


def driver(peer, places, rule):
    program = places.programs / peer
    if peer == "oneccl":
        library = places.oneccl / "lib"
        command(
            "g++", *CXX, f"-I{places.oneccl / 'include'}", FOLDER / "drivers" / "oneccl.cpp",
            rule, "-o", program, f"-L{library}", "-lccl", f"-Wl,-rpath,{library}", "-lpthread",
        )
    else:
        command(f"mpicc.{peer}", *C, FOLDER / "drivers" / "mpi.c", rule, "-o", program)


def bench(path):
    """allreduce-bench: the one that was named, else the tree's own, built."""
    if path:
        return path.resolve()
    note("building allreduce-bench")
    subprocess.run(
        ["cargo", "build", "--release", "--package", "allreduce-bench"],
        cwd=ROOT, check=True, env=os.environ,
    )
    return target_folder().resolve() / "release" / "allreduce-bench"
