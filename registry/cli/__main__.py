"""`python -m registry.cli` is the command `registry`."""

from registry.cli.main import main

if __name__ == "__main__":
    main()
