"""Options from a file: the same checks as on the command line, which wins; and files of runs."""

import math
import os
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ocelot_em import Simulation, simulate
from ocelot_em.cli import main as cli
from ocelot_em.cli.config_command import example as commented
from ocelot_em.cli.config_file import write_config
from ocelot_em.errors import InvalidInputError, StorageError
from ocelot_em.model.options import MergeOptions, SlurmJobs


@pytest.fixture
def config(tmp_path):
    """Write a file; its path."""

    def write(content, name="RUN.yaml"):
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        return str(path)

    return write


def parsed(*arguments):
    """The values of a command's options, of its models too."""
    _, outer, _ = cli.app.meta.parse_args(arguments, exit_on_error=False, print_error=False)
    _, bound = cli.parse(outer.args, outer.kwargs.get("config", ()))
    bound.apply_defaults()
    values = dict(bound.arguments)
    return values | dict(values.pop("options", ()))


def problems_of(path, command="merge"):
    """What is wrong with a file, without its name, which every problem begins with."""
    with pytest.raises(InvalidInputError) as refused:
        parsed(command, "--config", path)
    assert all(problem.startswith(f"{path}: ") for problem in refused.value.problems)
    return [problem.removeprefix(f"{path}: ") for problem in refused.value.problems]


def refusal(capsys, *arguments):
    """The message with which a command line is refused."""
    assert cli.run(arguments) == 2
    return capsys.readouterr().err


EVERYTHING = """\
# a run
inputs: [A.zarr, "B C.zarr"]
output: OUT.zarr
threads: 8
worker_timeout: 1e-3
memory-limit: 2 GiB
nan: mask
log: 00
overwrite: true
dry-run: false
slurm: [partition=cpu, directives=--gres=gpu:1, log_directory=8:30, directives=-x]
"""


def test_everything_from_a_file(config):
    found = parsed("merge", "--config", config(EVERYTHING))
    expected = MergeOptions(
        threads=8,
        worker_timeout=0.001,
        memory_limit=2**31,
        nan="mask",
        overwrite=True,
        slurm=SlurmJobs(partition="cpu", directives=("--gres=gpu:1", "-x"), log_directory="8:30"),
    )
    assert found == {
        "inputs": ["A.zarr", "B C.zarr"],
        "output": "OUT.zarr",
        "log": "00",
        "run_folder": None,
        "dry_run": False,
        **dict(expected),
    }


def test_options_with_several_values(config):
    found = parsed("simulate", "--config", config("directory: D\nshape: [30, 1_000]\n"))
    assert (found["directory"], found["shape"]) == ("D", (30, 1000))
    found = parsed(
        *("import", "--config"),
        config("files: [a, b]\noutput: R\ntotal-projections:\n  - 100\n  - 1_000\n"),
    )
    assert (found["files"], found["total_projections"]) == (["a", "b"], (100, 1000))


@pytest.mark.parametrize(
    "slurm", ["[partition=a, directives=x, cores=3]", "{partition: a, directives: x, cores: 3}"]
)
def test_options_inside_options(config, slurm):
    path = config(f"inputs: [A]\noutput: B\nslurm: {slurm}\n")
    jobs = SlurmJobs(partition="a", directives=("x",), cores=3)
    assert parsed("merge", "--config", path)["slurm"] == jobs
    # The command line replaces them all.
    found = parsed("merge", "--config", path, "--slurm", "partition=b", "--slurm=cores=4")
    assert found["slurm"] == SlurmJobs(partition="b", cores=4)
    found = parsed("merge", "--config", path, "--slurm.log-directory", "d")
    assert found["slurm"] == SlurmJobs(log_directory="d")


@pytest.mark.parametrize("place", ["first", "last", "between", "joined"])
def test_the_command_line_wins(config, place):
    path = config(EVERYTHING)
    given_there = ["X.zarr", "--output", "Y.zarr", "--threads", "2", "--nan=raise"]
    arguments = {
        "first": ["--config", path, *given_there],
        "last": [*given_there, "--config", path],
        "between": [*given_there[:3], "--config", path, *given_there[3:]],
        "joined": [*given_there, f"--config={path}"],
    }[place]
    found = parsed("--verbose", "merge", *arguments)
    assert (found["inputs"], found["output"], found["threads"]) == (["X.zarr"], "Y.zarr", 2)
    assert (found["nan"], found["overwrite"]) == ("raise", True)


def test_the_command_line_replaces_lists(config):
    path = config("files: [a]\noutput: R\ntotal-projections: [1, 2]\n")
    found = parsed("import", "--config", path, "--total-projections", "4", "5", "6")
    assert found["total_projections"] == (4, 5, 6)


def test_positionals_after_the_options(config):
    path = config("inputs: [A]\noutput: B\n")
    found = parsed("merge", "--config", path, "--threads", "3", "X", "Y")
    assert (found["inputs"], found["threads"]) == (["X", "Y"], 3)
    found = parsed("merge", "--overwrite", "--config", path, "--", "-X")
    assert found["inputs"] == ["-X"]


def test_one_positional(config):
    assert parsed("info", "--config", config("store: M.zarr"))["store"] == "M.zarr"
    assert parsed("info", "X", "--config", config("store: M.zarr"))["store"] == "X"


def test_what_the_file_has_not_is_still_required(config, capsys):
    assert "INPUTS is required" in refusal(capsys, "merge", "--config", config("output: B"))
    assert "--output is required" in refusal(capsys, "merge", "--config", config("inputs: [A]"))


def test_later_files_win(config):
    one = config("inputs: [A]\noutput: B\nthreads: 1\nslurm: [cores=1]\n", "ONE.yaml")
    two = config("threads: 2\nslurm: [memory=2GB]\n", "TWO.yaml")
    found = parsed("merge", "--config", one, "--config", two)
    assert (found["threads"], found["slurm"]) == (2, SlurmJobs(memory="2GB"))
    found = parsed("merge", "--config", two, "--config", one)
    assert (found["threads"], found["slurm"]) == (1, SlurmJobs(cores=1))


def test_a_file_is_of_one_command_line_only(config):
    assert parsed("merge", "--config", config(EVERYTHING))["threads"] == 8
    assert parsed("merge", "A", "--output", "B")["threads"] is None


def test_no_file(capsys):
    message = refusal(capsys, "merge", "A", "--output", "B", "--config")
    assert "--config: expected a value" in message


def test_an_empty_mapping_changes_nothing(config):
    without = parsed("merge", "A", "--output", "B")
    assert parsed("merge", "A", "--output", "B", "--config", config("{}")) == without


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1.0e+3", 1000.0), ("3", 3.0), ("-.5", -0.5), ("'2'", 2.0), ("1E3", 1000.0)],
)
def test_numbers(config, text, value):
    found = parsed("import", "--config", config(f"files: [A]\noutput: B\npixel-size: {text}\n"))
    assert found["pixel_size_angstrom"] == value
    assert type(found["pixel_size_angstrom"]) is float


@pytest.mark.parametrize(
    "text",
    ["8:30", "yes", "no", "on", "00", "0x10", "1e3", "2026-01-02", "1_000", "3.10", "true", "none"],
)
def test_texts_are_what_stands_there(config, text):
    """Of most of them YAML 1.1 makes something else."""
    path = config(f"store: M\noutput: B\nto: mrc\nexposure: {text}\n")
    assert parsed("export", "--config", path)["exposure"] == text


def test_decimal_numbers_stay_decimal(config):
    """YAML 1.1 has ``010`` for 8, and ``1:30`` for 90."""
    path = config("inputs: [A]\noutput: B\nthreads: 010\n")
    assert parsed("merge", "--config", path)["threads"] == 10
    assert problems_of(config("threads: 1:30")) == [
        "line 1: threads: expected a whole number, got '1:30'"
    ]


@pytest.mark.parametrize("text", ["true", "True", "TRUE", "yes", "Yes", "on", "ON"])
def test_flags_that_are_set(config, text):
    path = config(f"inputs: [A]\noutput: B\noverwrite: {text}\ndry-run: {text}\n")
    found = parsed("merge", "--config", path)
    assert (found["overwrite"], found["dry_run"]) == (True, True)


@pytest.mark.parametrize("text", ["false", "False", "no", "off", "OFF"])
def test_flags_that_are_not_set(config, text):
    path = config(f"inputs: [A]\noutput: B\noverwrite: {text}\ndry-run: {text}\n")
    found = parsed("merge", "--config", path)
    assert (found["overwrite"], found["dry_run"]) == (False, False)
    assert parsed("merge", "--config", path, "--overwrite")["overwrite"]


def test_all_problems_at_once(config):
    content = """\
inputs: A.zarr
output:
thread: 3
worker-timeout: yes
tile-size: 0
memory_limit: much
nan: MASK
overwrite: 1
log: [E]
run-folder: {a: 1}
slurm: [cores=x, partion=a, cores]
zzz: 1
worker_timeout: 2
config: MORE.yaml
verbose: true
merge: rm
help: true
options: 1
slurm.cores: 1
"""
    everything = ", ".join(
        sorted([*("inputs", "output", "log", "run-folder", "dry-run"), *MergeOptions.model_fields])
    ).replace("_", "-")
    found = problems_of(config(content))
    assert found[:10] == [
        "line 1: inputs: expected a list of one or more values, as in [A, B], got 'A.zarr'",
        "line 2: output: expected a value, got nothing; leave the key out for the default",
        "line 3: thread: 'ocelot merge' has no such option; did you mean threads?",
        "line 4: worker-timeout: expected a number, got 'yes'",
        "line 5: tile-size: expected at least 1, got '0'",
        "line 6: memory_limit: expected a size such as 800MB or 2GiB, got 'much'",
        "line 7: nan: expected 'raise' or 'mask', got 'MASK'",
        "line 8: overwrite: expected true or false, got '1'",
        "line 9: log: expected a value, got a list of 1",
        "line 10: run-folder: expected a value, got a mapping",
    ]
    assert found[10:13] == [
        "line 11: slurm: expected options and their values, got a list of 3",
        f"line 12: zzz: 'ocelot merge' has no such option; expected one of {everything}",
        "line 13: worker_timeout: given twice, first on line 4",
    ]
    assert [problem.partition(";")[0] for problem in found[13:]] == [
        f"line {line}: {key}: 'ocelot merge' has no such option"
        for line, key in enumerate(
            ("config", "verbose", "merge", "help", "options", "slurm.cores"), 14
        )
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("overwrite: 'true'", "line 1: overwrite: expected true or false, got 'true'"),
        ("overwrite: y", "line 1: overwrite: expected true or false, got 'y'"),
        ("overwrite:", "line 1: overwrite: expected true or false, got nothing"),
        ("overwrite: [true]", "line 1: overwrite: expected true or false, got a list of 1"),
        ("threads: ''", "line 1: threads: expected a whole number, got ''"),
        ("threads: {}", "line 1: threads: expected a value, got a mapping"),
        ("worker-timeout: .inf", "line 1: worker-timeout: expected a number, got '.inf'"),
        (
            "inputs: []",
            "line 1: inputs: expected a list of one or more values, as in [A, B], got a list of 0",
        ),
        (
            "inputs: [A, ~]",
            "line 1: inputs: value 2: expected a value, got nothing; leave the key out for the "
            "default",
        ),
        ("slurm: 3", "line 1: slurm: expected options and their values, got '3'"),
        ("slurm: [cores=x]", "line 1: slurm: cores: expected a whole number, got 'x'"),
        (
            "slurm: {partion: x}",
            "line 1: slurm: partion: 'slurm' has no such option; did you mean partition?",
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
        (
            "# threads: 1",
            "expected options and their values, got only comments; remove '# ' before a line to "
            "use it",
        ),
    ],
)
def test_one_problem(config, content, problem):
    assert problems_of(config(content)) == [problem]


@pytest.mark.parametrize(
    ("command", "content", "problem"),
    [
        ("simulate", "shape: [1, 2, 3]", "expected a list of 2 values, as in [A, B], got a list"),
        ("simulate", "shape: [1, x]", "value 2: expected a whole number, got 'x'"),
        ("import", "total-projections: [1, two]", "value 2: expected a whole number, got 'two'"),
        ("export", "to: tiff", "expected 'mrc', 'hdf5', 'ome-zarr'"),
    ],
)
def test_problems_of_other_commands(config, command, content, problem):
    (found,) = problems_of(config(content), command)
    assert found.startswith(f"line 1: {content.partition(':')[0]}: {problem}")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "PIPE.yaml")
    for path in (tmp_path / "NONE.yaml", tmp_path, tmp_path / "PIPE.yaml"):
        assert problems_of(str(path)) == ["expected options and their values, got no file"]


def test_a_byte_order_mark(config):
    assert parsed("info", "--config", config("\ufeffstore: M"))["store"] == "M"


def test_paths_are_relative_to_the_current_folder(config, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config("inputs: [A.zarr]\noutput: ../B.zarr\n")
    found = parsed("merge", "--config", "../RUN.yaml")
    assert (found["inputs"], found["output"]) == (["A.zarr"], "../B.zarr")


# writing


def test_the_options_of_a_merge_are_read_as_they_were_written(tmp_path):
    jobs = SlurmJobs(cores=3, directives=("--gres=gpu:1", "-x"))
    options = MergeOptions(
        tile_size=256, memory_limit="2 GiB", overwrite=True, threads=3, erode=1, slurm=jobs
    )
    run = {"inputs": ["A.zarr", "s3://bucket/B"], "output": "M.zarr"}
    write_config(tmp_path / "RUN.yaml", run | options.model_dump())
    text = (tmp_path / "RUN.yaml").read_text()
    assert text.startswith(
        "inputs:\n- A.zarr\n- s3://bucket/B\noutput: M.zarr\ntile-size: 256\n"
        "memory-limit: 2147483648\n"
    )
    assert "nan: raise\n" in text
    assert text.endswith("slurm:\n  cores: 3\n  directives:\n  - --gres=gpu:1\n  - -x\n")
    found = parsed("merge", "--config", str(tmp_path / "RUN.yaml"))
    assert (found["inputs"], found["output"]) == (["A.zarr", "s3://bucket/B"], "M.zarr")
    assert {name: found[name] for name in MergeOptions.model_fields} == dict(options)


def test_values_of_every_kind(tmp_path):
    write_config(
        tmp_path / "R.yaml",
        {
            "inputs": ("A",),
            "output": "Ångström.zarr",
            "worker_timeout": 1e-10,
            "counts": [],
            "names": ["yes", "8:30"],
            "overwrite": False,
            "dry_run": True,
            "port": None,
            "slurm": {"a_b": (1, "2"), "b": None, "d": ()},
            "more": {"e": None},
        },
    )
    assert (tmp_path / "R.yaml").read_text(encoding="utf-8") == (
        "inputs:\n- A\noutput: Ångström.zarr\nworker-timeout: 1.0e-10\n"
        "names:\n- 'yes'\n- '8:30'\noverwrite: false\ndry-run: true\nslurm:\n"
        "  a-b:\n  - 1\n  - '2'\n"
    )


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)


@example(["\x85", "a\rb", "\u2028", "a\x85 b\n"], "\n", None, 1.0, False)
@given(
    st.lists(texts, min_size=1, max_size=3),
    texts | st.sampled_from(["null", "~", "", "true", "1e3", "a: b", "- a", "#", "\n", "="]),
    st.none() | st.integers(1, 10_000),
    st.floats(1e-300, 1e7),
    st.booleans(),
)
def test_what_was_written_is_read(tmp_path_factory, inputs, output, threads, seconds, overwrite):
    path = tmp_path_factory.mktemp("w") / "R.yaml"
    options = {"inputs": inputs, "output": output, "threads": threads, "worker_timeout": seconds}
    write_config(path, options | {"overwrite": overwrite})
    found = parsed("merge", "--config", str(path))
    assert found["overwrite"] is overwrite
    assert (found["inputs"], found["output"], found["threads"]) == (inputs, output, threads)
    assert math.isclose(found["worker_timeout"], seconds, rel_tol=0)


def test_very_long_texts_are_read_again(tmp_path):
    run = {"inputs": ["x" * 4000, "a b " * 2000 + "c"], "output": "B"}
    write_config(tmp_path / "R.yaml", run)
    assert parsed("merge", "--config", str(tmp_path / "R.yaml"))["inputs"] == run["inputs"]


def test_what_cannot_be_written(tmp_path):
    path = tmp_path / "R.yaml"
    path.write_text("what was there")
    with pytest.raises(InvalidInputError, match="expected text that is Unicode, got"):
        write_config(path, {"a": 1, "c": "\udcff"})
    assert path.read_text() == "what was there"
    with pytest.raises(StorageError, match=r"R\.yaml: cannot be written"):
        write_config(path / "R.yaml", {"a": 1})


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_example_of_a_command_has_all_options_with_their_defaults(tmp_path, command):
    lines = list(commented(cli.app, command))
    written = [line.removeprefix("# ") for line in lines if re.match("# [a-z]", line)]
    options = cli.app[command].assemble_argument_collection()
    names = {o.name.removeprefix("--").lower() for o in options if o.parse and o.name != "*"}
    assert {line.partition(":")[0] for line in written} == {n.partition(".")[0] for n in names}
    assert all(line.startswith("#") or not line for line in lines)
    defaults = [line for line in written if not re.search(r":( \[?[A-Z_]+\]?)?$", line)]
    (tmp_path / "c.yaml").write_text("\n".join(defaults))
    words = {"--to": ["--to", "mrc"], "--shape": ["--shape", "8", "8"]}
    needed = [o.name for o in options if o.field_info.required and o.name != "*"]
    given = [word for name in needed for word in words.get(name, [])]
    given += ["X"] * sum(not name.startswith("--") for name in needed)
    given += ["--output", "X"] * ("--output" in needed)
    parsed(command, *given, *["--config", str(tmp_path / "c.yaml")][: 2 * bool(defaults)])


def test_an_example_is_written_once(tmp_path, capsys):
    path = str(tmp_path / "m.yaml")
    assert cli.run(["config", "merge", "--output", path]) == 0
    assert (tmp_path / "m.yaml").read_text() == "\n".join(commented(cli.app, "merge")) + "\n"
    assert cli.run(["config", "import", "-o", path]) == 2
    assert cli.run(["config", "import", "-o", path, "--overwrite"]) == 0
    capsys.readouterr()
    assert cli.run(["config", "impor"]) == 2
    assert "unknown command 'impor'; did you mean import?" in capsys.readouterr().err
    assert cli.run(["config"]) == 0
    assert capsys.readouterr().out == "\n".join(commented(cli.app, "merge")) + "\n"


def test_the_configuration_of_a_run_folder_works_from_anywhere(tmp_path, monkeypatch, capsys):
    simulate(tmp_path / "a", Simulation((96, 112), 2, 1, 0))
    monkeypatch.chdir(tmp_path / "a")
    words = ["merge", "RUN.zarr", "--output", "M.zarr", "--run-folder", "run", "--log", "log.jsonl"]
    assert cli.run(words) == 0
    monkeypatch.chdir(tmp_path)
    assert cli.run(["merge", "--config", "a/run/config.yaml"]) == 0
    assert "all tiles are already done" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
