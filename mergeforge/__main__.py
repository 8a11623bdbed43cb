"""python -m mergeforge, and the command `mergeforge`."""

from __future__ import annotations

import sys


def main() -> None:
    from mergeforge.cli import run_command

    sys.exit(run_command())


if __name__ == "__main__":
    main()
