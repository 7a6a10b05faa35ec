"""Draw what a model attends to in an image: see `python tools/visualize.py --help`."""

import _repository_root  # noqa: F401

from tools.visualization.main import main
from vil import command_line

if __name__ == "__main__":
    command_line.main(main)
