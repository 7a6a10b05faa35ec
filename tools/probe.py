"""Evaluate frozen features: see `python tools/probe.py --help`."""

import _repository_root  # noqa: F401

from tools.programs.probe import main
from vil import command_line

if __name__ == "__main__":
    command_line.main(main)
