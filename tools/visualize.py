"""Draw what a model attends to in an image; the options are in tools/visualization/main.py and --help.

python tools/visualize.py runs/digits image.png --output figures
"""

import _repository_root  # noqa: F401  (puts the repository on sys.path)

from tools.visualization.main import main
from vil import command_line

if __name__ == "__main__":
    command_line.main(main)
