"""Trackers, to which the numbers of a run go."""
