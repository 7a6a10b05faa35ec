"""Report what an image data set contains; the options are in tools/programs/inspect_data.py and --help.

python tools/inspect_data.py photos --sheet sheet.png
"""

import _repository_root  # noqa: F401  (puts the repository on sys.path)

from tools.programs.inspect_data import main
from vil import command_line

if __name__ == "__main__":
    command_line.main(main)
