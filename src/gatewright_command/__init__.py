"""The program ``gatewright``, outside the package: importing that takes a second, in which Ctrl-C is no traceback."""

import signal


def main() -> int:
    """Run one command and return its exit status; until it is imported, Ctrl-C ends the process without a word."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from gatewright.cli import main as run

    return run()
