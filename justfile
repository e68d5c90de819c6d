# The verbs of this repository; `just ci` is what .ci/run does on a bare machine, without its set-up.

# Show the verbs.
default:
    @just --list

# Install everything into the current environment.
install:
    pip install -c constraints.txt -e ".[compare,test,docs]"

# Run the tests and every example in the docs.
test *options:
    pytest {{ options }}

# Check style and formatting.
lint:
    ruff check
    ruff format --check

# Repair what can be repaired.
format:
    ruff check --fix
    ruff format

# Check types.
types:
    mypy

# Build the documentation into site/; warnings are errors.
docs:
    python docs/make_pictures.py --check
    python docs/make_tables.py --check
    NO_MKDOCS_2_WARNING=1 mkdocs build --strict

# All of the above, as CI runs them.
ci: test lint types docs
