"""Report what an image data set contains; the options are in --help.

python tools/inspect_data.py photos --sheet sheet.png
"""

import _repository_root  # noqa: F401  (puts the repository on sys.path)

from tools.data_inspection.main import main
from vil import command_line

if __name__ == "__main__":
    command_line.main(main)
