"""Compiles the kernels when the package is built, so that nobody's first merge has to wait."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILT = "src/ocelot_em/kernels/built"


class CompileKernels(BuildHookInterface):  # type: ignore[misc, type-arg, unused-ignore]
    """Adds the compiled kernels to a wheel, which then is one for this machine's architecture."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile them; a wheel without any, where that fails, compiles at the first merge."""
        root = Path(self.root)
        # pip passes the packages of an isolated build in the same variable.
        paths = [str(root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "ocelot_em.kernels.build"]
        if version == "editable":
            command.append("here")
        if subprocess.run(command, env=environment).returncode:
            self.app.display_warning("the kernels could not be compiled: numba will at first use")
            return
        if version != "editable":
            build_data["artifacts"].append(f"/{BUILT}/**")  # although git ignores them
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-manylinux2014_{os.uname().machine}"
