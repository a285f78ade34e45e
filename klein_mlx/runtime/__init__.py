"""One run in bounded memory: what is loaded, encoded, kept, recorded."""
