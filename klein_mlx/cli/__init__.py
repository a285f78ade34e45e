"""The command `klein-mlx`: what is typed and printed."""
