"""What neuroglancer shows: layers of an image's maps, and particles as annotations over them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.model.maps import MIP, SCALED_MIP
from ocelot_em.particles.table import ALL_COLUMNS, ParticleTable
from ocelot_em.view.plots import map_positions

FITTING_PX = 700
"""Screen pixels of the longest edge of an image when it is opened."""

RENDER_SCALE = 2
"""Screen pixels per pixel of the levels that are drawn; with fewer than 1, single bright pixels
disappear between screen pixels."""

ORIGIN = "{url}"
"""Placeholder, in a state, for the URL of the folder that contains the image and the particles."""

PICTURE, PARTICLES = "picture", "particles"
"""Names of the image and of the particles in that folder."""

SHOWN = (SCALED_MIP, MIP, "psi", "theta", "phi", "relative_defocus")
"""Columns that are shown of the particle under the pointer."""

MAGMA = (
    (-0.002136485, -0.000749655, -0.005386128),
    (0.251660541, 0.677523244, 2.494026599),
    (8.353717279, -3.577719515, 0.314467903),
    (-27.668733086, 14.264730781, -13.649213188),
    (52.176139812, -27.943606072, 12.944169442),
    (-50.768525365, 29.046582821, 4.234152994),
    (18.655705066, -11.489773520, -5.601961509),
)
"""Coefficients of a polynomial, for red, green and blue, that approximates the colours of magma
(Matt Zucker, public domain)."""

_MAP_SHADER = """\
#uicontrol invlerp normalized
void main() {
  float value = toRaw(getDataValue());
  if (isnan(value)) { emitTransparent(); return; }
  float t = normalized();
  emitRGB(%s);
}
"""

_RING_SHADER = """\
#uicontrol vec3 color color(default="#35c4d7")
#uicontrol float diameter slider(min=4, max=60, default=18)
void main() {
  setPointMarkerSize(diameter);
  setPointMarkerBorderWidth(1.5);
  setPointMarkerColor(vec4(0, 0, 0, 0));
  setPointMarkerBorderColor(color);
}
"""


def read_state(
    folder: Path, maps: Sequence[str] = (), particles: ParticleTable | None = None
) -> dict[str, Any]:
    """Return the state of neuroglancer: one layer per map, the first visible, then particles.

    ``maps`` selects maps of the image; by default all. Sources begin with :data:`ORIGIN`.

    Raises
    ------
    InvalidInputError
        The folder is not an OME-Zarr image, or does not contain one of the maps.
    """
    if not folder.is_dir():
        raise InvalidInputError(
            f"{folder}: expected a merged result, or a folder with an OME-Zarr image, got "
            + ("a file" if folder.exists() else "nothing there")
        )
    try:
        metadata = json.loads((folder / "zarr.json").read_bytes())
        ome = metadata["attributes"]["ome"]
        channels = [
            (str(channel["label"]), [float(channel["window"][k]) for k in ("start", "end")])
            for channel in ome.get("omero", {}).get("channels", [])
        ]
        multiscale = ome["multiscales"][0]
        full = json.loads((folder / multiscale["datasets"][0]["path"] / "zarr.json").read_bytes())
        dimensions, edge = _dimensions(multiscale), max(full["shape"][-2:])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InvalidInputError(
            f"{folder}: expected a merged result, or a folder with an OME-Zarr 0.5 image, got "
            f"something else ({type(error).__name__}: {error}); write one with ocelot export --to "
            "ome-zarr"
        ) from error
    names = [name for name, _ in channels]
    if unknown := [name for name in maps if name not in names]:
        raise InvalidInputError(
            f"{folder}: expected maps of this image, {', '.join(names)}; got {', '.join(unknown)}; "
            "write it again with all maps to show: ocelot export --to ome-zarr --map NAME"
        )
    shader = _MAP_SHADER % _polynomial()
    shown = maps or names
    layers = [
        {
            "type": "image",
            "name": name,
            "source": f"zarr3://{ORIGIN}{PICTURE}/",
            "visible": name == shown[0],
            "localPosition": [names.index(name)],
            "crossSectionRenderScale": RENDER_SCALE,
            "shader": shader,
            "shaderControls": {"normalized": {"range": channels[names.index(name)][1]}},
        }
        for name in shown
    ] or [{"type": "image", "name": folder.name, "source": f"zarr3://{ORIGIN}{PICTURE}/"}]
    if particles is not None and len(particles):
        source = f"precomputed://{ORIGIN}{PARTICLES}/"
        layers.append(
            {"type": "annotation", "name": PARTICLES, "source": source, "shader": _RING_SHADER}
        )
    return {
        "dimensions": dimensions,
        "crossSectionScale": edge / FITTING_PX,
        "layers": layers,
        "layout": "xy",
        "showAxisLines": False,
    }


def annotations(
    particles: ParticleTable, dimensions: Mapping[str, tuple[float, str]]
) -> dict[str, bytes]:
    """Return particles as files of neuroglancer's annotation format, by path.

    There is one chunk with all particles, and a file for each of them, which is read when it is
    selected. Identifiers are row numbers of the table. Positions are those of pixel centres, which
    have integer coordinates in OME-Zarr images.
    """
    y, x = map_positions(particles)
    values = [x, y, *(particles.columns[name] for name in SHOWN)]
    rows = np.stack(values, axis=1).astype("<f4")
    numbers = np.arange(len(rows), dtype="<u8")
    info = {
        "@type": "neuroglancer_annotations_v1",
        "dimensions": dimensions,
        "lower_bound": rows[:, :2].min(axis=0).tolist(),
        "upper_bound": rows[:, :2].max(axis=0).tolist(),
        "annotation_type": "point",
        "properties": [
            {"id": name, "type": "float32", "description": ALL_COLUMNS[name].meaning}
            for name in SHOWN
        ],
        "relationships": [],
        "by_id": {"key": "by_id"},
        "spatial": [
            {
                "key": "all",
                "grid_shape": [1, 1],
                "chunk_size": np.maximum(np.ptp(rows[:, :2], axis=0), 1).tolist(),
                "limit": len(rows),
            }
        ],
    }
    chunk = len(rows).to_bytes(8, "little") + rows.tobytes() + numbers.tobytes()
    return {
        f"{PARTICLES}/info": json.dumps(info).encode(),
        f"{PARTICLES}/all/0_0": chunk,
        **{f"{PARTICLES}/by_id/{n}": row.tobytes() for n, row in enumerate(rows)},
    }


def _polynomial() -> str:
    """Return the colour of ``t``, in GLSL."""
    text = ""
    for coefficients in reversed(MAGMA):
        colour = f"vec3{coefficients}"
        text = f"{colour} + t * ({text})" if text else colour
    return text


def _dimensions(multiscale: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    """Return pixel sizes, x first because neuroglancer draws the first axis to the right."""
    axes = {axis["name"]: axis.get("unit") for axis in multiscale["axes"]}
    scale = multiscale["datasets"][0]["coordinateTransformations"][0]["scale"]
    sizes = dict(zip(axes, scale, strict=True))
    return {
        name: (sizes[name] * 1e-10, "m") if axes[name] == "angstrom" else (sizes[name], "")
        for name in ("x", "y")
    }
