"""What the measured limits of the machine allow an all-reduce at best."""

# Working sets up to this size are taken to stay in the caches.
CACHED_BYTES = 8 << 20


def exchange_us(floors, size):
    """A raw duplex exchange of so many bytes each way; the better congestion control counts."""
    label = {1 << 20: "1M", 32 << 20: "32M", 64 << 20: "64M"}.get(size)
    rates = [floors[name] for name in (f"tcp_exchange_{label}_default",
                                       f"tcp_exchange_{label}_cubic") if name in floors]
    return size / max(rates) * 1e-3 if rates else None


def hosts_bound_us(goodput, hosts, size):
    """2(h-1)/h of the buffer must leave each host, at a plain stream's goodput in GB/s."""
    return 2 * (hosts - 1) / hosts * size / goodput * 1e-3


def shm_us(floors, ranks, size):
    """Every buffer crosses the memory bus once each way, and nobody knows before a line came."""
    if "nt_copy_all_cores" not in floors:
        return None
    cached = ranks * size <= CACHED_BYTES
    rates = ("cached_copy_all_cores",) if cached else ("nt_copy_all_cores", "nt_copy_1_core")
    rate = max(floors[name] for name in rates)
    return max(2 * floors.get("spin_one_way", 0), ranks * size / rate * 1e-3)


def tcp_us(floors, ranks, size):
    """2(n-1) buffers pass the loopback in all, no faster than the best exchange lets them."""
    rates = [rate for name, rate in floors.items() if name.startswith("tcp_exchange_")]
    if not rates:
        return None
    ways = 2  # an exchange moves its rate each way
    latency = floors.get("tcp_8B_spinning", 0)
    return max(latency, 2 * (ranks - 1) * size / (ways * max(rates)) * 1e-3)
