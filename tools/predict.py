"""Predict the classes of images: see `python tools/predict.py --help`."""

import _repository_root  # noqa: F401

from tools.programs.predict import main
from vil import command_line

if __name__ == "__main__":
    command_line.main(main)
