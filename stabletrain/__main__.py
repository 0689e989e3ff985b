"""`python -m stabletrain` is the command `stabletrain`."""

from stabletrain.cli.main import main

if __name__ == "__main__":
    main()
