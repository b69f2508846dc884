"""Runs a program of unisum's as one rank on each of some hosts (see hosts.py), which are gone
afterwards. The arguments: how many hosts, and the program with its own. Needs root."""

import os
import subprocess
import sys

from .hosts import Hosts, port, world


def main():
    if len(sys.argv) < 3 or not sys.argv[1].isdigit() or int(sys.argv[1]) < 1:
        sys.exit("usage: on-hosts HOSTS PROGRAM [ARGUMENT...]")
    count, words = int(sys.argv[1]), sys.argv[2:]
    try:
        with Hosts(count) as hosts:
            launch = world(hosts, count, port(0), words)
            environment = {**os.environ, **launch.environment}
            ranks = [subprocess.Popen(words, env=environment) for words in launch.commands]
            return 0 if all([rank.wait() == 0 for rank in ranks]) else 1
    except OSError as error:
        return f"no hosts: {error}"


if __name__ == "__main__":
    sys.exit(main())
