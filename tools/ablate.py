"""Run a grid of trainings and compare its cells; the options are in tools/ablation/main.py and --help.

python tools/ablate.py configs/ablations/pooling_digits.yaml
"""

import _repository_root  # noqa: F401  (puts the repository on sys.path)

from tools.ablation.main import main
from vil import command_line

if __name__ == "__main__":
    command_line.main(main)
