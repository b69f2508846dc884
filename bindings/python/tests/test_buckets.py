"""Gradient buckets and the loss scaler."""

import pickle

import numpy
import pytest
import unisum

PARAMETERS = [
    unisum.Parameter("weight", (64, 8)),
    unisum.Parameter("half", (33,), "bfloat16"),
    unisum.Parameter("bias", (8,)),
]


def backward(step, rank, number, torch):
    """Each gradient in another way."""
    step.view("bias").numpy()[:] += rank + number
    step.ready("bias")
    step.put("half", torch.full((33,), rank + 1.0, dtype=torch.bfloat16))
    step.put(0, numpy.full((64, 8), 2.0 * rank, "float32"))


def train():
    import torch

    with unisum.connect() as comm:
        mean = (comm.world - 1) / 2
        buckets = unisum.Buckets(comm, PARAMETERS, bucket_bytes=1024, end_bucket_bytes=64)
        for number in range(3):
            with buckets.begin() as step:
                backward(step, comm.rank, number, torch)
            assert (buckets.gradient("bias").numpy() == mean + number).all()
            assert (buckets.gradient("half").torch() == mean + 1).all()
            assert (buckets.gradient("weight").numpy() == 2 * mean).all()
            assert step.report.participants == comm.world and not step.report.nonfinite
            assert len(step.report.buckets) == len(buckets.buckets)
            assert step.report.exposed >= 0 and step.report.unused == []
        assert buckets.layout_version == 1
        saved = buckets.layout
        buckets.close()
        again = unisum.Buckets(comm, PARAMETERS, layout=saved)
        assert again.layout == saved
        return saved


def test_gradients_are_averaged_wherever_they_were_written():
    saved = unisum.spawn(train, 2)
    assert saved[0] == saved[1]


def accumulate():
    with unisum.connect() as comm:
        buckets = unisum.Buckets(comm, [("w", (10,))])
        for _ in range(2):
            with buckets.begin_accumulating() as step:
                step.put("w", numpy.full(10, comm.rank + 1.0, "float32"))
        assert (buckets.gradient("w").numpy() == 2 * (comm.rank + 1)).all()
        with buckets.begin() as step:
            step.put("w", numpy.full(10, comm.rank + 1.0, "float32"))
        return buckets.gradient("w").numpy().tolist()


def test_steps_accumulate_until_one_reduces():
    assert unisum.spawn(accumulate, 2) == [[4.5] * 10] * 2


def fail_on_one():
    with unisum.connect() as comm:
        buckets = unisum.Buckets(comm, [("w", (10,)), ("b", (3,))])
        try:
            with buckets.begin() as step:
                step.put("w", numpy.ones(10, "float32"))
                if comm.rank == 1:
                    raise KeyError("no such layer")
                step.put("b", numpy.ones(3, "float32"))
            raise AssertionError("the step went well")
        except KeyError:
            seen = None
        except unisum.Error as error:
            seen = (error.kind, error.ranks, "no such layer" in str(error))
        # The next step goes well.
        with buckets.begin() as step:
            step.put("b", numpy.ones(3, "float32"))
            step.put("w", numpy.ones(10, "float32"))
        assert (buckets.gradient("b").numpy() == 1).all()
        return seen


def test_a_step_that_raises_fails_on_all_ranks_and_is_named():
    assert unisum.spawn(fail_on_one, 2) == [("step_failed", (1,), True), None]


def miss_and_misuse():
    with unisum.connect() as comm:
        buckets = unisum.Buckets(comm, [("w", (10,)), ("b", (3,))])
        with pytest.raises(unisum.Error, match="`b`.*had no gradient"):
            with buckets.begin() as step:
                step.put("w", numpy.ones(10, "float32"))
        with pytest.raises(RuntimeError, match="no step is under way"):
            step.put("w", numpy.ones(10, "float32"))
        step = buckets.begin()
        with pytest.raises(RuntimeError, match="a step is under way"):
            buckets.begin()
        with pytest.raises(TypeError, match="elements of f64"):
            step.put("w", numpy.ones(10))
        with pytest.raises(unisum.ConfigurationError, match="was given 9 elements"):
            step.put("w", numpy.ones(9, "float32"))
        with pytest.raises(ValueError, match="no parameter"):
            step.view("x")
        with pytest.raises(ValueError, match="no parameter 7"):
            step.view(7)
        with pytest.raises(unisum.Error):
            step.wait()
        with pytest.raises(ValueError, match="can't travel as `int3`"):
            unisum.Buckets(comm, [("w", (10,))], wire="int3")
        with pytest.raises(unisum.MismatchError, match="parameter 0 differs"):
            unisum.Buckets(comm, [("w", (10 + comm.rank,))])
        gradient = buckets.gradient("w").numpy()
        buckets.close()
        with pytest.raises(RuntimeError, match="closed"):
            buckets.begin()
        # The memory lives as long as it is shown.
        assert gradient.shape == (10,) and numpy.isfinite(gradient).all()


def test_misuse_is_refused_in_words():
    unisum.spawn(miss_and_misuse, 2)


def compress():
    with unisum.connect() as comm:
        errors = {}
        generator = numpy.random.default_rng(comm.rank)
        gradient = generator.standard_normal((300, 40)).astype("float32")
        exact = comm.all_reduce(gradient.copy(), "average")
        for wire in ("bf16", "f16", "f8e4m3", "f8e5m2", "int8", "powersgd:4"):
            buckets = unisum.Buckets(comm, [("w", (300, 40))], wire=wire, start_step=0)
            total = numpy.zeros_like(exact)
            for _ in range(8):
                with buckets.begin() as step:
                    step.put("w", gradient)
                total += buckets.gradient("w").numpy()
            errors[wire] = float(abs(total / 8 - exact).max())
            saved = buckets.save()
            assert saved
            other = unisum.Buckets(comm, [("w", (300, 40))], wire=wire, start_step=0)
            other.restore(pickle.loads(pickle.dumps(saved)))
            assert other.save() == saved
            results = []
            for each in (buckets, other):
                with each.begin() as step:
                    step.put("w", gradient)
                results.append(each.gradient("w").numpy().copy())
            if wire != "powersgd:4":
                assert (results[0] == results[1]).all()
            buckets.rescale(2.0)
        forgetful = unisum.Buckets(comm, [("w", (300, 40))], wire="int8", feedback=False)
        with forgetful.begin() as step:
            step.put("w", gradient)
        errors["forgetful"] = float(abs(forgetful.gradient("w").numpy() - exact).max())
        return errors


def test_wires_lose_little_with_feedback_which_can_be_saved():
    for errors in unisum.spawn(compress, 2):
        assert errors["bf16"] < 2e-3 and errors["f16"] < 1e-3
        # What eight steps lost together is no more than what one did.
        assert errors["int8"] < errors["forgetful"] / 3
        assert errors["f8e4m3"] < 0.1 and errors["f8e5m2"] < 0.1 and errors["powersgd:4"] < 4


def uneven():
    with unisum.connect() as comm:
        buckets = unisum.Buckets(comm, [("w", (4,))], uneven_inputs=True)
        seen = []
        for number in range(2 + 2 * comm.rank):
            with buckets.begin() as step:
                step.put("w", numpy.full(4, comm.rank + 1.0, "float32"))
            seen.append((step.report.participants, buckets.gradient("w").numpy()[0].item()))
        buckets.join(lambda report, gradients: seen.append(
            (report.participants, gradients[0].numpy()[0].item())
        ))
        with pytest.raises(ZeroDivisionError):
            if comm.rank == 0:
                with buckets.begin() as step:
                    step.put("w", numpy.ones(4, "float32"))
                raise ZeroDivisionError
            buckets.join(lambda *_: 1 / 0)
        return seen


def test_ranks_that_ran_out_of_data_take_part_until_all_have():
    expected = [(2, 1.5), (2, 1.5), (1, 2.0), (1, 2.0)]
    assert unisum.spawn(uneven, 2) == [expected, expected]


def wait_for_a_step():
    import asyncio

    with unisum.connect() as comm:
        buckets = unisum.Buckets(comm, [("w", (4,))])

        async def one():
            step = buckets.begin()
            step.put("w", numpy.full(4, comm.rank, "float32"))
            return await step.finish()

        report = asyncio.run(one())
        assert report.participants == 2
        step = buckets.begin()
        step.put("w", numpy.full(4, comm.rank, "float32"))
        assert step.finish().future().result(30).participants == 2


def test_the_end_of_a_step_can_be_awaited():
    unisum.spawn(wait_for_a_step, 2)


def test_the_loss_scaler_backs_off_and_grows():
    scaler = unisum.LossScaler(8.0, growth_interval=2)
    assert not scaler.update(True) and scaler.scale == 4.0
    assert scaler.update(False) and scaler.update(False) and scaler.scale == 8.0
    other = unisum.LossScaler(growth_interval=2)
    other.restore(scaler.save())
    assert other.scale == 8.0 and "8" in repr(other)
    with pytest.raises(unisum.ConfigurationError, match="back off"):
        unisum.LossScaler(backoff=2.0)
    with pytest.raises(unisum.ConfigurationError, match="8 bytes"):
        scaler.restore(b"123")
    limited = unisum.LossScaler(1.0, limits=(0.5, 2.0))
    assert limited.update(True) is False and limited.scale == 0.5
    limited.update(True)
    assert limited.scale == 0.5
