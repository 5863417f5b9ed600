"""Validate run files with arbitrary content: each time, the validator must print findings and give
an exit code, in time.

python tests/fuzz/fuzz_run_file.py [100000] [--seconds 3600] [--seed 0] [--workers 2]

hypothesis draws the inputs: raw bytes, fixtures with bytes that are changed, removed, repeated and
spliced, deep nesting, wide and huge values, aliases that expand to huge values, byte-order marks
and other encodings, in all formats, with overrides. The command runs for each input in this
process. A traceback, or more than 2 s for one input, ends the run with exit code 1, and the shrunk
input is printed. The exit code is also 1 if the process takes more than 300 MB.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

from fuzz_loop import MAX_SECONDS_PER_INPUT, Round, main, mutate, run_inputs
from hypothesis import strategies as st

from toolkit.cli.findings import PRINTERS
from toolkit.cli.validate import validate

FIXTURES = Path(__file__).parents[1] / "fixtures"
MEGABYTES = 300.0
CODES = {0, 1, 2, 5}
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


def nested(unit: tuple[bytes, bytes], depth: int, core: bytes) -> bytes:
    """``core`` inside ``depth`` brackets or block indentations."""
    return unit[0] * depth + core + unit[1] * depth


def alias_bomb(levels: int, width: int) -> bytes:
    """YAML aliases of aliases, whose value is exponentially larger than their text."""
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
        lambda pair: mutate(*pair)
    )
    | st.tuples(
        st.sampled_from(CORPUS),
        st.sampled_from(["utf-16", "utf-32", "utf-16-be", "latin-1", "utf-8-sig", "cp037"]),
    ).map(lambda pair: pair[0].decode("latin-1").encode(pair[1], "replace"))
    | st.lists(st.sampled_from(WORDS), max_size=40).map(b"".join)
    | st.builds(nested, st.sampled_from(BRACKETS), st.integers(0, 3000), st.sampled_from(WORDS))
    | st.builds(alias_bomb, st.integers(1, 40), st.integers(1, 40))
    | st.tuples(st.sampled_from(WORDS), st.integers(0, 20_000)).map(
        lambda pair: b"model: " + pair[0] * pair[1]
    )
    | st.tuples(
        st.sampled_from([b"a%d: 1\n", b"- %d\n", b"[t%d]\n", b"{a%d: [1]}\n"]), st.integers(0, 3000)
    ).map(lambda pair: b"".join(pair[0] % number for number in range(pair[1])))
)
# Whether the command also rewrites the file (--fix).
FIX = st.sampled_from([False, False, False, True])
OVERRIDE = st.sampled_from(
    [None] * 6
    + ["lora.r=8", "grpo.beta=[", "x", "reward.functions.0.weight=1", "model=1", "a.b.c=&x *x"]
)


def check_input(path: Path, form: str, override: str | None, fix: bool = False) -> float:
    """Run the command on one input, and return the processor time in seconds."""
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
    assert output.getvalue() or form == "github", "an exit code without output"
    assert took < MAX_SECONDS_PER_INPUT, f"{took:.1f} s for one input"
    return took


def run_round(one: tuple[int, int]) -> Round:
    """Check one round of inputs: ``one`` is (number of inputs, seed)."""
    with tempfile.TemporaryDirectory() as folder:
        files = {suffix: Path(folder) / f"run{suffix}" for suffix in SUFFIXES}

        def check_drawn_input(
            data: bytes, suffix: str, form: str, override: str | None, fix: bool
        ) -> float:
            files[suffix].write_bytes(data)
            return check_input(files[suffix], form, override, fix)

        drawn = (st.sampled_from(SUFFIXES), st.sampled_from(list(PRINTERS)), OVERRIDE, FIX)
        return run_inputs(check_drawn_input, *one, INPUT, *drawn)


if __name__ == "__main__":
    sys.exit(main(run_round, "Run files:", count=100_000, megabytes=MEGABYTES))
