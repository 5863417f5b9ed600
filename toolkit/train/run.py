"""A whole run, top to bottom: resume, pre-flight, data, rewards, policy, training, report."""

from __future__ import annotations

import math
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from transformers import PrinterCallback, ProgressCallback

from toolkit.base.errors import ConfigError, DefectError, StoppedError, ToolkitError
from toolkit.config import chat_format, parallel
from toolkit.engine.mesh import mesh
from toolkit.policy.adapter_io import save_lora
from toolkit.policy.language_model import load_policy, policy_tokenizer
from toolkit.train.checkpointing import (
    branch,
    checkpoint,
    micro_batch_record,
    rollback,
    run_directory,
    trainer_state,
)
from toolkit.train.checkpointing.run_dir_watch import RunDirWatch
from toolkit.train.checkpointing.state_files import changed
from toolkit.train.checkpointing.stop_signals import Abandoned, StopSignals
from toolkit.train.data import chat_record
from toolkit.train.data.dataset import load_data
from toolkit.train.logging_setup import quiet
from toolkit.train.preflight import preflight
from toolkit.train.process_control import Peers, is_first_rank, is_gone, join, world_size
from toolkit.train.report.memory_peaks import measured
from toolkit.train.report.metrics_log import Journal, Recorder
from toolkit.train.report.progress import Progress
from toolkit.train.report.reward_watch import Watch
from toolkit.train.rewards import load_rewards
from toolkit.train.rollout.evaluate import evaluate, evaluates
from toolkit.train.rollout.sampler import find_engine
from toolkit.train.run_context import Options, RunContext, finish, introduce
from toolkit.train.step import step_errors
from toolkit.train.tracking import open_tracking
from toolkit.train.trainer import GRPOConfig, GRPOTrainer
from toolkit.train.trl_arguments import grpo_config, make_reproducible, require_packages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.run_config import RunConfig
    from toolkit.train.rollout.evaluate import Evaluation


class ProcessControl(NamedTuple):
    """What can end this process; ``run_dir_watch`` is None except on the first rank."""

    signals: StopSignals
    peers: Peers | None
    run_dir_watch: RunDirWatch | None = None


def run(config: RunConfig, options: Options | None = None) -> Path:
    """Train ``config`` and return its run folder.

    Every rank of ``torchrun`` calls it; the first one writes.

    Raises:
        ToolkitError: with the exit code of what went wrong; StoppedError (75) after a signal.
    """
    options = options or Options()
    run_dir = Path(config.runtime.output_dir)
    signals = StopSignals(abandon=world_size() == 1)
    with quiet(debug=options.debug), signals.installed():
        try:
            peers = join(config.grpo.get("ddp_timeout"))
        except Abandoned as cut:
            signals.end()
            raise _stopped(config, str(cut), begun=False) from None
        try:
            _run(config, run_dir, options, ProcessControl(signals, peers))
        except Exception as error:
            if peers is None:
                raise
            signals.ignore()  # a launcher ends the others when the first has ended
            raise peers.ending(error) from error
    return run_dir


def _run(config: RunConfig, run_dir: Path, options: Options, control: ProcessControl) -> None:
    begun = list[bool]()
    try:
        with _watched_run_dir(run_dir) as run_dir_watch:
            _begin(config, run_dir, options, control._replace(run_dir_watch=run_dir_watch), begun)
    except Abandoned as cut:
        control.signals.end()
        raise _stopped(config, str(cut), begun=bool(begun)) from None
    except Exception as error:
        known = step_errors.translate(error, str(run_dir), config)
        if known is None or known is error or (control.peers is not None and is_gone(error)):
            raise
        raise known from error


@contextmanager
def _watched_run_dir(run_dir: Path) -> Iterator[RunDirWatch | None]:
    """The run folder, held by the first rank. What goes wrong because it is not in its place any
    more is told as that.
    """
    if not is_first_rank():
        yield None
        return
    with run_directory.lock_run_dir(run_dir), RunDirWatch(run_dir) as run_dir_watch:
        try:
            yield run_dir_watch
        except Exception as error:
            if run_dir_watch.in_place() or isinstance(error, ToolkitError):
                raise
            raise run_dir_watch.fault() from error


def _begin(
    config: RunConfig, run_dir: Path, options: Options, control: ProcessControl, begun: list[bool]
) -> None:
    found, passed = _checkpoint(config, run_dir, control.peers)
    if is_first_rank():
        for line in passed:
            options.out.write(f"passed over {line}\n")
    if found is not None:
        size = parallel.size_of(config.model.tensor_parallel_size)
        if config.model.tensor_parallel_size != "auto":  # else once it is settled
            checkpoint.refuse_other_world(found, parallel.replicas(world_size(), size), size)
    as_begun = chat_record.kept(micro_batch_record.kept(config, found), found)
    context = prepare(as_begun, run_dir, control.peers)
    config = chat_record.settled(micro_batch_record.settled(config, context.config), context.config)
    _refuse_changes(config, context, found)
    _train(context, config, found, options, control, begun)


def _checkpoint(
    config: RunConfig, run_dir: Path, peers: Peers | None
) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, the same one on every rank; see ``branch.choose``."""
    if peers is None:
        return branch.choose(run_dir, config.runtime.resume)
    # The first judges and tells: the others may look at a folder that it has begun to write to.
    mine = branch.choose(run_dir, config.runtime.resume) if peers.number == 0 else (None, [])
    told = peers.exchange("checkpoint", [None if mine[0] is None else str(mine[0]), mine[1]])
    found, passed = told[0]
    if found is not None and not Path(found).is_dir():
        raise ConfigError(
            "the checkpoint that the first process resumes from is not here",
            where=found,
            fix="name a runtime.output_dir that all nodes of the run share",
        )
    return None if found is None else Path(found), passed


def prepare(config: RunConfig, run_dir: Path, peers: Peers | None = None) -> RunContext:
    """Check the node, size, load data, rewards and policy; config.json and preflight.json are
    written.
    """
    require_packages(config)
    ready = preflight(config, world_size=world_size(), peers=peers)
    resolved = ready.config
    if config.runtime.reproducible:
        make_reproducible()
    if is_first_rank():
        ready.write(run_dir)
    tokenizer = policy_tokenizer(resolved)
    resolved = chat_format.resolve(resolved, chat_format.usable(tokenizer.chat_template))
    if is_first_rank():
        run_directory.write_config(run_dir, resolved)
    # What is wrong with data or rewards is found before the engine starts.
    data = load_data(
        resolved.dataset,
        tokenizer,
        max_prompt_length=resolved.grpo.get("max_prompt_length"),
        template=resolved.grpo.get("chat_template_kwargs"),
    )
    replicas = parallel.replicas(world_size(), resolved.model.tensor_parallel_size)
    micro_batch_record.refuse_too_few(resolved, len(data.train), replicas)
    rewards = load_rewards(resolved, run_dir, columns=data.train.column_names)
    model, tokenizer = load_policy(resolved, tokenizer)
    reports = {"train": data.report.train, "eval": data.report.eval}
    digests = {n: r.digest.removeprefix("sha256:") for n, r in reports.items() if r is not None}
    return RunContext(resolved, run_dir, ready, model, tokenizer, data, rewards, digests)


def _refuse_changes(config: RunConfig, context: RunContext, found: Path | None) -> None:
    """A checkpoint goes on with the run that it is of."""
    if found is None:
        return
    now = run_directory.fingerprint(config, context.digests)
    then = chat_record.recorded(checkpoint.read_state(found, "run", dict), found)
    if then[chat_record.KEY] is None:
        then[chat_record.KEY] = now[chat_record.KEY]
    then.pop(parallel.KEY, None)  # recorded before it became free to change
    differing = changed(now, then, config.runtime.allow_changed)
    if differing:
        named = ", ".join(f"{key} ({then.get(key)!r} -> {now.get(key)!r})" for key in differing[:3])
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ConfigError(
            f"changed since the checkpoint was written: {named}{more}",
            where=str(found),
            fix=f"put it back, or allow it: runtime.allow_changed: [{', '.join(differing)}],"
            " or begin another run with --output-dir",
        )


def build_trainer(context: RunContext, config: RunConfig) -> GRPOTrainer:
    """Our trainer on the parts of the run, with nothing of upstream's printing left in it."""
    arguments = grpo_config(
        context.config, context.run_dir, GRPOConfig, has_eval=context.data.eval is not None
    )
    arguments.padding_free = config.runtime.padding_free
    trainer = GRPOTrainer(
        model=context.model,
        reward_funcs=context.rewards.functions,
        args=arguments,
        train_dataset=context.data.train,
        eval_dataset=context.data.eval,
        processing_class=context.tokenizer,
    )
    for kind in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(kind)
    trainer.fingerprint = run_directory.fingerprint(config, context.digests)
    trainer.keep_last, trainer.keep_best = config.runtime.keep_last, config.runtime.keep_best
    tokens = context.config.runtime.pack_tokens
    trainer.pack_tokens = tokens if isinstance(tokens, int) else None
    trainer.max_bad_steps = config.runtime.max_bad_steps
    return trainer


def _train(
    context: RunContext,
    config: RunConfig,
    found: Path | None,
    options: Options,
    control: ProcessControl,
    begun: list[bool],
) -> None:
    signals, peers, run_dir_watch = control
    trainer = build_trainer(context, config)
    if is_first_rank():
        introduce(context, trainer.args.seed, found, options)
    before = _evaluate(context, options, adapter=False)
    if peers is not None:
        peers.exchange("ready")  # the first may have evaluated for longer than a collective waits
    trainer.signals, trainer.run_dir_watch = signals, run_dir_watch
    if found is not None:
        trainer_state.check(trainer, found)  # before anything is moved
    total = total_steps(trainer)
    with signals.at_steps(), measured(trainer, context.run_dir):
        try:
            if run_dir_watch is not None:
                _open_journal(trainer, context, found, options, run_dir_watch)
            begun.append(True)
            if found is not None and trainer_state.step_of(found) >= total:
                # It had ended, and transformers would add a step.
                trainer_state.load_policy(trainer, found)
            else:
                trainer.train(str(found) if found else None)
                _refuse_unfinished(trainer, total)
        except Abandoned:
            signals.end()
            trainer.save_last()
        finally:
            _close_logs(trainer, stopped=signals.received is not None)
    _refuse_lost(trainer, run_dir_watch, peers)
    # Ranks stop where they have agreed to: a signal after the last step finds the run at its end.
    if signals.received is not None and (peers is None or trainer.stopping):
        raise _stopped(config, signals.received, begun=True)
    _end(context, before, trainer, options, peers)


def _end(
    context: RunContext,
    before: Evaluation | None,
    trainer: GRPOTrainer,
    options: Options,
    peers: Peers | None,
) -> None:
    """What a run leaves, written by the first process, and the end of the others."""
    after = _evaluate(context, options, adapter=True)
    if is_first_rank():
        finish(context, before, after, options.out, base=trainer.base_check)
    elif shares_with_first():
        save_lora(context.model, context.run_dir / "adapter")  # its part; the first one writes
    if peers is not None:
        engine = find_engine(context.model)
        if engine is not None:
            engine.close()  # its groups are made out of the one that goes now
        peers.leave()  # not before the first has written: a launcher takes an end for the end


def _open_journal(
    trainer: GRPOTrainer,
    context: RunContext,
    found: Path | None,
    options: Options,
    run_dir_watch: RunDirWatch,
) -> None:
    """The branch and the logs of the run, as the checkpoint ``found`` knows them."""
    assert trainer.signals is not None
    trainer.signals.shield()  # a signal does not cut what is moved
    start = rollback.begin(context.run_dir, found)
    trainer.signals.unshield()
    for line in start.notes:
        options.out.write(f"{line}\n")
    trainer.branch = start.branch
    trainer.journal = run_dir_watch.journal = journal = Journal(context.run_dir, start.positions)
    every = context.config.grpo.get("logging_steps")
    total = total_steps(trainer)
    progress = Progress(options.out, total, every)
    keep = context.config.runtime.log_completions
    watch = Watch(context.run_dir, progress.keep)
    trainer.tracking = tracking = open_tracking(
        context.config,
        trainer,
        run_dir=context.run_dir,
        step=None if found is None else trainer_state.step_of(found),
        total=total,
        say=progress.keep,
    )
    trainer.add_callback(
        Recorder(trainer, journal, progress, completions=keep, watch=watch, tracking=tracking)
    )


def _close_logs(trainer: GRPOTrainer, *, stopped: bool) -> None:
    if trainer.tracking is not None:
        trainer.tracking.close(stopped=stopped)
    if trainer.journal is not None:
        trainer.journal.close()


def _refuse_unfinished(trainer: GRPOTrainer, total: int) -> None:
    """A run that ends without its steps is no success.

    Raises:
        DefectError: nothing is known that would have ended it.
    """
    done = int(trainer.state.global_step)
    if done >= total or trainer.stopping or trainer.lost:
        return
    raise DefectError(
        f"training ended at step {done} of {total}, and nothing had asked it to",
        where=str(trainer.run_dir),
        fix="start the same command again: it goes on from the last checkpoint; report it if it"
        " ends there again",
    )


def _refuse_lost(
    trainer: GRPOTrainer, run_dir_watch: RunDirWatch | None, peers: Peers | None
) -> None:
    """What is written from here on would not be found, or is in somebody else's folder.

    Raises:
        ConfigError: the run folder was removed, moved or replaced; the same one on every rank.
    """
    if not trainer.lost:
        if run_dir_watch is not None and not run_dir_watch.in_place():
            raise run_dir_watch.fault()
        return
    fault = None if run_dir_watch is None else run_dir_watch.fault()
    if peers is not None:  # whichever of them tells it
        mine = None if fault is None else [fault.message, fault.where, fault.fix]
        message, where, fix = peers.exchange("lost", mine)[0]
        fault = ConfigError(message, where=where, fix=fix)
    assert fault is not None
    raise fault


def _stopped(config: RunConfig, signal: str, *, begun: bool) -> StoppedError:
    """``begun``: the run had settled what it goes on from."""
    run_dir, asked = Path(config.runtime.output_dir), config.runtime.resume
    named = asked not in ("auto", "must", "never")
    fix = "start the same command again: it goes on from there"
    if named and not begun:
        saved = f"no step had ended since {asked}"
    else:
        steps = branch.own_steps(run_dir)
        saved = f"checkpoint-{steps[0]} is written" if steps else "no step had ended yet"
        if steps and (named or asked == "never"):
            fix = f"start it again with --resume auto: it goes on from there, not from {asked}"
    return StoppedError(f"stopped by {signal}; {saved}", where=str(run_dir), fix=fix)


def shares_with_first() -> bool:
    """True in a process that shares a model with the first one of the run."""
    shared = mesh()
    return shared is not None and shared.replica == 0


def total_steps(trainer: GRPOTrainer) -> int:
    """Optimizer steps of the whole run, as transformers 5.17 counts them: the micro-batches left
    over at the end of an epoch are a step too.
    """
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    batches = len(trainer.get_train_dataloader())
    an_epoch = max(1, math.ceil(batches / trainer.args.gradient_accumulation_steps))
    steps: int = math.ceil(an_epoch * trainer.args.num_train_epochs)
    return steps


def _evaluate(context: RunContext, options: Options, *, adapter: bool) -> Evaluation | None:
    if context.data.eval is None or not (is_first_rank() or shares_with_first()):
        return None
    if not evaluates(context.config, options.evaluate):
        return None
    return evaluate(
        context.model,
        context.tokenizer,
        context.data.eval,
        context.rewards,
        max_tokens=context.config.grpo.get("max_completion_length", 256),
        adapter=adapter,
        template=context.config.grpo.get("chat_template_kwargs"),
    )
