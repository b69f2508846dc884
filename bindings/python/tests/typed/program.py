"""A program that uses most of unisum's interface, for type checkers: test_types has mypy check it.
Nothing runs it."""

import array
import asyncio
from typing import List, Optional, Tuple

import numpy as np
import numpy.typing as npt
import unisum


def connecting() -> unisum.Communicator:
    comm = unisum.connect(
        rank=0,
        world=2,
        rendezvous="file:///tmp/world",
        token="t" * 32,
        interface="=lo",
        timeout=30.0,
        connect_timeout=10,
        elastic=True,
    )
    names: Tuple[int, int, int, int] = (comm.rank, comm.world, comm.local_rank, comm.local_size)
    print(names, comm.transport, comm.closed)
    return comm


def collectives(comm: unisum.Communicator) -> None:
    data: npt.NDArray[np.float32] = np.ones(4, "float32")
    flags: npt.NDArray[np.bool_] = np.ones(4, bool)
    whole = np.ones((comm.world, 4), "float32")
    numbers = array.array("d", [1.0, 2.0])
    registered: unisum.Array = comm.empty((2, 3), "bfloat16")
    comm.all_reduce(data)
    comm.all_reduce(flags, "or")
    comm.all_reduce(numbers, "average")
    comm.all_reduce(memoryview(numbers), op="sum", scale=0.5)
    comm.all_reduce(bytearray(8), "xor")
    comm.all_reduce(registered, "max", out=registered)
    result, nonfinite = comm.all_reduce(data, detect_nonfinite=True)
    comm.reduce(data, 1, "min", out=data)
    comm.broadcast(registered, root=1)
    comm.all_gather(data, whole)
    comm.all_gather(data, [data, data], counts=[4, 4])
    comm.reduce_scatter([data, data], data, "sum", counts=(4, 4), detect_nonfinite=True)
    comm.all_to_all(whole, whole, counts=[4, 4], receive_counts=[4, 4])
    comm.gather(data, whole if comm.rank == 0 else None)
    comm.scatter(whole if comm.rank == 0 else None, data)
    comm.barrier()
    comm.all_reduce_batch([data, data], "product")
    comm.all_gather_batch([(data, whole)])
    comm.reduce_scatter_batch([(whole, data)], "sum")
    work: unisum.Work = comm.all_reduce(data, async_op=True)
    work.wait(1.5)
    print(work.done(), work.exception(), work.nonfinite, work.future().result(3))
    work.add_done_callback(print)
    comm.set_algorithm("ring")
    comm.set_algorithm(None)
    shape: Tuple[int, ...] = registered.shape
    print(result, nonfinite, shape, registered.dtype, registered.nbytes, len(registered))
    print(registered.numpy(), registered.torch(), unisum.empty(3).__dlpack_device__())


async def waiting(comm: unisum.Communicator) -> None:
    await comm.all_reduce(np.ones(3), async_op=True)


def groups(comm: unisum.Communicator) -> None:
    pair: Optional[unisum.Communicator] = comm.subset([0, 1])
    half = comm.split(comm.rank % 2, key=-comm.rank)
    if half is not None and pair is not None:
        half.duplicate().close()
    messenger: unisum.Messenger = comm.messenger()
    messenger.send(np.ones(2), 1, tag=7)
    received = messenger.receive(np.ones(2), source=0, tag=7)
    source: int = messenger.receive_any(received)
    sent: Optional[unisum.Work] = messenger.send(received, source, async_op=True)
    print(sent)
    messenger.close()


def elastic(comm: unisum.Communicator) -> None:
    try:
        comm.barrier()
    except unisum.ViewChanged as changed:
        lost: Tuple[int, ...] = changed.lost
        print(changed.epoch, lost, changed.joined)
        comm = comm.rebuild()
    view: Optional[unisum.View] = comm.view
    if view is not None:
        print(view.epoch, view.processes)
    if comm.newcomers:
        comm = comm.admit()
        state: Optional[bytes] = comm.share_state(b"state")
        print(state)
    comm = comm.shrink([1])
    comm.revoke()


def buckets(comm: unisum.Communicator) -> None:
    weight = np.ones((4, 4), "float32")
    made = unisum.Buckets(
        comm,
        [unisum.Parameter("weight", (4, 4)), ("bias", (4,), "bfloat16")],
        wire="powersgd:2",
        start_step=3,
        feedback=True,
        unused_parameters=True,
    )
    with made, made.begin() as step:
        step.put("weight", weight)
        step.view(1).numpy()[:] = 1
        step.ready("bias")
    report: Optional[unisum.StepReport] = step.report
    assert report is not None
    times: List[unisum.BucketReport] = report.buckets
    print(report.nonfinite, report.participants, times[0].bytes, report.exposed)
    if report.change is not None:
        print(report.change.lost, made.take_communicator())
    with made.begin_accumulating() as more:
        more.finish().wait()
    print(made.gradient("weight").numpy(), made.layout_version, made.buckets, made.view)
    made.restore(made.save())
    made.rescale(0.5)
    made.join(lambda told, gradients: print(told.participants, gradients[0].shape))
    scaler = unisum.LossScaler(1024.0, growth=2.0, limits=(1.0, 65536.0))
    applied: bool = scaler.update(report.nonfinite)
    scaler.restore(scaler.save())
    print(applied, scaler.scale)


def sharded(comm: unisum.Communicator) -> None:
    made = unisum.Buckets(comm, [("weight", (4, 4)), ("bias", (4,))], sharded=True)
    state = unisum.ShardState(3, "float32")
    resharded: unisum.Resharded = made.reshard(state)
    moves: List[unisum.ShardMove] = resharded.lost(comm.rank)
    source: Optional[int] = resharded.moves[0].source
    for it in moves:
        state.elements(0, it.parameter, it.start, it.stop).numpy()[:] = 1
    state.set_version(resharded.version + 1)
    pieces: List[unisum.ShardPiece] = made.shard_pieces(0)
    shard: range = made.shard(0)
    weights: unisum.Weights = made.weights()
    weights.shard(0).numpy()[:] = state.vector(0, 0).numpy() - made.shard_gradient(0).numpy()
    made.gather(weights)
    made.copy_shards(state)
    version: int = state.version
    print(weights.parameter("bias").torch(), weights.parameter(0), pieces[0].at, shard, version)
    print(source, resharded.lost())


def observing(comm: unisum.Communicator) -> None:
    described: unisum.Description = comm.describe()
    stats: unisum.Stats = comm.stats()
    ranks: List[unisum.RankDescription] = list(described.ranks)
    print(described.summary, ranks[0].pid, stats.calls, stats.running)


def devices(comm: unisum.Communicator, data: npt.NDArray[np.float32]) -> None:
    if unisum.cuda_devices():
        with comm.on_device(0) as device:
            device.all_reduce(data, "sum", stream=0)
            device.synchronize(timeout=5.0)
            found: bool = device.take_nonfinite()
            print(found, device.ordinal, device.describe())


def failing(comm: unisum.Communicator) -> None:
    try:
        comm.barrier()
    except unisum.TimeoutError as late:
        ranks: Tuple[int, ...] = late.ranks
        step: Optional[Tuple[int, int]] = late.step
        print(ranks, step, late.operation)
    except (unisum.RankLostError, unisum.MismatchError, unisum.RendezvousError) as error:
        kind: str = error.kind
        print(kind)
    except unisum.ConfigurationError as wrong:
        raise SystemExit(str(wrong)) from wrong
    aborted: BaseException = comm.abort("enough")
    assert isinstance(aborted, unisum.AbortedError) and isinstance(aborted, unisum.Error)


def main() -> None:
    with connecting() as comm:
        collectives(comm)
        asyncio.run(waiting(comm))


if __name__ == "__main__":
    results: List[object] = unisum.spawn(main, 2, (), grace=5.0)
