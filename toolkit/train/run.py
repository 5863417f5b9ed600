"""The steps of a whole run: resume, pre-flight, data, rewards, policy, training, report."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PrinterCallback, ProgressCallback

from toolkit.base.errors import ConfigError, ToolkitError, first_line
from toolkit.config import chat_format, parallel
from toolkit.config.resolved import resolve_run
from toolkit.engine.mesh import current_mesh
from toolkit.policy.adapter_io import save_lora
from toolkit.policy.language_model import load_policy, load_policy_tokenizer
from toolkit.policy.machine_facts import detect_machine
from toolkit.train.checkpointing import (
    branch,
    checkpoint,
    micro_batch_record,
    output_paths,
    rollback,
    run_directory,
    trainer_state,
)
from toolkit.train.checkpointing.run_dir_watch import RunDirWatch
from toolkit.train.checkpointing.state_files import changed_keys
from toolkit.train.checkpointing.stop_signals import StepAbandoned, StopSignals
from toolkit.train.data import chat_record
from toolkit.train.logging_setup import upstream_silenced
from toolkit.train.preflight import preflight
from toolkit.train.process_control import Peers, is_first_rank, is_peer_lost, join, world_size
from toolkit.train.report.memory_peaks import measure_memory_peaks
from toolkit.train.report.metrics_log import LOG_FILES, TOOL_LOG_FILES, Journal, Recorder
from toolkit.train.report.progress import Progress
from toolkit.train.report.reward_watch import RewardWatch
from toolkit.train.rollout.evaluate import evaluate, should_evaluate
from toolkit.train.rollout.sampler import find_engine
from toolkit.train.rollout.tool_log import ToolLog
from toolkit.train.run_context import Options, RunContext, print_run_description, write_results
from toolkit.train.run_end import refuse_lost_run_dir, refuse_unfinished, stopped_error, total_steps
from toolkit.train.step import step_errors
from toolkit.train.tracking import open_tracking
from toolkit.train.trainer import GRPOConfig, GRPOTrainer
from toolkit.train.trl_arguments import grpo_config, make_reproducible, require_packages
from toolkit.train.user_code import load_user_code

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.run_config import RunConfig
    from toolkit.train.preflight import Checker
    from toolkit.train.rollout.evaluate import Evaluation


class ProcessControl(NamedTuple):
    """What can end a run early: signals, other processes, and (on rank 0) a lost run folder."""

    signals: StopSignals
    peers: Peers | None
    run_dir_watch: RunDirWatch | None = None


def run(config: RunConfig, options: Options | None = None) -> Path:
    """Do the training run of the run file ``config``, and return the run folder.

    Every rank of ``torchrun`` calls this function, and only the first rank writes files.

    Raises:
        ToolkitError: the run failed. After a signal, the error is StoppedError (exit code 75).
    """
    options = options or Options()
    run_dir = Path(config.runtime.output_dir)
    signals = StopSignals(abandon=world_size() == 1)
    with upstream_silenced(debug=options.debug), signals.installed():
        try:
            peers = join(config.grpo.get("ddp_timeout"))
        except StepAbandoned as abandoned:
            signals.begin_shutdown()
            raise stopped_error(config, str(abandoned), begun=False) from None
        try:
            _run(config, run_dir, options, ProcessControl(signals, peers))
        except Exception as error:
            if peers is None:
                raise
            signals.ignore_signals()  # a launcher sends signals when the first process ends
            raise peers.exception_to_raise(error) from error
    return run_dir


def _run(config: RunConfig, run_dir: Path, options: Options, control: ProcessControl) -> None:
    begun = list[bool]()
    try:
        with _watched_run_dir(run_dir, config) as watch:
            _run_locked(config, run_dir, options, control._replace(run_dir_watch=watch), begun)
    except StepAbandoned as abandoned:
        control.signals.begin_shutdown()
        raise stopped_error(config, str(abandoned), begun=bool(begun)) from None
    except Exception as error:
        cause = step_errors.translate(error, str(run_dir), config)
        if cause is None or cause is error or (control.peers is not None and is_peer_lost(error)):
            raise
        raise cause from error


@contextmanager
def _watched_run_dir(run_dir: Path, config: RunConfig) -> Iterator[RunDirWatch | None]:
    """Keep the run folder locked during the ``with`` block. Only the first rank does this. If the
    block fails because the folder was moved or removed, raise an error with this reason.
    """
    if not is_first_rank():
        yield None
        return
    with run_directory.lock_run_dir(run_dir), RunDirWatch(run_dir) as run_dir_watch:
        output_paths.check_output_paths(run_dir, config)
        try:
            yield run_dir_watch
        except Exception as error:
            if run_dir_watch.is_in_place() or isinstance(error, ToolkitError):
                raise
            raise run_dir_watch.change_error() from error


def _run_locked(
    config: RunConfig, run_dir: Path, options: Options, control: ProcessControl, begun: list[bool]
) -> None:
    resumed, skipped = _choose_checkpoint(config, run_dir, control.peers)
    if is_first_rank():
        for line in skipped:
            options.out.write(f"skipped {line}\n")
    if resumed is not None:
        size = parallel.parallel_size(config.model.tensor_parallel_size)
        if config.model.tensor_parallel_size != "auto":  # else checked after sizing
            replicas = parallel.count_replicas(world_size(), size)
            checkpoint.check_replica_count(resumed, replicas, size)
    recorded = chat_record.with_recorded(micro_batch_record.with_recorded(config, resumed), resumed)
    context = prepare_run(recorded, run_dir, control.peers, options.check_rules)
    config = chat_record.config_to_record(
        micro_batch_record.config_to_record(config, context.config), context.config
    )
    _refuse_changes(config, context, resumed)
    _train(context, config, resumed, options, control, begun)


def _choose_checkpoint(
    config: RunConfig, run_dir: Path, peers: Peers | None
) -> tuple[Path | None, list[str]]:
    """Return (checkpoint to resume from or None, one line of text per skipped checkpoint)."""
    if peers is None:
        return branch.resume_point(run_dir, config.runtime.resume)
    # The first rank chooses for all, because it may already write to the folder when others read.
    own = branch.resume_point(run_dir, config.runtime.resume) if peers.rank == 0 else (None, [])
    by_rank = peers.exchange("checkpoint", [None if own[0] is None else str(own[0]), own[1]])
    chosen, skipped = by_rank[0]
    if chosen is not None and not Path(chosen).is_dir():
        raise ConfigError(
            "this process cannot find the checkpoint from which the first process resumes",
            where=chosen,
            fix="set runtime.output_dir to a folder that all nodes of the run share",
        )
    return None if chosen is None else Path(chosen), skipped


def prepare_run(
    config: RunConfig, run_dir: Path, peers: Peers | None = None, check_rules: Checker | None = None
) -> RunContext:
    """Check the node and the run file (``check_rules``), and size the run. Then load data, rewards
    and policy. The first rank also writes config.json and preflight.json.
    """
    require_packages(config)
    checked = preflight(config, world_size=world_size(), peers=peers, check_rules=check_rules)
    resolved = checked.config
    if config.runtime.reproducible:
        make_reproducible()
    if is_first_rank():
        checked.write(run_dir)
    tokenizer = load_policy_tokenizer(resolved)
    template = chat_format.is_usable_template(tokenizer.chat_template)
    resolved = resolve_run(resolved, detect_machine(), has_template=template).config
    if is_first_rank():
        run_directory.write_config(run_dir, resolved)
    # Errors in data, rewards and tools are found before the engine starts.
    user_code = load_user_code(resolved, tokenizer, run_dir)
    model, tokenizer = load_policy(resolved, tokenizer)
    return RunContext(
        resolved,
        run_dir,
        checked,
        model,
        tokenizer,
        user_code.data,
        user_code.rewards,
        user_code.digests(),
        user_code.tools,
        user_code.episodes,
    )


def _refuse_changes(config: RunConfig, context: RunContext, resumed: Path | None) -> None:
    """Reject a run file or data that changed after the checkpoint ``resumed`` was written."""
    if resumed is None:
        return
    new = run_directory.fingerprint(config, context.digests)
    old = chat_record.with_chat_key(checkpoint.read_state_value(resumed, "run", dict), resumed)
    if old[chat_record.CHAT_KEY] is None:
        old[chat_record.CHAT_KEY] = new[chat_record.CHAT_KEY]
    old.pop(parallel.TENSOR_PARALLEL_KEY, None)  # recorded by older checkpoints, but may change
    keys = changed_keys(new, old, config.runtime.allow_changed)
    if keys:
        changes = ", ".join(f"{key} ({old.get(key)!r} -> {new.get(key)!r})" for key in keys[:3])
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise ConfigError(
            f"the run file changed since the checkpoint was written: {changes}{more}",
            where=str(resumed),
            fix="restore the old value, set runtime.allow_changed to "
            f"[{', '.join(keys)}], or begin another run with --output-dir",
        )


def _make_trainer(context: RunContext, **arguments: Any) -> GRPOTrainer:
    """Build the trainer. Raises ConfigError if the chat template does not support tools."""
    if not (context.tools or context.episodes):
        return GRPOTrainer(**arguments)
    try:
        with warnings.catch_warnings():
            # TRL warns that its environment factory is experimental. tests/contract checks the
            # parts of the factory that the toolkit uses.
            warnings.filterwarnings("ignore", message=".*environment_factory")
            trainer = GRPOTrainer(
                **arguments, tools=context.tools, environment_factory=context.episodes
            )
        trainer.tool_log = ToolLog()
        return trainer
    except ValueError as error:
        if "template" not in str(error):
            raise
        raise ConfigError(
            first_line(error),
            where="tools",
            fix=chat_format.UNREADABLE_TOOL_CALLS_FIX,
        ) from error


def build_trainer(context: RunContext, config: RunConfig) -> GRPOTrainer:
    """Build the trainer from the parts of the run. Its callbacks print nothing."""
    arguments = grpo_config(
        context.config, context.run_dir, GRPOConfig, has_eval=context.data.eval is not None
    )
    arguments.padding_free = config.runtime.padding_free
    trainer = _make_trainer(
        context,
        model=context.model,
        reward_funcs=context.rewards.functions,
        args=arguments,
        train_dataset=context.data.train,
        eval_dataset=context.data.eval,
        processing_class=context.tokenizer,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.fingerprint = run_directory.fingerprint(config, context.digests)
    trainer.keep_last, trainer.keep_best = config.runtime.keep_last, config.runtime.keep_best
    pack_tokens = context.config.runtime.pack_tokens
    trainer.pack_tokens = pack_tokens if isinstance(pack_tokens, int) else None
    trainer.max_bad_steps = config.runtime.max_bad_steps
    return trainer


def _train(
    context: RunContext,
    config: RunConfig,
    resumed: Path | None,
    options: Options,
    control: ProcessControl,
    begun: list[bool],
) -> None:
    signals, peers, run_dir_watch = control
    trainer = build_trainer(context, config)
    if is_first_rank():
        print_run_description(context, trainer.args.seed, resumed, options)
    before = _evaluate(context, options, adapter=False)
    if peers is not None:
        peers.exchange("ready")  # the first rank may evaluate for longer than a collective waits
    trainer.signals, trainer.run_dir_watch = signals, run_dir_watch
    if resumed is not None:
        trainer_state.check_checkpoint(trainer, resumed)  # before ``_open_logs`` moves files
    total = total_steps(trainer)
    with signals.stop_at_step_end(), measure_memory_peaks(trainer, context.run_dir):
        try:
            if run_dir_watch is not None:
                _open_logs(trainer, context, resumed, options, run_dir_watch)
            begun.append(True)
            if resumed is not None and trainer_state.step_of(resumed) >= total:
                # The run is complete, and transformers would train one more step.
                trainer_state.load_adapter(trainer, resumed)
            else:
                trainer.train(str(resumed) if resumed else None)
                refuse_unfinished(trainer, total)
        except StepAbandoned:
            signals.begin_shutdown()
            trainer.save_last_snapshot()
        finally:
            _close_logs(trainer, stopped=signals.received is not None)
    refuse_lost_run_dir(trainer, run_dir_watch, peers)
    # Ranks stop only at a step on which they have agreed. So a signal after the last step does not
    # stop the run.
    if signals.received is not None and (peers is None or trainer.is_stopping):
        raise stopped_error(config, signals.received, begun=True)
    _finish_run(context, before, trainer, options, peers)


def _finish_run(
    context: RunContext,
    before: Evaluation | None,
    trainer: GRPOTrainer,
    options: Options,
    peers: Peers | None,
) -> None:
    """Finish a run: the first process writes the results, and all processes wait for each other."""
    after = _evaluate(context, options, adapter=True)
    if is_first_rank():
        write_results(context, before, after, options.out, base_check=trainer.base_check)
    elif is_in_first_replica():
        # Every process sends its part of the adapter to the first one, which writes the file.
        save_lora(context.model, context.run_dir / "adapter")
    if peers is not None:
        engine = find_engine(context.model)
        if engine is not None:
            engine.close()  # before ``leave_group`` destroys the process group that the engine uses
        peers.leave_group()  # wait, because a launcher stops all processes when one ends


def _open_logs(
    trainer: GRPOTrainer,
    context: RunContext,
    resumed: Path | None,
    options: Options,
    run_dir_watch: RunDirWatch,
) -> None:
    """Begin the branch of the run, and move the files of an abandoned branch away. Then open the
    log files and the trackers.
    """
    assert trainer.signals is not None
    trainer.signals.shield()  # a signal must not interrupt the moving of files
    bad_rewards_bytes = run_dir_watch.bad_rewards_bytes
    start = rollback.begin_branch(context.run_dir, resumed, bad_rewards_bytes=bad_rewards_bytes)
    trainer.signals.unshield()
    for line in start.notes:
        options.out.write(f"{line}\n")
    trainer.branch = start.branch
    trainer.journal = run_dir_watch.journal = journal = Journal(
        context.run_dir,
        start.log_positions,
        names=LOG_FILES if trainer.tool_log is None else (*LOG_FILES, *TOOL_LOG_FILES),
    )
    total = total_steps(trainer)
    progress = Progress(options.out, total, context.config.grpo.get("logging_steps"))
    enabled = context.config.runtime.log_completions
    watch = RewardWatch(context.run_dir, progress.print_line)
    trainer.tracking = tracking = open_tracking(
        context.config,
        trainer,
        run_dir=context.run_dir,
        step=None if resumed is None else trainer_state.step_of(resumed),
        total=total,
        print_line=progress.print_line,
    )
    trainer.add_callback(
        Recorder(trainer, journal, progress, completions=enabled, watch=watch, tracking=tracking)
    )


def _close_logs(trainer: GRPOTrainer, *, stopped: bool) -> None:
    if trainer.tracking is not None:
        trainer.tracking.close(stopped=stopped)
    if trainer.journal is not None:
        trainer.journal.close()


def is_in_first_replica() -> bool:
    """True if this process and the first one hold parts of one model (tensor parallelism)."""
    return (mesh := current_mesh()) is not None and mesh.replica == 0


def _evaluate(context: RunContext, options: Options, *, adapter: bool) -> Evaluation | None:
    if context.data.eval is None or not (is_first_rank() or is_in_first_replica()):
        return None
    if not should_evaluate(context.config, options.evaluate):
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
