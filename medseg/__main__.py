"""`python -m medseg` is `medseg` (torchrun needs a module)."""

from medseg.cli import main

if __name__ == "__main__":
    main()
