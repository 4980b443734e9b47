"""The studies use what is there; what they find takes hours, and is in `studies/results` and the documents."""

import importlib
from pathlib import Path


def test_every_study_can_be_imported():
    for path in sorted((Path(__file__).parents[1] / "studies").glob("[a-z]*.py")):
        importlib.import_module(f"studies.{path.stem}")
