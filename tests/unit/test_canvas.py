"""Regions and tiles against brute force over pixels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ocelot_em.model.regions import Region, TileGrid

sizes = st.tuples(st.integers(1, 12), st.integers(1, 12))
grids = st.builds(TileGrid, sizes, sizes)


@st.composite
def regions(draw, low=-4, high=16):
    y0, y1 = sorted(draw(st.tuples(st.integers(low, high), st.integers(low, high))))
    x0, x1 = sorted(draw(st.tuples(st.integers(low, high), st.integers(low, high))))
    return Region(y0, y1, x0, x1)


def pixels(region):
    return {(y, x) for y in range(region.y0, region.y1) for x in range(region.x0, region.x1)}


@given(grids)
def test_cells_partition_the_map(grid):
    hits = np.zeros(grid.shape, int)
    for tile in grid:
        hits[tile.region.slices] += 1
    assert (hits == 1).all()


@given(grids)
def test_cells_are_numbered_row_by_row(grid):
    rows, columns = grid.counts
    places = [(tile.iy, tile.ix) for tile in grid]
    assert places == [(iy, ix) for iy in range(rows) for ix in range(columns)]
    assert [grid[n] for n in range(len(grid))] == [grid.at(iy, ix) for iy, ix in places]
    with pytest.raises(IndexError):
        grid[len(grid)]
    with pytest.raises(IndexError):
        grid[-1]


@given(grids)
def test_cells_have_the_cell_shape_except_at_the_lower_and_right_edge(grid):
    for tile in grid:
        for n, cell, end, size in zip(
            tile.region.shape,
            grid.cell,
            (tile.region.y1, tile.region.x1),
            grid.shape,
            strict=True,
        ):
            assert n == cell or (0 < n < cell and end == size)


@given(grids, regions())
def test_touching_cells_are_those_that_share_a_pixel(grid, region):
    brute = [tile for tile in grid if pixels(tile.region) & pixels(region)]
    assert list(grid.touching(region)) == brute


@given(grids, regions())
def test_an_aligned_region_is_a_union_of_whole_cells(grid, region):
    if not pixels(region):
        return
    covered = set().union(*(pixels(tile.region) for tile in grid.touching(region)))
    assert grid.is_aligned(region) == (covered == pixels(region))


@given(regions(), regions())
def test_intersection_is_that_of_the_pixels(a, b):
    both = a.intersect(b)
    assert pixels(both) == pixels(a) & pixels(b)
    assert both.size == len(pixels(both))


@given(regions(), regions())
def test_relative_regions_keep_their_shape_and_distance(region, origin):
    moved = region.relative_to(origin)
    assert moved.shape == region.shape
    assert (moved.y0 + origin.y0, moved.x0 + origin.x0) == (region.y0, region.x0)


def test_a_region_indexes_its_own_pixels():
    values = np.arange(30).reshape(5, 6)
    assert values[Region(1, 3, 2, 6).slices].tolist() == [[8, 9, 10, 11], [14, 15, 16, 17]]
    assert Region.whole((5, 6)).size == values.size
    assert str(Region(1, 3, 2, 6)) == "[1:3, 2:6]"
