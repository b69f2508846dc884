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
        "where the ranks meet: `tcp://HOST:PORT`, `tcp://[IPV6]:PORT` or `file:///PATH`; \
         `store://KEY` in programs that hand in a store",
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
    variable("UNISUM_TOKEN", "", "secret that every connection must prove, of 128 bits or more"),
    variable("UNISUM_TOKEN_FILE", "", "file that holds the secret, readable by its owner only"),
    variable("UNISUM_TLS", "auto", "what is encrypted: `auto`, `off`, `token` or `mtls`"),
    variable(
        "UNISUM_TLS_CERT",
        "",
        "certificate of this rank and those above it, PEM; `mtls` only",
    ),
    variable("UNISUM_TLS_KEY", "", "key of that certificate, PEM; `mtls` only"),
    variable("UNISUM_TLS_CA", "", "CAs that sign the other ranks' certificates, PEM; `mtls` only"),
    variable(
        "UNISUM_TLS_PEERS",
        "",
        "DNS names and SPIFFE IDs of certificates that are accepted, `NAME,NAME` or `@FILE`; \
         `mtls` only",
    ),
    variable(
        "UNISUM_TIMEOUT",
        "300",
        "seconds an operation may take, fractions allowed; the same on all ranks",
    ),
    variable("UNISUM_CONNECT_TIMEOUT", "120", "seconds the ranks wait for each other at the start"),
    variable(
        "UNISUM_HEARTBEAT_TIMEOUT",
        "10",
        "seconds without a sign of life from another host, 1 or more, until it is lost",
    ),
    variable(
        "UNISUM_RECONNECT_TIMEOUT",
        "0",
        "seconds in which a broken TCP connection, or a queue pair that has failed, is restored \
         before the call fails; 0 fails at once; the same on all ranks",
    ),
    variable(
        "UNISUM_ELASTIC",
        "0",
        "ranks that a job needs to go on when it loses some; 0 ends it with the first that is lost",
    ),
    variable(
        "UNISUM_MEMBERS",
        "",
        "file that says to processes that join an elastic job where its ranks are, in place of one \
         beside the rendezvous",
    ),
    variable(
        "UNISUM_EPOCH_LOG",
        "",
        "folder in which each process of an elastic job logs its views",
    ),
    variable("UNISUM_REPLAY", "", "folder with the logs of an elastic job, which this one repeats"),
    variable(
        "UNISUM_REPLAY_PROCESS",
        "",
        "process of that job that a newcomer is; with `UNISUM_REPLAY` only",
    ),
    variable("UNISUM_ALGORITHM", "auto", "algorithm for every operation, or `auto`"),
    variable(
        "UNISUM_REPRODUCIBLE",
        "0",
        "1 chooses algorithms by nothing that was measured or tried",
    ),
    variable("UNISUM_TUNING", "", "file on rank 0's host that keeps what was measured and tried"),
    variable(
        "UNISUM_TRANSPORT",
        "auto",
        "`auto`, `tcp`, `shm`, `verbs`, or a transport of the program's own",
    ),
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
    variable(
        "UNISUM_MULTIMEM",
        "0",
        "1 lets the switch between CUDA devices add where a model finds that faster (NVLink \
         SHARP); the same on all ranks",
    ),
    variable("UNISUM_VERBS", "1", "0 leaves RDMA devices alone unless the transport is `verbs`"),
    variable(
        "UNISUM_VERBS_DEVICE",
        "",
        "RDMA devices and ports, as in `mlx5`, `=mlx5_0:1,mlx5_1:1`, `^mlx5_3`",
    ),
    variable("UNISUM_VERBS_GID_INDEX", "", "place of the port's address in its table of GIDs"),
    variable("UNISUM_VERBS_PAIRS", "2", "queue pairs for each peer on each device, 1 to 16"),
    variable("UNISUM_VERBS_MTU", "", "largest RDMA packet, 256 to 4096 bytes"),
    variable(
        "UNISUM_VERBS_TIMEOUT",
        "",
        "a lost packet is repeated after 4.096 µs · 2^this, 1 to 31; by default as an outage takes",
    ),
    variable("UNISUM_VERBS_RETRIES", "7", "repetitions before an RDMA connection fails, 0 to 7"),
    variable("UNISUM_VERBS_TRAFFIC_CLASS", "0", "traffic class of RDMA packets (RoCE: DSCP · 4)"),
    variable(
        "UNISUM_VERBS_ISOLATED",
        "0",
        "1 says that nobody else is on the RDMA fabric, without which `mtls` uses none",
    ),
    variable("UNISUM_VERBS_SERVICE_LEVEL", "0", "InfiniBand service level, 0 to 15"),
];
