"""The network: arrays and their configuration only; knows no files, pictures or prompts' sources."""
