# Every task of the project. The command in the README installs `just` itself. The recipe `setup` installs everything else.

set shell := ["bash", "-euo", "pipefail", "-c"]

python := ".venv/bin/python"
export PATH := justfile_directory() / ".venv/bin:" + env("PATH")

# List the recipes.
default:
    @just --list

# Install the locked CPU environment and the tools into .venv, if they are not installed.
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
    # Install torch after the lock, which has all requirements of torch. The build on the public index also installs its CUDA libraries.
    pip install -r locks/cpu-torch.txt
    pip install --no-deps -e .
    echo "$want" > .venv/setup-stamp
    echo "setup: done"

# Make a small model and its data, then check, size, validate, train and evaluate.
demo *ARGS: setup
    toolkit demo {{ARGS}}

# Run the tests that a change must pass (under ten minutes on two cores).
test *ARGS: setup
    OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not slow and not thorough and not image" {{ARGS}}

# Run the whole runs that `just test` leaves out: signals, broken inputs, several processes, the demo (five minutes on two cores).
test-thorough *ARGS: setup
    OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile --no-loadscope-reorder -m "thorough and not slow" {{ARGS}}

# Print the lines and branches that tests reach, for a path (`just coverage tests/unit/gpu`) or for all of `just test`. Takes twice the time of the tests.
coverage *ARGS: setup
    rm -rf build/coverage
    mkdir -p build/coverage
    OMP_NUM_THREADS=1 coverage run -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q -m "not gpu and not slow and not image" {{ARGS}}
    coverage combine --quiet
    coverage report

# Run the tests that take minutes: fault injection and soak.
test-slow *ARGS: setup
    OMP_NUM_THREADS=1 pytest -m "slow and not image and not gpu" {{ARGS}}

# Run the tests that need a CUDA GPU.
test-gpu *ARGS:
    {{ if path_exists(".venv/bin/pytest") == "true" { ".venv/bin/pytest" } else { "python3 -m pytest" } }} -m gpu tests/gpu {{ARGS}}

# Format and lint: ruff, mypy --strict, import-linter, codespell.
lint: setup
    ruff check .
    ruff format --check .
    mypy
    lint-imports --no-logo
    codespell toolkit tests containers schemas *.md Justfile

# Format the code, and apply ruff's automatic fixes.
format: setup
    ruff check --fix .
    ruff format .

# Generate the grpo part of run.schema.json from the pinned TRL.
schemas: setup
    {{python}} schemas/generate.py

# Refresh uv.lock and locks/*.txt from pyproject.toml (public index only); `just lock --check` changes nothing.
lock *ARGS:
    python3 containers/cli.py lock {{ARGS}}

# Build an image: envcheck, train or train-cpu (--stand-in if no container registry is available).
image TARGET *ARGS: setup
    {{python}} containers/cli.py build {{TARGET}} {{ARGS}}

# Build a SIF for Apptainer: train-cpu (default), train or envcheck (--stand-in; --from-base).
sif *ARGS: setup
    {{python}} containers/cli.py sif {{ARGS}}

# Build the real images and the SIF, and run them as four users, read-only, without network (takes minutes).
image-test *ARGS: setup
    {{python}} containers/cli.py test {{ARGS}}

# Write a CycloneDX bill of materials, with hashes, for each image.
sbom *ARGS: setup
    {{python}} containers/cli.py sbom {{ARGS}}

# List known vulnerabilities in the locked packages.
audit *ARGS: setup
    {{python}} containers/cli.py audit {{ARGS}}

# Compare speed and memory of the light commands and the demo with their goals, and the speed of validate with check-jsonschema.
bench *ARGS: setup
    {{python}} tests/bench/bench_commands.py {{ARGS}}
    {{python}} tests/bench/bench_validate.py

# Pass 100,000 hostile run files, and 20,000 data files, archives and adapters each, to the readers, with a time limit for each.
fuzz COUNT="100000" OTHERS="20000": setup
    {{python}} tests/fuzz/fuzz_run_file.py {{COUNT}}
    {{python}} tests/fuzz/fuzz_data.py {{OTHERS}}
    {{python}} tests/fuzz/fuzz_archives.py {{OTHERS}}
    {{python}} tests/fuzz/fuzz_adapters.py {{OTHERS}}

# Compare predicted and measured memory on this machine's GPU. Prints "not measured" if there is no GPU.
calibrate *ARGS:
    {{ if path_exists(".venv/bin/python") == "true" { ".venv/bin/python" } else { "python3" } }} tests/gpu/calibrate_matrix.py {{ARGS}}

# Serve the documentation at http://127.0.0.1:8000, and rebuild it when a page changes.
docs: setup
    NO_MKDOCS_2_WARNING=1 mkdocs serve

# Build the documentation into site/. A broken link or a missing page is an error.
docs-build: setup
    NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

# Remake the pictures and outputs that the documentation shows (needs Chromium, takes a minute).
docs-pictures: setup
    {{python}} docs/pictures.py

# Run everything that `.ci/run` runs (ten minutes of tests, a quarter of an hour of images).
ci: lint docs-build test test-thorough image-test
