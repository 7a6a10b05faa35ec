"""Run a learning-rate range test: see `python tools/find_lr.py --help`."""

import _repository_root  # noqa: F401

from tools.programs.find_lr import main
from vil import command_line

if __name__ == "__main__":
    command_line.main(main)
