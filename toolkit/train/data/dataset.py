"""Load the data that the section ``dataset`` of a run file names. The trainer gets the prompts and
the other columns, and the report of the run gets the counts.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.base import did_you_mean
from toolkit.base.errors import ConfigError, ToolkitError
from toolkit.config import chat_format
from toolkit.config.data_facts import NO_DATA
from toolkit.train.data import data_checks, prompt_format
from toolkit.train.data.arrow_columns import as_dataset, table_from_rows
from toolkit.train.data.dataset_source import read_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import datasets
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

    from toolkit.config.run_config import DatasetSection, EnvironmentSection
    from toolkit.train.data.arrow_columns import Rows
    from toolkit.train.data.prompt_format import TemplateArguments
    from toolkit.train.rewards.environment_problems import Row


HELD_OUT_SEED_OFFSET = 1 << 31
"""The seed of an environment's held-out problems is its training seed plus this number."""


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """The facts about one split (training or held-out). ``digest`` is written to the run's
    manifest, the counts to the report. ``wrapped`` is true if the prompts were texts and each text
    was made a user message, because of dataset.chat.
    """

    source: str
    digest: str
    rows: int
    used: int
    chat: bool
    wrapped: bool
    empty: int
    duplicates: int
    truncated: int
    longest_tokens: int | None
    columns: tuple[str, ...]
    no_answer: int = 0
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the lines of the report on this split: first a summary, then warnings."""
        kind = "chats" if self.chat else "plain prompts"
        summary = f"{self.used} {kind} from {self.source}"
        if self.wrapped:
            summary += "; each text becomes a user message of the chat template (dataset.chat)"
        lines = [summary]
        if self.empty:
            lines.append(f"{self.empty} of {self.rows} rows have no prompt and were left out")
        if self.duplicates:
            lines.append(
                f"{self.duplicates} prompts are duplicates of earlier prompts and were kept"
            )
        if self.truncated:
            lines.append(
                f"{self.truncated} prompts were longer than grpo.max_prompt_length: their first "
                f"tokens were removed (the longest had {self.longest_tokens} tokens)"
            )
        return [*lines, *self.notes]


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """The reports on the training split and the held-out split."""

    train: SplitReport
    eval: SplitReport | None = None

    def to_json(self) -> dict[str, Any]:
        """Return this report as plain values for the run's manifest."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the lines of the report on both splits. Lines about the held-out split begin with
        "held out:".
        """
        held_out = [f"held out: {line}" for line in self.eval.lines()] if self.eval else []
        return [*self.train.lines(), *held_out]


@dataclass(frozen=True, kw_only=True)
class Data:
    """The splits of the dataset, and the report on them. ``train`` and ``eval`` have a column
    ``prompt`` (a text, or a list of messages) and, if dataset.answer is set, a column ``answer``.
    They also have the other columns of the source, which the trainer passes to the rewards.
    """

    train: datasets.Dataset
    eval: datasets.Dataset | None
    report: DataReport


def load_data(  # noqa: PLR0913 - what a run file says about its data
    section: DatasetSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int | None = None,
    count_all: bool = True,
    template: TemplateArguments = None,
    environment: EnvironmentSection | None = None,
    make_problems: Callable[..., list[Row]] | None = None,
) -> Data:
    """Read, check and prepare the training split and, if ``section`` has one, the held-out split.

    With an ``environment``, the function ``make_problems(seed=, size=, start=)`` creates the
    problems of both splits (see rewards/problems). Then only the keys ``system`` and ``chat`` of
    ``section`` are used.

    If a prompt has more than ``max_prompt_length`` tokens, its first tokens are removed. Special
    tokens and the tokens of the chat template are counted too. If ``count_all`` is False, the
    tokens of prompts that are certainly short enough are not counted. ``template`` is
    ``grpo.chat_template_kwargs``.

    Raises:
        ConfigError: the data or the run file is invalid.
        InputError: a file cannot be read.
        RetryError: the hub does not answer.
    """
    if environment is not None:
        assert make_problems is not None
        return _load_environment_data(
            section,
            environment,
            make_problems,
            TokenizeOptions(tokenizer, max_prompt_length, template, count_all),
        )
    if section.path is None:
        raise ConfigError(NO_DATA, where="dataset.path")
    options = TokenizeOptions(tokenizer, max_prompt_length, template, count_all)
    with _prefix_error_location("dataset.path"):
        source = (section.path, section.split, section.limit)
        train, train_report = _load_split(section, options, source)
    if section.eval_path is None and section.eval_split is None:
        return Data(train=train, eval=None, report=DataReport(train=train_report))
    held_out = (
        section.eval_path or section.path,
        section.eval_split or section.split,
        section.eval_limit,
    )
    with _prefix_error_location(
        "dataset.eval_path" if section.eval_path is not None else "dataset.eval_split"
    ):
        held_out_split, eval_report = _load_split(section, options, held_out)
    report = DataReport(train=train_report, eval=eval_report)
    return Data(train=train, eval=held_out_split, report=report)


def _load_environment_data(
    section: DatasetSection,
    environment: EnvironmentSection,
    make_problems: Callable[..., list[Row]],
    options: TokenizeOptions,
) -> Data:
    section = replace(section, prompt="prompt", answer="answer")

    def split(seed: int, size: int, start: int = 0) -> tuple[datasets.Dataset, SplitReport]:
        problems = make_problems(seed=seed, size=size, start=start)
        columns = section if "answer" in problems[0] else replace(section, answer=None)
        name = f"{environment.adapter}:{environment.task}"
        rows = table_from_rows(problems, lambda index: f"{name} problem {index}")
        digest = hashlib.sha256(json.dumps(problems, sort_keys=True).encode()).hexdigest()
        return _prepare_split(columns, options, name, (rows, f"sha256:{digest}"))

    train, train_report = split(environment.seed, environment.size)
    if environment.eval_size is None:
        return Data(train=train, eval=None, report=DataReport(train=train_report))
    if environment.adapter == "verifiers":  # held-out tasks follow the training tasks in one list
        held_out_split, eval_report = split(
            environment.seed, environment.eval_size, environment.size
        )
    else:
        # A seed far from the training seeds, because problem i of a task is made from seed + i.
        held_out = (environment.seed + HELD_OUT_SEED_OFFSET) % 2**32
        held_out_split, eval_report = split(held_out, environment.eval_size)
    return Data(
        train=train, eval=held_out_split, report=DataReport(train=train_report, eval=eval_report)
    )


@contextmanager
def _prefix_error_location(key: str) -> Iterator[None]:
    """If the ``with`` block raises a ToolkitError, put ``key`` before the location in the error.
    ``key`` is the key of the run file that names the data.
    """
    try:
        yield
    except ToolkitError as error:
        error.where = f"{key}: {error.where}" if error.where else key
        raise


class TokenizeOptions(NamedTuple):
    """What is needed to convert prompts to tokens: the tokenizer, the limit in tokens, and the
    arguments of the chat template. ``count_all`` says whether the tokens of short prompts are
    counted too.
    """

    tokenizer: Any
    max_prompt_length: int | None
    template: TemplateArguments
    count_all: bool


def _load_split(
    section: DatasetSection, options: TokenizeOptions, source: tuple[str, str, int | None]
) -> tuple[datasets.Dataset, SplitReport]:
    path, split, limit = source
    rows_and_digest = read_source(
        path, split=split, name=section.name, revision=section.revision, limit=limit
    )
    return _prepare_split(section, options, path, rows_and_digest)


def _prepare_split(
    section: DatasetSection, options: TokenizeOptions, path: str, rows_and_digest: tuple[Rows, str]
) -> tuple[datasets.Dataset, SplitReport]:
    rows, digest = rows_and_digest
    if not len(rows.table):
        raise ConfigError("the dataset is empty: it has no rows", where=path)
    for key in ("prompt", "answer"):
        _check_column(rows.table, path, key, getattr(section, key))
    values, prompt_notes = data_checks.parse_prompts(rows.table[section.prompt].to_pylist())
    is_chat = prompt_format.check_prompts(values, section.prompt, rows.location)
    kept_indices = [
        index for index, prompt in enumerate(values) if not prompt_format.is_empty(prompt)
    ]
    if not kept_indices:
        raise ConfigError(f"no row has a prompt in the column {section.prompt!r}", where=path)
    chat = chat_format.resolve_chat(
        section.chat,
        chat_format.is_usable_template(getattr(options.tokenizer, "chat_template", None)),
    )
    if is_chat and section.chat is False:
        raise ConfigError(
            chat_format.NOT_CHATS.format(column=repr(section.prompt)),
            where=path,
            fix=chat_format.NOT_CHATS_FIX,
        )
    prompts = [
        prompt_format.format_prompt(values[index], section.system, chat=bool(chat))
        for index in kept_indices
    ]
    prompts = data_checks.pretruncate_prompts(options.tokenizer, prompts, options.max_prompt_length)
    if isinstance(prompts[0], list):
        prompt_format.check_template(
            options.tokenizer, prompts[0], section.prompt, options.template
        )
    prompts, truncated, longest_tokens = _truncate_prompts(options, prompts)
    unknown_notes = prompt_format.unknown_tokens_note(options.tokenizer, prompts, options.template)
    table, column_notes, missing_answers = _build_table(rows, kept_indices, section, prompts, path)
    report = SplitReport(
        source=path,
        digest=digest,
        rows=len(values),
        used=len(prompts),
        chat=isinstance(prompts[0], list),
        wrapped=isinstance(prompts[0], list) and not is_chat,
        empty=len(values) - len(kept_indices),
        duplicates=len(prompts) - len({json.dumps(prompt, sort_keys=True) for prompt in prompts}),
        truncated=truncated,
        longest_tokens=longest_tokens,
        columns=tuple(table.column_names),
        no_answer=missing_answers,
        notes=(
            *prompt_notes,
            *unknown_notes,
            *data_checks.missing_answers_note(missing_answers, len(kept_indices)),
            *column_notes,
        ),
    )
    return as_dataset(table, "prompt" if isinstance(prompts[0], list) else None), report


def _check_column(table: pa.Table, path: str, key: str, name: str | None) -> None:
    if name is None or name in table.column_names:
        return
    similar = did_you_mean.similar_words(name, table.column_names, cutoff=0.6)
    raise ConfigError(
        f"dataset.{key} names the column {name!r}, which does not exist; the columns are "
        f"{', '.join(table.column_names)}",
        where=path,
        fix=f"set `dataset.{key}` to {similar[0]}"
        if similar
        else f"set `dataset.{key}` to one of these columns",
    )


def _truncate_prompts(
    options: TokenizeOptions, prompts: list[Any]
) -> tuple[list[Any], int, int | None]:
    """Shorten prompts that are longer than the limit.

    Returns three values:

    - the prompts, each with at most ``max_prompt_length`` tokens,
    - the number of prompts that were shortened,
    - the number of tokens of the longest prompt before it was shortened. None if the tokens were
      not counted.
    """
    tokenizer, limit, template, count_all = options
    if limit is None:
        return prompts, 0, None
    lengths = [
        prompt_format.count_tokens(tokenizer, prompt, template)
        if count_all or prompt_format.may_be_longer(prompt, limit)
        else 0
        for prompt in prompts
    ]
    truncated = [
        prompt_format.truncate_prompt(tokenizer, prompt, limit, template)
        if length > limit
        else prompt
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    return truncated, sum(length > limit for length in lengths), max(lengths) or None


def _build_table(
    rows: Rows, kept_indices: list[int], section: DatasetSection, prompts: list[Any], path: str
) -> tuple[pa.Table, list[str], int]:
    """Build the table for the trainer.

    Returns three values:

    - a table of the rows with the indices ``kept_indices``, with the columns ``prompt`` and
      ``answer``,
    - notes on columns that were left out,
    - the number of missing answers.
    """
    table = rows.table.take(kept_indices)
    new_columns: dict[str, Any] = {"prompt": prompts}
    missing_answers = 0
    if section.answer:
        answers, missing_answers = data_checks.clean_answers(
            table[section.answer], section.answer, path
        )
        new_columns["answer"] = answers
    notes = [
        (
            f"the column {name!r} is left out, because dataset.{name} is the column "
            f"{getattr(section, name)!r}"
        )
        for name in new_columns
        if name in table.column_names and getattr(section, name) != name
    ]
    used = [name for name in (section.prompt, section.answer) if name]
    left_out = data_checks.left_out_columns(table.column_names, used)
    notes += [f"the column {name!r} is left out: {why}" for name, why in left_out.items()]
    left_out |= data_checks.left_out_columns(table.column_names, ())
    table = table.drop_columns(
        [*left_out, *(name for name in new_columns if name in table.column_names)]
    )
    for name, values in new_columns.items():
        table = table.append_column(name, [values] if isinstance(values, list) else values)
    return table, notes, missing_answers
