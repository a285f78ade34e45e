"""Pictures as files: reading, saving, masks, metadata."""
