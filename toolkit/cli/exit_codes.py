"""Turn an error into a message for the user and an exit code for the scheduler.

Every command runs inside ``report_errors``.
"""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from toolkit.base import disk_errors
from toolkit.base.abandoned_threads import exit_despite_abandoned_threads
from toolkit.base.errors import DefectError, InputError, ToolkitError
from toolkit.base.formatting import escape_unprintable
from toolkit.base.paths import tighten_umask
from toolkit.base.secrets import protect_output
from toolkit.base.streams import flush_output, open_missing_streams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

INTERRUPTED_EXIT_CODE = 130


@contextmanager
def report_errors(*, debug: bool = False) -> Iterator[None]:
    """If the block raises a ToolkitError, print its message to stderr and exit with the exit code
    of the error.

    For a known error of another library, print the explanation that base.symptoms has for it. Any
    other error is a defect of the toolkit: write a report, and exit with 70. With ``debug``, also
    print the traceback.
    """
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort, SystemExit):
        raise
    except ToolkitError as error:
        if error.exit_code == DefectError.exit_code:
            _exit_with_message(_report_defect(error), error.exit_code, debug=debug)
        _exit_with_message(f"error: {error}", error.exit_code, debug=debug)
    except Exception as error:  # noqa: BLE001 - a disk failure, a known upstream error, or a defect
        if (known := _explain_known_error(error)) is not None:
            _exit_with_message(f"error: {known}", known.exit_code, debug=debug)
        _exit_with_message(_report_defect(error), DefectError.exit_code, debug=debug)


@contextmanager
def exit_quietly() -> Iterator[None]:
    """If the block ends because of Ctrl-C, print "interrupted" and exit with 130. If the program
    that reads the output has ended (``envcheck probe | head``), exit with 0.

    Without this block, click would print "Aborted!" and exit with 1 in both cases.
    """
    try:
        yield
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED_EXIT_CODE)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


@contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """If the block raises an OSError, raise an InputError instead, which says that the file
    ``path`` cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot be written: {error.strerror}",
            where=str(path),
            fix="give the path of a file in an existing folder that you can write to",
        ) from None


def debug_requested() -> bool:
    """Whether to show tracebacks and the output of upstream libraries.

    This is the case with ``--debug`` before or after the name of the command, or with
    TOOLKIT_DEBUG=1.
    """
    return "--debug" in sys.argv or os.environ.get("TOOLKIT_DEBUG", "") == "1"


def _explain_known_error(error: Exception) -> ToolkitError | None:
    """Return a toolkit error that explains ``error``; None if there is no explanation. Three causes
    are known: a disk failure, a known error of another library, and a working folder that was
    removed.
    """
    if isinstance(error, FileNotFoundError) and not _working_folder_exists():
        return InputError(
            "the folder in which the command was started was removed",
            fix="change to an existing folder with `cd`, and start the command again",
        )
    from toolkit.base.symptoms.errors import explain_error  # noqa: PLC0415 - only for a failure

    return disk_errors.to_toolkit_error_without_path(error) or explain_error(
        error, "the command failed"
    )


def _working_folder_exists() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _report_defect(error: Exception) -> str:
    """Write a report about ``error``, which is a defect of the toolkit, and return the text to
    print.
    """
    from toolkit.base.defect import write_report  # noqa: PLC0415 - only for a defect

    message = error.message if isinstance(error, ToolkitError) else str(error)
    report_path = write_report(error)
    what = f"internal error: {type(error).__name__}: {message}\n  this is a defect of the toolkit"
    if report_path is None:
        return f"{what}\n  fix: run again with --debug and attach the output to an issue"
    return (
        f"{what}; the report is in {report_path}\n  fix: attach that file to an issue (it contains "
        "versions, the run file and the traceback, but no secrets)"
    )


def _exit_with_message(text: str, code: int, *, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    with suppress(OSError):  # If stderr is closed, only the exit code reports the failure.
        click.echo(
            escape_unprintable(text), err=True
        )  # the text may contain a name from an untrusted source
    sys.exit(code)


def command_main(group: click.Group) -> Callable[[], None]:
    """Return a function that runs the commands of ``group``. A console script calls this function.

    The returned function first ensures that no secret is printed and that other users cannot write
    to the created files. Then it runs the command. A usage error exits with 2, and
    ``report_errors`` handles all other errors.
    """

    def main() -> None:
        open_missing_streams()
        tighten_umask()
        protect_output()
        try:
            with report_errors(debug=debug_requested()):
                group(prog_name=group.name)
        except SystemExit as end:
            flush_output()
            exit_despite_abandoned_threads(end.code)
            raise
        finally:
            flush_output()

    return main
