"""``just calibrate``: compare the memory that sizing predicts with the memory that a GPU uses, over
a matrix of real runs.

The checkpoints are random, with the benchmark's 1B and 8B Llama shapes. Each engine of ``ENGINES``
has its own process. It is opened at the utilization that sizing chooses for its largest run, and it
trains every run of its list for two steps. Completions are random and have the full length (no time
is spent decoding), so that a step has the shape that sizing assumes. The engine samples a few
tokens of as many sequences as it runs at once, so that a rollout has its real peak.

    python tests/gpu/calibrate_matrix.py [--out FOLDER] [--work FOLDER] [--only NAME] [--dry]

Results are appended to FOLDER/calibration.jsonl after every run, and runs that have a result are
not repeated. Without a GPU the table says "not measured". ``--dry`` runs a tiny matrix on the CPU
engine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolkit.base.formatting import GIB
from toolkit.sizing.calibrate import Row

HERE = Path(__file__).parent
ENGINE_LIMIT_S = 240


@dataclass(frozen=True)
class Run:
    """One training shape: adapter rank, total length in tokens, micro-batch, checkpointing, and the
    part of the length that is the prompt. With ``tokens``, a step has ``rows`` completions of one
    prompt, in packs of at most ``tokens`` tokens.
    """

    r: int
    length: int
    micro: int
    checkpointing: bool
    prompt: int = 64
    rows: int | None = None
    tokens: int | None = None

    @property
    def name(self) -> str:
        mode = "ckpt" if self.checkpointing else "plain"
        packs = "" if self.tokens is None else f" {self.rows} rows in packs of {self.tokens}"
        return f"r{self.r} len{self.length} micro{self.micro} {mode}{packs}"


@dataclass(frozen=True)
class EngineCase:
    """One engine: checkpoint shape, weights, largest rank and length, eager or with CUDA graphs,
    whether its KV cache sleeps while the trainer works, whether layers have fused kernels, and how
    many sequences it decodes at once.
    """

    name: str
    shape: str
    four_bit: bool
    max_lora_rank: int
    max_length: int
    eager: bool
    runs: tuple[Run, ...]
    sleep: bool = False
    fused: bool = True
    max_num_seqs: int = 8


ENGINES = (
    EngineCase(
        "1b-graphs",
        "llama-1b",
        False,
        64,
        4096,
        False,
        (
            Run(64, 4096, 8, True),
            Run(16, 1024, 8, False),
            Run(64, 1024, 1, True),
            Run(16, 4096, 1, False),
        ),
    ),
    EngineCase(
        "8b",
        "llama-8b",
        False,
        64,
        4096,
        True,
        (
            Run(64, 4096, 8, True),
            Run(16, 1024, 1, False),
            Run(64, 1024, 8, True),
            Run(16, 4096, 1, True),
        ),
    ),
    EngineCase(
        "1b-4bit",
        "llama-1b",
        True,
        16,
        1024,
        True,
        (Run(16, 1024, 8, False), Run(16, 1024, 8, True), Run(16, 1024, 1, True)),
    ),
    EngineCase(
        "8b-4bit",
        "llama-8b",
        True,
        64,
        4096,
        True,
        (Run(64, 4096, 8, True), Run(16, 1024, 8, True), Run(64, 1024, 1, False)),
    ),
    # Training steps of 67 and 33 GiB. While the KV cache is awake, it fills the card.
    EngineCase(
        "1b-sleep",
        "llama-1b",
        False,
        64,
        4096,
        True,
        (Run(64, 4096, 8, False), Run(16, 4096, 4, False)),
        sleep=True,
    ),
    # Packs that hold a prompt once for its completions, with whole groups and with split groups.
    EngineCase(
        "1b-packs",
        "llama-1b",
        False,
        64,
        1280,
        True,
        (
            Run(64, 1280, 1, False, 1024, 32, 9216),
            Run(64, 1280, 1, False, 1024, 32, 5120),
            Run(64, 1280, 1, True, 1024, 32, 9216),
        ),
    ),
    EngineCase(
        "8b-4bit-long",
        "llama-8b",
        True,
        32,
        18432,
        True,
        (
            Run(32, 18432, 1, True, 16384, 8, 32768),
            Run(32, 18432, 1, True, 16384, 8, 20480),
        ),
        sleep=True,
    ),
    # The model's own layers, without fused kernels.
    EngineCase(
        "1b-unfused",
        "llama-1b",
        False,
        64,
        1024,
        True,
        (Run(64, 1024, 8, False), Run(64, 1024, 8, True)),
        fused=False,
    ),
    # 256 sequences: the memory of CUDA graphs with LoRA, and of the sampler's logits.
    EngineCase(
        "8b-graphs-256",
        "llama-8b",
        False,
        64,
        1024,
        False,
        (Run(64, 1024, 8, True),),
        max_num_seqs=256,
    ),
    EngineCase(
        "8b-4bit-graphs-256",
        "llama-8b",
        True,
        64,
        1024,
        False,
        (Run(64, 1024, 8, True),),
        max_num_seqs=256,
    ),
)
DRY_RUN_ENGINES = (
    EngineCase(
        "tiny",
        "tiny",
        False,
        8,
        128,
        True,
        (Run(8, 128, 2, True), Run(8, 64, 2, False), Run(8, 128, 1, True, 64, 4, 200)),
    ),
)


def main() -> int:
    """Run the missing runs and print the table. Return 1 if a run failed or a peak is "OUTSIDE"."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/calibration"))
    parser.add_argument("--work", type=Path, help="where checkpoints are made (17 GiB)")
    parser.add_argument("--only", action="append", help="name of an engine; repeatable")
    parser.add_argument("--budget-s", type=float, default=480, help="start no engine after this")
    parser.add_argument("--dry", action="store_true", help="a tiny matrix on the CPU engine")
    options = parser.parse_args()
    cases = [
        case
        for case in (DRY_RUN_ENGINES if options.dry else ENGINES)
        if not options.only or case.name in options.only
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "calibration.jsonl"
    if options.dry or has_gpu():
        work = options.work or Path(tempfile.mkdtemp(prefix="calibrate-"))
        run_all(cases, results, work, budget_s=options.budget_s)
    rows = read_results(results)
    text = table(cases, rows)
    (options.out / "calibration.md").write_text(text)
    print(text)
    outside = [
        term for row in rows for term in row.get("terms", ()) if term["verdict"] == "OUTSIDE"
    ]
    return 1 if outside or any(row.get("failed") for row in rows) else 0


def has_gpu() -> bool:
    """Whether a GPU is visible to CUDA. NVML answers, so that this process creates no context."""
    from toolkit.gpu.devices import select_device
    from toolkit.gpu.snapshot import take_snapshot

    return select_device(take_snapshot()) is not None


def run_all(cases: list[EngineCase], results: Path, work: Path, *, budget_s: float) -> None:
    """Start one process per engine. The worker appends one line per run, so that a crash loses no
    results.
    """
    start = time.monotonic()
    for case in cases:
        rows = read_results(results)
        done = {(row["engine"], row["run"]) for row in rows if not row.get("failed")}
        missing = [run for run in case.runs if (case.name, run.name) not in done]
        if not missing or time.monotonic() - start > budget_s:
            continue
        request = {**asdict(case), "runs": [asdict(run) for run in missing]}
        worker = [sys.executable, str(HERE / "calibrate_worker.py")]
        command = [*worker, json.dumps(request), str(results), str(work)]
        print(f"[{time.monotonic() - start:5.0f} s] engine {case.name}", flush=True)
        try:
            returncode = subprocess.run(command, timeout=ENGINE_LIMIT_S, check=False).returncode
        except subprocess.TimeoutExpired:
            returncode = -1
        if returncode:
            reason = f"the process ended with {returncode}"
            append(results, {"engine": case.name, "run": "process", "failed": reason})
    print(f"[{time.monotonic() - start:5.0f} s] done", flush=True)


def append(results: Path, row: dict[str, Any]) -> None:
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_results(results: Path) -> list[dict[str, Any]]:
    """All complete lines; if a run was repeated, only its last line."""
    if not results.is_file():
        return []
    row_of_run: dict[tuple[str, str], dict[str, Any]] = {}
    for line in results.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        row_of_run[row["engine"], row["run"]] = row
    return list(row_of_run.values())


def table(cases: list[EngineCase], rows: list[dict[str, Any]]) -> str:
    """A Markdown table: one line per run and term, predicted and measured in GiB."""
    by_run = {(row["engine"], row["run"]): row for row in rows}
    device = next((row["device"] for row in rows if row.get("device")), None)
    lines = [f"Calibration on {device or 'no GPU: not measured'}", ""]
    lines += ["| engine | run | term | predicted, GiB | measured, GiB | off | |"]
    lines += ["| --- | --- | --- | ---: | ---: | ---: | --- |"]
    for case in cases:
        names = ["engine", *(run.name for run in case.runs)]
        names += ["process"] if (case.name, "process") in by_run else []
        for run in names:
            row = by_run.get((case.name, run))
            if row is None:
                lines.append(f"| {case.name} | {run} | | | not measured | | |")
            elif row.get("failed"):
                lines.append(f"| {case.name} | {run} | | | failed: {row['failed']} | | |")
            elif row.get("skipped"):
                lines.append(f"| {case.name} | {run} | | | {row['skipped']} | | |")
            else:
                lines += [term_line(case.name, run, term) for term in row["terms"]]
    return "\n".join(lines) + "\n"


def term_line(engine: str, run: str, term: dict[str, Any]) -> str:
    row = Row(term["term"], term["predicted"], term["measured"])
    measured = "not measured" if row.measured is None else f"{row.measured / GIB:.3f}"
    error = "" if row.relative_error is None else f"{row.relative_error:+.1%}"
    cells = [engine, run, row.term, f"{row.predicted / GIB:.3f}", measured, error, term["verdict"]]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
