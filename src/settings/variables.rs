//! The table of all variables. `docs/configuration.md` is checked against it.

/// A variable a user can set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Variable {
    /// Its name.
    pub(crate) name: &'static str,
    /// What holds if it is not set: a value it could have, or empty if there is none to write.
    pub(crate) default: &'static str,
    /// What it sets, in one line.
    pub(crate) meaning: &'static str,
}

const fn variable(name: &'static str, default: &'static str, meaning: &'static str) -> Variable {
    Variable { name, default, meaning }
}

/// Every variable that unisum reads as its own, in the order of the documentation.
pub(crate) const VARIABLES: &[Variable] = &[
    variable("UNISUM_RANK", "", "this process's rank, from 0; overrides every launcher"),
    variable("UNISUM_WORLD", "", "how many ranks there are; goes with `UNISUM_RANK`"),
    variable(
        "UNISUM_LOCAL_RANK",
        "",
        "place among the ranks of this host; with `UNISUM_RANK` only",
    ),
    variable("UNISUM_LOCAL_SIZE", "", "ranks on this host; with `UNISUM_RANK` only"),
    variable(
        "UNISUM_RENDEZVOUS",
        "",
        "where the ranks meet: `tcp://HOST:PORT`, `tcp://[IPV6]:PORT` or `file:///PATH`",
    ),
    variable(
        "UNISUM_PORT",
        "",
        "port on rank 0's host, in place of the launcher's or a derived one",
    ),
    variable(
        "UNISUM_JOB",
        "",
        "name of this run, the same on all ranks, different from other runs",
    ),
    variable("UNISUM_TOKEN", "", "secret that every connection must prove, 16 bytes or more"),
    variable("UNISUM_TOKEN_FILE", "", "file that holds the secret, readable by its owner only"),
    variable("UNISUM_TIMEOUT", "300", "seconds an operation may take, fractions allowed"),
    variable("UNISUM_CONNECT_TIMEOUT", "120", "seconds the ranks wait for each other at the start"),
    variable("UNISUM_ALGORITHM", "auto", "algorithm for every operation, or `auto`"),
    variable("UNISUM_TRANSPORT", "auto", "`auto`, `tcp` or `shm`"),
    variable(
        "UNISUM_INTERFACE",
        "",
        "network interfaces, as in `eth,ib`, `=eth0`, `^docker`, `^=eth1`",
    ),
    variable("UNISUM_PORT_RANGE", "", "ports a rank may listen on, `LOW-HIGH` or one port"),
    variable("UNISUM_TCP_SOCKETS", "1", "TCP connections to each peer, 1 to 16"),
    variable("UNISUM_SLICE_BYTES", "256K", "bytes of one pipeline slice, 4K to 1G"),
    variable("UNISUM_WINDOW", "4", "slices open at once, 1 to 1024"),
    variable(
        "UNISUM_SHM_HEAP",
        "",
        "bytes of shared memory each rank offers for zero-copy buffers",
    ),
    variable("UNISUM_CMA", "1", "0 forbids reading another rank's private memory directly"),
];
