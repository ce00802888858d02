"""One process of a tiny run of several; the tests start this file once for each.

Arguments: the fields of the config that differ from `runs.tiny`, as JSON, and the step after which
the process is to kill itself, 0 for never.
"""

import json
import os
import signal
import sys

import jax

from experiments import config as configs
from experiments import progress, train
from tests.experiments import runs


def main(changes: str, last: str) -> int:
    """The exit status of the run, unless it is killed."""
    advance = progress.Progress.advance

    def advance_or_die(self, metrics):
        advance(self, metrics)
        if self._done == int(last):
            os.kill(os.getpid(), signal.SIGKILL)

    progress.Progress.advance = advance_or_die
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_disable_most_optimizations", True)
    fields = json.loads(changes)
    return train.train(runs.tiny(**fields | {"mesh": configs.Mesh(**fields["mesh"])}))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
