"""Measure everything and write the page."""

from functools import partial

from tests.promises.measure import in_one_graph, measure
from tests.promises.page import PAGE, render, versions
from tests.promises.places import PLACES


def main():
    rows = {}
    for place in PLACES:
        rows[place] = measure(*place, partial(in_one_graph, *place))
        print(*place, rows[place].too_large() or "", sep=", ", flush=True)
    PAGE.write_text(render(rows, versions()), encoding="utf-8")


if __name__ == "__main__":
    main()
