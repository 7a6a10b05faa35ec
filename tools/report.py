"""Write one HTML page about training runs: see `python tools/report.py --help`."""

import _repository_root  # noqa: F401

from tools.report_page.main import main
from vil import command_line

if __name__ == "__main__":
    command_line.main(main)
