"""A SQLite store of MLflow: where it is, where its files go, and how it is created whole."""

import re
from pathlib import Path

from gatewright.extras import require
from gatewright.train.lock import locked


def create_store(uri: str) -> None:
    """Create a SQLite database that is not there yet, whole or not at all; other stores are left to MLflow.

    MLflow creates its tables one by one. Two runs that do so at once, or one that is killed meanwhile, would leave a
    store that no run can use again: so it is made under another name, by one run while the others wait.
    """
    database = database_of(uri)
    if database is None or database.exists():
        return
    mlflow = require("mlflow", "train")
    partial = database.with_name(f"{database.name}.partial")
    database.parent.mkdir(parents=True, exist_ok=True)
    with locked(database.with_name(f"{database.name}.lock")):
        if database.exists():
            return
        partial.unlink(missing_ok=True)  # Of a run that was killed while it made it.
        mlflow.MlflowClient(tracking_uri=f"sqlite:///{partial.as_posix()}").search_experiments(max_results=1)
        partial.replace(database)


def database_of(uri: str) -> Path | None:
    """Return the file of a SQLite store; None of another store, and of one in memory."""
    found = re.match(r"sqlite(?:\+\w+)?:///(?!:memory:|file:)([^?]+)", uri)
    return Path(found[1]).resolve() if found else None


def artifact_location(uri: str) -> str | None:
    """Say where a new experiment keeps its files: beside a SQLite database, or where another store keeps them.

    MLflow itself would put them below the folder that the run was started in, where nothing finds them again.
    """
    database = database_of(uri)
    return str(database.parent / "mlartifacts") if database else None
