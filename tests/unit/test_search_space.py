"""Global index <-> pose against loops, and what makes no search space."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import SPACE
from ocelot_em import SearchSpace
from ocelot_em.errors import InvalidDataError, InvalidInputError


def numbered_tables(n_orientations, n_defocus, n_pixel):
    angles = np.arange(3 * n_orientations, dtype=np.float32).reshape(n_orientations, 3)
    return angles, 1000 + np.arange(n_defocus, dtype=np.float32), np.arange(n_pixel) / 8


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_indices_count_orientations_then_defoci_then_pixel_sizes(
    n_orientations, n_defocus, n_pixel
):
    angles, defoci, pixels = numbered_tables(n_orientations, n_defocus, n_pixel)
    space = SearchSpace.from_tables(angles, defoci, pixels)
    naive = [
        (*angles[orientation], defocus, pixel)
        for pixel in pixels
        for defocus in defoci
        for orientation in range(n_orientations)
    ]
    decoded = space.decode(np.arange(space.n_poses, dtype=np.int32))
    assert np.array_equal(np.stack(decoded, axis=1), naive)
    assert all(values.dtype == np.float32 for values in decoded)


def test_not_searched_decodes_to_nan_and_never_to_the_last_orientation():
    index = np.array([[-1, 0], [SPACE.n_poses - 1, -1]], np.int32)
    for values in SPACE.decode(index):
        assert np.isnan(values).tolist() == [[True, False], [False, True]]


def test_an_index_beyond_the_search_space_is_not_decoded():
    with pytest.raises(InvalidDataError, match="expected -1 to"):
        SPACE.decode(np.array([SPACE.n_poses]))


@pytest.mark.parametrize(
    ("tables", "problem"),
    [
        ((np.zeros((4, 2)), [0.0], [0.0]), "euler_angles: expected shape (n, 3), got (4, 2)"),
        ((np.zeros(3), [0.0], [0.0]), "euler_angles: expected shape (n, 3), got (3,)"),
        ((np.zeros((1, 3)), [[0.0]], [0.0]), "defocus_values: expected shape (n,), got (1, 1)"),
        ((np.zeros((1, 3)), [], [0.0]), "defocus_values: expected at least one value"),
        ((np.zeros((1, 3)), [0.0], [np.nan]), "pixel_values: expected finite values"),
        ((np.full((1, 3), np.inf), [0.0], [0.0]), "euler_angles: expected finite values"),
        ((np.zeros((1, 3)), ["a"], [0.0]), "defocus_values: expected numbers"),
        ((np.zeros((2**16, 3)), np.zeros(2**15), [0.0]), "2147483648 poses"),
    ],
)
def test_tables_that_are_no_search_space_are_refused(tables, problem):
    with pytest.raises(InvalidInputError) as refusal:
        SearchSpace.from_tables(*tables)
    assert problem in str(refusal.value)


def test_all_problems_of_the_tables_come_in_one_message():
    with pytest.raises(InvalidInputError) as refusal:
        SearchSpace.from_tables(np.zeros((4, 2)), [], [np.nan])
    assert len(refusal.value.problems) == 3


def test_equal_tables_have_equal_digests_whatever_their_type():
    tables = SPACE.euler_angles, SPACE.defocus_values, SPACE.pixel_values
    same = SearchSpace.from_tables(*(np.asfortranarray(table, ">f8") for table in tables))
    assert same.digest == SPACE.digest


@pytest.mark.parametrize("changed", range(3))
def test_any_change_of_a_table_changes_the_digest(changed):
    tables = [SPACE.euler_angles.copy(), SPACE.defocus_values.copy(), SPACE.pixel_values.copy()]
    tables[changed].flat[-1] += 1
    assert SearchSpace.from_tables(*tables).digest != SPACE.digest


def test_the_digest_tells_shapes_apart():
    one = SearchSpace.from_tables(np.zeros((1, 3)), [0.0, 0.0], [0.0])
    other = SearchSpace.from_tables(np.zeros((1, 3)), [0.0], [0.0, 0.0])
    assert one.digest != other.digest
