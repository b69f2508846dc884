"""Worlds of processes some of which the tests kill."""

import multiprocessing
import multiprocessing.connection
import os
import secrets
import signal
import time
import traceback

#: Of how many ranks all scenarios of a file are run; with two as well once a day.
SIZES = [2, 4] if os.environ.get("UNISUM_TEST_WHOLE") else [4]


class World:
    """Ranks that run `function(talk, *args)`; `talk(words)` tells the test how far one is."""

    def __init__(self, function, ranks, args=(), **environment):
        context = multiprocessing.get_context("spawn")
        meeting = {
            "UNISUM_WORLD": ranks,
            "UNISUM_LOCAL_SIZE": ranks,
            "UNISUM_TOKEN": secrets.token_hex(16),
            "UNISUM_INTERFACE": "=lo",
            **environment,
        }
        self._context, self._meeting = context, meeting
        self._told, self._processes = {}, []
        for rank in range(ranks):
            self.add(function, args, UNISUM_RANK=rank, UNISUM_LOCAL_RANK=rank)

    def add(self, function, args=(), **environment):
        """Another process, which runs `function(talk, *args)`; its number here."""
        number = len(self._processes)
        receiver, sender = self._context.Pipe(duplex=False)
        own = {name: str(value) for name, value in {**self._meeting, **environment}.items()}
        process = self._context.Process(
            target=_run, args=(sender, own, function, tuple(args)), daemon=True
        )
        process.start()
        sender.close()
        self._processes.append(process)
        self._told[number] = (receiver, [])
        return number

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
        for receiver, _ in self._told.values():
            receiver.close()

    def signal(self, rank, number=signal.SIGKILL):
        os.kill(self._processes[rank].pid, number)

    def _listen(self, open_ranks, deadline):
        """Hears what the next ranks tell; ranks that have ended are closed."""
        receivers = {self._told[rank][0]: rank for rank in open_ranks}
        left = deadline - time.monotonic()
        ready = multiprocessing.connection.wait(list(receivers), max(left, 0))
        assert ready, f"nothing of ranks {sorted(open_ranks)}: {self.told()}"
        for receiver in ready:
            rank = receivers[receiver]
            try:
                self._told[rank][1].append(receiver.recv())
            except EOFError:
                open_ranks.discard(rank)

    def told(self):
        """What each rank has told."""
        return {rank: words for rank, (_, words) in self._told.items()}

    def wait_for(self, words, limit=60, without=()):
        """Until all ranks but these have told this."""
        deadline = time.monotonic() + limit
        late = set(self._told) - set(without)
        while late:
            self._listen(late, deadline)
            late -= {rank for rank in late if words in self._told[rank][1]}
        ended = [rank for rank in set(self._told) - set(without)
                 if words not in self._told[rank][1]]
        assert not ended, f"ranks {ended} have ended: {self.told()}"

    def end(self, without=(), limit=60):
        """What the ranks other than these told last, once they have ended well."""
        deadline = time.monotonic() + limit
        open_ranks = set(self._told)
        while open_ranks:
            self._listen(open_ranks, deadline)
        for rank, process in enumerate(self._processes):
            process.join(max(deadline - time.monotonic(), 0))
            assert rank in without or process.exitcode == 0, (rank, process.exitcode, self.told())
        return {rank: words[-1] for rank, words in self.told().items() if rank not in without}


def _run(sender, environment, function, args):
    os.environ.update(environment)
    try:
        function(sender.send, *args)
    except BaseException:
        sender.send(traceback.format_exc())
        raise SystemExit(1) from None
    finally:
        sender.close()
