"""What is started under each launcher, and what has to come of it."""

import json
import os

import slurm

OPEN_MPI = "mpirun.openmpi --allow-run-as-root --oversubscribe --bind-to none"
MPICH = "mpiexec.mpich"
SECONDS = 180
ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
DIGITS = os.path.join(ROOT, "examples", "pytorch", "ddp_digits.py") + " --epochs 1"


class Fault(Exception):
    """A promise that does not hold."""


class Context:
    """What all cases need."""

    def __init__(self, place, given):
        self.place = place
        self.torchrun, self.python = given.torchrun, given.python
        self.bench = f"{given.binary} -e 4K --seconds-per-size 0.01 --format json"
        self.bare = given.binary
        self.cluster = None

    def slurm(self):
        if not self.cluster:
            self.cluster = slurm.Cluster(self.place)
        return self.cluster

    def close(self):
        if self.cluster:
            self.cluster.close()

    def start(self, command, **variables):
        return self.place.start(command, **variables)

    def check(self, process, ranks, *words, seconds=SECONDS):
        """All ranks of a world of so many have reduced right, and one said how they met."""
        status, out, errors = self.place.finish(process, seconds)
        told = f"{process.args[-1]}\n{out[-1500:]}\n{errors[-3000:]}"
        if status != 0:
            raise Fault(f"status {status}: {told}")
        rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        if not rows or any(row["wrong"] or row["ranks"] != ranks for row in rows):
            raise Fault(f"not {ranks} ranks with right results: {told}")
        lines = [line for line in errors.splitlines() if line.startswith("rank 0 of ")]
        if len(lines) != 1 or any(word not in lines[0] for word in words):
            raise Fault(f"not one line with {words}: {told}")
        return lines[0]

    def check_refused(self, process, *words, seconds=SECONDS):
        """It ends with an error that has these words."""
        status, out, errors = self.place.finish(process, seconds)
        if status == 0 or any(word not in errors for word in words):
            raise Fault(f"status {status}, expected {words}: {out}\n{errors[-3000:]}")

    def run(self, command, ranks, *words, **variables):
        return self.check(self.start(command, **variables), ranks, *words)

    def at_once(self, command, ranks, count, *words, **variables):
        started = [self.start(command, **variables) for _ in range(count)]
        try:
            for process in started:
                self.check(process, ranks, *words)
        finally:
            for process in started:
                self.place.end(process)


def all_cases(context):
    """Names and functions, in an order in which the slow ones come last."""
    cases = by_hand(context)
    cases += mpi(context, "Open MPI", OPEN_MPI, "by Open MPI")
    cases += mpi(context, "MPICH", MPICH, "by Hydra PMI")
    cases += open_mpi_hosts(context) + mpich_hosts(context) + slurm_cases(context)
    if context.torchrun:
        cases += torchrun_cases(context)
    return cases


def by_hand(context):
    """As README says."""
    ranks = f"UNISUM_RANK=$rank UNISUM_WORLD=4 UNISUM_LOCAL_SIZE=4 {context.bench}"
    return [
        ("by hand: the program starts its ranks", lambda: context.run(
            f"{context.bench} -n 4", 4, "by UNISUM_RANK and UNISUM_WORLD", "1 node")),
        ("by hand: a shell starts the ranks", lambda: context.run(
            f"for rank in 0 1 2 3; do {ranks} & done; wait", 4,
            "by UNISUM_RANK and UNISUM_WORLD", "1 node")),
    ]


def mpi(context, name, launcher, words):
    command = f"{launcher} -n 4 {context.bench}"
    address = "tcp://127.0.0.1:29871"

    def again_on_the_same_port():
        for _ in range(3):
            context.run(command, 4, address, UNISUM_RENDEZVOUS=address)

    def killed_and_again():
        """What a killed job leaves is in nobody's way."""
        process = context.start(f"exec {launcher} -n 4 {context.bare} --seconds-per-size 30")
        try:
            for line in process.stderr:
                if line.startswith("rank 0 of 4"):
                    break
            else:
                raise Fault(f"{name}: no rank said that it has joined")
        finally:
            context.place.end(process)
        context.run(command, 4, words)

    python = f"{launcher} -n 4 {context.python} {program('sum_ranks.py')}"
    cases = [
        (f"{name}: one job", lambda: context.run(command, 4, words, "1 node")),
        (f"{name}: three jobs at once", lambda: context.at_once(command, 4, 3, words)),
        (f"{name}: restarted at once on the same port", again_on_the_same_port),
        (f"{name}: killed, and started again", killed_and_again),
    ]
    if context.python:
        cases.append((f"{name}: a Python program", lambda: python_sum(context, python)))
    if context.python and context.torchrun:
        example = f"{launcher} -n 2 {torchs_python(context)} {DIGITS}"
        cases.append((f"{name}: an example that trains", lambda: trains(context, example)))
    return cases


def torchs_python(context):
    """The Python of torchrun's environment."""
    return os.path.join(os.path.dirname(context.torchrun), "python")


def trains(context, command, **variables):
    """The example joins two ranks, where it would start ranks of its own otherwise."""
    status, out, errors = context.place.finish(context.start(command, **variables), SECONDS)
    fault = told_once(errors, 2)
    if status != 0 or fault or out.count("Epoch 1, accuracy") != 1:
        raise Fault(f"status {status}, {fault}: {out}\n{errors[-3000:]}")


def program(name):
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), name)


def python_sum(context, command, ranks=4, **variables):
    status, out, errors = context.place.finish(context.start(command, **variables), SECONDS)
    expected = f"{ranks} ranks: {ranks * (ranks + 1) // 2}"
    if status != 0 or out.splitlines().count(expected) != ranks or told_once(out, ranks):
        raise Fault(f"status {status}, expected {expected}: {out}\n{errors[-3000:]}")


def told_once(out, ranks):
    """What is wrong, if not one line says how the ranks found each other."""
    lines = [line for line in out.splitlines() if line.startswith(f"rank 0 of {ranks}")]
    return None if len(lines) == 1 and " by " in lines[0] else f"not one line: {lines}"


def open_mpi_on_hosts(place):
    """How mpirun starts four ranks on two hosts."""
    agent = f"--mca plm_rsh_agent {place.remote} --mca plm rsh --mca orte_keep_fqdn_hostnames 1"
    network = "--mca oob_tcp_if_include 10.78.0.0/24"
    return f"{OPEN_MPI} {agent} {network} --host n1:2,n2:2 -n 4"


def open_mpi_hosts(context):
    place = context.place
    hosts = open_mpi_on_hosts(place)

    def different_homes():
        script = place.write("elsewhere", f"""#!/bin/sh
[ "$(hostname)" = n1 ] || export HOME={place.path('other-home')}
exec {context.bench}
""")
        os.chmod(script, 0o755)
        process = context.start(f"{hosts} {script}", UNISUM_CONNECT_TIMEOUT="4")
        context.check_refused(process, "if homes are not shared", "UNISUM_RENDEZVOUS=tcp://")

    return [
        ("Open MPI: two hosts with a common home",
         lambda: context.run(f"{hosts} {context.bench}", 4, "by Open MPI", "2 nodes")),
        ("Open MPI: two hosts without a common home are told what to set", different_homes),
        ("Open MPI: two hosts with an address", lambda: context.run(
            f"{hosts} -x UNISUM_RENDEZVOUS=tcp://n1:29872 {context.bench}", 4, "tcp://n1:29872")),
    ]


def mpich_hosts(context):
    place = context.place
    hosts = f"{MPICH} -launcher ssh -launcher-exec {place.remote} -iface br0 -hosts n1,n2 -n 4"

    def run(more):
        context.run(f"{hosts} {more} {context.bench}", 4, "rendezvous by mpiexec", "2 nodes")

    def different_homes():
        """The token goes the same way as the address."""
        script = place.write("at-other-home", f"""#!/bin/sh
[ "$(hostname)" = n1 ] || export HOME={place.path('other-home')}
exec {context.bench}
""")
        os.chmod(script, 0o755)
        context.run(f"{hosts} -ppn 2 {script}", 4, "rendezvous by mpiexec", "2 nodes")

    def one_stays_away():
        script = place.write("stays-away", f"""#!/bin/sh
[ "$PMI_RANK" = 3 ] && exec sleep 30
exec {context.bench}
""")
        os.chmod(script, 0o755)
        process = context.start(f"{hosts} -ppn 2 {script}", UNISUM_CONNECT_TIMEOUT="3")
        context.check_refused(process, "within 3 s", "mpiexec: not all ranks came")

    return [
        ("MPICH: two hosts", lambda: run("-ppn 2")),
        ("MPICH: two hosts in turn", lambda: run("-ppn 1")),
        ("MPICH: two jobs at once on two hosts", lambda: context.at_once(
            f"{hosts} -ppn 2 {context.bench}", 4, 2, "rendezvous by mpiexec")),
        ("MPICH: two hosts without a common home", different_homes),
        ("MPICH: two hosts, and a rank that does not join", one_stays_away),
    ]


def slurm_cases(context):
    def step(options, *words):
        cluster = context.slurm()
        variables = {"SLURM_CONF": cluster.configuration}
        context.run(f"srun {options} {context.bench}", 4, "by Slurm step", *words, **variables)

    def batch(name, text, options=""):
        """Output and errors of a batch job that has ended."""
        cluster, place = context.slurm(), context.place
        script = place.write(f"{name}.sh", f"#!/bin/sh\n{text}\n")
        files = f"--output={place.path(name)}.out --error={place.path(name)}.err"
        line = f"sbatch --wait --open-mode=append {files} {options} {script}"
        process = context.start(line, SLURM_CONF=cluster.configuration)
        status, out, errors = place.finish(process, SECONDS)
        read = []
        for end in ("out", "err"):
            with open(f"{place.path(name)}.{end}", encoding="utf-8") as file:
                read.append(file.read())
        if status != 0:
            raise Fault(f"status {status}: {out} {errors} {read}")
        return read

    def expect(texts, count, *words):
        lines = [line for line in texts[1].splitlines() if line.startswith("rank 0 of 4")]
        wrong = [line for line in texts[0].splitlines() if '"wrong":0,' not in line]
        if len(lines) != count or wrong or any(word not in texts[1] for word in words):
            raise Fault(f"not {count} worlds of 4 with {words}: {texts}")

    def requeued():
        """The first run's step is killed in the middle, by the queue."""
        text = f"""
exec 2>>{context.place.path('requeue')}.err
if [ -z "$SLURM_RESTART_COUNT" ]; then
    srun -n 4 {context.bare} --seconds-per-size 30 &
    until grep -q '^rank 0 of 4' {context.place.path('requeue')}.err; do sleep 0.1; done
    scontrol requeue $SLURM_JOB_ID
    wait
fi
srun -n 4 {context.bench}"""
        texts = batch("requeue", text, "--requeue -n 4")
        texts[0] = "".join(f"{line}\n" for line in texts[0].splitlines() if line[:1] == "{")
        expect(texts, 2)

    def alone():
        texts = batch("alone", f"{context.bench} 2>&1 >/dev/null", "-n 4")
        if "start it with srun" not in texts[0]:
            raise Fault(f"no warning that each process is alone: {texts}")

    def example():
        variables = {"SLURM_CONF": context.slurm().configuration}
        trains(context, f"srun -n 2 {torchs_python(context)} {DIGITS}", **variables)

    def python():
        command = f"srun -n 4 {context.python} {program('sum_ranks.py')}"
        python_sum(context, command, SLURM_CONF=context.slurm().configuration)

    two = f"srun -n 4 --overlap {context.bench} & srun -n 4 --overlap {context.bench} & wait"
    cases = [("Slurm: a Python program", python)] if context.python else []
    if context.python and context.torchrun:
        cases.append(("Slurm: an example that trains", example))
    return cases + [
        ("Slurm: a step", lambda: step("-n 4 -N 1", "1 node")),
        ("Slurm: a step on two nodes", lambda: step("-n 4 -N 2", "2 nodes")),
        ("Slurm: in planes", lambda: step("-n 4 -N 2 --distribution=plane=2", "2 nodes")),
        ("Slurm: in turn", lambda: step("-n 4 -N 2 --distribution=cyclic", "2 nodes")),
        ("Slurm: a batch job", lambda: expect(
            batch("batch", f"srun {context.bench}", "-n 4"), 1)),
        ("Slurm: two steps at once", lambda: expect(batch("two", two, "-n 4 -N 2"), 2)),
        ("Slurm: a batch job without srun", alone),
        ("Slurm: a requeued step", requeued),
        ("Slurm: mpirun in an allocation of two nodes", lambda: expect(batch(
            "mpirun", f"{OPEN_MPI} -n 4 {context.bench}", "-n 4 -N 2"), 1, "by Open MPI")),
    ]


def torchrun_cases(context):
    start = f"{context.torchrun} --no-python"
    on = context.place.on_command
    free = context.place.write("with-torchrun", f"#!/bin/sh\nexec {context.bench}\n")
    os.chmod(free, 0o755)
    one = f"{start} --nproc-per-node 4 {free}"

    def same_port():
        for _ in range(2):
            context.run(f"{start} --nproc-per-node 4 --master-port 29873 {free}", 4, "by torchrun")

    def two_hosts():
        nodes = "--nnodes 2 --nproc-per-node 2 --master-addr n1 --master-port 29874"
        other = context.start(f"{on('n2')} {start} {nodes} --node-rank 1 {free}")
        try:
            context.run(f"{on('n1')} {start} {nodes} --node-rank 0 {free}", 4, "2 nodes")
        finally:
            context.place.end(other)

    def example():
        trains(context, f"{context.torchrun} --nproc-per-node 2 {DIGITS}")

    examples = [("torchrun: an example that trains", example)] if context.python else []
    return examples + [
        ("torchrun: one job", lambda: context.run(one, 4, "by torchrun")),
        ("torchrun: two standalone jobs at once", lambda: context.at_once(
            f"{start} --standalone --nproc-per-node 4 {free}", 4, 2, "by torchrun")),
        ("torchrun: restarted at once on the same port", same_port),
        ("torchrun: two hosts", two_hosts),
    ]
