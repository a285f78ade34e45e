"""The embedded checkpoint: klein.json and its weights, as package data."""
