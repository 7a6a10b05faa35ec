"""Write one HTML page about training runs; the options are in tools/report_page/main.py and --help.

python tools/report.py runs/digits
"""

import _repository_root  # noqa: F401  (puts the repository on sys.path)

from tools.report_page.main import main
from vil import command_line

if __name__ == "__main__":
    command_line.main(main)
