"""Examples in the help of commands."""

from ocelot_em.cli.exit_codes import EXIT_CODES

EXAMPLES = {
    "import": (
        "ocelot import gpu0.npz gpu1.npz --output RUN.zarr --template-box 56 --pixel-size 2.5",
        "ocelot import maps/ --output FINISHED.zarr --total-projections 129600",
        "ocelot import LAMELLA.yaml --output MONTAGE.zarr",
    ),
    "merge": (
        "ocelot merge RUN.zarr --output MERGED.zarr",
        "ocelot merge RUN.zarr --output MERGED.zarr --dry-run",
        "ocelot merge RUN.zarr --output MERGED.zarr --cluster local --workers 4 --memory-limit 8GB",
        "ocelot merge RUN.zarr --output MERGED.zarr --cluster slurm --slurm.partition cpu",
        "ocelot config merge --output merge.yaml, then ocelot merge --config merge.yaml",
    ),
    "batch": (
        "ocelot batch SEARCHES/ --output SESSION/",
        "ocelot batch SEARCHES/ --output SESSION/ --skip-bad --reports",
        "ocelot batch SEARCHES/ --output SESSION/ --tables csv --tables relion "
        "--optics micrographs_ctf.star",
    ),
    "watch": ("ocelot watch RUN.zarr --output SO_FAR.zarr",),
    "peaks": (
        "ocelot peaks MERGED.zarr --output PEAKS.csv",
        "ocelot peaks MERGED.zarr --output PEAKS.parquet --method pvalue",
    ),
    "detections": ("ocelot detections MERGED.zarr --output DETECTIONS.parquet",),
    "export": (
        "ocelot export MERGED.zarr --to mrc --output maps/",
        "ocelot export MERGED.zarr --to relion --optics micrographs_ctf.star --micrograph M1 "
        "--output PEAKS.star",
    ),
    "report": ("ocelot report MERGED.zarr --output report.html",),
    "compare": (
        "ocelot compare WILD_TYPE.zarr KNOCK_OUT.zarr --output comparison.html",
        "ocelot compare BEFORE.zarr AFTER.zarr --symmetry D7 --table both.csv --output page.html",
    ),
    "view": ("ocelot view MERGED.zarr",),
    "config": ("ocelot config merge --output merge.yaml",),
    "doctor": ("ocelot doctor --folder /scratch/me", "ocelot doctor --cluster slurm"),
}
"""Command lines to start from, by command."""


def epilogue(command: str) -> str:
    """Return the end of a command's help, in Markdown."""
    lines = [f"- `{example}`" for example in EXAMPLES.get(command, ())]
    return "\n".join([*(["Examples:", "", *lines, ""] if lines else []), EXIT_CODES])
