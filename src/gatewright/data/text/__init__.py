"""Text data sets, as bytes."""
