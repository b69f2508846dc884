"""The emulated CUDA driver of the repository (tests/cuda-emulator), and arrays in its memory."""

import ctypes
import os
import pathlib

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[3]


def library():
    """The emulator as cargo builds it (``cargo build -p cuda-emulator``), or ``None``."""
    targets = [os.environ.get("CARGO_TARGET_DIR"), ROOT / "target"]
    for target in filter(None, targets):
        for profile in ("debug", "release"):
            found = pathlib.Path(target) / profile / "libcuda_emulator.so"
            if found.exists():
                return found
    return None


def use(folder, monkeypatch, devices=2, **settings):
    """Has processes that are started from here on find the emulator as their driver."""
    for name in ("libcuda.so", "libcuda.so.1"):
        if not (folder / name).exists():
            (folder / name).symlink_to(library())
    monkeypatch.setenv("LD_LIBRARY_PATH", str(folder))
    monkeypatch.setenv("CUDA_EMULATOR_DEVICES", str(devices))
    for name, value in settings.items():
        monkeypatch.setenv(f"CUDA_EMULATOR_{name}", str(value))


class Driver:
    """The driver's functions, in the primary context of a device."""

    def __init__(self, ordinal):
        # As unisum finds it: PyTorch may have loaded a stub of the other name (tests/setup).
        self._library = ctypes.CDLL("libcuda.so")
        self._ordinal = ordinal
        context = ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ordinal)
        self.call("cuCtxSetCurrent", context)

    def call(self, name, *arguments):
        code = getattr(self._library, name)(*arguments)
        assert code == 0, f"{name}: {code}"

    def stream(self):
        """A new stream's handle."""
        handle = ctypes.c_void_p()
        self.call("cuStreamCreate", ctypes.byref(handle), 1)
        return handle.value

    def synchronize(self, stream):
        self.call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def array(self, values):
        """An array on the device with these values."""
        return FakeArray(self, np.ascontiguousarray(values))


class FakeArray:
    """What a framework's array on a device shows of itself, and no more."""

    def __init__(self, driver, values):
        self._driver, self.shape, self.dtype = driver, values.shape, values.dtype
        self._address = ctypes.c_uint64()
        driver.call("cuMemAlloc_v2", ctypes.byref(self._address), ctypes.c_size_t(values.nbytes))
        self.set(values)
        #: Added to the address; changes to the interface.
        self.offset, self.changes = 0, {}

    def set(self, values):
        values = np.ascontiguousarray(values, self.dtype)
        to, size = self._address, ctypes.c_size_t(values.nbytes)
        self._driver.call("cuMemcpyHtoD_v2", to, values.ctypes.data_as(ctypes.c_void_p), size)

    def get(self):
        values = np.empty(self.shape, self.dtype)
        size = ctypes.c_size_t(values.nbytes)
        to = values.ctypes.data_as(ctypes.c_void_p)
        self._driver.call("cuMemcpyDtoH_v2", to, self._address, size)
        return values

    def __getitem__(self, part):
        """A view of a slice of a one-dimensional array."""
        start, stop, _ = part.indices(self.shape[0])
        view = object.__new__(FakeArray)
        view.__dict__.update(self.__dict__)
        view.shape = (stop - start,)
        view.offset = self.offset + start * self.dtype.itemsize
        view.base = self
        return view

    @property
    def __cuda_array_interface__(self):
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self._address.value + self.offset, False),
            "version": 3,
            "strides": None,
            **self.changes,
        }

    def free(self):
        self._driver.call("cuMemFree_v2", self._address)
