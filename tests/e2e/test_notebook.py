"""What a merge shows in a notebook."""

import asyncio

import nbformat
import pytest
from nbclient import NotebookClient

from builders import write_explicit_search

pytestmark = pytest.mark.slow


def displays(cells, folder):
    """Execute cells; return their outputs, updates of a display in place, and its updates."""
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
    updates = []

    class Client(NotebookClient):
        def process_message(self, message, cell, cell_index):
            if message["msg_type"] == "update_display_data":
                updates.append(message["content"]["data"])
            return super().process_message(message, cell, cell_index)

    client = Client(notebook, timeout=120, resources={"metadata": {"path": str(folder)}})
    asyncio.run(client.async_execute())  # execute() would leave an event loop open
    return [cell.outputs for cell in notebook.cells], updates


def test_a_merge_shows_a_bar_and_the_dashboard_in_a_notebook(tmp_path):
    write_explicit_search(tmp_path / "RUN.zarr", (40, 50))
    (_, threads, silent, local), updates = displays(
        [
            "from ocelot_em import merge",
            "merge('RUN.zarr', 'A.zarr', tile_size=16);",
            "merge('RUN.zarr', 'B.zarr', progress=False);",
            "merge('RUN.zarr', 'C.zarr', tile_size=16, cluster='local', workers=1, threads=1);",
        ],
        tmp_path,
    )
    assert silent == []
    (bar,) = (output.data for output in threads if output.output_type == "display_data")
    assert '<progress value="1.0000"></progress>' in bar["text/html"]
    assert bar["text/plain"].startswith("merged 12 of 12 tiles")
    (bar,) = (output.data for output in local if output.output_type == "display_data")
    assert '<a href="http://127.0.0.1:' in bar["text/html"]
    assert '/ocelot" target="_blank">dashboard</a>' in bar["text/html"]
    shown = [data["text/plain"] for data in updates]
    assert any(text.startswith("merging 0 of 12 tiles") for text in shown)
