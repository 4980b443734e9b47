"""DeepSpeed: its engine, and all that knows of it."""
