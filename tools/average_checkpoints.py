"""Average the weights of checkpoints: see `python tools/average_checkpoints.py --help`."""

import _repository_root  # noqa: F401

from tools.programs.average_checkpoints import main
from vil import command_line

if __name__ == "__main__":
    command_line.main(main)
