"""Time local attention, whole models, and data loaders: see `python tools/benchmark.py --help`."""

import _repository_root  # noqa: F401

from vil.runtime.launch import set_torch_environment

set_torch_environment()  # like train.py

from tools.benchmarks.program import benchmark  # noqa: E402
from vil.command_line import main  # noqa: E402

if __name__ == "__main__":
    main(benchmark)
