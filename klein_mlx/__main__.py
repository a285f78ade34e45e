"""`python -m klein_mlx`, the same as the command `klein-mlx`."""

import sys

from klein_mlx.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
