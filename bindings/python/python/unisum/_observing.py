"""What a communicator has done, is doing and consists of, as data."""

from __future__ import annotations

from typing import Any, List, Mapping, NamedTuple, Optional


class PeerStats(NamedTuple):
    """What moved between this rank and a peer."""

    #: Payload bytes sent to it.
    sent: int
    #: Payload bytes received from it.
    received: int


class LinkStats(NamedTuple):
    """What a link has counted."""

    #: The transport's name, as ``"verbs"``.
    transport: str
    #: By name. What is counted is the transport's choice.
    counters: Mapping[str, int]


class RunningCall(NamedTuple):
    """A collective that is under way."""

    #: The call in words, as in errors.
    call: str
    #: Steps of it that were done when it last waited.
    step: int
    #: All its steps; 0 until it waits.
    steps: int
    #: Payload bytes that had been transferred then.
    bytes: int


class Stats(NamedTuple):
    """What a communicator has done so far on this rank, and what it is doing. Fields may be added
    at the end."""

    #: Collectives that have ended well, those included that try algorithms.
    calls: int
    #: How often a thread went to sleep in a collective because a peer was not there yet.
    sleeps: int
    #: For how long in all, in seconds.
    slept: float
    #: By rank, what moved between the two in transfers; what ranks read in each other's shared
    #: memory is not counted. Transfers count when all of their run have ended.
    peers: List[PeerStats]
    #: What those of the links that count have counted, which includes what no collective does:
    #: connecting, measuring, trying algorithms.
    links: List[LinkStats]
    #: The collective that is under way.
    running: Optional[RunningCall]


class RankDescription(NamedTuple):
    """A rank of a job."""

    #: Ranks of the same node share memory.
    node: int
    #: Its process, in its own PID namespace.
    pid: int
    #: Where others reach it, the preferred address first.
    addresses: List[str]


class MeasuredCost(NamedTuple):
    """What was measured when a job started: a time however few bytes there are, and a rate."""

    #: What it is of, as ``"inside a node"``.
    what: str
    #: By whom it was measured.
    source: str
    #: Seconds before the first byte.
    latency: float
    #: ``None`` if it is too fast to be told.
    bytes_per_second: Optional[float]
    #: The same for bytes that are in a cache, where that makes a difference.
    bytes_per_second_in_cache: Optional[float]


class AlgorithmRange(NamedTuple):
    """Which algorithm all-reduces of ``float32`` use, by the size of the buffer."""

    #: It begins above so many bytes.
    above: int
    #: The largest size that was looked at.
    up_to: int
    #: The algorithm's name.
    algorithm: str
    #: The modelled time of a call of ``up_to`` bytes; ``None`` if it is not modelled.
    seconds: Optional[float]


class Description(NamedTuple):
    """What a communicator consists of. ``str`` and ``print`` give it for people, in several lines.
    Fields may be added at the end."""

    #: In one line: launcher, nodes, transports.
    summary: str
    #: Which launcher started the ranks and how they found each other, or what the communicator was
    #: made from.
    origin: str
    #: The transports in use, as ``"tcp"`` or ``"shm+tcp"``; ``"none"`` in a world of one.
    transport: str
    #: How long joining took on this rank, in seconds; only of a job's own communicator.
    joined_in: Optional[float]
    #: By rank; only of a job's own communicator with several ranks.
    ranks: List[RankDescription]
    #: How the transport is protected from others, in words.
    protection: Optional[str]
    #: What the links say of themselves, as the RDMA devices in use.
    links: List[str]
    #: What was measured when the job started: what algorithms are chosen by.
    costs: List[MeasuredCost]
    #: Where the costs come from if they were not measured, and which file keeps what is settled.
    notes: List[str]
    #: The algorithms of an all-reduce of ``float32``, by size in ascending order.
    algorithms: List[AlgorithmRange]
    #: All of this for people.
    text: str

    def __str__(self) -> str:
        return self.text


def stats(told: Any) -> Stats:
    """What the native part tells, under its names."""
    calls, sleeps, slept, peers, links, running = told
    return Stats(
        calls,
        sleeps,
        slept,
        [PeerStats(*peer) for peer in peers],
        [LinkStats(transport, dict(counters)) for transport, counters in links],
        None if running is None else RunningCall(*running),
    )


def description(told: Any) -> Description:
    """What the native part tells, under its names."""
    told = Description(*told)
    return told._replace(
        ranks=[RankDescription(*rank) for rank in told.ranks],
        costs=[MeasuredCost(*cost) for cost in told.costs],
        algorithms=[AlgorithmRange(*known) for known in told.algorithms],
    )
