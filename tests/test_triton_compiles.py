"""Every Triton kernel compiles for Hopper at the real shapes without a GPU: registers, spills, memory accesses.

python test_triton_compiles.py      what the test runs: Triton must be imported without TRITON_INTERPRET
"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

B, F, D, I, J = "*bf16", "*fp32", "*fp64", "*i64", "*i32"  # noqa: E741
STEP = dict(t=F, s=F, cap=F, mode=I)
PAIR = dict(v=B, v_old=B, first=F, second=F, v_ref=B)
TILE = dict(TOKENS=16, CHANNELS=64)
CHUNKS = {"partial": F, "order": J, "spans": J}
SIZES = {
    name: "i32"
    for name in (
        "width", "stride", "tokens", "programs", "heads", "rows", "dim", "tiles", "size", "chunks", "channels", "quads",
        "samples", "components", "stride_a", "stride_b", "stride_c", "out_token", "out_head", "part_token", "part_head",
        "lse_token", "lse_head", "part_lse_token", "part_lse_head",
    )
}  # fmt: skip
SIZES |= {"count": "i64", "calls": "i64", "seed": "i64"}
SIZES |= dict.fromkeys(("eps", "level", "sine", "guidance", "beta", "scale", "low", "high", "clip"), "fp32")
# sizes that are multiples of 16 at the real shapes
EVEN = (
    "width", "stride", "count", "dim", "channels", "quads", "calls", "stride_a", "stride_b", "stride_c", "out_token",
    "out_head", "part_token", "part_head",
)  # fmt: skip
ROWS = dict(width=4096, TOKENS=1, BLOCK=4096, REST=0, LANES=256)
WIDE_ROWS, PARTED_ROWS = ROWS | dict(LANES=512), dict(width=3072, TOKENS=1, BLOCK=2048, REST=1024, LANES=256)
HEADS = dict(heads=24, half=64, ROWS=16, HALF=64)
# op.kernel, or op.kernel:variant: pointers (None: left out), compile-time sizes, warps; 2.1 is 4096 wide with heads of 128,
# 1.x 3072
KERNELS = {
    "swiglu._forward_kernel": (dict(gate=B, up=B, out=B), dict(BLOCK=2048), 4),
    "swiglu._backward_kernel": (dict(dout=B, gate=B, up=B, dgate=B, dup=B), dict(BLOCK=2048), 4),
    "gated_residual._forward_kernel": (
        dict(x=B, y=B, gate=B, row=I, out=B), dict(BOUNDED=True, TOKENS=1, BLOCK=2048), 4,
    ),
    "gated_residual._backward_kernel": (
        dict(dout=B, y=B, gate=B, dy=B, **CHUNKS), dict(BOUNDED=True, TOKENS=1, BLOCK=1024), 2,
    ),
    "norm_modulate._forward_kernel": (dict(x=B, scale=B, shift=B, row=I, out=B), ROWS, 8),
    "norm_modulate._forward_kernel:3072": (dict(x=B, scale=B, shift=B, row=I, out=B), PARTED_ROWS, 8),
    "norm_modulate._backward_kernel": (dict(dout=B, x=B, scale=B, dx=B, **CHUNKS), dict(SHIFTED=True, **ROWS), 8),
    "norm_modulate._backward_kernel:3072": (
        dict(dout=B, x=B, scale=B, dx=B, **CHUNKS), dict(SHIFTED=True, **PARTED_ROWS), 8,
    ),
    "qk_norm_rope._forward_kernel": (dict(x=B, weight=B, cos=F, sin=F, out=B), HEADS, 8),
    "qk_norm_rope._backward_kernel": (dict(dout=B, x=B, weight=B, cos=F, sin=F, dx=B, partial=F), HEADS, 8),
    "qk_norm_rope._weight_kernel": (dict(partial=F, out=B), dict(PROGRAMS=512, BLOCK=16), 8),
    "residual_norm._forward_kernel": (
        dict(x=B, y=B, gate=B, scale=B, shift=None, row=I, out=B, scaled=B), dict(BOUNDED=True, **ROWS), 8,
    ),
    "residual_norm._backward_kernel": (
        dict(dout=B, dscaled=B, out=B, y=B, gate=B, scale=B, dx=B, dy=B, **CHUNKS),
        dict(BOUNDED=False, SHIFTED=True, **WIDE_ROWS), 16,
    ),
    "residual_norm._forward_kernel:3072": (
        dict(x=B, y=B, gate=B, scale=B, shift=B, row=I, out=B, scaled=B), dict(BOUNDED=False, **PARTED_ROWS), 8,
    ),
    "residual_norm._backward_kernel:3072": (
        dict(dout=B, dscaled=B, out=B, y=B, gate=B, scale=B, dx=B, dy=B, **CHUNKS),
        dict(BOUNDED=False, SHIFTED=True, **WIDE_ROWS | dict(width=3072)), 16,
    ),
    "merge_attention._kernel": (dict(out=B, lse=F, part=B, part_lse=F), dict(ROWS=16, DIM=128), 4),
    "philox._kernel": (dict(row=I, token=I, prompt=I, sample=I, word=I, out=F), dict(BLOCK=512), 4),
    "flow_step._kernel": (
        dict(x=F, cond=B, uncond=B, row=I, **STEP, prompt=I, sample=I, word=I, index=I, x_next=F, squares=F),
        dict(GUIDED=True, RESCALE=True, NOISY=True, SQUARES=True, ROUNDS=True, **TILE), 4,
    ),
    "policy_triton._forward_kernel": (dict(**PAIR, row=I, **STEP, sums=F), dict(KIND=2, REFERENCE=True, **TILE), 4),
    "policy_triton._rows_kernel": (
        dict(sums=F, offset=I, **STEP, share=F, advantage=F, loss=F, kl=F, kept=F, ratio=F, clipped="*i1"),
        dict(KIND=2, GUARD=True, REFERENCE=True, BLOCK=1024), 4,
    ),
    "policy_triton._backward_kernel": (
        dict(dloss=F, dkl=F, kept=F, **PAIR, row=I, offset=I, **STEP, dv=B), dict(KIND=1, REFERENCE=True, **TILE), 4,
    ),
    "velocity_match._forward_kernel": (
        dict(v=B, cond=B, uncond=B, sums=F), dict(GUIDED=True, RESCALE=True, **TILE), 4,
    ),
    "velocity_match._rows_kernel": (dict(sums=F, offset=I, loss=F), dict(BLOCK=1024), 4),
    "velocity_match._backward_kernel": (
        dict(dloss=F, v=B, cond=B, uncond=B, row=I, offset=I, dv=B), dict(GUIDED=True, RESCALE=True, **TILE), 4,
    ),
    "group_advantage._groups_kernel": (
        dict(scores=D, applies="*i1", order=I, group=I, weights=D, floors=D, total=D, value=D, valid="*i1", floor=D),
        dict(CONVENTION=0, BLOCK=1024), 16,
    ),
    "group_advantage._batch_kernel": (
        dict(total=D, value=D, valid="*i1", scale=D, advantage=F, floor=D), dict(CONVENTION=3, BLOCK=1024), 16,
    ),
    "modulation._table_kernel": (dict(row=I, order=J, spans=J, first=J), dict(BLOCK=4096), 16),
    "quantise_rows._kernel": (dict(a=B, b=B, c=B, out="*fp8e4nv", scale=F), dict(LARGEST=448.0, PARTS=3, BLOCK=4096), 16),
    "modulation._reduce_kernel": (dict(partial=F, first=J, out=B), dict(CHUNKS=64, BLOCK=32), 4),
}  # fmt: skip
# kernels that may move fewer than 16 bytes a time: their outputs are small or scattered
NARROW = (
    "qk_norm_rope._backward_kernel", "qk_norm_rope._weight_kernel", "modulation._table_kernel", "modulation._reduce_kernel",
    "policy_triton._rows_kernel", "velocity_match._rows_kernel", "group_advantage._groups_kernel",
    "group_advantage._batch_kernel",
)  # fmt: skip
# kernels that write a number a token beside their tensors
SUMS = (
    "merge_attention._kernel",
    "flow_step._kernel",
    "policy_triton._forward_kernel",
    "velocity_match._forward_kernel",
    "quantise_rows._kernel",
)


def build(name: str):
    """The kernel as Triton compiles it for aligned tensors."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers, sizes, warps = KERNELS[name]
    op, _, kernel = name.partition(":")[0].partition(".")
    fn = getattr(importlib.import_module(f"qirl.kernels.{op}"), kernel)
    constants = sizes | {arg: None for arg, kind in pointers.items() if kind is None}
    signature = {arg: "constexpr" if arg in constants else pointers.get(arg) or SIZES[arg] for arg in fn.arg_names}
    place = fn.arg_names.index
    aligned = [arg for arg in fn.arg_names if arg not in constants and (arg in pointers or arg in EVEN)]
    source = ASTSource(
        fn,
        signature,
        {(place(arg),): value for arg, value in constants.items()},
        {(place(arg),): [["tt.divisibility", 16]] for arg in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def compile_all() -> None:
    """Prints one line a kernel: its name, registers, bytes of stack, and its global accesses by width."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    for name in KERNELS:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(build(name).asm["cubin"])
            file.flush()
            used, code = (
                subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
                for command in ([tools / "cuobjdump", "--dump-resource-usage"], [tools / "nvdisasm", "-c"])
            )
        registers, stack = (int(re.search(rf"{word}:(\d+)", used)[1]) for word in ("REG", "STACK"))
        accesses = re.findall(r"\b(?:LDG|STG|LDGSTS)\.E[.\w]*", code)
        widths = {access: accesses.count(access) for access in sorted(set(accesses))}
        print(name, registers, stack, *(f"{access}:{count}" for access, count in widths.items()))


@pytest.fixture(scope="module")
def compiled():
    """Rows of `compile_all` from a process of its own: name, registers, stack, accesses."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_hopper_without_spills(compiled):
    assert [row[0] for row in compiled] == list(KERNELS)
    assert not [row for row in compiled if int(row[2])], compiled


def test_registers_leave_room_for_sixteen_warps_a_multiprocessor(compiled):
    """65,536 registers, 32 threads a warp: under 128 a thread, one program of 16 warps or two of 8 fit."""
    assert not [row for row in compiled if int(row[1]) > 128], compiled


def test_large_tensors_move_sixteen_bytes_a_thread_at_a_time(compiled):
    """Loads and stores in bfloat16 are 128 bits wide; narrower ones read a program's own row and span."""
    for variant, _, _, *accesses in compiled:
        name = variant.partition(":")[0]
        # the second block of a row in two has 4 values a thread
        narrow = [access for access in accesses if ".128:" not in access and not (":" in variant and ".64:" in access)]
        wide = [access for access in accesses if ".128:" in access]
        assert wide or name in NARROW, name
        assert not [access for access in narrow if access.startswith("STG")] or name in (*NARROW, *SUMS), name
        assert not [access for access in narrow if ".U16" in access or ".U8" in access] or name in NARROW, name


def test_the_list_names_every_kernel_there_is():
    folder = Path(__file__).parents[1] / "kernels"
    found = {f"{path.stem}.{name}" for path in folder.glob("*.py") for name in re.findall(r"^def (\w+_kernel|_kernel)\(", path.read_text(), re.M)}  # fmt: skip
    assert found == {name.partition(":")[0] for name in KERNELS}


if __name__ == "__main__":
    compile_all()
