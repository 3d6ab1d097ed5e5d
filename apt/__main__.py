"""``python -m apt``."""

from apt.cli import main

if __name__ == "__main__":
    main()
