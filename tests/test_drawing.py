"""The geometry of the drawings: values land where they should, and ticks are round numbers."""

from __future__ import annotations

from distill.drawing import Scale


def test_scales():
    linear, log = Scale(0, 10, 100, 0), Scale(1, 1000, 0, 300, log=True)
    assert (linear(0), linear(10), linear(25)) == (100, 0, 0)
    assert linear.ticks() == [0, 2, 4, 6, 8, 10]
    assert (log(10), log(1000)) == (100, 300) and log.ticks() == [1, 10, 100, 1000]
    assert Scale(3, 3, 0, 1)(3) == 0.5
