"""The options of a batch of micrographs: its own, and those of merging and picking."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ocelot_em.model.options import MergeOptions, Options, one_or_many
from ocelot_em.model.pick_options import PickOptions


class ManyOptions(Options):
    """Options of a batch of its own, with the same names as on the command line.

    Parameters
    ----------
    tables
        Format of the table of all particles: ``csv``, ``parquet``, ``relion`` or ``cistem``; repeat
        it for several. The last two need the optics of every micrograph.
    reports
        Write a report of every micrograph, to which the page links.
    estimates
        Add the columns ``precision`` and ``recall``, of the particles of each micrograph.
        ``noise``: by the model of noise; else the name of a group that is a decoy. Default: they
        are not added.
    skip_bad
        Skip micrographs that are damaged, incomplete or inconsistent, and name them on the page and
        at the end. Otherwise the run stops, and if the plan shows it, before anything is written.
    """

    tables: Annotated[
        tuple[Literal["csv", "parquet", "relion", "cistem"], ...], BeforeValidator(one_or_many)
    ] = ("csv",)
    reports: bool = False
    estimates: Annotated[str, Field(min_length=1)] | None = None
    skip_bad: bool = False


class BatchOptions(ManyOptions, MergeOptions, PickOptions):
    """Options of a batch: those of :class:`MergeOptions` and :class:`PickOptions`, and its own.

    ``tables`` are formats of the table of all particles: ``csv``, ``parquet``, ``relion``,
    ``cistem``. ``reports`` asks for a report of every micrograph. ``estimates`` adds precision
    and recall, by ``noise`` or by a group that is a decoy. With ``skip_bad``, micrographs
    that are damaged, incomplete or inconsistent are skipped, and named.

    Examples
    --------
    >>> from ocelot_em import BatchOptions
    >>> BatchOptions(tables=("csv", "parquet"), min_distance=20, threads=4).merging.threads
    4
    """

    @property
    def merging(self) -> MergeOptions:
        """The options of the merges."""
        return MergeOptions(**{name: getattr(self, name) for name in MergeOptions.model_fields})

    @property
    def picking(self) -> PickOptions:
        """The options of picking."""
        return PickOptions(**{name: getattr(self, name) for name in PickOptions.model_fields})
