"""Export a trained model; the options are in tools/programs/export.py and --help.

python tools/export.py runs/digits digits.onnx --format onnx
"""

import _repository_root  # noqa: F401  (puts the repository on sys.path)

from tools.programs.export import main
from vil import command_line

if __name__ == "__main__":
    command_line.main(main)
