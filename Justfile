# Every task of the project. The README's line brings `just` itself; everything else is installed by `setup`.

set shell := ["bash", "-euo", "pipefail", "-c"]

python := ".venv/bin/python"
export PATH := justfile_directory() / ".venv/bin:" + env("PATH")

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
    OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not slow and not image" {{ARGS}}

# The lines and branches that tests reach: `just coverage tests/unit/gpu`; without a path all of `just test`, in twice its time.
coverage *ARGS: setup
    rm -rf build/coverage
    mkdir -p build/coverage
    OMP_NUM_THREADS=1 coverage run -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q -m "not gpu and not slow and not image" {{ARGS}}
    coverage combine --quiet
    coverage report

# The tests that take minutes: fault injection, soak.
test-slow *ARGS: setup
    OMP_NUM_THREADS=1 pytest -m "slow and not image and not gpu" {{ARGS}}

# What needs a CUDA GPU.
test-gpu *ARGS:
    {{ if path_exists(".venv/bin/pytest") == "true" { ".venv/bin/pytest" } else { "python3 -m pytest" } }} -m gpu tests/gpu {{ARGS}}

# Format and lint: ruff, mypy --strict, import-linter, codespell.
lint: setup
    ruff check .
    ruff format --check .
    mypy
    lint-imports --no-logo
    codespell toolkit tests containers schemas *.md Justfile

# Rewrite what the formatters can.
format: setup
    ruff check --fix .
    ruff format .

# Make the grpo part of run.schema.json from the pinned TRL.
schemas: setup
    {{python}} schemas/generate.py

# Refresh uv.lock and locks/*.txt from pyproject.toml (public index only); `just lock --check` changes nothing.
lock *ARGS:
    python3 containers/cli.py lock {{ARGS}}

# Build an image: envcheck, train or train-cpu (--stand-in where no registry is reached).
image TARGET *ARGS: setup
    {{python}} containers/cli.py build {{TARGET}} {{ARGS}}

# Build a SIF for Apptainer: train-cpu (default), train or envcheck (--stand-in; --from-base).
sif *ARGS: setup
    {{python}} containers/cli.py sif {{ARGS}}

# Build the real images and run them as four users, read-only, without network; then the SIF. Minutes.
image-test *ARGS: setup
    {{python}} containers/cli.py test {{ARGS}}

# A CycloneDX bill of materials, with hashes, for each lock.
sbom *ARGS: setup
    {{python}} containers/cli.py sbom {{ARGS}}

# Known vulnerabilities in the locked packages.
audit *ARGS: setup
    {{python}} containers/cli.py audit {{ARGS}}

# Speed and memory beside their goals: the light commands, the demo, and validate beside check-jsonschema.
bench *ARGS: setup
    {{python}} tests/bench/bench_commands.py {{ARGS}}
    {{python}} tests/bench/bench_validate.py

# 100,000 hostile run files; 20,000 hostile data files, archives and adapters each; bounded in time.
fuzz COUNT="100000" OTHERS="20000": setup
    {{python}} tests/fuzz/fuzz_run_file.py {{COUNT}}
    {{python}} tests/fuzz/fuzz_data.py {{OTHERS}}
    {{python}} tests/fuzz/fuzz_archives.py {{OTHERS}}
    {{python}} tests/fuzz/fuzz_adapters.py {{OTHERS}}

# Predicted against measured memory on this machine's GPU; says "not measured" where there is none.
calibrate *ARGS:
    {{ if path_exists(".venv/bin/python") == "true" { ".venv/bin/python" } else { "python3" } }} tests/gpu/calibrate_matrix.py {{ARGS}}

# The documentation at http://127.0.0.1:8000, rebuilt when a page changes.
docs: setup
    NO_MKDOCS_2_WARNING=1 mkdocs serve

# Build the documentation into site/; a broken link or a missing page is an error.
docs-build: setup
    NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

# Make the pictures and outputs that the documentation shows again (needs Chromium; a minute).
docs-pictures: setup
    {{python}} docs/pictures.py

# What `.ci/run` does: ten minutes of tests, a quarter of an hour of images.
ci: lint docs-build test image-test
