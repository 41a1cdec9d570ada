"""The exponent of a power is the power; every point is one change of the base."""

from dataclasses import asdict

import pytest


@pytest.fixture
def scaling(monkeypatch):
    from pathlib import Path

    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import scaling

    return scaling


def test_an_exponent_is_the_slope_between_logarithms(scaling):
    assert scaling.exponent([1, 2, 4, 8], [3 * size**1.7 for size in (1, 2, 4, 8)]) == pytest.approx(1.7)
    assert scaling.exponent([1, 10], [5, 5]) == pytest.approx(0)


def test_points_change_one_thing_and_exponents_wait_for_all_of_an_axis(scaling):
    base = asdict(scaling.Point())
    changed = [[key for key, value in asdict(point).items() if value != base[key]] for point in scaling.points()]
    assert all(len(names) <= 1 for names in changed) and [] in changed
    rows = [{"point": asdict(point), "stages": {"gates": {"processor": point.width * point.layers**2}}} for point in scaling.points()]
    found = scaling.exponents([row for row in rows if row["point"]["tokens"] != 4096])
    assert "tokens" not in found and found["width"]["gates"]["processor"] == pytest.approx(1)
    assert found["layers"]["gates"]["processor"] == pytest.approx(2) and 1 < found["width"]["gates"]["operations"] < 2
    assert found["layers"]["gates"]["operations"] < 1
