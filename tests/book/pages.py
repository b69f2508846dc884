"""Runs the commands of the book and of README, as somebody would copy them."""

import os
import re
import shutil
import subprocess
import tempfile
import urllib.request

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
QUICK_START = "docs/quick-start"
BLOCK = re.compile(r"^```(\S+)\n(.*?)^```", flags=re.S | re.M)
PAGE_S = 3000
# What starts ranks on a page, what they print in all, and how many lines of it.
PROMISES = {
    "rust": (r"^target/debug/sum|\btarget/debug/sum( &)?$", r"^rank \d of 4: 10$", 4),
    "c": (r"\./sum &$", r"^8$", 2),
    "pytorch": (r"^torchrun ", r"^rank \d of 4: 10$", 4),
    "README": (r"\./sum & done", r"^2$", 2),
}
# Where a page leaves something open, this gives it; `{}` stands for the block.
WITH_BUCKETS = """cat > step.py <<'END'
{}END
cat > buckets.py <<'END'
import numpy, torch, unisum

def train():
    comm, scaler = unisum.connect(), unisum.LossScaler()
    gradient = numpy.full((128, 64), comm.rank + 1.0, "float32")
    scope = dict(globals(), comm=comm, scaler=scaler, gradient=gradient)
    exec(open("step.py").read().replace("] = ...", "] = 1.0"), scope)
    assert abs(scope["weight"] - 1.5).max() < 0.02 and scope["applied"]

if __name__ == "__main__":
    unisum.spawn(train, 2)
END
"$VENV/bin/python" buckets.py
"""
WITH_CERTIFICATES = """{}
export UNISUM_TLS=mtls UNISUM_TLS_CERT=tls.crt UNISUM_TLS_KEY=tls.key UNISUM_TLS_CA=ca.crt
UNISUM_TLS_PEERS=worker.train cargo run --release --manifest-path "ROOT/Cargo.toml" \\
    --bin allreduce-bench -- -n 2 -t tcp -e 1K --seconds-per-size 0.05
""".replace("ROOT", ROOT)
# Of the pages that are no quick starts: the beginnings of the blocks that run here, and how.
PIECES = {
    "README": [
        ("bindings/c/install PREFIX", 'PREFIX="$(mktemp -d)"\n{}'),
        ("#include <stdio.h>", 'cd "$PREFIX"\ncat > sum.c <<\'END\'\n{}END\n'),
        ("export PKG_CONFIG_PATH=PREFIX", "{}"),
    ],
    "docs/security": [
        ("openssl req -x509", WITH_CERTIFICATES),
    ],
    "docs/pytorch": [
        ("import numpy, unisum\n\ndef work", "cat > work.py <<'END'\n{}END\n\"$VENV/bin/python\" work.py\n"),
        ("buckets = unisum.Buckets", WITH_BUCKETS),
    ],
}
# What runs elsewhere: a page, how a block of it begins, the file that runs the same, and a part of
# the line that does.
ELSEWHERE = [
    ("docs/observing", "print(comm.describe())", "bindings/python/tests/test_observing.py",
     "after = comm.stats()"),
    ("docs/observing", "print(unisum.torch.describe())", "bindings/python/tests/test_torch.py",
     "unisum.torch.stats(group).calls"),
    ("docs/observing", "unisum_stats *stats;", "bindings/c/tests/worlds.c",
     "OK(unisum_comm_stats(comm, &stats));"),
    ("docs/cuda", "device = comm.on_device()", "bindings/python/tests/test_device.py",
     ".on_device("),
    ("docs/cuda", "buckets = unisum.DeviceBuckets", "bindings/python/tests/test_device.py",
     "with buckets.begin(stream=stream)"),
    ("README", "pip install ./bindings/python", "docs/quick-start/pytorch.md",
     "python examples/pytorch/ddp_digits.py"),
    ("README", 'torch.distributed.init_process_group("unisum")', "docs/quick-start/pytorch.md",
     'dist.init_process_group("unisum")'),
    ("docs/pytorch", 'torch.distributed.init_process_group("unisum")',
     "docs/quick-start/pytorch.md", 'dist.init_process_group("unisum")'),
    ("docs/quick-start/pytorch", 'torch.distributed.init_process_group("unisum")',
     "docs/quick-start/pytorch.md", 'dist.init_process_group("unisum")'),
    ("docs/pytorch", "from unisum.torch import DistributedDataParallel",
     "bindings/python/tests/ddp_scenarios.py", "DistributedDataParallel"),
    ("docs/pytorch", "model.register_comm_hook(state, unisum.torch.hooks.aborting(my_hook))",
     "bindings/python/tests/test_torch_hooks.py", "hooks.aborting("),
    ("docs/elastic", "comm = unisum.connect(elastic=2)", "bindings/python/tests/test_elastic.py",
     "unisum.connect(elastic=1)"),
    ("docs/elastic", "state = unisum.ShardState(3)", "bindings/python/tests/test_sharded.py",
     "resharded = buckets.reshard(self.state)"),
    ("docs/elastic", "weights = buckets.weights()", "bindings/python/tests/test_sharded.py",
     "buckets.gather(weights)"),
    ("docs/elastic", "model = unisum.torch.DistributedDataParallel",
     "bindings/python/tests/test_torch_elastic.py", "elastic=True)"),
    ("docs/elastic", "unisum.torch.join(", "bindings/python/tests/test_torch_joining.py",
     "unisum.torch.join("),
    ("docs/elastic", '{"epoch_log":1', "src/epoch_log/line.rs",
     'include_str!("../../docs/elastic.md")'),
    ("docs/elastic", "optimizer.step()",
     "bindings/python/tests/test_torch_joining.py", "model.last_report.newcomers"),
    ("README", "cargo run --release --bin allreduce-bench -- -n 16", ".ci/run",
     "cargo run --release --bin allreduce-bench -- -n 16"),
    ("README", "bench=", "tests/launchers/cases.py", "UNISUM_LOCAL_SIZE=4 {context.bench}"),
    ("docs/performance", "cargo run --release --bin allreduce-bench -- -n 16 -t tcp", ".ci/run",
     "cargo run --release --bin allreduce-bench -- -n 16 -t tcp"),
    ("docs/frameworks", "examples/frameworks/run", ".ci/nightly", "examples/frameworks/run"),
    # The tests make certificates of their own, at other places.
    ("docs/security", "export UNISUM_TLS=mtls", "src/settings/tls.rs", "UNISUM_TLS_PEERS"),
    ("docs/security", "export UNISUM_TLS_CERT=/svid", "src/settings/tls.rs", "UNISUM_TLS_CERT"),
]


def pages():
    """The names of the pages that have something to run."""
    found = sorted(name[:-3] for name in os.listdir(os.path.join(ROOT, QUICK_START)))
    # PyTorch's comes last: the next page uses what it has installed.
    found.sort(key=lambda name: name == "pytorch")
    return ["README", *found, "docs/pytorch"]


def path_of(name):
    return f"{name}.md" if name in PIECES else f"{QUICK_START}/{name}.md"


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return file.read()


def unaccounted(files):
    """Which blocks of these pages run nowhere, and what the lists above have that is not so."""
    faults, used, compiled = [], set(), read("src/lib.rs")
    for file in files:
        page = file.removesuffix(".md")
        for language, block in BLOCK.findall(read(file)):
            if language.split(",")[0] == "rust":
                if f'include_str!("../{file}")' not in compiled:
                    faults.append(f"{file}: its Rust is compiled by no test")
                continue
            known = [("", start) for start, _ in PIECES.get(page, [])]
            known += [entry for entry in ELSEWHERE if entry[0] == page]
            found = [entry for entry in known if block.startswith(entry[1])]
            used.update(found)
            runs = language in ("text", "yaml") or (language == "sh" and QUICK_START in file)
            if not found and not runs:
                faults.append(f"{file}: runs nowhere: {block.splitlines()[0]}")
    for entry in ELSEWHERE:
        if entry not in used:
            faults.append(f"tests/book: {entry[0]} has no block {entry[1]}")
        if entry[3] not in read(entry[2]):
            faults.append(f"tests/book: {entry[2]} has no line {entry[3]}")
    return faults


def works(tool):
    if not shutil.which(tool):
        return False
    if tool == "srun":
        return subprocess.run(["sinfo"], capture_output=True, timeout=60).returncode == 0
    return True


def blocks_of(name):
    """What to run of a page, and which tools are missing for the rest."""
    found = BLOCK.findall(read(path_of(name)))
    blocks, without = [], []
    for start, around in PIECES.get(name, []):
        block = next(text for _, text in found if text.startswith(start))
        block = re.sub(r"\bPREFIX\b", '"$PREFIX"', block) if name == "README" else block
        blocks.append(around.replace("{}", block))
    for language, block in found if name not in PIECES else []:
        tool = re.match(r"# with: (\S+)", block)
        if language == "sh" and tool and not works(tool[1]):
            without.append(tool[1])
        elif language == "sh":
            blocks.append(block)
    return blocks, without


def is_reachable(address):
    try:
        with urllib.request.urlopen(address, timeout=20):
            return True
    except OSError:
        return False


def with_torch_from_pypi(blocks):
    """For machines that reach PyPI only, whose PyTorch wants CUDA's libraries."""
    setup = 'bindings/python/tests/setup "$VENV"\n'
    kept = [re.sub(r".* --index-url .*\n", "", block) for block in blocks]
    return [setup + kept[0], *kept[1:]]


def run(name, venv):
    """Runs a page in an empty home, and in a process namespace that ends what it leaves behind.
    Returns whether all went well."""
    blocks, without = blocks_of(name)
    if name == "pytorch" and not is_reachable("https://download.pytorch.org/whl/cpu"):
        blocks = with_torch_from_pypi(blocks)
        without.append("download.pytorch.org")
    script = "set -euo pipefail\n"
    script += 'cd "$HOME"\n' if name.startswith("docs/") else ""
    for at, block in enumerate(blocks):
        script += f"echo '@block {at}'\n{block}"
    command = ["bash", "-c", script]
    if os.geteuid() == 0 and shutil.which("unshare"):
        command = ["unshare", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc", *command]
    with tempfile.TemporaryDirectory() as home:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment(name, home, venv), text=True, timeout=PAGE_S,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        except subprocess.TimeoutExpired:
            print(f"FAILED {name}: not done after {PAGE_S} s")
            return False
    fault = None if done.returncode == 0 else f"status {done.returncode}"
    fault = fault or broken_promise(name, blocks, done.stdout)
    left_out = f" without {', '.join(without)}" if without else ""
    print(f"{'FAILED' if fault else 'ok':6} {name}{left_out}", flush=True)
    if fault:
        print(f"{fault}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return not fault


def environment(name, home, venv):
    """That of a newcomer: nothing of unisum's or a launcher's is set, and the home is empty. A
    library that was built before may be given to bindings/c/install."""
    launchers = re.compile(
        r"UNISUM_(?!STATIC_LIBRARY$)|(SLURM|OMPI|PMI|PMIX|HYDRA)_|(RANK|WORLD_SIZE)$")
    kept = {key: value for key, value in os.environ.items() if not launchers.match(key)}
    real = os.path.expanduser("~")
    tools = {"CARGO_HOME": f"{real}/.cargo", "RUSTUP_HOME": f"{real}/.rustup"}
    # What this page compiles in a folder of its own is kept for the next run.
    shared = {}
    if name == "rust":
        shared["CARGO_BUILD_BUILD_DIR"] = os.path.join(ROOT, "target", "book-build")
    # As root, in containers and on few cores Open MPI asks whether that is meant.
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
               "OMPI_MCA_rmaps_base_oversubscribe": "1", "OMPI_MCA_hwloc_base_binding_policy": "none"}
    return tools | shared | kept | allowed | {"HOME": home, "VENV": venv}


def broken_promise(name, blocks, out):
    """Which block did not print what the page says, if any."""
    if name not in PROMISES:
        return None
    start, expected, times = PROMISES[name]
    printed = dict(re.findall(r"^@block (\d+)\n(.*?)(?=^@block |\Z)", out, flags=re.S | re.M))
    starts = [at for at, block in enumerate(blocks) if re.search(start, block, flags=re.M)]
    for at in starts:
        count = len(re.findall(expected, printed.get(str(at), ""), flags=re.M))
        if count != times:
            return f"block {at} printed {count} of {times} lines {expected}: {blocks[at]}"
    return None if starts else "no block starts ranks"
