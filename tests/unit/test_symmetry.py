"""Symmetry groups of templates against RELION's axes, and angles under them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from ocelot_em.errors import InvalidInputError
from ocelot_em.particles.symmetry import parse_symmetry, rotation_between, symmetry_group

pytestmark = pytest.mark.filterwarnings("ignore:Gimbal lock")

RELION = {
    "C5": ((5, (0, 0, 1)),),
    "D7": ((7, (0, 0, 1)), (2, (1, 0, 0))),
    "T": ((3, (0, 0, 1)), (2, (0, 0.816496, 0.577350))),
    "O": ((3, (1, 1, 1)), (4, (0, 0, 1))),
    "I": ((2, (0, 0, 1)), (5, (0.525731114, 0, 0.850650807)), (3, (0, 0.356822076, 0.934172364))),
    "I1": ((2, (1, 0, 0)), (5, (0.850650807, 0, -0.525731114)), (3, (0.934172364, 0.356822076, 0))),
}
"""Orders and axes that generate the groups: ``SymList::fill_symmetry_class`` of RELION."""

ORDER = {"C5": 5, "D7": 14, "T": 12, "O": 24, "I": 60, "I1": 60}


@pytest.mark.parametrize("name", RELION)
def test_groups_are_those_of_relions_axes(name):
    group = symmetry_group(name)
    assert len(group) == ORDER[name]
    for order, axis in RELION[name]:
        turn = Rotation.from_rotvec(2 * np.pi / order * np.array(axis) / np.linalg.norm(axis))
        assert (turn.inv() * group).magnitude().min() < 1e-5


angles = st.tuples(*[st.floats(-360, 360)] * 3)


@given(angles, st.sampled_from([*RELION]), st.data())
def test_equivalent_poses_have_no_angle_between_them(pose, name, data):
    group = symmetry_group(name)
    same = group[data.draw(st.integers(0, len(group) - 1))]
    turned = same * Rotation.from_euler("ZYZ", pose, degrees=True)
    # Independent of the poses' Euler angles: a further turn in the plane is what is left.
    further = turned * Rotation.from_euler("Z", 3, degrees=True)
    both = [
        np.stack([pose, turn.as_euler("ZYZ", degrees=True)])[:, :, None]
        for turn in (turned, further)
    ]
    found = [rotation_between(*zip(*own, strict=True), symmetry=name)[0] for own in both]
    np.testing.assert_allclose(found, [0, 3], atol=1e-5)


def test_a_cyclic_template_is_the_same_after_a_turn_of_phi():
    phi = np.array([10.0, 10]), np.array([130.0, 100])
    pairs = [phi, *((np.full(2, angle),) * 2 for angle in (60.0, 20.0))]
    assert rotation_between(*pairs, symmetry="C3") == pytest.approx(
        [0, rotation_between(*pairs, symmetry="c3")[1]]
    )
    assert rotation_between(*pairs)[0] > 90
    assert np.isnan(rotation_between(*(tuple(a * np.nan for a in pair) for pair in pairs))).all()


@pytest.mark.parametrize("name", ["", "C0", "X2", "I9", "C-1", "D", None])
def test_an_unknown_group_is_refused(name):
    with pytest.raises(InvalidInputError, match="symmetry: expected C or D with a number"):
        parse_symmetry(name)
