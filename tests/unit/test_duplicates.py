"""Peaks of several exposures that are one particle."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from ocelot_em.errors import InvalidInputError
from ocelot_em.particles.duplicates import Peaks, Tolerances, join_duplicates
from ocelot_em.particles.symmetry import rotation_between


def peaks_of(*rows):
    columns = np.array(rows, np.float64).reshape(-1, 7).T
    return Peaks(
        columns[0].astype(int), columns[1].astype(int), columns[2].astype(int), *columns[3:]
    )


def joined(rows, order=None, **tolerances):
    peaks = peaks_of(*rows)
    order = np.arange(len(peaks)) if order is None else order
    return join_duplicates(peaks, order, Tolerances(**tolerances)).tolist()


A = (0, 10, 10, 20.0, 30.0, 40.0, 100.0)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ((1, 10, 10, 20.0, 30.0, 40.0, 100.0), True),
        ((1, 13, 13, 20.0, 30.0, 40.0, 100.0), True),
        ((1, 13, 14, 20.0, 30.0, 40.0, 100.0), False),  # exactly 5 pixels away
        ((0, 11, 10, 20.0, 30.0, 40.0, 100.0), False),  # the same exposure
        ((1, 10, 10, 20.0, 30.0, 49.9, 100.0), True),
        ((1, 10, 10, 20.0, 30.0, 50.2, 100.0), False),
        ((1, 10, 10, 380.0, 30.0, -320.0, 100.0), True),
        ((1, 10, 10, 20.0, 30.0, 40.0, 600.0), True),
        ((1, 10, 10, 20.0, 30.0, 40.0, 600.5), False),
        ((1, 10, 10, np.nan, 30.0, 40.0, 100.0), False),
    ],
)
def test_what_is_one_particle(other, same):
    assert joined([A, other]) == ([0, 0] if same else [0, 1])
    assert joined([A, other], [1, 0]) == ([1, 1] if same else [0, 1])


def test_a_pole_has_many_angles():
    """At theta = 0 only the sum of phi and psi matters."""
    one, other = (0, 0, 0, 10.0, 0.0, 50.0, 0.0), (1, 0, 0, 50.0, 0.0, 10.0, 0.0)
    assert joined([one, other], angle_degrees=0.001) == [0, 0]


def test_no_distance_joins_nothing_and_no_peaks_are_fine():
    assert joined([A, (1, *A[1:])], distance_px=0) == [0, 1]
    assert joined([]) == []


def test_a_particle_has_one_sighting_in_an_exposure():
    second, third = (1, *A[1:]), (1, 12, *A[2:])
    assert joined([A, second, third]) == [0, 0, 2]


def test_sightings_do_not_make_chains():
    """The one in the middle belongs to the first; the last is too far from that."""
    middle, last = (1, 14, *A[2:]), (2, 18, *A[2:])
    assert joined([A, middle, last]) == [0, 0, 2]


def test_symmetric_molecules_are_joined_by_place():
    assert joined([A, (1, 10, 10, 90.0, 90.0, 0.0, 0.0)], angle_degrees=180) == [0, 0]


@pytest.mark.parametrize("name", ["distance_px", "angle_degrees", "defocus_angstrom"])
@pytest.mark.parametrize("value", [-1.0, np.nan])
def test_impossible_tolerances_are_refused(name, value):
    with pytest.raises(InvalidInputError, match=f"{name}: expected 0 or more"):
        Tolerances(**{name: value})


angles = st.tuples(*[st.floats(-720, 720)] * 3)


@given(st.lists(st.tuples(angles, angles), min_size=1, max_size=5))
def test_the_angle_between_orientations_is_scipys(pairs):
    one, other = (np.array([pair[k] for pair in pairs]) for k in (0, 1))
    ours = rotation_between(*zip(one.T, other.T, strict=True))
    # phi, theta, psi (ZYZ): Rz(phi) Ry(theta) Rz(psi), which SciPy calls intrinsic.
    left, right = (Rotation.from_euler("ZYZ", a, degrees=True) for a in (one, other))
    np.testing.assert_allclose(ours, np.degrees((left.inv() * right).magnitude()), atol=2e-5)


@given(st.integers(0, 2**32 - 1), st.floats(0.5, 9))
def test_joining_is_what_comparing_all_pairs_gives(seed, distance):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 40))
    peaks = Peaks(
        rng.integers(0, 4, n),
        rng.integers(0, 25, n),
        rng.integers(0, 25, n),
        *(rng.integers(0, 3, n) * 9.0 for _ in range(3)),
        rng.integers(0, 3, n) * 300.0,
    )
    order = rng.permutation(n)
    found = join_duplicates(peaks, order, Tolerances(distance_px=distance))
    stands_for, sightings = list(range(n)), {}
    for rank, k in enumerate(order.tolist()):
        for first in order[:rank].tolist():
            near = (peaks.y[k] - peaks.y[first]) ** 2 + (peaks.x[k] - peaks.x[first]) ** 2
            pairs = ((peaks.phi, peaks.theta, peaks.psi)[a][[k, first]] for a in range(3))
            angle = rotation_between(*((p[:1], p[1:]) for p in pairs))[0]
            if (
                stands_for[first] == first
                and near < distance**2
                and angle <= 10 + 1e-4
                and abs(peaks.defocus_angstrom[k] - peaks.defocus_angstrom[first]) <= 500
                and peaks.exposure[k] not in sightings.setdefault(first, {peaks.exposure[first]})
            ):
                stands_for[k] = first
                sightings[first].add(peaks.exposure[k])
                break
    assert found.tolist() == stands_for
