"""Predict the classes of images; the options are in tools/programs/predict.py and --help.

python tools/predict.py runs/imagenet photo.jpg photos/
"""

import _repository_root  # noqa: F401  (puts the repository on sys.path)

from tools.programs.predict import main
from vil import command_line

if __name__ == "__main__":
    command_line.main(main)
