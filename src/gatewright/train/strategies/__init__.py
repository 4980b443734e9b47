"""Strategies by which a run is spread over processes: one process, DDP, or FSDP2."""
