"""Attributes: what is written is read, and what is wrong is named."""

import copy
import math

import pytest

from ocelot_em.errors import FormatError
from ocelot_em.model.maps import MAPS, PoseForm
from ocelot_em.store import attributes as fmt
from ocelot_em.store import constants

PROVENANCE = fmt.Provenance(created="2026-01-01T00:00:00+00:00", versions={"ocelot-em": "0.1.0"})
SEARCH = fmt.SearchAttributes(
    format_version=3,
    kind="search",
    shape=(50, 60),
    valid_shape=(40, 50),
    pixel_size_angstrom=2.5,
    pose_form=PoseForm.INDEXED,
    has_pixel_size=True,
    has_counts=False,
    search_space_digest="ab" * 32,
    total_projections=2**53 + 1,
    provenance=PROVENANCE,
)
PARTIAL = fmt.PartialAttributes(
    id="0" * 32, order=-3, total_projections=7, state="writing", provenance=PROVENANCE
)
MERGED = fmt.MergedAttributes(
    **SEARCH.model_dump(exclude={"kind"}),
    kind="merged",
    id="1" * 32,
    state="complete",
    partials=(fmt.Contribution(name="gpu0", id="0" * 32, total_projections=7),),
    plan={"tile": [16, 16]},
    finished="2026-01-01T00:00:01+00:00",
)
ALL = [SEARCH, PARTIAL, MERGED]

WRONG = {
    "kind": ["merge", 1],
    "shape": [[0, 5], [5], [5, 6, 7], [5.5, 6], "5x6", [2**31, 5], ["5", 6], [True, 6]],
    "valid_shape": [[0, 5], [51, 60], [50, 61], None],
    "pixel_size_angstrom": [0.0, -1.0, math.nan, math.inf, "2.5"],
    "pose_form": ["euler", None],
    "has_pixel_size": ["yes", 1, None],
    "has_counts": ["no", 2, None],
    "search_space_digest": [5, None, "ab"],
    "total_projections": [-1, 1.0, 1e20, "7", True, None, 2**63],
    "provenance": [None, {}, {"created": 1, "versions": {}}],
    "id": [None, 7, "", "a b", "\x1b[2J", "a" * 129],
    "order": [1.5, "1", None, 10**400, -(2**53) - 1],
    "state": ["done", None],
    "partials": [None, [{}], [{"name": "a", "id": "b", "total_projections": -1}]],
    "plan": [None, []],
    "finished": [5],
}
CASES = [
    pytest.param(model, field, value, id=f"{type(model).__name__}-{field}-{value!r}")
    for model in ALL
    for field, values in WRONG.items()
    if field in type(model).model_fields
    for value in values
]


def parse(model, attributes):
    return fmt.parse_attributes(type(model), attributes, "RUN.zarr")


@pytest.mark.parametrize("model", ALL)
def test_what_is_written_is_read(model):
    assert parse(model, fmt.dump_attributes(model)) == model


@pytest.mark.parametrize(("model", "field", "value"), CASES)
def test_a_wrong_field_is_named(model, field, value):
    attributes = fmt.dump_attributes(model)
    attributes["ocelot"][field] = value
    with pytest.raises(FormatError, match=rf"^RUN\.zarr: .*{field}"):
        parse(model, attributes)


@pytest.mark.parametrize("model", ALL)
def test_a_missing_field_is_named(model):
    complete = fmt.dump_attributes(model)
    for field, info in type(model).model_fields.items():
        if not info.is_required():
            continue
        attributes = copy.deepcopy(complete)
        del attributes["ocelot"][field]
        with pytest.raises(FormatError, match=f"{field}: missing"):
            parse(model, attributes)


@pytest.mark.parametrize("model", ALL)
def test_an_unknown_field_is_named(model):
    attributes = fmt.dump_attributes(model)
    attributes["ocelot"]["colour"] = "red"
    with pytest.raises(FormatError, match="colour"):
        parse(model, attributes)


def test_all_wrong_fields_come_in_one_message():
    attributes = fmt.dump_attributes(SEARCH)
    attributes["ocelot"] |= {"shape": [0, 5], "kind": "picture", "has_counts": "no"}
    with pytest.raises(FormatError) as refusal:
        parse(SEARCH, attributes)
    assert all(field in str(refusal.value) for field in ("shape.0", "kind", "has_counts"))


@pytest.mark.parametrize("version", [4, 0, "2", 1.5, None])
@pytest.mark.parametrize("model", [SEARCH, MERGED])
def test_another_version_is_refused_and_named(model, version):
    attributes = fmt.dump_attributes(model)
    attributes["ocelot"]["format_version"] = version
    with pytest.raises(FormatError, match=r"format.version"):
        parse(model, attributes)


def test_a_later_version_is_said_to_be_that_whatever_else_it_holds():
    with pytest.raises(FormatError, match=r"expected format version 3, got 4.*or a newer"):
        parse(SEARCH, {"ocelot": {"format_version": 4, "kind": "tilt series"}})


@pytest.mark.parametrize(
    "attributes", [None, {}, [], {"ome": {}}, {"ocelot": []}, {"ocelot": None}]
)
def test_another_zarr_group_is_not_a_store(attributes):
    with pytest.raises(FormatError, match="not an ocelot-em store"):
        parse(SEARCH, attributes)


def test_fill_values_say_not_searched():
    assert MAPS["best_global_index"].fill == MAPS["best_partial"].fill == -1
    assert MAPS["total_projections"].fill == 0
    assert MAPS["source_exposure"].fill == MAPS["best_group"].fill == -1
    integers = {name for name, about in MAPS.items() if about.dtypes[0].startswith("int")}
    assert all(math.isnan(MAPS[name].fill) for name in MAPS if name not in integers)


def test_every_map_says_its_meaning_and_unit():
    for name in MAPS:
        attributes = constants.map_attributes(name)
        assert attributes["long_name"]
        assert attributes["units"] in ("1", "degree", "angstrom")
