"""Reading: what a file is, and every foreign layout as a Source; LoRA files."""
