"""The library's table of multiply-adds against the count by hand."""

import pytest
from hand_counts import HAND

import jaxopt_models as jom


@pytest.mark.parametrize("name", HAND)
def test_multiply_adds_are_those_counted_by_hand(name):
    build, args, macs = HAND[name]
    fn, params = build()
    table = jom.accelerate(fn).explain(params, *args)
    found = {}
    for row in table:
        if row["path"] and row["multiply-adds"]:
            found[row["path"]] = found.get(row["path"], 0) + row["multiply-adds"]
    assert found == macs
