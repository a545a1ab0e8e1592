"""``python -m polyadic``: the command line."""

from polyadic_cli.main import main

if __name__ == "__main__":
    main()
