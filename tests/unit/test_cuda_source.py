"""The CUDA source compiles for the GPUs that are around; needs NVIDIA's compiler, but no GPU."""

import re

import pytest

from ocelot_em.kernels.device import _COMPILE_OPTIONS, kernel_source

KERNELS = {"fold_indexed", "fold_4_poses", "fold_5_poses", "finalise", "mask_nan"}
KERNELS |= {"decode_streams", "unshuffle", "measure_rows"}
KERNELS |= {"encode_streams", "shuffle", "pack_streams", "gather"}


def compiled(architecture, *options):
    """Object code, or text for the assembler if the architecture is virtual; the compiler's log."""
    nvrtc = pytest.importorskip(
        "cuda.bindings.nvrtc", reason="no cuda-bindings, which brings NVIDIA's compiler"
    )

    def checked(answer):
        status, *values = answer
        assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, status
        return values[0] if values else None

    def read(of, name):
        # It is written to where it is. Of a single byte, Python has one object for everybody.
        content = bytes(1 + checked(getattr(nvrtc, f"nvrtcGet{name}Size")(of)))
        checked(getattr(nvrtc, f"nvrtcGet{name}")(of, content))
        return content.rstrip(b"\x00")

    try:
        source = kernel_source().encode()
        program = checked(nvrtc.nvrtcCreateProgram(source, b"merge.cu", 0, [], []))
    except RuntimeError as error:
        pytest.skip(f"NVIDIA's compiler cannot be loaded: {error}")
    flags = [f"--gpu-architecture={architecture}".encode(), b"-std=c++17"]
    flags += [option.encode() for option in (*_COMPILE_OPTIONS, *options)]
    status = nvrtc.nvrtcCompileProgram(program, len(flags), flags)[0]
    log = read(program, "ProgramLog").decode()
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, log
    return read(program, "CUBIN" if architecture.startswith("sm") else "PTX"), log


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_compiles_without_spilling_and_without_warnings(architecture):
    code, log = compiled(architecture, "--ptxas-options=-v")
    assert len(code) > 1000
    assert set(re.findall(r"Compiling entry function '(\w+)'", log)) == KERNELS
    assert "warning" not in log
    # What does not fit the registers would go through memory, which is what limits these kernels.
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    assert frames == [("0", "0")] * len(KERNELS)
    assert max(map(int, re.findall(r"Used (\d+) registers", log))) <= 128


def test_products_and_sums_are_not_fused():
    source = kernel_source()
    for name in ("__dmul_rn", "__dadd_rn", "__dsub_rn", "__ddiv_rn", "__dsqrt_rn"):
        assert name in source
    assert "--fmad=false" in _COMPILE_OPTIONS


def test_subnormal_values_are_kept():
    assert b".ftz" not in compiled("compute_90")[0]
