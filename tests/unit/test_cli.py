"""The command line: what it prints, what it refuses, how it exits."""

import re
import shutil
import subprocess
import sys

import pytest

from builders import (
    explicit_maps,
    flip_byte,
    save_plain_npz,
    snapshot,
    write_explicit_search,
)
from ocelot_em import __version__, describe, open_merged
from ocelot_em.cli import main as cli

SHAPE = (40, 50)


@pytest.fixture
def ocelot(capsys):
    """Run a command; its exit code, and what it wrote to stdout and stderr."""

    def call(*arguments):
        capsys.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def run(tmp_path):
    return write_explicit_search(tmp_path / "RUN.zarr", SHAPE)


@pytest.fixture
def broken(run, tmp_path):
    """A search of which one chunk is damaged."""
    shutil.copytree(run, tmp_path / "BROKEN.zarr")
    flip_byte(tmp_path / "BROKEN.zarr/partials/gpu1/mip/c/0/0")
    return tmp_path / "BROKEN.zarr"


def assert_refused(result, *parts):
    """Exit code 2, and the reason on stderr without a traceback."""
    code, _, err = result
    assert code == 2
    assert "Traceback" not in err
    assert all(part in err for part in parts), err


def save_results(folder, n=2, count=9):
    return [
        save_plain_npz(folder / f"gpu{number}.npz", explicit_maps(SHAPE, number), count)
        for number in range(n)
    ]


# import


def test_import_says_what_it_made(ocelot, tmp_path):
    files, output = save_results(tmp_path), tmp_path / "R [1].zarr"
    code, out, err = ocelot("import", *files, "--output", output)
    assert (code, err) == (0, "")
    assert f"imported 2 partials into {output}: gpu0, gpu1" in out
    assert "all pixels are taken as valid" in out
    assert [name for name, *_ in describe(output).partials] == ["gpu0", "gpu1"]


def test_import_again_and_names_that_are_cleaned(ocelot, tmp_path):
    first, second = save_results(tmp_path)
    second = second.rename(tmp_path / "my gpu.npz")
    assert ocelot("import", first, "--output", tmp_path / "R")[0] == 0
    code, out, _ = ocelot("import", first, second, "--output", tmp_path / "R")
    assert code == 0
    assert f"partial my-gpu is {second}" in out
    assert "imported 1 partials into" in out
    assert "1 had been imported before, and are unchanged" in out


def test_import_takes_all_its_options(ocelot, tmp_path, crops, tables):
    code, out, _ = ocelot(
        *("import", *crops, "--output", tmp_path / "R", "--search-space", tables),
        *("--template-box", 56, "--pixel-size", 2.5),
        *("--total-projections", 51840, 38880, 25920, 12960),
    )
    assert code == 0
    assert "all pixels are taken as valid" not in out
    attributes = describe(tmp_path / "R").attributes
    assert attributes.pose_form == "indexed"
    assert attributes.valid_shape == (73, 73)
    assert attributes.pixel_size_angstrom == 2.5
    assert attributes.total_projections == 129_600


def test_import_refuses_with_all_reasons(ocelot, tmp_path):
    files = [*save_results(tmp_path, 2, count=None), tmp_path / "nothing.npz"]
    result = ocelot("import", *files, "--output", tmp_path / "R", "--template-box", 99)
    assert_refused(
        result,
        "ocelot: 4 problems:",
        "gpu0.npz: total_projections: missing",
        "gpu1.npz: total_projections: missing",
        "nothing.npz: expected a file",
        "template box",
    )
    assert not (tmp_path / "R").exists()


# merge


def test_merge_says_what_it_does_in_plain_lines(ocelot, run, tmp_path):
    code, out, err = ocelot("merge", run, "--output", tmp_path / "M")
    assert (code, err) == (0, "")
    assert re.search(r"^partials +3, 3,003 projections$", out, re.MULTILINE)
    assert re.search(r"^merged 1 tile in ", out, re.MULTILINE)
    assert f"result: {tmp_path / 'M'}" in out
    assert "\x1b" not in out
    assert open_merged(tmp_path / "M").attrs["total_projections"] == 3003


def test_merge_takes_all_its_options(ocelot, run, tmp_path):
    code, out, _ = ocelot(
        *("merge", run, "--output", tmp_path / "M", "--cluster", "threads", "--workers", 1),
        *("--threads", 2, "--tile-size", 16, "--memory-limit", "2GB", "--nan", "mask"),
        "--overwrite",
    )
    assert code == 0
    assert "tiles       12 of 16 x 16 pixels" in out
    assert "total_projections" in open_merged(tmp_path / "M")


def test_merge_again_has_nothing_left_to_do(ocelot, run, tmp_path):
    ocelot("merge", run, "--output", tmp_path / "M")
    before = snapshot(tmp_path / "M")
    code, out, _ = ocelot("merge", run, "--output", tmp_path / "M")
    assert code == 0
    assert "nothing is left to do" in out
    assert snapshot(tmp_path / "M") == before


def test_a_dry_run_prints_the_plan_and_writes_nothing(ocelot, run, tmp_path):
    code, out, _ = ocelot("merge", run, "--output", tmp_path / "M", "--dry-run", "--tile-size", 16)
    assert code == 0
    labels = "partials", "shape", "tiles", "to read", "to write", "files", "memory", "free disk"
    assert [line[:10].strip() for line in out.splitlines()] == [*labels, "device"]
    assert not (tmp_path / "M").exists()


def test_a_failed_tile_is_named_once_on_standard_error(broken, tmp_path):
    command = [sys.executable, "-m", "ocelot_em", "merge", broken, "--output", tmp_path / "M"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("is corrupt") == 1


def test_a_merge_whose_tiles_fail_exits_1_and_keeps_the_others(ocelot, broken, tmp_path):
    code, _, err = ocelot("merge", broken, "--output", tmp_path / "M")
    assert code == 1
    assert "1 of 1 tiles failed" in err
    assert "partial 'gpu1': mip: chunk (0, 0)" in err
    assert "Traceback" not in err
    shutil.copy(tmp_path / "RUN.zarr/partials/gpu1/mip/c/0/0", broken / "partials/gpu1/mip/c/0/0")
    assert ocelot("merge", broken, "--output", tmp_path / "M")[0] == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--tile-size", 0), "--tile-size: expected at least 1, got '0'"),
        (("--tile-size", 1025), "tile size: expected at most 1024 or a multiple of it"),
        (("--memory-limit", "1MB"), "but 1,000,000 bytes are allowed"),
        (("--memory-limit", "much"), "--memory-limit: expected a size such as 800MB"),
        (("--workers", 0), "--workers: expected at least 1"),
        (("--workers", 3), "cluster 'threads', which is one process"),
        (("--cluster", "cloud"), "cluster: expected threads, local, cuda, slurm, slurm-job, or"),
        (("--nan", "ignore"), "--nan: expected 'raise' or 'mask', got 'ignore'"),
        (("--tile-size", "big"), "--tile-size: expected a whole number, got 'big'"),
        (("--tile-size", "1.5", "--erode", -1), "--erode: expected at least 0"),
        (("--tile", 16), "unknown option --tile; did you mean --tile-size?"),
        (("--slurm", "cores=many"), "--slurm.cores: expected a whole number, got 'many'"),
        (("--slurm", "partion=cpu"), "did you mean --slurm.partition?"),
        (("--slurm",), "--slurm: expected a value"),
        (("--slurm", "--dry-run"), "unknown option --slurm.--dry-run"),
        (("--log", "--dry-run"), "--log: expected a value"),
    ],
)
def test_merge_refuses_options_that_cannot_work(ocelot, run, tmp_path, options, reason):
    assert_refused(ocelot("merge", run, "--output", tmp_path / "M", *options), reason)
    assert not (tmp_path / "M").exists()


def test_merge_refuses_inputs_that_cannot_be_merged(ocelot, run, tmp_path):
    merged = tmp_path / "M"
    assert_refused(ocelot("merge", run, run, "--output", merged), "given more than once")
    assert_refused(ocelot("merge", run, "--output", run), "is a search, not a merged result")
    assert_refused(ocelot("merge", tmp_path / "X", "--output", merged), "got nothing there")
    other = write_explicit_search(tmp_path / "OTHER", (41, 50))
    assert_refused(ocelot("merge", run, other, "--output", merged), "shape: expected (40, 50)")
    assert not merged.exists()


def test_merge_refuses_an_output_that_is_something_else(ocelot, run, tmp_path):
    other = write_explicit_search(tmp_path / "OTHER", SHAPE)
    before = snapshot(other)
    for overwrite in ((), ("--overwrite",)):
        assert_refused(ocelot("merge", run, "--output", other, *overwrite), "is a search")
    assert snapshot(other) == before
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("Dear")
    assert_refused(ocelot("merge", run, "--output", tmp_path / "letters"), "got other files")


# info and check


def test_info_of_a_search_and_of_a_merge(ocelot, run, tmp_path):
    code, out, _ = ocelot("info", run)
    assert code == 0
    assert re.search(r"^kind +search, format version 3$", out, re.MULTILINE)
    assert re.search(r"^shape +40 x 50 pixels$", out, re.MULTILINE)
    assert re.search(r"gpu2 .* complete .* 1,002", out)
    ocelot("merge", run, "--output", tmp_path / "M")
    code, out, _ = ocelot("info", tmp_path / "M")
    assert code == 0
    assert re.search(r"^kind +merged, format version 3$", out, re.MULTILINE)
    assert re.search(r"^tiles +1 of 1 done$", out, re.MULTILINE)
    assert "scaled_mip" in out


def test_info_of_nothing_is_refused(ocelot, tmp_path):
    assert_refused(ocelot("info", tmp_path / "X"), "expected an ocelot-em store")


def test_check_names_problems_and_exits_1(ocelot, run, broken, tmp_path):
    assert ocelot("check", run) == (0, f"{run}: no problems\n", "")
    code, out, _ = ocelot("check", run, broken, tmp_path / "X")
    assert code == 1
    assert f"{run}: no problems\n{broken}: 1 problem\n" in out
    assert f"{broken}: partial 'gpu1': mip: chunk (0, 0)" in out
    assert f"{tmp_path / 'X'}: 1 problem\n" in out


# simulate


def test_simulate_makes_a_search_that_can_be_merged(ocelot, tmp_path):
    code, out, _ = ocelot(
        *("simulate", tmp_path / "S", "--shape", 150, 160, "--partials", 2, "--particles", 3),
        *("--seed", 5, "--form", "indexed"),
    )
    assert code == 0
    assert "simulated 2 partials of 150 x 160 pixels" in out
    assert len(describe(tmp_path / "S" / "RUN.zarr").partials) == 2


# all commands


def test_the_version(ocelot):
    assert ocelot("--version") == (0, f"ocelot-em {__version__}\n", "")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(ocelot, command):
    code, out, _ = ocelot(command, "--help")
    assert code == 0
    assert f"Usage: ocelot {command}" in out


def test_every_option_is_described():
    for command in cli.COMMANDS:
        options = cli.app[command].assemble_argument_collection(parse_docstring=True)
        helps = {o.name: o.parameter.help or "" for o in options if o.name != "*"}
        assert all(helps.values())
        python_names = [re.findall(r"[a-z]+_[a-z_]+\b(?!\.)", text) for text in helps.values()]
        assert not any(python_names)


def test_every_option_has_its_default_in_the_help():
    missing = [
        f"{command} {option.name}"
        for command in cli.COMMANDS
        for option in cli.app[command].assemble_argument_collection(parse_docstring=True)
        if option.parse and option.name != "*" and not option.field_info.required
        if option.resolved_hint is not bool and not option.children
        if "Default: " not in (option.parameter.help or "")
        if option.show_default and not option.show_default(option.field_info.default)
    ]
    assert missing == []


def test_the_help_of_merge_is_grouped_and_has_defaults(ocelot):
    out = " ".join(re.sub(r"[^\w. -]", " ", ocelot("merge", "--help")[1]).split())
    titles = ("Options", "Tiles and memory", "Result", "Montages", "Workers", "SLURM jobs")
    assert all(f" {title} " in out for title in (*titles, "This run", "Every command"))
    assert "choices earliest max-zscore farthest-from-edge default earliest" in out


def test_the_help_explains_the_exit_codes(ocelot):
    for arguments in (["--help"], ["merge", "--help"]):
        assert "refused: nothing was started" in ocelot(*arguments)[1]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "expected a command: import, merge, batch, watch, peaks"),
        (["fly"], "unknown command 'fly'; expected one of import, merge, batch, watch, peaks"),
        (["merg"], "unknown command 'merg'; did you mean merge?"),
        (["--verbos"], "unknown option --verbos; did you mean --verbose?"),
        (["merge"], "INPUTS is required"),
        (["merge", "A", "--ouput", "B"], "unknown option --ouput; did you mean --output?"),
        (["merge", "A", "--output"], "--output: expected a value"),
        (["import", "a.npz"], "--output is required"),
        (["info"], "STORE is required"),
        (["info", "A", "B"], "unexpected argument 'B'"),
        (["simulate", "S", "--shape", 3], "--shape: expected a value"),
    ],
)
def test_incomplete_commands_exit_2_and_point_to_the_help(ocelot, arguments, reason):
    known = [word for word in arguments[:1] if word in cli.COMMANDS]
    assert_refused(ocelot(*arguments), reason, f"ee '{' '.join(['ocelot', *known])} --help'")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["simulate", "S", "--shape", "3", "4.5"], "--shape: expected a whole number, got '4.5'"),
        (["simulate", "S", "--shape", 3, 4, "--form", "no"], "--form: expected 'explicit' or"),
        (["view", "P", "--port", "any"], "--port: expected a whole number, got 'any'"),
        (["peaks", "M", "--output", "P.csv", "--cutoff", "nan"], "--cutoff: expected a finite"),
        (["export", "M", "--output", "P", "--to", "tiff"], "--to: expected 'mrc', 'hdf5',"),
        (["import", "a", "--output", "R", "--pixel-size", "x"], "--pixel-size: expected a number"),
        (["import", "a", "--output", "R", "--total-projections", 3, "x"], "expected a whole"),
    ],
)
def test_values_are_checked_before_anything_starts(ocelot, arguments, reason):
    assert_refused(ocelot(*arguments), reason)


def test_the_last_of_repeated_options_wins(ocelot, run, tmp_path):
    arguments = ("merge", run, "--output", tmp_path / "M", "--dry-run", "--tile-size")
    assert "tiles       12 of 16 x 16" in ocelot(*arguments, 8, "--tile-size", 16)[1]


@pytest.mark.parametrize("words", [["bash"], ["zsh"], ["--shell", "fish"]])
def test_completion_can_be_installed(ocelot, tmp_path, monkeypatch, words):
    monkeypatch.setenv("HOME", str(tmp_path))
    script, shell = tmp_path / "completion", words[-1]
    code, _, err = ocelot("--install-completion", *words, "--output", script)
    assert (code, err) == (0, "")
    text = script.read_text()
    assert all(word in text for word in ("memory-limit", "farthest-from-edge", "simulate"))
    assert {"bash": "compgen -f", "zsh": ":output:_files", "fish": "-F"}[shell] in text


def test_an_interrupt_exits_130(ocelot, run, tmp_path, monkeypatch):
    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("ocelot_em.run.api.run_merge", interrupt)
    code, _, err = ocelot("merge", run, "--output", tmp_path / "M")
    assert code == 130
    assert "the same command resumes the merge" in err


def test_main_exits_with_the_code(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["info", str(tmp_path / "X")])
    assert stop.value.code == 2
