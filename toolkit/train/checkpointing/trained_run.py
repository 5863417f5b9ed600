"""Read a run folder: load its policy for generation, or export its adapter or merged weights."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from toolkit.base.errors import ConfigValueError, InputError, UnsupportedError
from toolkit.config import chat_format
from toolkit.config.build_config import build_config
from toolkit.config.document_loader import load_document
from toolkit.train.data.chat_record import run_used_chats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from toolkit.config.run_config import RunConfig

EngineName = Literal["transformers", "vllm"]


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run folder to read. ``config`` is the resolved config of the run. Either ``adapter`` (the
    folder of the finished adapter) or ``checkpoint`` (the folder of a checkpoint) is set.
    """

    folder: Path
    config: RunConfig
    adapter: Path | None
    checkpoint: Path | None


def open_run(
    folder: Path, *, step: int | None = None, trust_remote_code: bool = False
) -> FinishedRun:
    """Return the run in ``folder``. If ``step`` is set, its checkpoint ``checkpoint-<step>`` is
    used. Otherwise, the finished adapter is used, or the latest valid checkpoint if the run has not
    finished.

    The rules for run files are not checked again. They also check the run's data, which is not
    needed here. The folder may come from another person. Therefore code that comes with the model
    runs only if ``trust_remote_code`` is True.

    Raises:
        InputError: ``folder`` is not a run folder.
        UnsupportedError: the run trained every weight, so it has no adapter.
        ConfigValueError: the run has no checkpoint and no adapter, or its model needs
            ``trust_remote_code``.
    """
    from toolkit.train.checkpointing import branch, checkpoint  # noqa: PLC0415 - light start

    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            "the folder is not a run folder: config.json is missing",
            where=str(folder),
            fix="pass the output_dir of a run of `toolkit train`",
        )
    document = load_document(path)
    try:
        if not document.is_readable or not document.is_complete:
            raise ValueError(document.findings[0].message)
        config = build_config(document)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"is not the config of a run: {error}", where=str(path)) from error
    if config.model.full_finetuning:
        raise UnsupportedError(
            "the run trained every weight, so it has no adapter",
            where=str(folder),
            fix=f"load {folder / 'model'} as a model",
        )
    if config.model.trust_remote_code and not trust_remote_code:
        raise ConfigValueError(
            "this file sets model.trust_remote_code, so loading the model runs code that "
            f"comes with {config.model.model_name}",
            where=str(path),
            fix="read the code that comes with the model, then allow it with --trust-remote-code",
        )
    finished = folder / "adapter"
    if step is None and (finished / "adapter_config.json").is_file():
        return FinishedRun(folder, config, finished, None)
    checkpoint_dir = (
        checkpoint.path_of(folder, step)
        if step is not None
        else branch.latest_checkpoint(folder)[0]
    )
    if (
        checkpoint_dir is not None
        and checkpoint_dir.is_dir()
        and checkpoint.is_intact(checkpoint_dir)
    ):
        return FinishedRun(folder, config, None, checkpoint_dir)
    raise ConfigValueError(
        "has neither an intact checkpoint nor a finished adapter yet"
        if step is None
        else f"has no intact checkpoint-{step}",
        where=str(folder),
        fix="wait until the run has written a checkpoint, or select another checkpoint with "
        "--checkpoint",
    )


def load_run_policy(run: FinishedRun, *, engine: EngineName = "transformers") -> tuple[Any, Any]:
    """Return (model with the trained adapter, tokenizer). The model is in evaluation mode, ready
    for ``fast_generate``.

    Raises:
        The errors of ``policy.model_loading.load_model_and_tokenizer``.
    """
    from toolkit.policy.from_config import make_load_request  # noqa: PLC0415 - loads torch
    from toolkit.policy.language_model import FastLanguageModel, load_policy  # noqa: PLC0415
    from toolkit.policy.model_loading import load_model_and_tokenizer  # noqa: PLC0415

    config = with_engine(run.config, engine)
    if run.adapter is not None:
        model, tokenizer = load_model_and_tokenizer(make_load_request(config), run.adapter)
    else:
        assert run.checkpoint is not None
        model, tokenizer = load_policy(config)
        load_checkpoint_adapter(model, run.checkpoint)
    return FastLanguageModel.for_inference(model), tokenizer


def with_engine(config: RunConfig, engine: EngineName) -> RunConfig:
    """Return ``config`` for generation on ``engine``, without training. Gradient checkpointing is
    switched off. ``lora.adapter_path``, the adapter with which the run started, is removed.
    """
    return replace(
        config,
        runtime=replace(config.runtime, engine=engine),
        lora=replace(config.lora, use_gradient_checkpointing=False, adapter_path=None),
    )


def load_checkpoint_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Load the adapter of the training checkpoint in ``folder`` into ``model``, in place."""
    from toolkit.policy.adapter_io import read_tensors  # noqa: PLC0415 - loads torch
    from toolkit.train.checkpointing.state_files import copy_into_parameters, trainable_parameters  # noqa: PLC0415
    from toolkit.train.checkpointing.trainer_state import ADAPTER_FILE  # noqa: PLC0415

    copy_into_parameters(
        trainable_parameters(model), read_tensors(folder / ADAPTER_FILE), str(folder)
    )


def export_run(run: FinishedRun, target: Path, *, merge: bool = False, dtype: str = "auto") -> Path:
    """Write the run's adapter to ``target``, as a PEFT folder with the tokenizer. With ``merge``,
    write the base model with the adapter merged into it, which plain transformers can load. Return
    the path.

    Raises:
        ConfigValueError: ``target`` is not empty.
        InputError: ``target`` cannot be written.
    """
    from toolkit.policy.from_config import make_load_request  # noqa: PLC0415
    from toolkit.policy.merged_export import check_empty, merge_adapter, write_adapter  # noqa: PLC0415
    from toolkit.policy.model_files import find_checkpoint  # noqa: PLC0415 - loads torch
    from toolkit.policy.saved_adapter import read_adapter  # noqa: PLC0415

    check_empty(target)
    config = with_engine(run.config, "transformers")
    base = find_checkpoint(config.model.model_name, revision=config.model.revision)
    with tempfile.TemporaryDirectory() as scratch:
        folder = run.adapter
        if folder is None:
            model, _ = load_run_policy(run)
            folder = model.save_lora(Path(scratch) / "adapter")
        adapter = read_adapter(folder)
        if merge:
            return merge_adapter(base, adapter, make_load_request(config), target, dtype=dtype)
        return write_adapter(base, adapter, target)


def generate_completions(
    run: FinishedRun,
    prompts: list[str],
    *,
    chat: bool | None = None,
    base: bool = False,
    engine: EngineName = "transformers",
    **options: Any,
) -> list[list[str]]:
    """Return the completions of each prompt, as text. With ``base``, the base model generates the
    completions, without the adapter.

    If ``chat`` is True, each prompt becomes a user message after the run's system prompt, and the
    tokenizer's chat template renders these messages. If ``chat`` is False, each prompt stays a
    plain text, with the system prompt before it. If ``chat`` is None, the choice is the same as for
    the prompts of the run. ``options`` are those of ``fast_generate``.

    Raises:
        ConfigValueError: ``chat`` is true but there is no chat template, or a prompt is too long.
    """
    from toolkit.train.data.prompt_format import format_prompt, token_ids  # noqa: PLC0415 - loads torch

    model, tokenizer = load_run_policy(run, engine=engine)
    has_template = chat_format.is_usable_template(tokenizer.chat_template)
    if chat is None:
        chat = trained_on_chats(run, has_template=has_template)
    if chat and not has_template:
        raise ConfigValueError(
            "the tokenizer has no chat template", where=str(run.folder), fix="use --plain"
        )
    formatted = [format_prompt(prompt, run.config.dataset.system, chat=chat) for prompt in prompts]
    ids = token_ids(formatted, tokenizer, run.config.grpo.get("chat_template_kwargs"))
    try:
        adapter_option = {"lora_request": None} if base else {}
        answers = model.fast_generate(ids, **options, **adapter_option)
        return [[output.text for output in answer.outputs] for answer in answers]
    finally:
        if model.toolkit_engine is not None:
            model.toolkit_engine.close()


def trained_on_chats(run: FinishedRun, *, has_template: bool) -> bool:
    """Return True if the run's prompts were chats. config.json records this, unless an older
    version of this package wrote the file. Without this record, the first completion in the log
    decides. Without a log, the prompts count as chats if there is a chat template
    (``has_template``) and a system prompt.
    """
    recorded = run.config.dataset.chat
    if isinstance(recorded, bool):
        return recorded
    used_chats = run_used_chats(run.folder)
    return (
        (has_template and run.config.dataset.system is not None)
        if used_chats is None
        else used_chats
    )
