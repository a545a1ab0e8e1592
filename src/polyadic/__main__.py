"""``python -m polyadic``: the command line.

Python imports the package first, and torch with it; the script ``polyadic`` does not.
"""

from polyadic_cli.main import main

if __name__ == "__main__":
    main()
