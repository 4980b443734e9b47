from tests.train.conftest import _own_folders, folder  # noqa: F401 the fixtures work by being here
