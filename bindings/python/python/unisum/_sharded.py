"""Sharded buckets: what a rank averages, updates and keeps is its share of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, List, NamedTuple, Optional, Union

from . import _unisum
from ._unisum import Array

if TYPE_CHECKING:
    from ._buckets import Buckets


class ShardPiece(NamedTuple):
    """The elements of a parameter in this rank's shard of a bucket."""

    #: The parameter, by its place.
    parameter: int
    #: The first of its elements, all counted in one row, and the one behind the last.
    start: int
    stop: int
    #: Where the first of them is in the shard.
    at: int


class ShardMove(NamedTuple):
    """Elements that keep or change their rank when shards are laid out anew."""

    #: The parameter, by its place.
    parameter: int
    #: The first of its elements, all counted in one row, and the one behind the last.
    start: int
    stop: int
    #: The rank whose state they come from, often the same one; ``None`` if nobody has them any
    #: more.
    source: Optional[int]
    #: The rank in whose shard they are now.
    destination: int


class Resharded(NamedTuple):
    """How state came to where it is now: the same on all ranks."""

    #: The version that all ranks have now: the latest, or an earlier one if more is left of that.
    version: int
    #: Where each element of each parameter was, and is, in the numbers of the new view.
    moves: List[ShardMove]

    def lost(self, rank: Optional[int] = None) -> List[ShardMove]:
        """What nobody has any more: all, or what is in the shards of ``rank``."""
        return [
            it for it in self.moves if it.source is None and rank in (None, it.destination)
        ]


class Weights:
    """A model's parameters in the memory and the layout of sharded buckets (``Buckets.weights``):
    each rank updates its shards, and ``Buckets.gather`` completes them.

    Arrays stay in place, and keep their memory. While ``gather`` runs nobody touches them.
    """

    def __init__(self, buckets: "Buckets") -> None:
        self._place = buckets._place
        self._native = _unisum.make_weights(buckets._native)

    def parameter(self, parameter: Union[int, str]) -> Array:
        """A parameter, in its shape, to be initialized in the same way on all ranks, or read."""
        return self._native._parameter(self._place(parameter))

    def shard(self, bucket: int) -> Array:
        """This rank's shard of a bucket, for the optimizer to update: as many elements as
        ``Buckets.shard``."""
        return self._native._shard(bucket)

    def __repr__(self) -> str:
        return "unisum.Weights()"


class ShardState:
    """What a rank keeps for its shards from step to step: several vectors, for example the weights
    and the optimizer's two moments, each with one element for each element of the shards::

        state = unisum.ShardState(3)
        while True:
            try:
                buckets = unisum.Buckets(comm, parameters, sharded=True)
                resharded = buckets.reshard(state)
                for lost in resharded.lost(comm.rank):
                    ...     # at the start: initialize it; later: from a checkpoint of that version
                state.set_version(resharded.version)
                ...         # steps, each of which ends with `state.set_version(steps)`
            except unisum.ViewChanged:
                comm = comm.rebuild()

    Has nothing until ``Buckets.reshard`` lays it out. ``vectors`` is at most 1024, ``dtype`` a type
    of gradients, float32 if it isn't said. Arrays of it lie where the state lies. They keep their
    memory: after the next ``reshard`` they show what was there before, and belong to the program
    alone. While ``reshard`` or ``copy_shards`` runs nobody touches them.
    """

    def __init__(self, vectors: int, dtype: str = "float32") -> None:
        self._native = _unisum.ShardState(vectors, dtype)

    @property
    def version(self) -> int:
        """After how many steps it is: what ``set_version`` was given, or ``Resharded.version``."""
        return self._native.version

    def set_version(self, version: int) -> None:
        """Says that the state is complete, after so many steps: what was missing is restored. Ranks
        that have different versions have different models, so this is called after each step. If
        all ranks go back to an earlier version by themselves, later copies are dropped. Not
        collective."""
        self._native.set_version(version)

    def vector(self, bucket: int, vector: int) -> Array:
        """A vector of this rank's shard of a bucket, to be read and updated: one dimension of as
        many elements as ``Buckets.shard``, with padding. ``IndexError`` if there is none, or none
        yet."""
        return self._native._vector(bucket, vector)

    def elements(self, vector: int, parameter: int, start: int, stop: int) -> Array:
        """Some elements of a parameter in one of this rank's shards, to be initialized or restored:
        those of a ``ShardMove`` whose ``destination`` is this rank. ``ValueError`` if they are in
        no shard of this rank."""
        return self._native._elements(vector, parameter, start, stop)

    def __repr__(self) -> str:
        return f"unisum.ShardState(version={self.version})"
