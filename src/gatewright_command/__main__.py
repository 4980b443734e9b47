"""``python -m gatewright_command``, by which the launcher starts the processes of a run."""

import sys

from gatewright_command import main

if __name__ == "__main__":
    sys.exit(main())
