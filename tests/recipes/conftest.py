from tests.train.runs import one_thread  # noqa: F401 the fixture works by being here
