"""Report sections about timings and provenance."""

from datetime import datetime

import numpy as np

from ocelot_em.merge.outcome import SUMMARY_FIELDS
from ocelot_em.model.markup import (
    Markup,
    element,
    join,
    nbytes_text,
    pairs,
    percent,
    seconds_text,
)
from ocelot_em.store import attributes as fmt
from ocelot_em.store import constants
from ocelot_em.store.arrays import read_table
from ocelot_em.view.subject import Subject


def timings_section(subject: Subject) -> Markup:
    """Show how the time was spent."""
    tiles = read_table(subject.merged.objects, constants.TILE_SUMMARY)
    totals = dict(zip(SUMMARY_FIELDS, np.nansum(tiles, axis=(0, 1)).tolist(), strict=True))
    seconds = {name: totals[f"{name}_seconds"] for name in ("read", "fold", "write")}
    busy = sum(seconds.values())
    shares = [(name, value / busy) for name, value in seconds.items() if busy > 0]
    bars = [
        element("div", f"{name} {share:.0%}", class_=name, style=f"flex-grow: {share:.4f}")
        for name, share in shares
        if share >= 0.005
    ]
    threads = [
        ("time of all threads", seconds_text(busy)),
        *((name, f"{seconds_text(seconds[name])}, {percent(share)}") for name, share in shares),
        ("of these waiting", seconds_text(totals["waited_seconds"])),
        ("from start to end", _elapsed(subject.attributes)),
    ]
    moved = [
        ("tiles", f"{tiles.shape[0] * tiles.shape[1]:,}"),
        ("fetched", nbytes_text(totals["read_nbytes"])),
        ("decoded", nbytes_text(totals["decoded_nbytes"])),
        ("written", nbytes_text(totals["written_nbytes"])),
    ]
    if busy > 0:
        moved.append(
            ("by each thread", f"{nbytes_text(totals['decoded_nbytes'] / busy)}/s decoded")
        )
    return join([element("div", *bars, class_="bar"), beside(pairs(threads), pairs(moved))])


def _elapsed(attributes: fmt.MergedAttributes) -> str:
    """Return the wall-clock time of a merge, including interruptions."""
    try:
        times = (attributes.provenance.created, attributes.finished or "")
        started, finished = map(datetime.fromisoformat, times)
        return seconds_text(max((finished - started).total_seconds(), 0.0))
    except (ValueError, TypeError):
        return "—"


def beside(left: Markup, right: Markup) -> Markup:
    """Place two tables side by side if there is room."""
    halves = (element("div", content, class_="scroll half") for content in (left, right))
    return element("div", *halves, class_="row")


def provenance_section(subject: Subject) -> Markup:
    """Show how the result was made."""
    attributes = subject.attributes
    made, about = attributes.provenance, subject.particles.about
    facts = [
        ("store", subject.url),
        ("run", attributes.id),
        ("started", made.created),
        ("finished", attributes.finished or "—"),
        ("versions", ", ".join(f"{name} {version}" for name, version in made.versions.items())),
        ("poses", f"{attributes.pose_form.value}"),
    ]
    if about is not None:
        facts.append(("particles by", _method_text(subject)))
    inputs = element(
        "details",
        element("summary", f"{len(made.inputs):,} input{'' if len(made.inputs) == 1 else 's'}"),
        element("ul", *(element("li", place) for place in made.inputs), class_="path"),
        **({"open": ""} if len(made.inputs) <= 8 else {}),
    )
    options = pairs((name, _option(value)) for name, value in made.options.items())
    return join([beside(pairs(facts), options), inputs])


def _method_text(subject: Subject) -> str:
    about = subject.particles.about
    assert about is not None
    cutoff = f"{about.cutoff:.6g}" if about.per is None else about.cutoff_text
    words = [f"method {about.method}", f"cutoff {cutoff}"]
    if about.false_positives is not None:
        of = {"exposure": " in each exposure", "montage": " in the montage", None: ""}[about.per]
        words.append(f"{about.false_positives:g} false positives accepted{of}")
    words.append(f"at least {about.min_distance_px:g} px apart")
    return ", ".join(words)


def _option(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not given" if value is None else str(value)
