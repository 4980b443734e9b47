"""Measure everything, with a process per core, and write the page."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from tests.promises.measure import measure_all_of
from tests.promises.page import PAGE, render, versions
from tests.promises.places import PLACES


def main():
    rows = {}
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for place, row in zip(PLACES, pool.map(measure_all_of, PLACES), strict=True):
            rows[place] = row
            print(*place, row.too_large() or "measured", sep=": ", flush=True)
    PAGE.write_text(render(rows, versions()), encoding="utf-8")


if __name__ == "__main__":
    main()
