"""Options are keywords that type checkers and editors know, and what is not a store is refused."""

import inspect
import subprocess
import sys
import typing

import numpy as np
import pytest
import xarray as xr
from pydantic import TypeAdapter

import ocelot_em
from ocelot_em import BatchOptions, ImportOptions, MergeOptions, PickOptions
from ocelot_em.errors import InvalidInputError
from ocelot_em.io.import_options import ImportKeywords
from ocelot_em.model.keywords import (
    BatchKeywords,
    DetectionKeywords,
    MergeKeywords,
    PickKeywords,
    ReportKeywords,
    SlurmKeywords,
)
from ocelot_em.model.options import SlurmJobs
from ocelot_em.model.pick_options import DetectionOptions
from ocelot_em.store.objects import as_places
from ocelot_em.view.hits import ReportImages

PAIRS = {
    MergeKeywords: MergeOptions,
    SlurmKeywords: SlurmJobs,
    PickKeywords: PickOptions,
    BatchKeywords: BatchOptions,
    DetectionKeywords: DetectionOptions,
    ImportKeywords: ImportOptions,
    ReportKeywords: ReportImages,
}
FUNCTIONS = {
    ocelot_em.merge: MergeOptions,
    ocelot_em.merge_many: BatchOptions,
    ocelot_em.lazy_merge: MergeOptions,
    ocelot_em.find_peaks: PickOptions,
    ocelot_em.find_detections: DetectionOptions,
    ocelot_em.write_index: PickOptions,
    ocelot_em.write_report: ReportImages,
    ocelot_em.import_results: ImportOptions,
    ocelot_em.import_finished: ImportOptions,
}


@pytest.mark.parametrize("keywords", PAIRS, ids=lambda kind: kind.__name__)
def test_keywords_are_in_step_with_the_options(keywords):
    model, hints = PAIRS[keywords], typing.get_type_hints(keywords)
    assert list(hints) == list(model.model_fields)
    for name, field in model.model_fields.items():
        if name not in ("slurm", "cluster"):  # which take more, or have keywords of their own
            TypeAdapter(hints[name]).validate_python(field.get_default())
        if typing.get_origin(field.annotation) is typing.Literal:
            assert hints[name] == field.annotation


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_tab_and_help_show_every_option(function):
    parameters = inspect.signature(function).parameters
    assert set(FUNCTIONS[function].model_fields) <= set(parameters)
    assert not [p for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: ocelot_em.merge("A", "B", clutser="local"), "option clutser: .*mean cluster"),
        (lambda: ocelot_em.merge("A", "B", slurm={"memry": "1GB"}), "slurm.memry: .*mean memory"),
        (lambda: ocelot_em.lazy_merge("A", tile_sizes=5), "option tile_sizes: .*mean tile_size"),
        (lambda: ocelot_em.find_peaks("A", cutof=5), "option cutof: .*mean cutoff"),
        (lambda: ocelot_em.import_results("A", "B", template_bo=5), "mean template_box"),
        (lambda: ocelot_em.import_finished("A", "B", prefx="x"), "mean prefix"),
    ],
)
def test_a_mistyped_option_gets_a_suggestion(tmp_path, monkeypatch, call, problem):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError, match=problem) as refusal:
        call()
    assert len(refusal.value.problems) == 1


@pytest.mark.parametrize("thing", [{"mip": np.zeros((3, 4))}, xr.Dataset(), 5, None, np.zeros(3)])
@pytest.mark.parametrize(
    "call",
    [
        lambda thing: ocelot_em.merge(thing, "OUT"),
        lambda thing: ocelot_em.merge([thing], "OUT"),
        lambda thing: ocelot_em.merge_many(thing, "OUT"),
        lambda thing: ocelot_em.merge("A", thing),
        lambda thing: ocelot_em.lazy_merge(thing),
        lambda thing: ocelot_em.open_merged(thing),
        lambda thing: ocelot_em.open_partials(thing),
        lambda thing: ocelot_em.find_peaks(thing),
        lambda thing: ocelot_em.describe(thing),
        lambda thing: ocelot_em.check(thing),
        lambda thing: ocelot_em.write_report(thing, "report.html"),
        lambda thing: ocelot_em.write_index(thing, "index.html"),
        lambda thing: ocelot_em.plot_crop(thing, (0, 0)),
        lambda thing: ocelot_em.read_correlations(thing),
        lambda thing: ocelot_em.import_results(thing, "OUT"),
        lambda thing: ocelot_em.import_results([thing], "OUT"),
        lambda thing: ocelot_em.import_finished(thing, "OUT"),
        lambda thing: ocelot_em.read_search_space_file(thing),
    ],
)
def test_what_is_no_path_is_refused_in_one_sentence(tmp_path, monkeypatch, call, thing):
    monkeypatch.chdir(tmp_path)
    message = f"expected a path or URL, got an object of type {type(thing).__name__}; "
    with pytest.raises(InvalidInputError, match=message) as refusal:
        call(thing)
    assert len(refusal.value.problems) == 1
    assert list(tmp_path.iterdir()) == []


PATHS_FOR_TABLES = (
    lambda thing: ocelot_em.plot_poses(thing),
    lambda thing: ocelot_em.plot_psi(thing),
    lambda thing: ocelot_em.plot_defocus(thing),
    lambda thing: ocelot_em.plot_zscore("A", particles=thing),
    lambda thing: ocelot_em.plot_joint("A", particles=thing),
    lambda thing: ocelot_em.write_parquet(thing, "table.parquet"),
    lambda thing: ocelot_em.write_relion_star(thing, "table.star", optics=None),
    lambda thing: ocelot_em.write_cistem_star(thing, "table.star", optics=None),
    lambda thing: ocelot_em.write_leopard_csv(thing, "table.csv", optics=None),
)


@pytest.mark.parametrize("call", PATHS_FOR_TABLES)
def test_what_is_no_table_of_particles_is_refused_in_one_sentence(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    for thing, got in (("peaks.csv", "'peaks.csv'"), (xr.Dataset(), "an object of type Dataset")):
        message = f"particles: expected a ParticleTable, .*read_csv, got {got}$"
        with pytest.raises(InvalidInputError, match=message) as refusal:
            call(thing)
        assert len(refusal.value.problems) == 1
    assert not list(tmp_path.iterdir())
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()  # no empty figure is left


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda table: ocelot_em.plot_psi(table, "psi.png"), "ax: .*axes.*, got 'psi.png'"),
        (lambda _: ocelot_em.plot_map("A"), "values: expected a map of .*, got 'A'"),
        (lambda _: ocelot_em.plot_map(xr.Dataset()), "an object of type Dataset"),
        (lambda _: ocelot_em.simulate("A", 3), "simulation: .*Simulation, got 3"),
        (lambda table: table.to_star("A", optics="A.star"), "optics: .*Optics.*, got 'A.star'"),
        (lambda _: ocelot_em.merge("A", "B", observer=print), "observer: .*an Observer, got"),
    ],
)
def test_an_argument_of_another_kind_is_refused_in_one_sentence(
    tmp_path, monkeypatch, call, problem
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError, match=problem):
        call(ocelot_em.ParticleTable.empty())


def test_one_works_where_several_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert MergeOptions.parse({"without": "gpu0"}).without == ("gpu0",)
    assert SlurmJobs.parse({"directives": "--gres=gpu:1"}).directives == ("--gres=gpu:1",)
    assert ImportOptions.parse({"total_projections": 7}).total_projections == (7,)
    assert as_places(tmp_path) == [tmp_path]
    assert as_places(name for name in ("a", "b")) == ["a", "b"]
    with pytest.raises(InvalidInputError, match=r"missing\.npz"):
        ocelot_em.import_results("missing.npz", "OUT")


def test_keywords_override_options_that_imports_share():
    shared = ImportOptions(template_box=56, pixel_size_angstrom=2.5)
    changed = ImportOptions.of(shared, {"template_box": 64})
    assert (changed.template_box, changed.pixel_size_angstrom) == (64, 2.5)
    assert changed.model_fields_set == shared.model_fields_set
    assert ImportOptions.of(shared, {}) is shared
    with pytest.raises(InvalidInputError, match="expected ImportOptions, got dict"):
        ocelot_em.import_results("gpu0.npz", "OUT", {"template_box": 56})


def test_a_mistyped_name_gets_a_suggestion():
    with pytest.raises(AttributeError, match="'find_peak'; did you mean find_peaks"):
        _ = ocelot_em.find_peak


@pytest.mark.slow
def test_type_checkers_find_a_mistyped_option(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import ocelot_em\n"
        "ocelot_em.merge('A', 'B', tile_size=512, without='gpu0', slurm={'memory': '8GB'})\n"
        "ocelot_em.merge('A', 'B', clutser='local')\n"
        "ocelot_em.find_peaks('A', method='gauss')\n"
    )
    command = [sys.executable, "-m", "mypy", "--cache-dir", tmp_path / "cache", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if "error:" in line]
    assert len(lines) == 2, done.stdout
    assert 'Unexpected keyword argument "clutser"' in lines[0]
    assert "script.py:4" in lines[1]
