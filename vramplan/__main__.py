"""``python -m vramplan``."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="vramplan")
