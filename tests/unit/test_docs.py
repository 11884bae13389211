"""What the documentation names is there: commands, options, files, headings, modules, numbers."""

import ast
import re
import shlex
from functools import cache
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

import pytest
import yaml
from cyclopts import CycloptsError

import ocelot_em
from ocelot_em.cli import exit_codes
from ocelot_em.cli import main as cli
from ocelot_em.errors import OcelotError
from ocelot_em.merge import memory_model, outcome
from ocelot_em.merge.stats import collected
from ocelot_em.model import maps
from ocelot_em.model import options as options_module
from ocelot_em.run import clusters as cluster
from ocelot_em.run import executors as execute
from ocelot_em.run import slurm
from ocelot_em.store import attributes as fmt
from ocelot_em.store import bucket, constants, lock, statistics_attributes

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "ocelot_em"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "docker").glob("*.md"),
        *PACKAGE.rglob("DESIGN.md"),
        ROOT / "tests" / "data" / "README.md",
    )
}
OF_OTHERS = {"--build-arg", "--gpus", "--gpus-per-node", "--ntasks", "--plugin", "--profile"}
OF_OTHERS |= {"--user", "--help"}
"""Options of other programs that are named without the program."""

TOP = {path.name for path in ROOT.iterdir()}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def prose(text):
    return BLOCK.sub("", text)


def spans(text):
    """What stands between backticks in a line."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def command_lines(text):
    """Whole commands of code blocks, fenced or indented."""
    fenced = "\n".join(block for language, block in BLOCK.findall(text) if language != "python")
    indented = re.findall(r"^ {4}(\S.*)$", prose(text), re.MULTILINE)
    joined = re.sub(r"\\\n\s*", "", "\n".join((fenced, *indented)))
    return re.findall(r"^ocelot .*$", joined, re.MULTILINE)


@cache
def commands():
    """The options of each command."""
    return {name: cli.app[name].assemble_argument_collection() for name in cli.COMMANDS}


@cache
def options_of(command):
    common = cli.app.meta.assemble_argument_collection()
    return {name: option for option in (*commands()[command], *common) for name in option.names}


def wrong_options(words, known):
    """Options that are not known, or are given a value that they do not have."""
    for word, value in zip_longest(words, words[1:], fillvalue=""):
        name, _, after = word.partition("=")
        if not re.fullmatch(r"--[a-z][a-z-]*", name) or name in OF_OTHERS:
            continue
        actions = [options[name] for options in known if name in options]
        if not actions:
            yield f"{name}: no such option"
            continue
        value = after or value
        choices = {choice for action in actions for choice in action.get_choices() or ()}
        if choices and re.fullmatch(r"[a-z][a-z-]*", value) and value not in choices:
            yield f"{name} {value}: no such choice"


def wrong(what, is_right):
    """What is found in the pages that is not right, with its page."""
    found = [(page, item) for page, text in PAGES.items() for item in what(text)]
    assert found
    return [f"{page}: {item}" for page, item in sorted(set(found)) if not is_right(page, item)]


def shaped(pattern):
    """What stands between backticks and is of a shape."""
    return lambda text: [span for span in spans(text) if re.fullmatch(pattern, span)]


# The command line


def test_commands_in_code_blocks_are_understood():
    def is_understood(_page, line):
        words = shlex.split(line, comments=True)[1:]
        try:
            _, outer, _ = cli.app.meta.parse_args(words, exit_on_error=False, print_error=False)
            cli.parse(outer.args, outer.kwargs.get("config", ()))
        except (CycloptsError, OcelotError):
            return False
        return True

    assert wrong(command_lines, is_understood) == []


def test_commands_in_sentences_exist():
    def exists(_page, span):
        _, command, *words = span.replace("[", " ").replace("]", " ").split()
        return command in commands() and not [*wrong_options(words, [options_of(command)])]

    assert wrong(shaped(r"ocelot [a-z].*"), exists) == []


def test_options_in_sentences_exist():
    known = [options_of(command) for command in commands()]
    assert wrong(shaped("--.*"), lambda _, span: not [*wrong_options(span.split(), known)]) == []


def test_every_command_is_described():
    text = "".join(PAGES.values())
    assert [name for name in commands() if f"ocelot {name}" not in text] == []


def test_exit_codes_are_those_of_the_command_line():
    codes = (
        exit_codes.DONE,
        exit_codes.FAILED,
        exit_codes.REFUSED,
        exit_codes.STOPPED,
        exit_codes.INTERRUPTED,
    )
    section = PAGES["docs/reference/exit-codes.md"]
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)] == [*codes]
    assert [
        int(code) for code in re.findall(r"^- (\d+):", exit_codes.EXIT_CODES, re.MULTILINE)
    ] == [*codes]


def test_events_of_the_log_are_described():
    calls = r"\.event\(\s*\"(\w+)\""
    writers = (PACKAGE / "run/runlog.py", *PACKAGE.glob("cli/*.py"))
    sources = [path.read_text(encoding="utf-8") for path in writers]
    written = {"message", *(name for text in sources for name in re.findall(calls, text))}
    assert {*first_column("docs/reference/log.md", "Events")} == written


# Files and headings


@cache
def anchors(path):
    """Names of a page's headings in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    def leads(page, link):
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        return target.exists() and (not anchor or anchor in anchors(target))

    links = r"\]\(((?!https?:)[^)\s]+)\)"
    assert wrong(lambda text: re.findall(links, prose(text)), leads) == []


def pages_of_the_site(entries):
    for entry in entries:
        value = entry if isinstance(entry, str) else next(iter(entry.values()))
        if isinstance(value, str):
            yield value
        else:
            yield from pages_of_the_site(value)


def test_the_site_has_every_page():
    """Those of other folders are named in ``docs/hooks.py``."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    elsewhere = ast.literal_eval(
        re.search(r"^ELSEWHERE = (\{.*?^\})", (ROOT / "docs/hooks.py").read_text(), re.M | re.S)[1]
    )
    assert [name for name in elsewhere if not (ROOT / name).exists()] == []
    assert {page for page in PAGES if page.endswith("DESIGN.md")} <= elsewhere.keys()
    pages = [p.removeprefix("docs/") for p in PAGES if p.startswith("docs/")]
    assert sorted(pages_of_the_site(site["nav"])) == sorted([*pages, *elsewhere.values()])


def test_prose_is_wrapped():
    """At 100 columns, but for tables, headings, links and what is code."""

    def long_lines(text):
        return [
            line
            for line in re.sub(r"^(?: {4}|\|).*$", "", prose(text), flags=re.M).splitlines()
            if len(re.sub(r"\]\([^)]*\)|https?://\S+", "", line)) > 100
        ]

    assert {page: lines for page, text in PAGES.items() if (lines := long_lines(text))} == {}


def test_public_names_are_in_the_python_reference():
    names = re.findall(r"^::: ocelot_em\.([A-Za-z_]+)$", PAGES["docs/reference/python.md"], re.M)
    modules = {"errors", "process_results"}
    assert sorted({*names} - modules) == sorted({*ocelot_em.__all__} - {"__version__"})


def test_messages_in_the_troubleshooting_are_those_of_the_code():
    """As far as they stand in one string; placeholders are left out."""
    sources = "\n".join(p.read_text(encoding="utf-8") for p in PACKAGE.rglob("*.py"))
    joined = re.sub(r"\"\s+f?\"", "", sources)
    rows = section_of("docs/how-to/troubleshoot.md", "Messages that need more explanation")
    cells = [line.split("|")[1] for line in rows.splitlines() if line.startswith("| ")]
    quoted = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 5
    known = {"KilledWorker"}
    assert [message for message in quoted if message not in joined and message not in known] == []


def test_paths_in_sentences_exist():
    paths = rf"({'|'.join(map(re.escape, TOP))})/[\w./-]*"
    assert wrong(shaped(paths), lambda _, span: (ROOT / span).exists()) == []


@cache
def file_names():
    folders = ("src", "tests", "docs", "benchmarks", "docker", "examples", "notebooks")
    inside = (path.name for folder in folders for path in (ROOT / folder).rglob("*.*"))
    return {*inside, *TOP}


def test_files_in_sentences_exist():
    files = r"[\w-]+\.(py|cu|md|toml|def)"
    assert wrong(shaped(files), lambda _, span: span in file_names()) == []


def test_tests_in_sentences_exist():
    tests = ROOT / "tests"
    assert wrong(shaped(r"test_\w+"), lambda _, span: any(tests.rglob(f"{span}.py"))) == []


def test_pages_that_the_code_names_exist():
    sources = [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    named = {name for path in sources for name in re.findall(r"docs/\w+\.md", path.read_text())}
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


# Modules and what is in them


@cache
def names_in(path):
    """Names that a module defines or imports, and those of its classes' members."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name): set() for alias in node.names}
        elif isinstance(node, ast.ClassDef):
            members = {target for child in node.body for target in _defined(child)}
            found[node.name] = members
        else:
            found |= {name: set() for name in _defined(node)}
    return found


def _defined(node):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.AnnAssign):
        yield ast.unparse(node.target)
    elif isinstance(node, ast.Assign):
        yield from (n.id for target in node.targets for n in ast.walk(target) if hasattr(n, "id"))


def is_there(dotted):
    """Whether a dotted name is a module, or something in one."""
    package, *rest = dotted.split(".")
    place = {"ocelot_em": PACKAGE, "benchmarks": ROOT / "benchmarks"}[package]
    while rest and (place / rest[0]).is_dir():
        place /= rest.pop(0)
    if rest and (place / f"{rest[0]}.py").exists():
        names = names_in(place / f"{rest.pop(0)}.py")
    else:
        public = ocelot_em.__all__ if package == "ocelot_em" else ()
        names = names_in(place / "__init__.py") | {name: set() for name in public}
    if not rest:
        return True
    return rest[0] in names and (len(rest) == 1 or rest[1] in names[rest[0]])


DOTTED = re.compile(r"\b(?<![./])((?:ocelot_em|benchmarks)(?:\.\w+)+)")


def test_modules_and_functions_exist():
    def dotted(text):
        return [name for name in DOTTED.findall(text) if not name.endswith((".py", ".md"))]

    assert wrong(dotted, lambda _, name: is_there(name)) == []


def test_what_modules_have_is_there():
    """As ``module.name``, without the folder."""
    homes = {path.stem: path for path in PACKAGE.rglob("*.py") if path.stem != "__init__"}
    members = rf"({'|'.join(homes)})\.(?!cu\b|html\b|json\b|md\b|npz\b|py\b|yaml\b)\w+"

    def has(_page, span):
        module, name, *_ = span.split(".")
        return name in names_in(homes[module])

    assert wrong(shaped(members), has) == []


def test_what_docstrings_refer_to_exists():
    roles = r":(?:mod|class|func|data|meth|attr):`~?(ocelot_em[^`]*)`"
    texts = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    found = [(path.name, name) for path, t in texts.items() for name in re.findall(roles, t)]
    assert found
    assert [(path, name) for path, name in found if not is_there(name)] == []


def test_modules_that_are_run_exist():
    run = r"python -m ((?:benchmarks|tests|ocelot_em)[\w.]*)"
    assert wrong(lambda text: re.findall(run, text), lambda _, m: find_spec(m) is not None) == []


def module_rows():
    """Modules by row of the table in ``docs/design.md``."""
    lines = section_of("docs/design.md", "The way of the data").splitlines()
    rows = [line.split("|")[1] for line in lines if line.startswith("| `")]
    return {m: n for n, row in enumerate(rows) for m in re.findall(r"`(\w+)/?`", row)}


def test_the_table_of_modules_is_complete_and_in_the_order_of_imports():
    row = module_rows()
    modules = {
        p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert row.keys() == modules - {"__init__", "__main__"}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("ocelot"):
                continue
            _, *names = node.module.split(".")
            imported |= {names[0]} if names else {alias.name for alias in node.names}
        below = [m for m in imported & row.keys() if row[m] > row.get(name, len(row))]
        assert not below, f"{name} imports {below}, which stand below it"


# What is written about the format, and numbers


def section_of(page, title):
    """A section of a page, without those below it."""
    text = PAGES[page]
    start = re.search(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)
    end = re.search(r"^#", text[start.end() :], re.MULTILINE)
    return text[start.end() : start.end() + end.start() if end else len(text)]


def first_column(page, *titles):
    """Names in the first columns of the tables of some sections."""
    cells = [
        line.split("|")[1]
        for title in titles
        for line in section_of(page, title).splitlines()
        if line.startswith("| `")
    ]
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]


FORMAT, BOTH = "docs/format.md", "Root, both kinds"


@pytest.mark.parametrize(
    ("titles", "names"),
    [
        ((BOTH,), fmt.SearchAttributes.model_fields),
        ((BOTH, "Root of a merged result"), fmt.MergedAttributes.model_fields),
        (("Exposure",), fmt.ExposureAttributes.model_fields),
        (("Partial",), fmt.PartialAttributes.model_fields),
        (("Provenance",), fmt.Provenance.model_fields),
        (("Montages",), {*fmt.MergedExposure.model_fields}),
        (
            ("Statistics",),
            {*statistics_attributes.StatisticsAttributes.model_fields} - {"exposures"},
        ),
        (("Tiles and their records",), {*outcome.SUMMARY_FIELDS, "progress"}),
        (("Maps",), maps.MAPS),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_tables_of_the_format_have_what_the_code_has(titles, names):
    found = [name for name in first_column(FORMAT, *titles) if name not in ("counts", "numbers")]
    assert sorted(found) == sorted({*names} - {"progress"})


def megabytes(**changes):
    """Predicted memory of one worker with 1 and with 2 threads, MB."""
    chosen = {"form": maps.PoseForm.EXPLICIT, "streams": 1, "exposures": False} | changes
    kinds = maps.MapSet(chosen["form"], pixel_size=True, exposures=chosen["exposures"])
    storage = memory_model.StorageShape((constants.DEFAULT_CHUNK,) * 2, 4, chosen["streams"])
    one, two = (
        memory_model.worker_nbytes(
            (memory_model.DEFAULT_TILE,) * 2, storage, kinds, options_module.MergeOptions(threads=n)
        )
        for n in (1, 2)
    )
    return (two - one) / 1e6


MERGE_DESIGN = "src/ocelot_em/merge/DESIGN.md"
EXPLICIT, INDEXED = megabytes(), megabytes(form=maps.PoseForm.INDEXED)
BUCKET = megabytes(streams=bucket.STREAMS[0])


@pytest.mark.parametrize(
    ("page", "says"),
    [
        (MERGE_DESIGN, f"first tile ({memory_model.PROCESS_NBYTES // 2**20} MiB:"),
        ("docs/design.md", f"not changed for {lock.STALE_SECONDS:.0f} seconds"),
        (MERGE_DESIGN, f"a batch of up to {execute.MAX_TILES_PER_TASK} neighbouring tiles"),
        (MERGE_DESIGN, f"After {outcome.MAX_CONSECUTIVE_FAILURES} consecutive failures"),
        (MERGE_DESIGN, f"one candidate in {collected.PIXELS_PER_CANDIDATE} pixels"),
        (MERGE_DESIGN, f"({constants.DEFAULT_CHUNK} x {constants.DEFAULT_CHUNK} by default)"),
        ("docs/scaling.md", f"{memory_model.PROCESS_NBYTES / 1e6:.0f} MB for each process"),
        ("docs/scaling.md", f"{EXPLICIT:.0f} (explicit) to {INDEXED:.0f} MB (indexed)"),
        ("docs/scaling.md", f"{BUCKET - EXPLICIT:.0f} MB more for each thread"),
        *(
            ("docs/scaling.md", f"`{name}={cluster.WORKER_ENVIRONMENT[name]}`")
            for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
        ),
        ("docs/operations.md", f"`--worker-timeout` seconds: {execute.WORKER_TIMEOUT_SECONDS:.0f}"),
        (
            "docs/how-to/merge-on-slurm.md",
            f"{slurm.DEFAULT_JOBS} jobs of {slurm.DEFAULT_CORES} cores",
        ),
        ("docs/how-to/troubleshoot.md", f"another machine after {lock.STALE_SECONDS:.0f} s"),
        ("docs/how-to/resume.md", f"another machine after {lock.STALE_SECONDS:.0f} s"),
        ("docs/reliability.md", f"else after {lock.STALE_SECONDS:.0f} s"),
        ("docs/gpu.md", f"its share of the cores, up to {cluster.MAX_GPU_THREADS}."),
        ("docs/format.md", f"has not changed for {lock.STALE_SECONDS:.0f} seconds"),
        ("docs/format.md", f"at most {constants.MAX_CHUNK_NBYTES // 2**20} MiB decoded"),
        (
            "docs/format.md",
            f"a `zarr.json` of more than {constants.MAX_METADATA_NBYTES // 2**20} MiB",
        ),
        ("docs/format.md", f"# The stored format, version {constants.FORMAT_VERSION}"),
        ("docs/format.md", f"{collected.N_FLAT} counts:"),
    ],
)
def test_a_number_is_that_of_the_code(page, says):
    assert says in " ".join(PAGES[page].split())


def test_what_statistics_cost_is_said_once():
    cost = "6 to 8 % of"
    pages = ("docs/how-to/merge-on-one-machine.md", "docs/particles.md")
    assert all(cost in " ".join(PAGES[page].split()) for page in pages)


def test_the_changelog_has_one_unreleased_section():
    headings = re.findall(r"^## (.+)$", PAGES["CHANGELOG.md"], re.MULTILINE)
    assert [h for h in headings if "unreleased" in h.lower()] == ["[Unreleased]"]
    assert len(headings) == len(set(headings))


def test_faults_name_tests_that_exist():
    cells = re.findall(r"\| ([^|]*) \|$", PAGES["docs/reliability.md"], re.MULTILINE)
    named = [name for cell in cells for name in re.findall("`(test_[a-z0-9_]+)`", cell)]
    assert len(named) > 50
    assert {*named} <= {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
