"""Progress of a batch of micrographs."""

from collections.abc import Callable

from ocelot_em.errors import StoppedError
from ocelot_em.merge.outcome import Outcome
from ocelot_em.model.progress import Bar, Pace
from ocelot_em.model.text import count_text, seconds_text
from ocelot_em.run.clusters import Cluster
from ocelot_em.run.observer import COMPILING, TileProgress


class BatchProgress(TileProgress):
    """Shows how many micrographs are done, and the tiles of the one being merged.

    ``stop`` ends the run after the running tiles; it may be called by a signal handler.
    """

    def __init__(self, bar: Bar) -> None:
        self.bar, self._micrographs = bar, Pace()
        self._stop_merge: Callable[[], None] | None = None
        self._n = self._n_done = self._n_skipped = 0
        self._name, self._why, self._is_announced = "", "", False

    def begin(self, n: int) -> None:
        """Start to count micrographs, of which ``n`` have work to do."""
        self._n = n
        self._micrographs.restart()

    def enter(self, name: str) -> None:
        """Start a micrograph; raise a StoppedError if the run is to stop."""
        self._name, self.n_tiles = name, 0
        self.require_running()
        self._show(now=True)

    def leave(self, *, skipped: bool) -> None:
        """End a micrograph, or skip it."""
        self._n_done += 1
        self._n_skipped += skipped
        self._micrographs.step()
        self._show()

    def show(self, label: str) -> None:
        """Show another phase."""
        self.bar.show(label, None, now=True)

    def stop(self, why: str) -> None:
        """Stop the run after the running tiles."""
        self._why = why
        if self._stop_merge is not None:
            self._stop_merge()

    def require_running(self) -> None:
        """Raise a StoppedError if the run is to stop."""
        if self._why:
            raise StoppedError(
                f"{self._why}: stopped; {count_text(self._n - self._n_done, 'micrograph')} left; "
                "the same command resumes"
            )

    def waiting(self, reason: str) -> None:
        """Show why the merge is waiting."""
        self.bar.say(reason)

    def locked(self, stop: Callable[[], None]) -> None:
        """Keep the function that stops the merge."""
        self._stop_merge = stop
        self.require_running()

    def started(self, cluster: Cluster) -> None:
        """Show where the merges run, once."""
        super().started(cluster)
        if not self._is_announced:
            self._is_announced = True
            self.bar.say(f"running on {cluster.description}")
            if cluster.dashboard:
                self.bar.link("dashboard", cluster.dashboard)

    def compiling(self) -> None:
        """Show that kernels are compiled."""
        self.bar.say(COMPILING)

    def tile_ended(self, outcome: Outcome) -> None:
        """Count a tile, and say why it failed."""
        if outcome.summary is None:
            self.bar.say(f"{self._name}: {self.failure_text(outcome)}")
        super().tile_ended(outcome)
        self._show()

    @property
    def text(self) -> str:
        """State how many micrographs are done, what is merged, and the time left."""
        parts = [f"{self._n_done:,} of {count_text(self._n, 'micrograph')}"]
        if self._n_done < self._n:
            tiles = f": {self.n_done:,} of {self.n_tiles:,} tiles" if self.n_tiles else ""
            parts.append(f"{self._name}{tiles}")
        if self._n_skipped:
            parts.append(f"{self._n_skipped:,} skipped")
        parts.append(seconds_text(round(self._micrographs.seconds)))
        left = self._micrographs.seconds_left(self._n - self._n_done)
        if left is not None and self._n_done < self._n:
            parts.append(f"about {seconds_text(max(left, 1), is_rough=True)} left")
        return ", ".join(parts)

    def _show(self, *, now: bool = False) -> None:
        share = (self._n_done + 0.9 * (self.share if self.n_tiles else 0)) / max(self._n, 1)
        self.bar.show("merging and picking", min(share, 1.0), lambda: self.text, now=now)
