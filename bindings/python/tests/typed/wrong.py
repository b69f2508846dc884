"""Wrong uses, each of which mypy reports with the code that stands beside it."""

import numpy as np
import unisum

comm = unisum.connect()
data = np.ones(3)

comm.all_reduce("abc")  # wrong: arg-type
comm.all_reduce(3)  # wrong: arg-type
comm.all_reduce(None)  # wrong: arg-type
comm.all_reduce([data, data])  # wrong: arg-type
comm.all_reduce(data, 1)  # wrong: arg-type
comm.all_reduce(data, operation="sum")  # wrong: call-arg
comm.all_reduce(data, "sum", data)  # wrong: call-arg
comm.all_gather(data)  # wrong: call-arg
comm.all_gather(data, "out")  # wrong: arg-type
comm.all_gather(data, [data], counts=3)  # wrong: arg-type
comm.broadcast(data, root="first")  # wrong: arg-type
comm.reduce_scatter(data, [data])  # wrong: arg-type
comm.all_reduce_batch(data)  # wrong: arg-type
comm.all_reduced(data)  # wrong: attr-defined
comm.subset([0]).barrier()  # wrong: union-attr
comm.messenger().send("abc", 1)  # wrong: arg-type
comm.empty("3")  # wrong: arg-type
comm.share_state("text")  # wrong: arg-type
unisum.connect(ranks=3)  # wrong: call-arg
unisum.connect(world="3")  # wrong: arg-type
unisum.connect("file:///tmp/world")  # wrong: call-arg arg-type
unisum.LossScaler(2.0, 3.0)  # wrong: call-arg
unisum.Buckets(comm, [("weight", (3,))]).begin().put("weight", "x")  # wrong: arg-type
unisum.Parameter("weight")  # wrong: call-arg
unisum.Buckets(comm, [("weight", (3,))], sharded=True).reshard(3)  # wrong: arg-type
unisum.ShardState("float32")  # wrong: arg-type
unisum.ShardState(3).vector("weight", 0)  # wrong: arg-type
unisum.Error("text").kinds  # wrong: attr-defined
