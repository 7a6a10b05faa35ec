"""Run a grid of trainings and compare its cells: see `python tools/ablate.py --help`."""

import _repository_root  # noqa: F401

from tools.ablation.main import main
from vil import command_line

if __name__ == "__main__":
    command_line.main(main)
