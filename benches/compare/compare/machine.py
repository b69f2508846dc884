"""What the measurements ran on."""

import os
import platform
import re
import subprocess
from pathlib import Path


def processor():
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.M)
    flags = re.search(r"^flags\s*:\s*(.*)$", text, re.M)
    vectors = [flag for flag in ("avx2", "avx512f", "avx512_bf16")
               if flags and flag in flags[1].split()]
    return f"{name[1] if name else platform.machine()} ({', '.join(vectors) or 'no AVX2'})"


def congestion_control():
    path = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    return path.read_text(encoding="ascii").strip() if path.exists() else "?"


def describe():
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_GiB": round(memory / 2**30),
        "kernel": platform.release(),
        "congestion_control": congestion_control(),
        "load_before": os.getloadavg()[0],
    }


def unisum_version(bench):
    lines = subprocess.run(
        [str(bench), "--version"], check=True, capture_output=True, text=True, timeout=60
    ).stdout.splitlines()
    return ", ".join(lines)
