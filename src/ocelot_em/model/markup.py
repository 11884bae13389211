"""HTML of pages and notebooks; all text is escaped. Pure."""

from collections.abc import Iterable
from html import escape

_WITHOUT_END = frozenset({"meta", "img", "br"})


class Markup(str):
    """HTML that is inserted unchanged; any other text is escaped."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str) -> Markup:
    """Build an HTML element.

    Parameters
    ----------
    tag
        Name of the element.
    *children
        Its contents: text, which is escaped, or markup.
    **attributes
        Attribute values, which are escaped; trailing underscores of names are removed, others
        become hyphens.
    """
    told = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for name, value in attributes.items()
    )
    end = "" if tag in _WITHOUT_END else f"</{tag}>"
    return Markup(f"<{tag}{told}>{join(children)}{end}")


def join(parts: Iterable[str]) -> Markup:
    """Concatenate text, which is escaped, and markup."""
    return Markup("".join(p if isinstance(p, Markup) else escape(p) for p in parts))


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Markup:
    """Build a table with a header row."""
    head = element("tr", *(element("th", name) for name in header))
    body = (element("tr", *(element("td", cell) for cell in row)) for row in rows)
    return element("table", element("thead", head), element("tbody", *body))


def pairs(facts: Iterable[tuple[str, str]]) -> Markup:
    """Build a table of names and values."""
    rows = (element("tr", element("th", name), element("td", value)) for name, value in facts)
    return element("table", element("tbody", *rows))


def captioned(drawing: Markup, caption: str, width: str) -> Markup:
    """Build a figure with a caption; ``width`` is a CSS class of the page."""
    return element("figure", drawing, element("figcaption", caption), class_=width)


def percent(share: float) -> str:
    """Format a fraction as a percentage; only exact 0 and 1 give 0% and 100%."""
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    return f"{min(max(share, 0.001), 0.999):.1%}"


def length_text(height_angstrom: float, width_angstrom: float) -> str:
    """Format height and width in nm or µm."""
    unit, name = (1e4, "µm") if max(height_angstrom, width_angstrom) >= 1e4 else (10.0, "nm")
    return f"{height_angstrom / unit:.3g} × {width_angstrom / unit:.3g} {name}"


def nbytes_text(nbytes: float) -> str:
    """Format a size in the largest unit in which it is 1 or more."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}" if unit != "B" else f"{nbytes:.0f} B"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"


def seconds_text(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def page(title: str, body: Iterable[Markup]) -> str:
    """Build a complete page, with light and dark styles, that cannot load anything."""
    # The policy makes browsers refuse scripts and anything that is not in this file.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(_CSS)),
    )
    return f"<!doctype html>\n{element('html', head, element('body', *body), lang='en')}\n"


_CSS = """
:root { color-scheme: light dark; --paper: #fbfbfa; --card: #fff; --ink: #1d2126; --soft: #616971;
  --line: #e1e4e7; --accent: #2a6fb0; --bad: #b3363f; --good: #2f7d4f; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --card: #1c2024; --ink: #e5e8ea;
  --soft: #9aa3ab; --line: #30363c; --accent: #6db1ee; --bad: #f08a91; --good: #78c596; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 3.2rem; }
body { margin: 0 auto; padding: 0 1.5rem 4rem; max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
header { padding: 2rem 0 .6rem; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 0 0 .9rem; font-size: 1.2rem; }
section { margin-top: 2.4rem; padding-top: 1.4rem; border-top: 1px solid var(--line); }
nav { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .2rem 1.3rem;
  padding: .6rem 0; background: var(--paper); border-bottom: 1px solid var(--line); }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.path { margin: .2rem 0; color: var(--soft); font: 13px/1.5 ui-monospace, monospace;
  overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .7rem;
  margin: 1.2rem 0; }
.cards div { padding: .7rem .9rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
.cards strong { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.cards span, .caption, figcaption { color: var(--soft); font-size: .85rem; }
.good, .notes { margin: 0; padding: .6rem .9rem; border-left: 4px solid var(--good);
  background: var(--card); }
.notes { padding-left: 2rem; border-color: var(--bad); overflow-wrap: anywhere; }
.row { display: flex; flex-wrap: wrap; gap: 1.2rem; }
figure { margin: 0; padding: .8rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
figure svg { display: block; width: 100%; height: auto; margin: 0 auto; }
figcaption { margin-top: .5rem; }
.wide { flex: 3 1 30rem; } .narrow { flex: 2 1 20rem; } .half { flex: 1 1 26rem; min-width: 0; }
.full { width: 100%; } .stack { display: flex; flex-direction: column; gap: 1.2rem; }
.row > figure, .stack > figure { align-self: stretch; }
.scroll { overflow-x: auto; margin-top: 1rem; }
table { border-collapse: collapse; font-size: .88rem; }
.numbers table { width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; text-align: left; vertical-align: top; overflow-wrap: anywhere;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; white-space: nowrap; }
.numbers td:not(:first-child), .numbers th:not(:first-child) { text-align: right; }
.bar { display: flex; border-radius: .4rem; overflow: hidden; color: #fff; font-size: .85rem; }
.bar div { flex-basis: 0; padding: .35rem .6rem; white-space: nowrap; overflow: hidden; }
.bar .read { background: #2f74b5; } .bar .fold { background: #a85b13; }
.bar .write { background: #4c7a3a; }
details { margin-top: 1rem; } summary { cursor: pointer; }
.notes details { margin: 0; } .notes ul { padding-left: 1.2rem; }
@media print { nav { display: none; } figure, .cards div { break-inside: avoid; } }
"""
