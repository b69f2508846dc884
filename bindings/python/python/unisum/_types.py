"""What arguments are, for type checkers. Nothing here is looked at when programs run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Sequence, Union

if TYPE_CHECKING:
    from typing import Protocol

    # Of the type checker's own stubs: it need not be installed.
    from typing_extensions import Buffer

    class HasDLPack(Protocol):
        """What has ``__dlpack__``: arrays of NumPy, PyTorch, JAX and CuPy, and unisum's own."""

        def __dlpack__(self, *arguments: Any, **options: Any) -> Any: ...

    class HasCudaArray(Protocol):
        """What has ``__cuda_array_interface__``: arrays of Numba and CuPy."""

        @property
        def __cuda_array_interface__(self) -> Any: ...

    #: An array in memory of the CPU.
    Data = Union[HasDLPack, Buffer]
    #: An array, or several that are filled or read one after the other.
    DataOrList = Union[HasDLPack, Buffer, Sequence[Data]]
    #: An array in memory of a CUDA device.
    DeviceData = Union[HasDLPack, HasCudaArray]
else:
    Data = DataOrList = DeviceData = Any
