import pytest

from gatewright.integrations.mlflow.store import artifact_location


@pytest.mark.parametrize(
    ("uri", "location"),
    [
        ("sqlite:////a/b/my.db", "/a/b/mlartifacts"),
        ("sqlite+pysqlite:////a/b/my.db?timeout=5", "/a/b/mlartifacts"),
        ("sqlite:///:memory:", None),
        ("sqlite://", None),
        ("postgresql://me@host/db", None),
        ("http://127.0.0.1:5000", None),
        ("./mlruns", None),
    ],
)
def test_only_a_sqlite_file_has_a_place_for_artifacts_beside_it(uri, location):
    assert artifact_location(uri) == location
