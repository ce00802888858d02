"""Train a model on a task: one page, read from top to bottom.

    attnjax train digits --mixers "gna(window=(3, 3))" --steps 500
    attnjax train source_text --mesh.context 4 --cpu-devices 4

The same command again resumes the run: parameters and the next batch are those that an
uninterrupted run would have, bit for bit. SIGTERM saves and exits with 0. The same command on
several hosts, with --coordinator, is one run: docs/several_hosts.md.
"""

import contextlib
import dataclasses
import sys
import traceback
from collections.abc import Sequence

from experiments import config as configs


class NotFinite(Exception):
    """The loss or its gradient is not a finite number."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parses a config and runs it; 2 for what can't be run, said in one line."""
    import tyro

    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if args and not args[0].startswith("-"):
            configs.named(args[0])
        choices = configs.configs()
        config = tyro.extras.overridable_config_cli(choices, prog="attnjax train", args=args)
        if not config.directory:
            config = dataclasses.replace(config, directory=f"runs/{args[0]}")
        return train(config)
    except (ValueError, NotFinite) as error:
        return _told(error)


def train(config: configs.Experiment) -> int:
    """Runs `config` to its last step, or to a signal; 0 where it ended in order.

    In a run of several processes an exception ends the process instead of leaving this function.
    """
    from experiments import processes

    configs.emulate(config.cpu_devices)
    with processes.joined(config, _told):
        return _run(config)


def _run(config: configs.Experiment) -> int:
    import jax

    from attnjax.tasks import loading
    from experiments import (
        checkpointing,
        dry_run,
        evaluation,
        learning,
        placement,
        preemption,
        run_directory,
    )
    from experiments import progress as progress_bars

    first = jax.process_index() == 0  # the one that speaks

    # ---- mesh and data ----
    mesh = placement.make_mesh(config)
    _, source = configs.make_task(config.task, "train")
    loader = loading.loader(
        source,
        batch_size=config.batch_size,
        seed=config.seed,
        rows=placement.rows(mesh, config.batch_size),
        num_workers=config.num_workers,
        transforms=configs.make_augmentations(config.augment),
    )
    batches = iter(loader)
    example = batches.peek()

    # ---- model and step ----
    description = learning.model_description(config, source)
    model = learning.make_model(description, parallel=placement.context_parallel(mesh, config))
    placed = placement.place(config, model, example, mesh)
    if config.dry_run:
        if first:
            dry_run.show(config, placed, example, mesh)
        return 0

    # ---- the run so far ----
    run = run_directory.RunDirectory(config.directory, config, model=description)
    fingerprint = {
        "config": configs.fingerprint(config),
        "data": loader.fingerprint(),
        "code": configs.code_version(),
        "jax": jax.__version__,
    }
    checkpointer = checkpointing.Checkpointer(
        run.path / "checkpoints",
        fingerprint=fingerprint,
        keep=config.keep,
        save_every=config.save_every,
        allow_changes=config.allow_changes,
    )
    with contextlib.ExitStack() as stack:
        stack.callback(run.close)
        stack.enter_context(checkpointer)
        preempted = stack.enter_context(preemption.Preemption())
        restored = checkpointer.restore_latest_valid(placed.target)
        if restored is None:
            state, step = placed.init(), 0
        else:
            state, step = restored.state, restored.step
            batches.set_state(restored.data_state)
            for bad, reason in restored.skipped if first else ():
                print(f"skipped the checkpoint of step {bad}: {reason}", file=sys.stderr)
            if first:
                print(f"resumed after step {step}")
        run.forget_after(step)
        progress = stack.enter_context(progress_bars.Progress(config, done=step, example=example))

        # ---- the loop ----
        while step < config.steps and not run.reached(config.target):
            batch = next(batches)
            state, metrics = placed.update(state, placed.put(batch))
            step += 1
            if not metrics["finite"]:
                raise NotFinite(
                    f"step {step}: loss {float(metrics['loss'])} and gradient norm "
                    f"{float(metrics['gradient_norm'])} must be finite; parameters were not "
                    f"updated; batch {loading.batch_hash(batch)}; last good checkpoint: "
                    f"{checkpointer.last_step if checkpointer.last_step >= 0 else 'none'}"
                )
            progress.advance(metrics)
            if step % config.log_every == 0 or step == config.steps:
                run.log(step, **progress.summary())
                checkpointer.check()
            if step % config.eval_every == 0 or step == config.steps:
                most = None if step == config.steps else config.eval_examples
                measured = evaluation.measure(config, placed, state["params"], most)
                run.log(step, **{f"test_{name}": value for name, value in measured.items()})
                progress.say(f"step {step}: test {evaluation.text(measured)}")
            last = step == config.steps or run.reached(config.target)
            stop = preempted.requested(step)
            if checkpointer.due(step) or stop or last:
                checkpointer.save(step, state, batches.get_state())
            if stop and not last:
                checkpointer.wait()
                progress.say(preempted.message(step))
                return 0
    if first:
        print(f"run directory: {run.path}")
    return 0


def _told(error: BaseException, who: str = "") -> int:
    """The exit status for `error`, which is said: in a line, or with its traceback."""
    if not isinstance(error, ValueError | NotFinite):
        traceback.print_exception(error)
        return 1
    print(f"attnjax train: {who}{error}", file=sys.stderr)
    return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(main())
