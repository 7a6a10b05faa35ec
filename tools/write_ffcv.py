"""Write a data set as FFCV files; the options are in tools/programs/write_ffcv.py and --help.

python tools/write_ffcv.py --data.source folder --data.root /datasets/imagenet --output /datasets/ffcv
"""

import _repository_root  # noqa: F401  (puts the repository on sys.path)

from tools.programs.write_ffcv import main
from vil import command_line

if __name__ == "__main__":
    command_line.main(main)
