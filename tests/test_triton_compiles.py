"""Every Triton kernel compiles for Hopper at the real shapes without a GPU, and keeps its values in registers.

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

B, F, D, I = "*bf16", "*fp32", "*fp64", "*i64"  # noqa: E741
STEP = dict(t=F, s=F, cap=F, mode=I)
PAIR = dict(v=B, v_old=B, first=F, second=F, v_ref=B)
TILE = dict(TOKENS=16, CHANNELS=64)
CHUNKS = {"partial": F, "order": I, "chunk_row": I, "begin": I, "end": I}
SIZES = {"count": "i64", "width": "i32", "eps": "fp32", "tokens": "i32", "heads": "i32", "half": "i32", "rows": "i32", "dim": "i32", "channels": "i32",
         "calls": "i64", "quads": "i32", "samples": "i32", "components": "i32", "seed": "i64"}  # fmt: skip
SIZES |= dict.fromkeys(("level", "sine", "guidance", "beta", "scale", "low", "high", "clip"), "fp32")
# op.kernel: pointers, compile-time sizes, warps; 2.1 is 4096 wide with 32 heads of 128, 1.x 3072 with 24
KERNELS = {
    "swiglu._forward_kernel": (dict(gate=B, up=B, out=B), dict(BLOCK=2048), 4),
    "swiglu._backward_kernel": (dict(dout=B, gate=B, up=B, dgate=B, dup=B), dict(BLOCK=2048), 4),
    "gated_residual._forward_kernel": (dict(x=B, y=B, gate=B, row=I, out=B), dict(BLOCK=2048), 4),
    "gated_residual._backward_kernel": (dict(dout=B, y=B, gate=B, dy=B, **CHUNKS), dict(BLOCK=1024), 4),
    "norm_modulate._forward_kernel": (dict(x=B, scale=B, row=I, out=B), dict(BLOCK=4096), 8),
    "norm_modulate._backward_kernel": (dict(dout=B, x=B, scale=B, dx=B, **CHUNKS), dict(BLOCK=4096), 8),
    "qk_norm_rope._forward_kernel": (dict(x=B, weight=B, cos=F, sin=F, out=B), dict(HEADS=32, HALF=64), 8),
    "qk_norm_rope._backward_kernel": (
        dict(dout=B, x=B, weight=B, cos=F, sin=F, dx=B, partial=F), dict(TOKENS=4, HEADS=32, HALF=64), 8,
    ),
    "residual_norm._forward_kernel": (dict(x=B, y=B, gate=B, scale=B, row=I, out=B, scaled=B), dict(BLOCK=4096), 8),
    "residual_norm._backward_kernel": (
        dict(dout=B, dscaled=B, out=B, y=B, gate=B, scale=B, dx=B, dy=B, of_gate=F, of_scale=F, **CHUNKS),
        dict(BLOCK=4096), 8,
    ),
    "merge_attention._kernel": (dict(out_a=B, lse_a=F, out_b=B, lse_b=F, out=B, lse=F), dict(ROWS=16, DIM=128), 4),
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
        dict(CONVENTION=0, BLOCK=1024), 4,
    ),
    "group_advantage._batch_kernel": (
        dict(total=D, value=D, valid="*i1", scale=D, advantage=F, floor=D), dict(CONVENTION=3, BLOCK=1024), 4,
    ),
    "rows._reduce_kernel": (dict(partial=F, first=I, out=F), dict(BLOCK=256), 4),
}  # fmt: skip


def compile_all() -> None:
    """Prints one line a kernel: its name, registers and bytes spilled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for name, (pointers, sizes, warps) in KERNELS.items():
        op, _, kernel = name.partition(".")
        fn = getattr(importlib.import_module(f"qirl.kernels.{op}"), kernel)
        signature = {arg: pointers.get(arg) or ("constexpr" if arg in sizes else SIZES[arg]) for arg in fn.arg_names}
        constants = {(fn.arg_names.index(arg),): value for arg, value in sizes.items()}
        built = triton.compile(ASTSource(fn, signature, constants), target=GPUTarget("cuda", 90, 32),
                               options={"num_warps": warps})  # fmt: skip
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            used = subprocess.run(
                [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
            )
        registers, stack = (int(re.search(rf"{word}:(\d+)", used.stdout)[1]) for word in ("REG", "STACK"))
        print(name, registers, stack)


def test_every_kernel_compiles_for_hopper_without_spills():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == list(KERNELS)
    assert not [row for row in rows if int(row[2])], done.stdout


def test_the_list_names_every_kernel_there_is():
    folder = Path(__file__).parents[1] / "kernels"
    found = {f"{path.stem}.{name}" for path in folder.glob("*.py") for name in re.findall(r"^def (\w+_kernel|_kernel)\(", path.read_text(), re.M)}  # fmt: skip
    assert found == set(KERNELS)


if __name__ == "__main__":
    compile_all()
