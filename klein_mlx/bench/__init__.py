"""Measuring, counting and predicting the cost of a picture."""
