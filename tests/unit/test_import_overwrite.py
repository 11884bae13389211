"""An import that replaces a search: whole or not at all."""

import numpy as np
import pytest

from builders import explicit_maps, snapshot
from ocelot_em import ImportOptions, check, describe, import_results, merge
from ocelot_em.cli.main import run
from ocelot_em.errors import (
    InvalidInputError,
    OutputExistsError,
    StorageError,
    StoreNotFoundError,
)
from ocelot_em.io import leopard
from ocelot_em.model.maps import COUNT
from ocelot_em.store.local import new_suffix
from ocelot_em.store.whole_folder import whole_folder_or_nothing
from recording import record


@pytest.fixture
def files(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(2):
        path = tmp_path / "in" / f"gpu{number}.npz"
        np.savez(path, **explicit_maps((40, 50), number), **{COUNT: np.asarray(9)})
    return sorted(map(str, (tmp_path / "in").glob("*.npz")))


def test_a_search_is_replaced_by_one_with_a_template_box(files, tmp_path):
    search = tmp_path / "S.zarr"
    arguments = ["import", *files, "--output", str(search)]
    assert run(arguments) == 0
    assert run([*arguments, "--template-box", "8"]) == 2
    assert describe(search).attributes.valid_shape == (40, 50)
    assert run([*arguments, "--template-box", "8", "--overwrite"]) == 0
    assert describe(search).attributes.valid_shape == (33, 43)
    assert check(search) == []
    assert {path.name for path in tmp_path.iterdir()} == {"in", "S.zarr"}


def test_a_new_search_is_written_where_there_is_none(files, tmp_path):
    assert import_results(files, tmp_path / "S.zarr", overwrite=True) == ["gpu0", "gpu1"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_import_that_fails_leaves_the_old_search(files, tmp_path, monkeypatch, error):
    search = tmp_path / "S.zarr"
    import_results(files, search)
    before = snapshot(tmp_path)

    def fail(*_):
        raise error

    monkeypatch.setattr(leopard, "refresh_total", fail)
    with pytest.raises((StorageError, KeyboardInterrupt)):
        import_results(files, search, ImportOptions(template_box=8), overwrite=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("swapped", [False, True])
def test_what_a_killed_replacement_left_is_deleted_by_the_next(tmp_path, swapped):
    place, left = tmp_path / "S", [tmp_path / f"S{new_suffix()}" for _ in range(2)]
    for folder in left if swapped else [place, *left]:  # killed between the renames, or before
        folder.mkdir()
        (folder / "old").touch()
    with whole_folder_or_nothing(place) as new:
        (new / "new").touch()
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"S", "S/new"}


def test_a_search_that_is_being_recorded_is_not_replaced(files, tmp_path):
    record(tmp_path / "S.zarr", n=2)
    with pytest.raises(OutputExistsError, match="not being recorded, got gpu0"):
        import_results(files, tmp_path / "S.zarr", overwrite=True)


def test_only_searches_are_replaced(files, tmp_path):
    search, merged = tmp_path / "S.zarr", tmp_path / "M.zarr"
    import_results(files, search)
    merge(search, merged)
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("kept")
    before = snapshot(tmp_path)
    with pytest.raises(OutputExistsError, match="got a merged result"):
        import_results(files, merged, overwrite=True)
    with pytest.raises(StoreNotFoundError, match="expected an ocelot-em store"):
        import_results(files, other, overwrite=True)
    with pytest.raises(InvalidInputError, match="input"):
        import_results(files, tmp_path / "in", overwrite=True)
    with pytest.raises(InvalidInputError, match="buckets cannot rename"):
        import_results(files, "memory://bucket/S.zarr", overwrite=True)
    assert snapshot(tmp_path) == before
