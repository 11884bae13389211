"""YAML files that people wrote: plain values, and everything that YAML lets slip refused."""

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from ocelot_em.errors import InvalidInputError
from ocelot_em.io.yaml_file import MAX_DEPTH, MAX_NBYTES, MAX_UNQUOTED, read_yaml


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "F.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal_of(path: Path) -> tuple[str, ...]:
    """Problems of a file, each of which begins with its name, without that name."""
    with pytest.raises(InvalidInputError) as refused:
        read_yaml(path, "a list of things to do")
    assert all(problem.startswith(f"{path}: ") for problem in refused.value.problems)
    return tuple(problem.removeprefix(f"{path}: ") for problem in refused.value.problems)


def test_plain_values(tmp_path):
    path = written(
        tmp_path,
        "# what is there\n"
        'quoted: "00"\nnumber: 3\nfraction: 2.5\nexponent: 1e4\nflow: {a: [1, x], b: null}\n'
        "block:\n  - yes\n  - 2026-01-02\nlong: |\n  one\n  two\nÅngström: é\n",
    )
    content = read_yaml(path, "x")
    assert content == yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["quoted"] == "00"
    assert content["exponent"] == "1e4"  # YAML 1.1 wants 1.0e+4
    assert read_yaml(str(path), "x") == content


@pytest.mark.parametrize(
    "content", ["a: 1", "\ufeffa: 1", "a: 1\r\n", "---\na: 1\n...\n", "{a: 1}"]
)
def test_the_same_written_otherwise(tmp_path, content):
    assert read_yaml(written(tmp_path, content), "x") == {"a": 1}


def test_what_is_no_mapping(tmp_path):
    for content, got in (
        ("", "nothing"),
        ("# nothing yet\n", "only comments; remove '# ' before a line to use it"),
        ("---\n", "nothing"),
        ("- a\n- b\n", "list"),
        ("a", "str"),
        ("3", "int"),
    ):
        (problem,) = refusal_of(written(tmp_path, content))
        assert problem == f"expected a list of things to do, got {got}"


@pytest.mark.parametrize(
    ("content", "problems"),
    [
        ("a: 1\nb: 2\na: 1\n", ["line 3: 'a': is there twice, first on line 1"]),
        ("{a: 1, 'a': 2}", ["line 1: 'a': is there twice, first on line 1"]),
        ("x:\n  - y:\n      a: 1\n      a: 2\n", ["line 4: 'a': is there twice, first on line 3"]),
        ("1: a\n1: b\n", ["line 2: '1': is there twice, first on line 1"]),
        ("? a\n? a\n", ["line 2: 'a': is there twice, first on line 1"]),
        (
            "a: 1\na: 2\na: 3\n" + "x:\n" * 9,
            [
                f"line {line}: {key!r}: is there twice, first on line {first}"
                for line, key, first in [
                    *((line, "a", 1) for line in (2, 3)),
                    *((line, "x", 4) for line in range(5, 13)),
                ]
            ],
        ),
        ("<<: {a: 1}\n", ["line 1: expected no <<; write the keys out"]),
        ("a: 2\n<<: [{a: 1}]\n", ["line 2: expected no <<; write the keys out"]),
    ],
)
def test_a_key_that_is_there_twice(tmp_path, content, problems):
    """YAML would take one of the values without a word; problems come in the file's order."""
    assert refusal_of(written(tmp_path, content)) == tuple(problems)


def test_equal_keys_of_different_mappings(tmp_path):
    content = read_yaml(written(tmp_path, "a: {a: 1}\nb:\n- {a: 1}\n- {a: 1}\n'<<': 3\n"), "x")
    assert content == {"a": {"a": 1}, "b": [{"a": 1}, {"a": 1}], "<<": 3}


def test_aliases(tmp_path):
    (problem,) = refusal_of(written(tmp_path, "a: &here [1]\nb:\n  c: *here\n"))
    assert problem == "line 3: expected no aliases, got *here; write the value out"
    assert read_yaml(written(tmp_path, "a: &here [1]\n"), "x") == {"a": [1]}


def test_a_bomb_of_aliases(tmp_path):
    """Of less than a kilobyte, which would become 10**20 values."""
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 20)]
    (problem,) = refusal_of(written(tmp_path, "\n".join(lines)))
    assert problem == "line 2: expected no aliases, got *l0; write the value out"


def test_an_alias_of_itself(tmp_path):
    (problem,) = refusal_of(written(tmp_path, "a: &a [*a]"))
    assert "expected no aliases" in problem


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object:os.system {}",
        "!!python/object/apply:os.mkdir [sprung]",
        "!!python/object/new:os.mkdir [sprung]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/tuple [1]",
        "!!binary eA==",
        "!!timestamp x",
        "!!bool x",
        "!!int ''",
        "!!float ''",
        "!!str 00",
        "!mine x",
        "! x",
    ],
)
def test_tags(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    (problem,) = refusal_of(written(tmp_path, f"a: 1\nb: {value}\n"))
    assert problem.startswith("line 2: expected no tags, got ")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "content",
    [
        "[" * 1_000_000,
        "a: " + "{a: " * 5000 + "1" + "}" * 5000,
        "".join(f"{' ' * n}-\n" for n in range(2000)),
        "".join(f"{' ' * n}a:\n" for n in range(2000)),
        "? " * 5000,
        "- " * 5000,
    ],
    ids=["open", "flow", "lists", "mappings", "keys", "a line"],
)
def test_values_that_are_nested_deeply(tmp_path, content):
    """They cost no time, nor the stack."""
    (problem,) = refusal_of(written(tmp_path, content))
    assert problem.endswith(f": expected values nested at most {MAX_DEPTH} deep, got deeper ones")


def test_values_that_are_nested_as_deeply_as_they_may(tmp_path):
    depth = MAX_DEPTH - 1
    found = read_yaml(written(tmp_path, "a: " + "[" * depth + "]" * depth), "x")["a"]
    for _ in range(depth - 1):
        (found,) = found
    assert found == []
    refusal_of(written(tmp_path, "a: " + "[" * (depth + 1) + "]" * (depth + 1)))


@pytest.mark.parametrize(
    "digits", ["0x" + "f" * 5000, "9" * 5000, "1" + ":0" * 4000, "0b" + "1" * 9999]
)
def test_numbers_without_end(tmp_path, digits):
    """Python refuses to print them, which is what errors do."""
    (problem,) = refusal_of(written(tmp_path, f"a: {digits}"))
    assert problem.startswith(f"line 1: expected at most {MAX_UNQUOTED} characters of a value, got")
    shorter = read_yaml(written(tmp_path, f"a: {digits[: MAX_UNQUOTED - 1]}"), "x")
    assert len(repr(shorter)) > 800


def test_long_texts(tmp_path):
    text = "x" * (2 * MAX_UNQUOTED)
    assert read_yaml(written(tmp_path, f'a: "{text}"\nb: |\n  {text}'), "x") == {
        "a": text,
        "b": text,
    }


@pytest.mark.parametrize(
    "content",
    [
        b"a: \x1b[0m",
        b"PK\x03\x04",
        b"a: [1",
        b"a: b: c",
        b"a: 1\n---\nb: 2\n",
        b"a: 2026-02-30",
        b"a: 0x_",
        b"a: 1" + b":0" * 900 + b".5",
        b"[a]: 1",
        b"{a: 1}: 1",
        b"%YAML 3.0\n---\na: 1",
        b"\ta: 1",
        b"a: @x",
        b'a: "\\ud800"',
        b'a: "open',
    ],
)
def test_what_cannot_be_read(tmp_path, content):
    (problem,) = refusal_of(written(tmp_path, content))
    assert problem.startswith("cannot be read as YAML: ")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff\xfea: 1", "expected text in UTF-8"),
        ("a: é".encode("latin-1"), "expected text in UTF-8"),
        ("a: é".encode("utf-16"), "expected text, got binary data"),
        (b"a: \x00", "expected text, got binary data"),
    ],
)
def test_what_is_no_text(tmp_path, content, problem):
    assert refusal_of(written(tmp_path, content))[0].startswith(problem)


def test_what_is_not_there(tmp_path):
    for path in (tmp_path / "NONE.yaml", tmp_path):
        assert refusal_of(path) == ("expected a list of things to do, got no file",)
    (problem,) = refusal_of(tmp_path / ("x" * 300))
    assert problem == "cannot be read: File name too long"


def test_what_has_no_end_is_not_read():
    (problem,) = refusal_of(Path("/dev/zero"))
    assert problem == "expected a list of things to do, got no file"


def test_more_values_than_anybody_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("ocelot_em.io.yaml_file.MAX_VALUES", 7)
    assert read_yaml(written(tmp_path, "a: [1, 2, 3, 4]"), "x") == {"a": [1, 2, 3, 4]}
    (problem,) = refusal_of(written(tmp_path, "a: [1, 2, 3, 4,\n 5]"))
    assert problem == "line 2: expected at most 7 values and keys, got more"


def test_a_huge_file_is_not_read(tmp_path, monkeypatch):
    path = written(tmp_path, "a: 1\n")
    with path.open("r+b") as file:
        file.truncate(MAX_NBYTES + 1)
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda _: pytest.fail("it was read"))
    (problem,) = refusal_of(path)
    assert problem == (
        "expected a list of things to do of at most 64,000,000 bytes, got 64,000,001"
    )


def test_without_the_c_library(tmp_path, monkeypatch):
    """PyYAML can be built without it; it is slower then, and no less strict."""
    monkeypatch.delattr(yaml, "CSafeLoader")
    assert read_yaml(written(tmp_path, "a: [1, {b: c}]"), "x") == {"a": [1, {"b": "c"}]}
    for content in ("a: *b", "a: !!int x", "[" * 1000, "a: 1\na: 2", "a: [", b"\xff", "a: \0", ""):
        refusal_of(written(tmp_path, content))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=9), plain, max_size=5), st.booleans())
def test_what_was_written_is_read(tmp_path_factory, values, flow):
    text = yaml.safe_dump(values, default_flow_style=flow, sort_keys=False)
    assert read_yaml(written(tmp_path_factory.mktemp("y"), text), "x") == values


pieces = st.sampled_from(
    [*"abz019.:-?[]{},#&*!|>'\"%@`~_+\n ", "\n  ", "- ", ": ", "<<", "!!", "!!int ", "0x", "1e3"]
)


@given(st.lists(pieces, max_size=30).map("".join) | st.text(max_size=30))
@example("a: 1:1.5e99")
def test_anything_is_a_mapping_or_a_clean_refusal(tmp_path_factory, text):
    path = written(tmp_path_factory.mktemp("y"), text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(InvalidInputError):
        repr(read_yaml(path, "x"))
