"""What each combination of router, experts and dispatcher keeps to, measured; `docs/promises.md` is written from it.

python -m tests.promises    # measures everything and writes the page: a minute or two
"""
