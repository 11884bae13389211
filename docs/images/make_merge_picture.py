"""Make ``merge.png``, the picture in the README, from the real partial results in ``tests/data``.

Run it from anywhere: ``python docs/images/make_merge_picture.py``.
"""

import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from PIL import Image

import ocelot_em as oe

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "tests" / "data"
COLOURS = {"cmap": "magma", "vmin": 3, "vmax": 8}


def main() -> None:
    """Import the four devices' crops, merge them, draw."""
    matplotlib.rcParams["font.size"] = 11
    with tempfile.TemporaryDirectory() as folder:
        search, merged = Path(folder, "search.zarr"), Path(folder, "merged.zarr")
        files = sorted(DATA.glob("A_crop_shard*.npz"))
        oe.import_results(files, search, pixel_size_angstrom=2.5)
        oe.merge(search, merged)
        figure = Figure(figsize=(13.0, 4.9), layout="constrained")
        left, gap, middle, right = figure.subfigures(1, 4, width_ratios=(1.0, 0.22, 1.1, 0.95))
        draw_partials(left, search)
        draw_arrow(gap)
        cutoff = draw_zscore(middle, merged)
        draw_survival(right, merged, cutoff)
        figure.savefig(Path(folder, "merge.png"), dpi=72)
        # Noise hardly compresses; 192 colours take a fifth of the bytes.
        picture = Image.open(Path(folder, "merge.png")).convert("RGB")
        coloured = picture.quantize(192, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        coloured.save(HERE / "merge.png", optimize=True)


def draw_partials(figure: Any, search: Path) -> None:
    """Draw the best match of each device, in small."""
    partials = oe.open_partials(search)
    counts = partials["total_projections"].to_numpy()
    for number, axes in enumerate(figure.subplots(2, 2).flat):
        axes.imshow(partials["mip"][number].to_numpy(), **COLOURS)
        share = counts[number] / counts.sum()
        axes.set_title(f"device {number}: {share:.0%} of the search", fontsize=9)
        axes.set(xticks=[], yticks=[])
    figure.suptitle("maximum of each device (mip)", fontsize=12)


def draw_arrow(figure: Any) -> None:
    """Draw an arrow that says what happens."""
    arrow = FancyArrowPatch(
        (0.02, 0.5), (0.98, 0.5), arrowstyle="simple", mutation_scale=34, color="0.35"
    )
    arrow.set_transform(figure.transSubfigure)
    figure.add_artist(arrow)
    figure.text(0.5, 0.57, "merge", ha="center", fontsize=13, family="monospace")


def draw_zscore(figure: Any, store: Path) -> float:
    """Draw the merged z-scores with circles around what is significant; returns the cutoff."""
    merged = oe.open_merged(store)
    z = merged["scaled_mip"].to_numpy()
    height, width = merged.attrs["valid_shape"]
    cutoff = oe.gaussian_cutoff(height * width, merged.attrs["total_projections"])
    axes = figure.subplots()
    image = axes.imshow(z, **COLOURS)
    figure.colorbar(image, ax=axes, shrink=0.8)
    rows, columns = np.nonzero(z > cutoff)
    axes.scatter(columns, rows, s=220, facecolors="none", edgecolors="tab:cyan", linewidths=1.6)
    for y, x in zip(rows, columns, strict=True):
        pixel = {name: values.item() for name, values in merged.isel(y=y, x=x).compute().items()}
        pose = ", ".join(f"{pixel[name]:.0f}°" for name in ("best_phi", "best_theta", "best_psi"))
        axes.annotate(
            f"z = {pixel['scaled_mip']:.1f}, device {pixel['best_partial']}\n({pose})",
            (x, y),
            (0, -17 if x > width / 2 else 17),
            textcoords="offset points",
            ha="right" if x > width / 2 else "center",
            va="top" if x > width / 2 else "bottom",
            color="white",
            fontsize=11,
        )
    axes.set(xticks=[], yticks=[])
    figure.suptitle("merged: z-score and best pose", fontsize=12)
    return cutoff


def draw_survival(figure: Any, store: Path, cutoff: float) -> None:
    """Draw how many pixels exceed a z-score."""
    axes = figure.subplots()
    oe.plot_survival(store, axes, cutoff)
    axes.set_title("")
    figure.suptitle("pixels above a z-score", fontsize=12)


if __name__ == "__main__":
    main()
