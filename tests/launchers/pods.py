"""What pods of each Kubernetes controller are given, replayed: network, PID and UTS namespaces."""

import os
import re

from cases import Fault
import sandbox

MANIFESTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../examples/kubernetes")
TOKEN = "UNISUM_TOKEN=the-secret-of-the-tests"
RANKS = 4


def manifest_variables(name):
    """The variables with literal values in a manifest: one line each."""
    with open(os.path.join(MANIFESTS, name), encoding="utf-8") as file:
        found = re.findall(r'- \{name: (\w+), value: "([^"]*)"\}', file.read())
    return dict(found)


def indexed(rank):
    return {"JOB_COMPLETION_INDEX": rank}


def pytorchjob(rank):
    """training-operator, pkg/controller.v1/pytorch/envvar.go."""
    return {
        "RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "unisum-master-0",
        "MASTER_PORT": 23456, "PYTHONUNBUFFERED": 1, "PET_MASTER_ADDR": "unisum-master-0",
        "PET_MASTER_PORT": 23456, "PET_NODE_RANK": rank, "PET_NNODES": RANKS,
        "PET_NPROC_PER_NODE": "auto",
    }


def trainjob(rank):
    """trainer, pkg/runtime/framework/plugins/torch; the job under it is an indexed one."""
    return {
        "PET_NODE_RANK": rank, "PET_NNODES": RANKS, "PET_NPROC_PER_NODE": 1,
        "PET_MASTER_ADDR": "unisum-node-0-0.unisum", "PET_MASTER_PORT": 29400,
        "JOB_COMPLETION_INDEX": rank,
    }


def leaderworkerset(rank):
    return {
        "LWS_WORKER_INDEX": rank, "LWS_GROUP_SIZE": RANKS,
        "LWS_LEADER_ADDRESS": "unisum-0.unisum.default",
    }


def ray_train(rank):
    return {
        "RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1,
        "NODE_RANK": rank, "MASTER_ADDR": sandbox.ADDRESSES[sandbox.HOSTS[0]],
        "MASTER_PORT": 37103,
    }


CONTROLLERS = {
    "indexed-job.yaml": (indexed, "by Kubernetes Indexed Job", "tcp://unisum-0.unisum:29500"),
    "jobset.yaml": (indexed, "by Kubernetes Indexed Job", "tcp://unisum-ranks-0-0.unisum:29500"),
    "pytorchjob.yaml": (pytorchjob, "by Kubeflow PyTorchJob", "tcp://unisum-master-0:23456"),
    "trainjob.yaml": (trainjob, "by Kubeflow Trainer", "tcp://unisum-node-0-0.unisum:29400"),
    "leaderworkerset.yaml": (
        leaderworkerset, "by LeaderWorkerSet", "tcp://unisum-0.unisum.default:29500"),
    "ray-train.yaml": (ray_train, "by torchrun", ":29501"),
}


class Pods:
    """Four pods, each on its own host."""

    def __init__(self, context):
        self.context = context

    def start(self, rank, variables):
        """A pod gets nothing of its surroundings, and sees its own processes only."""
        host = sandbox.HOSTS[rank]
        told = " ".join(f"'{name}={value}'" for name, value in variables.items())
        home = self.context.place.path(f"pod-{rank}")
        os.makedirs(home, exist_ok=True)
        inside = "unshare --pid --fork --kill-child --mount-proc"
        clean = f"env -i PATH=/usr/bin:/bin HOME={home} {TOKEN} {told}"
        on = self.context.place.on_command(host)
        return self.context.start(f"{on} {inside} {clean} {self.context.bench}")

    def run(self, manifest):
        given, *words = CONTROLLERS[manifest]
        # The first pod comes last: the others wait for it.
        started = {
            rank: self.start(rank, given(rank) | manifest_variables(manifest))
            for rank in reversed(range(RANKS))
        }
        try:
            self.context.check(started[0], RANKS, *words, "4 nodes")
            for rank in range(1, RANKS):
                status, _, errors = self.context.place.finish(started[rank], 120)
                if status != 0:
                    raise Fault(f"{manifest}: rank {rank}: status {status}: {errors}")
        finally:
            for process in started.values():
                self.context.place.end(process)

    def refused(self, variables, *words):
        self.context.check_refused(self.start(0, variables), *words)

    def alone(self):
        process = self.start(0, {"JOB_COMPLETION_INDEX": 1})
        status, _, errors = self.context.place.finish(process, 120)
        if status != 0 or "set UNISUM_WORLD" not in errors:
            raise Fault(f"no warning about a pod that is alone: {status} {errors}")


# What is wrong or contradicts itself, and what has to be said of it.
MISTAKES = {
    "more pods than the world has": (
        {"JOB_COMPLETION_INDEX": 4, "UNISUM_WORLD": 4, "UNISUM_RENDEZVOUS": "tcp://n1:1"},
        ["JOB_COMPLETION_INDEX=`4`", "below UNISUM_WORLD=4"]),
    "no address": (
        {"JOB_COMPLETION_INDEX": 1, "UNISUM_WORLD": 4},
        ["Indexed Job", "set UNISUM_RENDEZVOUS=tcp://HOST:PORT"]),
    "two ranks a node that nothing starts": (
        trainjob(1) | {"PET_NPROC_PER_NODE": 2}, ["PET_NPROC_PER_NODE=`2`", "torchrun"]),
    "a rank without a world": ({"RANK": 1}, ["RANK is set but WORLD_SIZE is not"]),
    "an address without a port": (
        {"RANK": 1, "WORLD_SIZE": 4, "MASTER_ADDR": "unisum-master-0"}, ["MASTER_PORT"]),
}


def all_cases(context):
    pods = Pods(context)
    cases = [
        (f"pods: {manifest}", lambda manifest=manifest: pods.run(manifest))
        for manifest in CONTROLLERS
    ]
    for name, (variables, words) in MISTAKES.items():
        cases.append((f"pods: {name}", lambda v=variables, w=words: pods.refused(v, *w)))
    cases.append(("pods: an index without a world", pods.alone))
    return cases
