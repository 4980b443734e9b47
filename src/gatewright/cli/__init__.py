"""The command line: ``gatewright train | evaluate | predict | plan | list``."""

from gatewright.cli.main import main

__all__ = ["main"]
