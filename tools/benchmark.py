"""Time local attention, whole models, and data loaders: see `python tools/benchmark.py --help`."""

import _repository_root  # noqa: F401

from tools.benchmarks.program import benchmark
from vil.command_line import main

if __name__ == "__main__":
    main(benchmark)
