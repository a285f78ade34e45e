"""HTTP server: the studio page, the native API, OpenAI's and Stable Diffusion web UI's; MLX runs in a child process."""
