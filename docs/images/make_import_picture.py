"""Make ``imports.svg``, the picture of the imports from folder to folder on the design page.

Run it from anywhere: ``python docs/images/make_import_picture.py``.
"""

import ast
from collections import Counter
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "src" / "ocelot_em"
LAYERS = (
    "errors",
    "model",
    "store",
    "kernels",
    "merge",
    "process_results",
    "particles",
    "io",
    "view",
    "testing",
    "run",
    "cli",
)


def main() -> None:
    """Count the imports, and draw each folder on its layer."""
    imports, lines = count()
    matplotlib.rcParams.update({"svg.hashsalt": "imports", "svg.fonttype": "none"})
    figure = Figure(figsize=(6, 6.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-3.4, 3.3), ylim=(len(LAYERS) - 0.5, -0.5))
    axes.axis("off")
    for row, folder in enumerate(LAYERS):
        axes.text(-0.25, row, folder, ha="right", va="center", weight="bold", family="monospace")
        axes.text(-3.4, row, f"{lines[folder]:,} lines", va="center", color="0.4")
        axes.plot(0, row, "o", color="#3b528b", markersize=4 + lines[folder] / 600)
    for (importer, imported), n in imports.items():
        start, end = LAYERS.index(importer), LAYERS.index(imported)
        style = f"arc3,rad={0.55 if start > end else -0.55}"
        arrow = FancyArrowPatch(
            (0.08, start),
            (0.08, end),
            arrowstyle="-|>",
            mutation_scale=9,
            connectionstyle=style,
            linewidth=0.4 + n / 12,
            color="#5ec962" if start > end else "#d1495b",
            alpha=0.75,
        )
        axes.add_patch(arrow)
    figure.savefig(HERE / "imports.svg", metadata={"Date": None})


def count() -> tuple[Counter[tuple[str, str]], Counter[str]]:
    """Return the imports from one folder to another, and the lines of each folder."""
    imports: Counter[tuple[str, str]] = Counter()
    lines: Counter[str] = Counter()
    for path in PACKAGE.rglob("*.py"):
        importer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        text = path.read_text()
        lines[importer] += len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ocelot_em."):
                imported = str(node.module).split(".")[1]
                if importer in LAYERS and imported not in ("", importer):
                    imports[importer, imported] += 1
    return imports, lines


if __name__ == "__main__":
    main()
