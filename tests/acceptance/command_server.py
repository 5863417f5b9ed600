"""Run many ``toolkit`` commands in forks of one process that has imported the libraries.

``toolkit train`` imports torch, transformers and trl, which takes seconds. This script imports them
once and forks for each case. The child process calls the entry point of the installed console
script, with the arguments, folder, environment and output files of its case, and ends with the
command's exit code. Each line of standard input is a JSON list of cases. Each line of standard
output is the list of their exit codes. The script's arguments name further modules to import.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any


def main() -> None:
    from toolkit.train.logging_setup import prepare_environment

    prepare_environment()
    import toolkit.train.run  # noqa: F401 - the children share it
    from toolkit.engine.open_engine import prepare_environment as prepare_engine
    from toolkit.train import report  # noqa: F401

    if len(sys.argv) > 1:
        prepare_engine()
    for module in sys.argv[1:]:
        import_module(module)
    (script,) = entry_points(group="console_scripts", name="toolkit")
    command = script.load()
    gc.collect()
    gc.freeze()  # the children's garbage collection skips shared objects
    for line in sys.stdin:
        codes = []
        for case in json.loads(line):
            child = os.fork()
            if child == 0:
                signal.alarm(case.get("limit_s", 0))
                os._exit(_run(command, case))
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        print(json.dumps(codes), flush=True)


def _run(command: Any, case: dict[str, Any]) -> int:
    os.chdir(case["folder"])
    os.environ.update(case["env"])
    os.umask(case.get("umask", 0o022))
    for number, name in ((1, "stdout"), (2, "stderr")):
        handle = os.open(Path(case["folder"]) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, number)
    sys.argv = ["toolkit", *case["arguments"]]
    code = 0
    try:
        command()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return code


if __name__ == "__main__":
    main()
