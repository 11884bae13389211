"""Compiles kernels ahead, when the package is built: ``python -m ocelot_em.kernels.build [here]``.

It compiles for all kinds of processors of this machine's architecture, or for the best that this
one can run, and needs numba and NumPy only. ``signatures.txt`` lists the kernels that Python calls,
each with the types of its arguments in merges, in the notation of
:mod:`ocelot_em.kernels.compiling`.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from llvmlite import binding

from ocelot_em.kernels import ahead

_NEVER_CALLED = "define weak void @NRT_MemInfo_call_dtor(i8* %memory) { ret void }"
"""Frees an array that owns memory; no kernel has one."""


def build(cpus: Iterable[str]) -> None:
    """Compile all kernels of ``signatures.txt``, unless they are: a process for each processor."""
    processes = []
    for cpu in cpus:
        if ahead.is_current(cpu):
            continue
        # numba reads them when it is imported, and vectorises for them.
        variables = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""}
        command = [sys.executable, "-m", __spec__.name, cpu]
        processes.append(subprocess.Popen(command, env=os.environ | variables))
    for process in processes:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, process.args)


def _build_for(cpu: str) -> None:
    from ocelot_em.kernels import jit

    jit.make_only_assembly()
    code, kernels = _compiled_together()
    compiler = binding.Target.from_default_triple().create_target_machine(
        cpu=cpu, opt=3, reloc="static", codemodel="jitdefault", jit=True
    )
    folder = ahead.FOLDER / cpu
    folder.mkdir(parents=True, exist_ok=True)
    index = {"sources": ahead.digest_of_sources(), "kernels": kernels}
    (folder / ahead.OBJECT).write_bytes(compiler.emit_object(code))
    (folder / ahead.INDEX).write_text(json.dumps(index, indent=1))


def _compiled_together() -> tuple[Any, dict[str, dict[str, tuple[str, str]]]]:
    """Return a module of all kernels, and their symbols and results by name and types."""
    code, kernels = None, defaultdict[str, dict[str, tuple[str, str]]](dict)
    for number, line in enumerate(signatures()):
        name, _, types = line.partition(" ")
        symbol = f"{name.replace('.', '_')}_{number}"
        text, own_name, returned = _compiled(name, types)
        module = binding.parse_assembly(text)
        module.get_function(own_name).name = symbol
        if code is None:
            code = module
        else:
            code.link_in(module)
        kernels[name][types] = symbol, returned
    assert code is not None
    code.link_in(binding.parse_assembly(_NEVER_CALLED))
    return code, kernels


def signatures() -> Iterator[str]:
    """Yield the lines of ``signatures.txt``."""
    text = Path(__file__).with_name("signatures.txt").read_text()
    yield from (line for line in text.splitlines() if line and not line.startswith("#"))


def _compiled(name: str, types: str) -> tuple[str, str, str]:
    """Compile a kernel; return LLVM's assembly, the name of the function, and what it returns."""
    from numba import types as numba_types

    from ocelot_em.kernels import jit

    module, _, function = name.rpartition(".")
    kernel = getattr(import_module(f"ocelot_em.kernels.{module}"), function)
    argument_types = numba_types.Tuple(tuple(Types(types)))
    enter: Any = jit.entry_point(kernel, argument_types)
    signature = (numba_types.int64, numba_types.int64)
    enter.compile(signature)
    result = enter.overloads[signature]
    inner = kernel.dispatcher.overloads[tuple(argument_types)]
    return (
        enter.inspect_llvm(signature),
        result.fndesc.llvm_func_name,
        _notation(inner.signature.return_type),
    )


class Types:
    """numba's types, read from their notation."""

    def __init__(self, text: str) -> None:
        self._words = text.replace("(", " ( ").replace(")", " ) ").split()

    def __iter__(self) -> Iterator[Any]:
        from numba import types

        while self._words:
            word = self._words.pop(0)
            if word == ")":
                return
            if word == "(":
                yield types.Tuple(tuple(self))
            elif ":" in word:
                dtype, _, form = word.partition(":")
                yield types.Array(_number(dtype), int(form[0]), form[1])
            else:
                yield _number(word)


def _number(dtype: str) -> Any:
    import numpy as np
    from numba import from_dtype

    return from_dtype(np.dtype(dtype))


def _notation(numba_type: Any) -> str:
    from numba import types

    if isinstance(numba_type, types.BaseTuple):
        return f"({' '.join(_notation(item) for item in numba_type)})"
    if isinstance(numba_type, types.Boolean):
        return "?"
    if isinstance(numba_type, types.Integer | types.Float):
        return f"{'f' if isinstance(numba_type, types.Float) else 'i'}{numba_type.bitwidth // 8}"
    return ""


if __name__ == "__main__":
    if sys.argv[1:] == ["here"]:
        build(list(filter(ahead.can_run, ahead.cpus()))[:1])
    elif sys.argv[1:]:
        _build_for(sys.argv[1])
    else:
        build(ahead.cpus())
