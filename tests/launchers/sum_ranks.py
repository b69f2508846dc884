"""Adds up ranks with NumPy arrays: started by every launcher alike."""

import numpy
import unisum

with unisum.connect() as comm:
    data = numpy.full(1000, comm.rank + 1.0, numpy.float32)
    comm.all_reduce(data)
    print(f"{comm.world} ranks: {data[0]:.0f}", flush=True)
    if comm.rank == 0:
        print(comm.describe().summary, flush=True)
