"""Rules on the files of the model and of the data, if they are on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.did_you_mean import nearest
from toolkit.config.chat_format import (
    CHATS_WITHOUT_TEMPLATE,
    CHATS_WITHOUT_TEMPLATE_FIX,
    NO_TEMPLATE,
    NOT_CHATS,
)
from toolkit.config.data_facts import NO_DATA, DataFacts, read_data_facts
from toolkit.config.data_types import TYPE_MISMATCH_FIX
from toolkit.config.finding import Fix, Severity
from toolkit.config.model_facts import folder_fault, is_adapter
from toolkit.config.rules.violation import RuleViolation, rule
from toolkit.config.run_paths import is_path_only, path_exists, resolve_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run

_PATH_KEYS = ("path", "eval_path")


def _string_in_file(run: Run, key: str) -> str | None:
    node = run.node(key)
    return node.value if node is not None and isinstance(node.value, str) and node.value else None


@rule(
    "DATA001",
    "dataset.prompt dataset.answer dataset.path dataset.eval_path",
    example="dataset:\n  path: train.jsonl\n  prompt: qestion",
    fix="prompt: question",
)
def columns_exist(run: Run) -> Iterator[RuleViolation]:
    """dataset.prompt and dataset.answer are names of columns that the dataset has.

    The rule checks datasets that are on this machine: JSONL, JSON, CSV and Parquet files, and
    folders that save_to_disk wrote.
    """
    for path_key in _PATH_KEYS:
        data = read_data_facts(run.document, path_key)
        if data is None or data.columns is None:
            continue
        for key in ("prompt", "answer"):
            column = run.value(f"dataset.{key}")
            if column is None or column in data.columns:
                continue
            suggestion = nearest(column, data.columns)
            yield RuleViolation(
                f"dataset.{key}",
                f"{data.path.name} has no column {column}",
                notes=(f"its columns: {', '.join(map(str, data.columns[:20]))}",),
                fixes=(run.set_fix(f"dataset.{key}", suggestion),) if suggestion else (),
                related=(f"dataset.{path_key}",),
            )


@rule(
    "DATA002",
    "dataset.path dataset.eval_path dataset.prompt",
    example="dataset:\n  path: train.jsonl  # some rows have an empty prompt",
    fix="remove rows without a prompt, and rows that repeat a prompt",
    severity=Severity.WARNING,
)
def prompts_are_filled_and_unique(run: Run) -> Iterator[RuleViolation]:
    """No prompt is empty or repeated.

    Training skips rows with an empty prompt. A prompt that is in two rows is trained on twice as
    often as the others. In a large file only the first rows are checked.
    """
    for path_key in _PATH_KEYS:
        data = read_data_facts(run.document, path_key)
        if data is None or not (data.empty_prompts or data.repeated_prompts):
            continue
        counts = [
            f"{count} of {data.rows}{'' if data.is_complete else ' first'} rows {fault}"
            for count, fault in (
                (data.empty_prompts, "have no prompt"),
                (data.repeated_prompts, "repeat a prompt"),
            )
            if count
        ]
        yield RuleViolation(f"dataset.{path_key}", "; ".join(counts))


@rule(
    "DATA003",
    "dataset.path dataset.eval_path",
    example="dataset:\n  path: trian.jsonl",
    fix="path: train.jsonl",
    severity=Severity.WARNING,
)
def data_exists(run: Run) -> Iterator[RuleViolation]:
    """The dataset is on this machine and can be read.

    A missing file is a warning, because the run may be meant for another machine (with --strict it
    is an error). A file that exists but cannot be read is an error. Datasets of the hub are not
    looked up.
    """
    for path_key in _PATH_KEYS:
        key = f"dataset.{path_key}"
        name_or_path = _string_in_file(run, key)
        if name_or_path is None:
            continue
        node = run.node(key)
        assert node is not None
        path = resolve_path(name_or_path, node)
        data = read_data_facts(run.document, path_key)
        if data is not None and data.problem:
            yield RuleViolation(key, f"{path.name} {data.problem}", severity=Severity.ERROR)
        elif not path_exists(path):
            problem = (
                f"{path} does not exist"
                if is_path_only(name_or_path)
                else f"{name_or_path} is not on this machine"
            )
            yield RuleViolation(
                key,
                f"{problem}: its columns are not checked",
                unknown=not is_path_only(name_or_path),
            )


@rule(
    "DATA004",
    "dataset.split dataset.eval_split",
    example="dataset:\n  path: train.jsonl\n  split: test",
    fix="remove split, and set eval_path: test.jsonl",
)
def files_have_no_splits(run: Run) -> Iterator[RuleViolation]:
    """split and eval_split are only for hub datasets and folders that save_to_disk wrote.

    A single file has only one split, called train.
    """
    for path_key, key in (("path", "split"), ("eval_path", "eval_split")):
        data: DataFacts | None = read_data_facts(run.document, path_key)
        if data is None and path_key == "eval_path" and run.value("dataset.eval_path") is None:
            data = read_data_facts(run.document, "path")
        split = run.value(f"dataset.{key}")
        if data is None or data.path.is_dir() or split in (None, "train"):
            continue
        yield RuleViolation(
            f"dataset.{key}",
            f"{data.path.name} is a single file, which has only the split train and not {split}",
            fixes=(Fix(f"set dataset.eval_path to the evaluation file, and remove {key}"),),
        )


@rule(
    "DATA005",
    "grpo.eval_strategy dataset.eval_path dataset.eval_split",
    example="grpo:\n  eval_strategy: steps",
    fix="dataset: {eval_path: eval.jsonl}",
)
def evaluation_has_data(run: Run) -> Iterator[RuleViolation]:
    """eval_strategy needs dataset.eval_path or dataset.eval_split.

    Without one of these keys there is no data to evaluate on.
    """
    strategy = run.value("grpo.eval_strategy")
    if strategy == "no":
        return
    if run.value("dataset.eval_path") is None and run.value("dataset.eval_split") is None:
        yield RuleViolation(
            "grpo.eval_strategy",
            f"evaluation is on ({strategy}), but there is no data to evaluate on",
            notes=(f"{run.describe('dataset.eval_path')}; {run.describe('dataset.eval_split')}",),
            fixes=(run.set_fix("grpo.eval_strategy", "no"),),
        )


@rule(
    "DATA006",
    "dataset.chat model.model_name",
    example="dataset:\n  chat: true  # and a base model, whose tokenizer has no chat template",
    fix="chat: false",
)
def chats_need_a_template(run: Run) -> Iterator[RuleViolation]:
    """dataset.chat: true needs a tokenizer with a chat template.

    The template turns messages into the text format that the model was trained on. With chat: auto,
    text prompts become user messages if the tokenizer has a template, and stay plain text
    otherwise.
    """
    if run.value("dataset.chat") is not True or run.has_chat_template is not False:
        return
    yield RuleViolation(
        "dataset.chat",
        NO_TEMPLATE.format(model=run.value("model.model_name")),
        notes=(f"{run.describe('dataset.chat')}; {run.describe('model.model_name')}",),
        fixes=(
            run.set_fix("dataset.chat", False),
            Fix("use a model with a chat template (an instruct model)"),
        ),
        related=("model.model_name",),
    )


@rule(
    "DATA007",
    "dataset.system dataset.chat",
    example="dataset:\n  chat: false\n  system: Answer with a number only.",
    fix="chat: auto",
    severity=Severity.WARNING,
)
def system_prompt_needs_chat(run: Run) -> Iterator[RuleViolation]:
    """dataset.system, the system prompt, needs dataset.chat to be auto or true.

    With dataset.chat: false there are no messages, so the text of dataset.system is put before each
    prompt, followed by an empty line. A model without a chat template can use this format. A model
    with a chat template was not trained on it.
    """
    if run.value("dataset.chat") is not False or not run.value("dataset.system"):
        return
    if run.has_chat_template is False:
        return  # a model without a chat template reads only plain text
    yield RuleViolation(
        "dataset.system",
        "the system prompt is put before each prompt as plain text, because chat is false",
        notes=(run.describe("dataset.chat"),),
        fixes=(run.set_fix("dataset.chat", "auto"), Fix("remove dataset.system")),
        related=("dataset.chat",),
    )


@rule(
    "DATA008",
    "dataset.prompt dataset.chat dataset.path dataset.eval_path",
    example="dataset:\n  path: chats.jsonl  # the prompts are lists of messages\n  chat: false",
    fix="chat: auto",
)
def message_lists_need_chat(run: Run) -> Iterator[RuleViolation]:
    """Prompts that are lists of messages need dataset.chat to be auto or true, and a chat template.

    Messages have roles, and only a template can turn roles into text. The rule checks JSONL and
    JSON files that are on this machine.
    """
    for path_key in _PATH_KEYS:
        data = read_data_facts(run.document, path_key)
        if data is None or not data.has_message_lists:
            continue
        column = run.value("dataset.prompt")
        if run.value("dataset.chat") is False:
            yield RuleViolation(
                "dataset.chat",
                NOT_CHATS.format(column=column),
                notes=(f"read from {data.path.name}",),
                fixes=(
                    run.set_fix("dataset.chat", "auto"),
                    Fix("set dataset.prompt to a column of texts"),
                ),
                related=("dataset.prompt", f"dataset.{path_key}"),
            )
            return
        if run.has_chat_template is False:
            yield RuleViolation(
                f"dataset.{path_key}",
                CHATS_WITHOUT_TEMPLATE.format(column=column),
                notes=(run.describe("model.model_name"),),
                fixes=(Fix(CHATS_WITHOUT_TEMPLATE_FIX),),
                related=("dataset.prompt", "model.model_name"),
            )


@rule(
    "DATA009",
    "dataset.path",
    example="dataset:\n  path: null",
    fix="path: train.jsonl",
)
def dataset_is_set(run: Run) -> Iterator[RuleViolation]:
    """dataset.path is set, unless the run has an environment.

    The prompts of a run come from the dataset at dataset.path or from an environment.
    grpo.max_steps sets the length of the run, but does not replace a dataset.
    """
    if run.value("dataset.path") is None and run.node("environment") is None:
        yield RuleViolation(
            "dataset.path",
            NO_DATA,
            notes=(run.describe("dataset.path"),),
            fixes=(Fix("set dataset.path to a file (train.jsonl), a folder, or a hub id"),),
            related=("model.model_name",),
        )


@rule(
    "DATA040",
    "dataset.path dataset.eval_path dataset.prompt",
    example='dataset:\n  path: train.jsonl  # {"question": true}',
    fix="give every column one type, and make every prompt a text or a list of messages",
)
def rows_can_be_trained_on(run: Run) -> Iterator[RuleViolation]:
    """A column must have one type for all rows. A prompt must be a text or a list of messages.

    The rule checks the first rows of JSONL, JSON and CSV files on this machine, and the schema of
    Parquet files. Training checks every row.
    """
    for path_key in _PATH_KEYS:
        data = read_data_facts(run.document, path_key)
        if data is not None and data.refused_row is not None:
            yield RuleViolation(
                f"dataset.{path_key}",
                f"{data.path.name} {data.refused_row}",
                fixes=(
                    Fix(
                        TYPE_MISMATCH_FIX if "one column" in data.refused_row else "correct the row"
                    ),
                ),
                related=("dataset.prompt",),
            )


@rule(
    "MODEL001",
    "model.model_name",
    example="model:\n  model_name: ./chekpoint",
    fix="model_name: ./checkpoint",
    severity=Severity.WARNING,
)
def model_exists(run: Run) -> Iterator[RuleViolation]:
    """The model is on this machine.

    The model is a folder with config.json, or a snapshot in the hub cache. A missing model is a
    warning (with --strict an error), because lengths, attention heads and target modules cannot be
    checked without its files. A folder that contains a pipe, a device file or a loop of symbolic
    links is an error, because the model cannot be loaded.
    """
    name_or_path = _string_in_file(run, "model.model_name")
    if name_or_path is None:
        return
    node = run.node("model.model_name")
    assert node is not None
    path = resolve_path(name_or_path, node)
    if path_exists(path) and path.is_dir() and (fault := folder_fault(path)):
        yield RuleViolation(
            "model.model_name", f"{path} cannot be loaded: {fault}", severity=Severity.ERROR
        )
        return
    if run.model is not None or is_adapter(path):
        return  # MODEL003 reports an adapter
    if path_exists(path):
        problem = (
            "has no readable config.json" if path.is_dir() else "is not a folder with a checkpoint"
        )
        yield RuleViolation("model.model_name", f"{path} {problem}", severity=Severity.ERROR)
    else:
        is_path = is_path_only(name_or_path)
        problem = f"{path} does not exist" if is_path else f"{name_or_path} is not on this machine"
        yield RuleViolation(
            "model.model_name",
            f"{problem}. Lengths, attention heads and target modules are not checked, because the "
            "model is not available",
            unknown=not is_path,
        )
