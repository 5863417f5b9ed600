"""Feed the validator what nobody would write: it must give findings and an exit code, each time,
soon.

python tests/fuzz/fuzz_run_file.py [100000] [--seconds 3600] [--seed 0] [--workers 2]

Inputs are drawn by hypothesis: raw bytes, the fixtures with bytes changed, cut, repeated and
spliced, deep nesting, wide and huge values, bombs of aliases, byte-order marks and other
encodings, in all formats, with overrides. Each goes through the command in this process. A
traceback, more than 2 s for one input, or more than 300 MB for the process end the run with exit
code 1 and the input shrunk and printed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from toolkit.cli.findings import PRINTERS
from toolkit.cli.validate import validate

FIXTURES = Path(__file__).parents[1] / "fixtures"
SECONDS_EACH, MEGABYTES = 2.0, 300.0
CODES = {0, 1, 2, 5}
ROUND = 1000
SUFFIXES = (".yaml", ".json", ".toml", ".txt")

CORPUS = [
    path.read_bytes()
    for folder in ("valid", "invalid")
    for path in sorted((FIXTURES / folder).iterdir())
    if path.suffix in SUFFIXES
]
WORDS = [
    b"model", b"lora", b"grpo", b"reward", b"functions", b"dataset", b"runtime", b"extends",
    b"null", b".nan", b"~", b"&a", b"*a", b"<<", b"!!python/object:os.system", b"!x",
    b"---\n", b"...\n", b"%YAML 1.1\n", b"? ", b": ", b"- ", b"[", b"]", b"{", b"}", b"|\n",
    b">\n", b"'", b'"', b"\t", b"\r", b"\n", b"#", b"\\u0000", b"\xef\xbb\xbf", b"\xff",
    b"\xfe\xff", b"\x00", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"1e999", b"-0", b"0x",
    b"12:30:00", b"9" * 30, b"[[[[[[[[", b"a." * 50, b'"""', b"'''", b"= ", b"[[x]]\n",
    b"hf_abcdefghijklmnopqrstu", b"extends: .\n", b"../", b"\x1b[31m",
]  # fmt: skip

chunk = (
    st.binary(max_size=6)
    | st.sampled_from(WORDS)
    | st.integers(-(10**6), 10**6).map(lambda n: b"%d" % n)
)
change = st.tuples(st.floats(0, 1), st.floats(0, 0.2), chunk, st.integers(0, 3))


def mutated(base: bytes, changes: list[tuple[float, float, bytes, int]]) -> bytes:
    """``base`` with pieces replaced: each change names where, how much goes, and what comes,
    repeated.
    """
    for where, share, piece, times in changes:
        start = int(where * len(base))
        end = start + int(share * share * len(base))
        base = base[:start] + piece * times + base[end:]
    return base


def nested(unit: tuple[bytes, bytes], depth: int, core: bytes) -> bytes:
    """``core`` inside ``depth`` brackets or block indentations."""
    return unit[0] * depth + core + unit[1] * depth


def bomb(levels: int, width: int) -> bytes:
    """Aliases of aliases."""
    lines = [b"a0: &a0 [x, x]"]
    for level in range(1, levels):
        lines.append(
            b"a%d: &a%d [%s]" % (level, level, b", ".join([b"*a%d" % (level - 1)] * width))
        )
    return b"\n".join(lines)


BRACKETS = [
    (b"[", b"]"),
    (b"{a: ", b"}"),
    (b'{"a": ', b"}"),
    (b"- ", b""),
    (b"? ", b""),
    (b"a.", b" = 1"),
    (b"a = [", b"]"),
    (b"(", b")"),
]
INPUT = (
    st.binary(max_size=120)
    | st.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.tuples(st.sampled_from(CORPUS), st.lists(change, max_size=5)).map(
        lambda pair: mutated(*pair)
    )
    | st.tuples(
        st.sampled_from(CORPUS),
        st.sampled_from(["utf-16", "utf-32", "utf-16-be", "latin-1", "utf-8-sig", "cp037"]),
    ).map(lambda pair: pair[0].decode("latin-1").encode(pair[1], "replace"))
    | st.lists(st.sampled_from(WORDS), max_size=40).map(b"".join)
    | st.builds(nested, st.sampled_from(BRACKETS), st.integers(0, 3000), st.sampled_from(WORDS))
    | st.builds(bomb, st.integers(1, 40), st.integers(1, 40))
    | st.tuples(st.sampled_from(WORDS), st.integers(0, 20_000)).map(
        lambda pair: b"model: " + pair[0] * pair[1]
    )
    | st.tuples(
        st.sampled_from([b"a%d: 1\n", b"- %d\n", b"[t%d]\n", b"{a%d: [1]}\n"]), st.integers(0, 3000)
    ).map(lambda pair: b"".join(pair[0] % number for number in range(pair[1])))
)
# Whether the text is rewritten too.
FIX = st.sampled_from([False, False, False, True])
OVERRIDE = st.sampled_from(
    [None] * 6
    + ["lora.r=8", "grpo.beta=[", "x", "reward.functions.0.weight=1", "model=1", "a.b.c=&x *x"]
)


def judge(path: Path, form: str, override: str | None, fix: bool = False) -> float:
    """One input through the command; the seconds of processor time that it took."""
    arguments = [str(path), "--format", form]
    if override is not None:
        arguments += ["--set", override]
    if fix:
        arguments.append("--fix")
    output = io.StringIO()
    start = time.process_time()
    code: object = None
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
            validate.main(arguments, prog_name="validate", standalone_mode=False)
    except SystemExit as end:
        code = end.code
    took = time.process_time() - start
    assert code in CODES, f"exit code {code}"
    assert output.getvalue() or form == "github", "an exit code and nothing said"
    assert took < SECONDS_EACH, f"{took:.1f} s for one input"
    return took


def attack(count: int, number: int) -> tuple[int, float, float]:
    """One round of ``count`` inputs, drawn from seed ``number``: (inputs, the longest's seconds,
    peak MB of the process).
    """
    with tempfile.TemporaryDirectory() as folder:
        files = {suffix: Path(folder) / f"run{suffix}" for suffix in SUFFIXES}
        done = {"inputs": 0, "longest": 0.0}
        _attack(files, count, number, done)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return int(done["inputs"]), done["longest"], peak


def _attack(files: dict[str, Path], count: int, number: int, done: dict[str, float]) -> None:

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(INPUT, st.sampled_from(SUFFIXES), st.sampled_from(list(PRINTERS)), OVERRIDE, FIX)
    def one(data: bytes, suffix: str, form: str, override: str | None, fix: bool) -> None:
        files[suffix].write_bytes(data)
        done["longest"] = max(done["longest"], judge(files[suffix], form, override, fix))
        done["inputs"] += 1

    one()


def main() -> int:
    """Draw, judge, tell."""
    parser = argparse.ArgumentParser(description="Fuzz the run file validator.")
    parser.add_argument("count", nargs="?", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop drawing after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    start = time.monotonic()
    # In rounds, so that the clock is looked at: hypothesis itself cannot be told to stop. A round
    # is drawn from its number, so that the inputs are the same with any number of workers.
    rounds = [
        (min(ROUND, asked.count - begin), asked.seed + begin)
        for begin in range(0, asked.count, ROUND)
    ]
    inputs, longest, peak = 0, 0.0, 0.0
    with multiprocessing.get_context("spawn").Pool(asked.workers) as pool:
        for found in pool.imap_unordered(_round, rounds):
            inputs, longest, peak = inputs + found[0], max(longest, found[1]), max(peak, found[2])
            if time.monotonic() - start > asked.seconds:
                break
    took = time.monotonic() - start
    print(
        f"{inputs} inputs in {took:.0f} s: no traceback, the longest took "
        f"{longest:.3f} s, peak {peak:.0f} MB"
    )
    return 0 if peak < MEGABYTES else 1


def _round(one: tuple[int, int]) -> tuple[int, float, float]:
    return attack(*one)


if __name__ == "__main__":
    sys.exit(main())
