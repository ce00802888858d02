"""One process of a tiny run of several; the tests call it once for each."""

import os
import signal

from experiments import config as configs
from experiments import progress, train
from tests.experiments import runs


def run(fields: dict, last: int, environment: dict[str, str]) -> int:
    """The exit status of `runs.tiny` with other fields; it kills itself after step `last`."""
    advance = progress.Progress.advance

    def advance_or_die(self, metrics):
        advance(self, metrics)
        if self._done == last:
            os.kill(os.getpid(), signal.SIGKILL)

    progress.Progress.advance = advance_or_die
    os.environ.update(environment)
    return train.train(runs.tiny(**fields | {"mesh": configs.Mesh(**fields["mesh"])}))
