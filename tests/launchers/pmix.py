"""PMIx alone: real servers of Open MPI and Slurm, whose own variables the program does not get."""

import os

import cases


def all_cases(context):
    place = context.place
    bare = script(context, "pmix-only")
    start = f"{cases.OPEN_MPI} -n 4"
    hosts = cases.open_mpi_on_hosts(place)

    def different_homes():
        """The token goes the same way as the address."""
        elsewhere = script(
            context, "pmix-elsewhere",
            f"[ \"$(hostname)\" = n1 ] || export HOME={place.path('other-home')}")
        context.run(f"{hosts} {elsewhere}", 4, "rendezvous by PMIx", "2 nodes")

    def one_stays_away():
        """It stays until the others have failed, with which mpirun ends it."""
        away = script(context, "pmix-away", '[ "$PMIX_RANK" = 3 ] && exec sleep 30')
        process = context.start(f"{hosts} {away}", UNISUM_CONNECT_TIMEOUT="3")
        context.check_refused(process, "within 3 s", "PMIx: not all ranks came")

    def no_library():
        """An empty file is in its place, for the program only."""
        hide = 'for it in $(ldconfig -p | sed -n "s/.*libpmix.so.2 .*=> //p"); do ' \
            'mount --bind /dev/null "$it"; done'
        alone = script(context, "pmix-missing", hide, "unshare --mount sh")
        context.check_refused(
            context.start(f"{start} {alone}"), "its library can't be used", "set UNISUM_RANK to")

    def old_library():
        """One that has all functions, and calls itself another version."""
        names = "Error_string Init Initialized Finalize Put Commit Fence Get".split()
        text = 'const char *PMIx_Get_version(void) { return "PMIx 2.2.5"; }\n'
        text += "".join(f"int PMIx_{name}(void) {{ return -1; }}\n" for name in names)
        source = place.write("old.c", text)
        os.mkdir(place.path("old"))
        place.sh(f"cc -shared -fPIC -o {place.path('old')}/libpmix.so.2 {source}")
        alone = script(context, "pmix-old", f"export LD_LIBRARY_PATH={place.path('old')}")
        context.check_refused(
            context.start(f"{start} {alone}"), "is `PMIx 2.2.5`, and version 3 is needed",
            "set UNISUM_RANK to")

    def no_server():
        process = context.start(context.bench, PMIX_RANK="0", PMIX_NAMESPACE="nobody")
        context.check_refused(process, "PMIX_RANK is set", "no PMIx server", "set UNISUM_RANK to")

    def server_that_has_gone():
        """The daemon of the second host is killed while rank 2 waits there for rank 3."""
        told = place.path("pmix-told")
        kill = script(context, "pmix-killed", f"""exec 2>>{told}.$PMIX_RANK
[ "$PMIX_RANK" = 3 ] && sleep 3 && kill -9 $PPID && exec sleep 30""")
        process = context.start(f"{hosts} {kill}", UNISUM_CONNECT_TIMEOUT="30")
        status, out, errors = place.finish(process, cases.SECONDS)
        with open(f"{told}.2", encoding="utf-8") as file:
            rank_2 = file.read()
        if status == 0 or "no PMIx server of the launcher answers" not in rank_2:
            raise cases.Fault(f"status {status}: {out}\n{errors}\nrank 2: {rank_2}")

    told = "tcp://127.0.0.1:29876"
    return [
        ("PMIx: one job", lambda: context.run(f"{start} {bare}", 4, "by PMIx", "1 node")),
        ("PMIx: three jobs at once", lambda: context.at_once(
            f"{start} {bare}", 4, 3, "by PMIx", "1 node")),
        ("PMIx: an address", lambda: context.run(
            f"{start} {bare}", 4, "by PMIx", told, UNISUM_RENDEZVOUS=told)),
        ("PMIx: two hosts", lambda: context.run(
            f"{hosts} {bare}", 4, "rendezvous by PMIx", "2 nodes")),
        ("PMIx: two hosts without a common home", different_homes),
        ("PMIx: two hosts, and a rank that does not join", one_stays_away),
        ("PMIx: without its library", no_library),
        ("PMIx: with a library that is too old", old_library),
        ("PMIx: without a server", no_server),
        ("PMIx: two hosts, and a daemon that is killed", server_that_has_gone),
        ("PMIx: Slurm's server", lambda: slurm(context, bare)),
    ]


def slurm(context, program):
    cluster = context.slurm()
    if "pmix" not in cluster.ask("srun --mpi=list 2>&1"):
        print("       not run: this Slurm has no PMIx")
        return
    try:
        context.run(
            f"srun --mpi=pmix -n 4 -N 2 {program}", 4, "rendezvous by PMIx", "2 nodes",
            SLURM_CONF=cluster.configuration)
    except cases.Fault as fault:
        raise cases.Fault(f"{fault}\n{cluster.logs()}") from fault


def script(context, name, first="", shell="/bin/sh"):
    """A program that is started with nothing of its launcher but PMIx."""
    path = context.place.write(name, f"""#!/usr/bin/env -S {shell}
{first}
for name in $(env | sed -n 's/^\\(OMPI_[A-Za-z0-9_]*\\|SLURM_[A-Za-z0-9_]*\\)=.*/\\1/p'); do
    unset "$name"
done
exec {context.bench}
""")
    os.chmod(path, 0o755)
    return path
