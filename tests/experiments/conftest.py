import pytest

from tests.experiments import forked


@pytest.fixture
def start():
    """Starts a function in a process of its own; what still runs after the test is killed."""
    started = []

    def start(function, *args) -> forked.Process:
        started.append(forked.Process(function, *args))
        return started[-1]

    yield start
    for process in started:
        process.close()
