"""Every command and every Python example of the documents, run as a newcomer would: ``make docs-check``."""
