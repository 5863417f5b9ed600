# Every task of the project. The README's line brings `just` itself; everything else is installed by `setup`.

set shell := ["bash", "-euo", "pipefail", "-c"]

python := ".venv/bin/python"
export PATH := justfile_directory() / ".venv/bin:" + env("PATH")
# The public index alone decides the locks, whatever this machine's uv is told elsewhere.
uv := "env -u UV_INDEX_URL -u UV_DEFAULT_INDEX -u UV_EXTRA_INDEX_URL -u UV_INDEX -u UV_FIND_LINKS XDG_CONFIG_DIRS=/nonexistent XDG_CONFIG_HOME=/nonexistent uv"

# List the recipes.
default:
    @just --list

# Install the locked CPU environment and the tools into .venv; does nothing when they are there.
setup:
    #!/usr/bin/env bash
    set -euo pipefail
    [ -x .venv/bin/python ] || python3 -m venv .venv
    want="$(cat pyproject.toml locks/cpu.txt locks/dev.txt | sha256sum | cut -d' ' -f1) $({{python}} -V) $PWD"
    if [ "$(cat .venv/setup-stamp 2>/dev/null || true)" = "$want" ]; then exit 0; fi
    echo "setup: installing the locked CPU environment into .venv (once; some minutes)"
    rm -f .venv/setup-stamp
    pip() { {{python}} -m pip --disable-pip-version-check -q "$@"; }
    pip install --no-deps --require-hashes -r locks/cpu.txt
    pip install --no-deps --require-hashes -r locks/dev.txt
    # After the lock, which holds what torch asks for: on the public index this brings the CUDA libraries of that build as well.
    pip install -r locks/cpu-torch.txt
    pip install --no-deps -e .
    echo "$want" > .venv/setup-stamp
    echo "setup: done"

# The main job: make a small model and its data, check, size, validate, train, evaluate.
demo *ARGS: setup
    toolkit demo {{ARGS}}

# The tests that a change must pass (under ten minutes on two cores).
test *ARGS: setup
    pytest -n 2 --dist loadfile -m "not gpu and not slow and not image" {{ARGS}}

# The tests that take minutes: fault injection, soak.
test-slow *ARGS: setup
    pytest -m "slow and not image and not gpu" {{ARGS}}

# What needs a CUDA GPU.
test-gpu *ARGS:
    {{ if path_exists(".venv/bin/pytest") == "true" { ".venv/bin/pytest" } else { "python3 -m pytest" } }} -m gpu tests/gpu {{ARGS}}

# Format and lint: ruff, mypy --strict, import-linter, codespell.
lint: setup
    ruff check .
    ruff format --check .
    mypy
    lint-imports --no-logo 2>/dev/null || lint-imports
    codespell toolkit tests containers schemas *.md Justfile

# Rewrite what the formatters can.
format: setup
    ruff check --fix .
    ruff format .

# Make the grpo part of run.schema.json from the pinned TRL.
schemas: setup
    {{python}} schemas/generate.py

# What `.ci/run` does.
ci: lint test
