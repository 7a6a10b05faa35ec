"""Write a data set as FFCV files: see `python tools/write_ffcv.py --help`."""

import _repository_root  # noqa: F401

from tools.programs.write_ffcv import main
from vil import command_line

if __name__ == "__main__":
    command_line.main(main)
