"""Options from a file: the same checks as on the command line, which wins; and files of runs."""

import argparse
import math
import os
from enum import StrEnum
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ocelot_em.cli import main as cli
from ocelot_em.cli.config_file import add_config_option, apply_config, parse_arguments, write_config
from ocelot_em.errors import InvalidInputError, StorageError
from ocelot_em.model.options import MergeOptions


def even(text):
    if int(text) % 2:
        raise argparse.ArgumentTypeError(f"expected an even number, got {text}")
    return int(text)


def make_parser():
    """A command line with one option of every kind that ours has."""
    parser = argparse.ArgumentParser(prog="ocelot", allow_abbrev=False)
    parser.add_argument("--verbose", action="store_true")
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("merge", allow_abbrev=False)
    p.add_argument("inputs", nargs="+")
    p.add_argument("--output", required=True)
    p.add_argument("--threads", type=int)
    p.add_argument("--pairs", type=even)
    p.add_argument("--pixel-size", type=float)
    p.add_argument("--counts", type=int, nargs="+", default=[])
    p.add_argument("--shape", type=int, nargs=2)
    p.add_argument("--names", nargs="*", default=["A"])
    p.add_argument("--port", type=int, nargs="?", choices=(80, 8080))
    p.add_argument("--nan", choices=("raise", "mask"), default="raise")
    p.add_argument("--exposure")
    p.add_argument("--overwrite", action="store_true")
    p.add_argument("--no-check", dest="check", action="store_false")
    p.add_argument("--add", action="append", choices=("a=1", "a=2", "b=3"))
    p.add_argument("--more", action="extend", nargs="+", type=int, default=[1])
    p.add_argument("--loud", action="count")
    add_config_option(p)
    p.set_defaults(command="what merge does")
    p = commands.add_parser("info", allow_abbrev=False)
    p.add_argument("store")
    add_config_option(p)
    return parser


@pytest.fixture
def config(tmp_path):
    """Write a file; its path."""

    def write(content, name="RUN.yaml"):
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        return str(path)

    return write


def parsed(*arguments):
    return parse_arguments(make_parser(), arguments)


def problems_of(path, command="merge"):
    """What is wrong with a file, without its name, which every problem begins with."""
    with pytest.raises(InvalidInputError) as refused:
        parsed(command, "--config", path)
    assert all(problem.startswith(f"{path}: ") for problem in refused.value.problems)
    return [problem.removeprefix(f"{path}: ") for problem in refused.value.problems]


EVERYTHING = """\
# a run
inputs: [A.zarr, "B C.zarr"]
output: OUT.zarr
threads: 8
pixel_size: 1e-3
counts:
  - 100
  - 1_000
shape: [30, 40]
names: []
port: 8080
nan: mask
exposure: 00
overwrite: true
no-check: true
add: [a=1, b=3]
more: [7]
"""


def test_everything_from_a_file(config):
    found = parsed("merge", "--config", config(EVERYTHING))
    assert vars(found) == {
        "verbose": False,
        "command": "what merge does",
        "config": config(EVERYTHING),
        "inputs": ["A.zarr", "B C.zarr"],
        "output": "OUT.zarr",
        "threads": 8,
        "pairs": None,
        "pixel_size": 0.001,
        "counts": [100, 1000],
        "shape": [30, 40],
        "names": [],
        "port": 8080,
        "nan": "mask",
        "exposure": "00",
        "overwrite": True,
        "check": False,
        "add": ["a=1", "b=3"],
        "more": [7],
        "loud": None,
    }


@pytest.mark.parametrize("place", ["first", "last", "between", "joined"])
def test_the_command_line_wins(config, place):
    path = config(EVERYTHING)
    given_there = ["X.zarr", "--output", "Y.zarr", "--threads", "2", "--counts", "7", "--nan=raise"]
    arguments = {
        "first": ["--config", path, *given_there],
        "last": [*given_there, "--config", path],
        "between": [*given_there[:3], "--config", path, *given_there[3:]],
        "joined": [*given_there, f"--config={path}"],
    }[place]
    found = parsed("--verbose", "merge", *arguments)
    assert (found.inputs, found.output, found.threads) == (["X.zarr"], "Y.zarr", 2)
    assert (found.counts, found.nan, found.shape) == ([7], "raise", [30, 40])
    assert found.verbose


def test_the_command_line_wins_with_the_value_of_the_default(config):
    path = config("inputs: [A]\noutput: B\nnan: mask\n")
    assert parsed("merge", "--nan", "raise", "--config", path).nan == "raise"


def test_the_command_line_replaces_what_is_appended(config):
    path = config("inputs: [A]\noutput: B\nadd: [a=1]\nmore: [2]\n")
    found = parsed("merge", "--config", path, "--add", "a=2", "--add", "b=3", "--more", "4", "5")
    assert (found.add, found.more) == (["a=2", "b=3"], [4, 5])


def test_positionals_after_the_options(config):
    path = config("inputs: [A]\noutput: B\n")
    found = parsed("merge", "--config", path, "--threads", "3", "X", "Y")
    assert (found.inputs, found.threads) == (["X", "Y"], 3)
    found = parsed("merge", "--overwrite", "--config", path, "--", "-X")
    assert found.inputs == ["-X"]


def test_one_positional(config):
    assert parsed("info", "--config", config("store: M.zarr")).store == "M.zarr"
    assert parsed("info", "X", "--config", config("store: M.zarr")).store == "X"


def test_what_the_file_has_not_is_still_required(config, capsys):
    with pytest.raises(SystemExit):
        parsed("merge", "--config", config("threads: 3"))
    assert "the following arguments are required: inputs, --output" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parsed("merge", "--config", config("inputs: [A]"))
    assert "the following arguments are required: --output" in capsys.readouterr().err


def test_later_files_win(config):
    one = config("inputs: [A]\noutput: B\nthreads: 1\n", "ONE.yaml")
    two = config("threads: 2\n", "TWO.yaml")
    assert parsed("merge", "--config", one, "--config", two).threads == 2
    assert parsed("merge", "--config", two, "--config", one).threads == 1


def test_no_file(capsys):
    assert parsed("merge", "A", "--output", "B").config is None
    with pytest.raises(SystemExit):
        parsed("merge", "A", "--output", "B", "--config")
    assert "--config: expected one argument" in capsys.readouterr().err


def test_an_empty_mapping_changes_nothing(config):
    without = vars(parsed("merge", "A", "--output", "B"))
    with_it = vars(parsed("merge", "A", "--output", "B", "--config", config("{}")))
    assert with_it | {"config": None} == without


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1.0e+3", 1000.0), ("3", 3.0), ("-.5", -0.5), ("'2'", 2.0), ("1E3", 1000.0)],
)
def test_numbers(config, text, value):
    found = parsed("merge", "--config", config(f"inputs: [A]\noutput: B\npixel-size: {text}\n"))
    assert found.pixel_size == value
    assert type(found.pixel_size) is float


@pytest.mark.parametrize(
    "text",
    ["8:30", "yes", "no", "on", "00", "0x10", "1e3", "2026-01-02", "1_000", "3.10", "true"],
)
def test_texts_are_what_stands_there(config, text):
    """Of most of them YAML 1.1 makes something else."""
    found = parsed("merge", "--config", config(f"inputs: [A]\noutput: B\nexposure: {text}\n"))
    assert found.exposure == text


def test_decimal_numbers_stay_decimal(config):
    """YAML 1.1 has ``010`` for 8, and ``1:30`` for 90."""
    path = config("inputs: [A]\noutput: B\nthreads: 010\n")
    assert parsed("merge", "--config", path).threads == 10
    assert problems_of(config("threads: 1:30")) == [
        "line 1: threads: expected a whole number, got '1:30'"
    ]


@pytest.mark.parametrize("text", ["true", "True", "TRUE", "yes", "Yes", "on", "ON"])
def test_flags_that_are_set(config, text):
    path = config(f"inputs: [A]\noutput: B\noverwrite: {text}\nno-check: {text}\n")
    found = parsed("merge", "--config", path)
    assert (found.overwrite, found.check) == (True, False)


@pytest.mark.parametrize("text", ["false", "False", "no", "off", "OFF"])
def test_flags_that_are_not_set(config, text):
    path = config(f"inputs: [A]\noutput: B\noverwrite: {text}\nno-check: {text}\n")
    found = parsed("merge", "--config", path)
    assert (found.overwrite, found.check) == (False, True)
    assert parsed("merge", "--config", path, "--overwrite").overwrite


def test_all_problems_at_once(config):
    content = """\
inputs: A.zarr
output:
thread: 3
pixel-size: yes
counts: [1, two, 3.0]
shape: [1, 2, 3]
nan: MASK
overwrite: 1
pairs: 3
exposure: [E]
names: {a: 1}
port: 81
zzz: 1
pixel_size: 2
config: MORE.yaml
command: rm
loud: 1
add: [a=1, b]
help: true
no: 1
counts2: []
"""
    everything = (
        "add counts exposure inputs more names nan no-check output overwrite pairs pixel-size port "
        "shape threads"
    )
    found = problems_of(config(content))
    assert found[:12] == [
        "line 1: inputs: expected a list of one or more values, as in [A, B], got 'A.zarr'",
        "line 2: output: expected text, got nothing; leave the key out for the default",
        "line 3: thread: 'ocelot merge' has no such option; did you mean threads?",
        "line 4: pixel-size: expected a number, got 'yes'",
        "line 5: counts: value 2: expected a whole number, got 'two'",
        "line 5: counts: value 3: expected a whole number, got '3.0'",
        "line 6: shape: expected a list of 2 values, as in [A, B], got a list of 3",
        "line 7: nan: expected one of raise, mask, got 'MASK'",
        "line 8: overwrite: expected true or false, got '1'",
        "line 9: pairs: expected an even number, got 3",
        "line 10: exposure: expected text, got a list of 1",
        "line 11: names: expected a list of values, as in [A, B], got a mapping",
    ]
    assert found[12:15] == [
        "line 12: port: expected one of 80, 8080, got 81",
        "line 13: zzz: 'ocelot merge' has no such option; expected one of "
        + ", ".join(everything.split()),
        "line 14: pixel_size: is there twice, first on line 4",
    ]
    assert found.pop(18) == "line 18: add: value 2: expected one of a=1, a=2, b=3, got 'b'"
    assert [problem.partition(";")[0] for problem in found[15:]] == [
        f"line {line}: {key}: 'ocelot merge' has no such option"
        for line, key in [
            *((15, "config"), (16, "command"), (17, "loud"), (19, "help"), (20, "no")),
            (21, "counts2"),
        ]
    ]
    assert found[-1].endswith("did you mean counts?")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("overwrite: 'true'", "line 1: overwrite: expected true or false, got 'true'"),
        ("overwrite: y", "line 1: overwrite: expected true or false, got 'y'"),
        ("overwrite:", "line 1: overwrite: expected true or false, got nothing"),
        ("overwrite: [true]", "line 1: overwrite: expected true or false, got a list of 1"),
        ("threads: ''", "line 1: threads: expected a whole number, got ''"),
        ("threads: {}", "line 1: threads: expected a whole number, got a mapping"),
        ("pixel-size: .inf", "line 1: pixel-size: expected a number, got '.inf'"),
        (
            "inputs: []",
            "line 1: inputs: expected a list of one or more values, as in [A, B], got a list of 0",
        ),
        (
            "inputs: [A, ~]",
            "line 1: inputs: value 2: expected text, got nothing; leave the key out for the "
            "default",
        ),
        ("threads: 1\nthreads: 1", "line 2: 'threads': is there twice, first on line 1"),
        ("threads: &a 1\nport: *a", "line 2: expected no aliases, got *a; write the value out"),
        (
            "threads: !!int 1",
            "line 1: expected no tags, got tag:yaml.org,2002:int; write text between quotation "
            "marks",
        ),
        ("[threads, 1]", "expected options and their values, got list"),
        ("", "expected options and their values, got nothing"),
    ],
)
def test_one_problem(config, content, problem):
    assert problems_of(config(content)) == [problem]


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "PIPE.yaml")
    for path in (tmp_path / "NONE.yaml", tmp_path, tmp_path / "PIPE.yaml"):
        assert problems_of(str(path)) == ["expected options and their values, got no file"]


def test_a_byte_order_mark(config):
    assert parsed("info", "--config", config("\ufeffstore: M")).store == "M"


def test_nothing_is_applied_when_something_is_wrong(config):
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1, required=True)
    with pytest.raises(InvalidInputError):
        apply_config(parser, config("threads: 3\nx: 1\n"))
    assert parser.get_default("threads") == 1
    with pytest.raises(SystemExit):
        parser.parse_args([])


def test_paths_are_relative_to_the_current_folder(config, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config("inputs: [A.zarr]\noutput: ../B.zarr\n")
    found = parsed("merge", "--config", "../RUN.yaml")
    assert (found.inputs, found.output) == (["A.zarr"], "../B.zarr")


# the real commands


def command(name):
    (commands,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices[name]


def merge_options(found):
    """The options of a merge, checked, of what was parsed."""
    return MergeOptions.parse(
        {k: v for k, v in vars(found).items() if k in MergeOptions.model_fields}
    )


def test_merge_from_a_file(config):
    parser = command("merge")
    apply_config(
        parser,
        config(
            "inputs: [A.zarr, B.zarr]\noutput: M.zarr\ncluster: local\nworkers: 2\n"
            "memory-limit: 800MB\nrmm_pool_size: 1000000000\ndry-run: true\nerode: 4\n"
        ),
    )
    found = parser.parse_args([])
    assert (found.inputs, found.output, found.dry_run) == (["A.zarr", "B.zarr"], "M.zarr", True)
    assert merge_options(found) == MergeOptions(
        cluster="local", workers=2, memory_limit="800MB", rmm_pool_size=10**9, erode=4
    )


def test_the_options_of_a_merge_are_read_as_they_were_written(tmp_path):
    options = MergeOptions(tile_size=256, memory_limit="2 GiB", overwrite=True, threads=3, erode=1)
    run = {"inputs": [Path("A.zarr"), "s3://bucket/B"], "output": Path("M.zarr")}
    write_config(tmp_path / "RUN.yaml", run | options.model_dump())
    assert (
        (tmp_path / "RUN.yaml")
        .read_text()
        .startswith(
            "inputs:\n- A.zarr\n- s3://bucket/B\noutput: M.zarr\ntile-size: 256\n"
            "memory-limit: 2147483648\nnan: raise\n"
        )
    )
    parser = command("merge")
    apply_config(parser, tmp_path / "RUN.yaml")
    found = parser.parse_args([])
    assert (found.inputs, found.output) == (["A.zarr", "s3://bucket/B"], "M.zarr")
    assert merge_options(found) == options


# writing


class Colour(StrEnum):
    RED = "red"


def test_values_of_every_kind(tmp_path):
    write_config(
        tmp_path / "R.yaml",
        {
            "inputs": ("A",),
            "output": Path("Ångström.zarr"),
            "threads": 3,
            "pixel_size": 1e-10,
            "counts": [],
            "names": ["yes", "8:30"],
            "exposure": Colour.RED,
            "overwrite": False,
            "no_check": True,
            "port": None,
            "add": {"a": (1, Path("2")), "b": None, "c": 3.0, "d": ()},
            "more": {"e": None},
        },
    )
    assert (tmp_path / "R.yaml").read_text(encoding="utf-8") == (
        "inputs:\n- A\noutput: Ångström.zarr\nthreads: 3\npixel-size: 1.0e-10\n"
        "names:\n- 'yes'\n- '8:30'\nexposure: red\noverwrite: false\nno-check: true\nadd:\n"
        "- a=1\n- a=2\n- c=3.0\n"
    )
    text = (tmp_path / "R.yaml").read_text(encoding="utf-8").replace("c=3.0", "b=3")
    (tmp_path / "R.yaml").write_text(text, encoding="utf-8")
    found = parsed("merge", "--config", str(tmp_path / "R.yaml"))
    assert (found.add, found.more) == (["a=1", "a=2", "b=3"], [1])
    assert (found.output, found.pixel_size, found.names) == (
        "Ångström.zarr",
        1e-10,
        ["yes", "8:30"],
    )
    assert (found.counts, found.port, found.overwrite, found.check) == ([], None, False, False)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@example(["\x85", "a\rb", "\u2028", "a\x85 b\n"], "\n", None, None, False)
@given(
    st.lists(texts, min_size=1, max_size=3),
    texts | st.sampled_from(["null", "~", "", "true", "1e3", "a: b", "- a", "#", "\n", "="]),
    st.none() | st.integers(),
    st.none() | st.floats(),
    st.booleans(),
)
def test_what_was_written_is_read(tmp_path_factory, inputs, output, threads, pixel_size, overwrite):
    path = tmp_path_factory.mktemp("w") / "R.yaml"
    options = {"inputs": inputs, "output": output, "threads": threads, "pixel_size": pixel_size}
    write_config(path, options | {"overwrite": overwrite})
    found = vars(parsed("merge", "--config", str(path)))
    assert found["overwrite"] is overwrite
    assert (found["inputs"], found["output"], found["threads"]) == (inputs, output, threads)
    if pixel_size is None or not math.isnan(pixel_size):
        assert found["pixel_size"] == pixel_size
    else:
        assert math.isnan(found["pixel_size"])


def test_very_long_texts_are_read_again(tmp_path):
    run = {"inputs": ["x" * 4000, "a b " * 2000 + "c"], "output": "B"}
    write_config(tmp_path / "R.yaml", run)
    assert parsed("merge", "--config", str(tmp_path / "R.yaml")).inputs == run["inputs"]


def test_what_cannot_be_written(tmp_path):
    path = tmp_path / "R.yaml"
    path.write_text("what was there")
    with pytest.raises(InvalidInputError) as refused:
        write_config(
            path,
            {
                "a": {"b": b"1"},
                "b": [1, None],
                "c": "\udcff",
                "d": b"x",
                "e_f": 1,
                "e-f": 2,
                "g": 1,
            },
        )
    assert refused.value.problems == (
        f"{path}: a: expected text, a number or a list of them, got b'1'",
        f"{path}: b: expected text, a number or a list of them, got None",
        f"{path}: c: expected text that is Unicode, got '\\udcff'",
        f"{path}: d: expected text, a number or a list of them, got b'x'",
        f"{path}: e-f: expected it once, got it as 'e-f', too",
    )
    assert path.read_text() == "what was there"
    with pytest.raises(StorageError, match=r"R\.yaml: cannot be written"):
        write_config(tmp_path / "none" / "R.yaml", {"a": 1})
