"""Prints unisum's times of all-reduces beside NCCL's: UNISUM_CSV NCCL_CSV."""

import csv
import sys


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def main():
    ours = rows(sys.argv[1])
    theirs = {int(row["bytes"]): float(row["p50_us"]) for row in rows(sys.argv[2])}
    if not ours:
        sys.exit("there are no results of unisum")
    form = "{:>12} {:>10} {:>12} {:>12} {:>12} {:>12} {:>8}"
    heads = ("bytes", "algorithm", "events (us)", "wall (us)", "busbw (GB/s)", "NCCL (us)", "ratio")
    print(f"\nall-reduce, f32, {ours[0]['ranks']} ranks, {ours[0]['transport']}, medians")
    print(form.format(*heads))
    for row in ours:
        time, nccl = float(row["p50_us"]), theirs.get(int(row["bytes"]))
        print(
            form.format(
                row["bytes"],
                row["algorithm"],
                f"{time:.1f}",
                f"{float(row['wall_us']):.1f}",
                f"{float(row['busbw_GBps']):.2f}",
                "-" if nccl is None else f"{nccl:.1f}",
                "-" if nccl is None else f"{time / nccl:.2f}",
            )
        )
    wrong = sum(int(row["wrong"]) for row in ours)
    print(f"wrong elements: {wrong}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
