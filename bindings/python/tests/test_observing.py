"""What a communicator tells of itself: descriptions, and what was counted."""

import os
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import unisum

WORLD = 3
COUNT = 30_000


def described():
    with unisum.connect(transport="tcp", algorithm="ring") as comm:
        it = comm.describe()
        assert isinstance(it, unisum.Description) and it.transport == comm.transport == "tcp"
        assert str(it) == it.text and it.text.startswith(it.summary) and it.origin in it.summary
        assert [rank.pid for rank in it.ranks][comm.rank] == os.getpid()
        assert len(it.ranks) == comm.world and {rank.node for rank in it.ranks} == {0}
        assert all(rank.addresses[0] in it.text for rank in it.ranks)
        assert 0 < it.joined_in < 60
        assert it.costs[0].latency > 0 and it.costs[0].what in it.text
        sizes = [(known.above, known.up_to) for known in it.algorithms]
        assert sizes[0][0] == 0
        assert all(one[1] == other[0] for one, other in zip(sizes, sizes[1:]))
        assert {known.algorithm for known in it.algorithms} == {"ring"}
        # What is a job's own is not known of a group.
        group = comm.split(0).describe()
        assert group.joined_in is None and group.ranks == [] and "over tcp" in str(group)
        with pytest.raises(AttributeError):
            it.transport = "shm"
    with pytest.raises(RuntimeError, match="closed"):
        comm.describe()


def counted():
    with unisum.connect(transport="tcp", algorithm="ring") as comm:
        rank, world, data = comm.rank, comm.world, np.ones(COUNT, "float32")
        comm.all_reduce(data)
        before = comm.stats()
        assert before.running is None and len(before.peers) == world
        comm.all_reduce(data)
        after = comm.stats()
        assert (after.calls, after.running) == (before.calls + 1, None)
        # A ring passes all parts but one on to the next rank, twice.
        expected = 2 * data.nbytes * (world - 1) // world
        for peer in range(world):
            sent = after.peers[peer].sent - before.peers[peer].sent
            received = after.peers[peer].received - before.peers[peer].received
            assert sent == (expected if peer == (rank + 1) % world else 0)
            assert received == (expected if peer == (rank - 1) % world else 0)
        # Counters that are there have names and belong to a transport.
        for link in after.links:
            assert link.transport and all(value >= 0 for value in link.counters.values())
        comm.barrier()


def asked_while_stuck():
    """The last rank comes when the others have been seen to wait for it."""
    with unisum.connect(transport="tcp", algorithm="ring") as comm:
        control = comm.duplicate()
        data = np.ones(COUNT, "float32")
        if comm.rank < comm.world - 1:
            call = threading.Thread(target=comm.all_reduce, args=(data,))
            call.start()
            running, limit = None, time.monotonic() + 30
            while running is None or running.steps == 0:
                assert time.monotonic() < limit, running
                running = comm.stats().running
            assert "all_reduce" in running.call and str(COUNT) in running.call
            assert running.step <= running.steps
            control.barrier()
            call.join()
        else:
            control.barrier()
            comm.all_reduce(data)
        assert (data == comm.world).all() and comm.stats().running is None
        control.close()


def alone():
    with unisum.connect(world=1, rank=0) as comm:
        comm.all_reduce(np.ones(3))
        assert comm.stats() == unisum.Stats(0, 0, 0.0, [], [], None)
        it = comm.describe()
        assert it.transport == "none" and it.algorithms == [] and it.protection is None


@pytest.mark.parametrize("body", [described, counted, asked_while_stuck], ids=lambda it: it.__name__)
def test_world(body):
    unisum.spawn(body, WORLD)


def test_a_world_of_one():
    unisum.spawn(alone, 1)


ALONE = """
import os, socket, threading, time, unisum
from urllib.parse import urlparse
place = urlparse(os.environ["UNISUM_RENDEZVOUS"])

def stranger():
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            with socket.create_connection((place.hostname, place.port)) as connection:
                connection.sendall(b"GET / HTTP/1.1\\r\\n\\r\\n")
                return connection.recv(1)
        except ConnectionRefusedError:
            time.sleep(0.01)
        except ConnectionResetError:
            return None

other = threading.Thread(target=stranger)
other.start()
try:
    unisum.connect()
except unisum.Error as error:
    print(error)
other.join()
"""


def test_warnings_reach_standard_error():
    """There is no subscriber of events in this process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {name: it for name, it in os.environ.items() if not name.startswith("UNISUM_")}
    environment |= {
        "UNISUM_RANK": "0",
        "UNISUM_WORLD": "2",
        "UNISUM_RENDEZVOUS": f"tcp://127.0.0.1:{port}",
        "UNISUM_TOKEN": "a" * 24,
        "UNISUM_CONNECT_TIMEOUT": "2",
    }
    ended = subprocess.run(
        [sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0 and "rank 1 did not join" in ended.stdout, ended
    lines = ended.stderr.splitlines()
    for warning in ["the token from UNISUM_TOKEN has at most", "refused a connection: from 127."]:
        assert sum(line.startswith(f"unisum: warning: {warning}") for line in lines) == 1, ended
