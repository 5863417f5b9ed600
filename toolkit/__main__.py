"""Make ``python -m toolkit`` and ``torchrun -m toolkit`` run the ``toolkit`` command."""

from toolkit.cli.train import main

if __name__ == "__main__":
    main()
