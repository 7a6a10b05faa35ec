"""Check that everything computes correctly and fast on a GPU: see `python tools/check_gpu.py --help`."""

import _repository_root  # noqa: F401

from tools.gpu_check.program import check_gpu
from vil.command_line import main

if __name__ == "__main__":
    main(check_gpu)
