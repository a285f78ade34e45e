"""`python -m klein_convert SOURCE DESTINATION`, the same as `klein-mlx convert`."""

import sys
from collections.abc import Sequence

from klein_mlx.cli import main as cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return cli.main(["convert", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
