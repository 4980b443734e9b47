"""Processes: starting them, joining them, and noticing that one is gone."""
