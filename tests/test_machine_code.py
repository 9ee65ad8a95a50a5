"""Facts read off machine code: each parser on a few lines of it, and tiny kernels compiled for two targets.

The kernels are compiled in a process of their own, `python -m tests.test_machine_code`, so that it does not matter
whether this one interprets Triton (TRITON_INTERPRET=1).
"""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from bench import codegen  # noqa: E402
from bench.__main__ import main  # noqa: E402
from bench.machine_code import (  # noqa: E402
    Access,
    MachineCode,
    Resources,
    Synchronization,
    access_forms,
    amd_accesses,
    amd_resources,
    compile_kernel,
    ptx_synchronization,
    sass_accesses,
    sass_resources,
)
from tests.processes import ROOT, without_interpreter  # noqa: E402

TTIR = """
#loc = loc("/a/k.py":15:0)
#loc20 = loc("x"(#loc))
module {
    %n = tt.load %lens : !tt.ptr<i64> loc(#loc23)
    %v_2 = tt.load %v_1 cacheModifier = ca : tensor<1024x!tt.ptr<f32>> loc(#loc31)
    %v_5 = tt.load %v_4#1, %v_2, %cst evictionPolicy = evict_first : tensor<1024x!tt.ptr<f32>> loc(#loc34)
    tt.store %v_1, %1 : tensor<1024x!tt.ptr<f32>> loc(#loc11)
    tt.store %v_4, %1, %v_2 : tensor<1024x!tt.ptr<f32>> loc(#loc17)
    tt.store %v_4, %1, %v_2 : tensor<1024x!tt.ptr<f32>> loc(#loc11)
    %k = tt.atomic_rmw add, acq_rel, gpu, %p, %c1_i32, %true : (!tt.ptr<i32>, i32, i1) -> i32 loc(#loc5)
}
#loc4 = loc("/a/k.py":17:14)
#loc5 = loc("/a/k.py":18:7)
#loc7 = loc("/a/k.py":13:23)
#loc9 = loc("/a/k.py":7:23)
#loc11 = loc("/a/k.py":20:22)
#loc15 = loc("/a/k.py":9:23)
#loc17 = loc("/a/k.py":23:22)
#loc23 = loc("n"(#loc4))
#loc28 = loc(callsite(#loc7 at #loc23))
#loc30 = loc("v"(#loc9))
#loc31 = loc(callsite(#loc30 at #loc28))
#loc34 = loc(callsite(#loc15 at #loc28))
"""
FORMS = {
    ("k.py", 17): "scalar",
    ("k.py", 7): "full",
    ("k.py", 9): "masked",
    ("k.py", 20): "mixed",
    ("k.py", 23): "masked",
    ("k.py", 18): "atomic",
}
SASS = """
k:
	//## File "/a/k.py", line 17
        /*0030*/                   LDG.E.64 R4, desc[UR4][R4.64] ;
	//## File "/a/k.py", line 7
        /*00d0*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*00e0*/                   LDG.E.EF.ENL2.256 R8, R16, desc[UR4][R2.64+0x800] ;
        /*00f0*/                   LD.E.128.STRONG.GPU R8, [R2.64] ;
	//## File "/a/k.py", line 9
        /*0200*/               @P1 LDG.E R0, desc[UR4][R2.64] ;
        /*0210*/              @!P1 LDG.E.U16.CONSTANT R0, desc[UR4][R2.64] ;
        /*0220*/             @!UP1 LDG.E.S8 R0, desc[UR4][R2.64] ;
.L_x_0:
	//## File "/a/k.py", line 24
        /*0330*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0340*/                   ATOMG.E.ADD.STRONG.GPU PT, R3, desc[UR8][R2.64], R7 ;
        /*0350*/                   STS.128 [R2], R4 ;
        /*0360*/                   STL [R1+0x8], R4 ;
        /*0370*/                   STL.64 [R1], R4 ;
       /*10380*/                   LDL.LU.64 R8, [R1] ;
        /*0390*/                   ULDC.64 UR6, c[0x0][0x218] ;
"""
USAGE = " Function k:\n  REG:254 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:992 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
AMDGCN = """
	.file	1 "/a" "k.py"
	.loc	1 17 14 is_stmt 1               ; k.py:17:14
	s_load_dwordx2 s[0:1], s[6:7], 0x0
	global_load_dwordx2 v[0:1], v2, s[6:7]
	.loc	1 9 23                          ; k.py:9:23 @[ k.py:13:23 @[ k.py:22:21 ] ]
	buffer_load_ushort v3, v2, s[8:11], 0 offen
	buffer_load_short_d16_hi v3, v2, s[8:11], 0 offen
	.loc	1 7 23
	buffer_load_dwordx4 v[2:5], v0, s[4:7], 0 offen
	flat_load_dwordx4 v[2:5], v[0:1]
	.loc	1 24 22                         ; k.py:24:22
	global_store_dwordx4 v0, v[2:5], s[4:5]
	global_atomic_add v3, v3, v4, s[2:3] sc0
	scratch_store_dwordx4 off, v[16:19], off offset:176 ; 16-byte Folded Spill
	scratch_load_dword v1, off, off offset:4 ; 4-byte Folded Reload
amdhsa.kernels:
  - .agpr_count:     0
    .private_segment_fixed_size: 340
    .sgpr_count:     74
    .sgpr_spill_count: 2
    .vgpr_count:     94
    .vgpr_spill_count: 84
"""
PTX = """
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0
)
{
	ld.param.b64 	%rd33, [k_param_0];
	@%p1 atom.global.gpu.relaxed.add.u32 %r7, [ %rd33 + 0 ], %r8;
	@%p1 st.shared.b32 [ %r9 + 0 ], %r7;
	bar.sync 	0;
$L__BB0_1:                              // =>This Inner Loop Header: Depth=1
	@%p2 ld.global.gpu.acquire.b32 %r38, [ %rd3 + 0 ];
	@%p2 st.shared.b32 [ %r39 + 0 ], %r38;
	bar.sync 	0;
	ld.shared.b32 	%r40, [global_smem];
	@%p1 bra 	$L__BB0_1;
	// bar.sync in a comment
	st.global.v4.b32 [ %rd6 + 0 ], { %r2, %r3, %r4, %r5 };
	@%p2 atom.global.gpu.release.add.u32 %r34, [ %rd1 + 0 ], %r35;
	bar.sync 	0;
$L__tmp35:
	.loc	1 36 48                         // toy.py:36:48
	add.s64 	%rd24, %rd33, %rd209;
	@%p2 atom.global.acquire.cta.cas.b32 %r44, [ %rd5 + 0 ], %r43, %r42;
	{ red.relaxed.sys.global.add.f32 [%rd1], %f1; }
	fence.acq_rel.gpu;
	membar.gl;
	st.release.gpu.global.b32 [%rd1], %r1;
	ret;
"""


def test_forms_of_lines() -> None:
    assert access_forms(TTIR) == FORMS


def test_sass() -> None:
    assert set(sass_accesses(SASS, FORMS)) == {
        Access("load", 64, "k.py", 17, "scalar", 1),
        Access("load", 128, "k.py", 7, "full", 2),
        Access("load", 256, "k.py", 7, "full", 1, evict_first=True),
        Access("load", 32, "k.py", 9, "masked", 1),
        Access("load", 16, "k.py", 9, "masked", 1),
        Access("load", 8, "k.py", 9, "masked", 1),
        Access("store", 128, "k.py", 24, "unknown", 1),
    }
    assert sass_resources(USAGE, SASS) == Resources(254, 0, 0, 16, 12, 8)
    with pytest.raises(ValueError, match="no resource usage"):
        sass_resources("", SASS)


def test_amdgcn() -> None:
    assert set(amd_accesses(AMDGCN, FORMS)) == {
        Access("load", 64, "k.py", 17, "scalar", 1),
        Access("load", 16, "k.py", 9, "masked", 2),
        Access("load", 128, "k.py", 7, "full", 2),
        Access("store", 128, "k.py", 24, "unknown", 1),
    }
    assert amd_resources(AMDGCN) == Resources(94, 74, 2, 340, 16, 4)
    with pytest.raises(ValueError, match=r"no \.vgpr_count"):
        amd_resources("")


def test_ptx() -> None:
    assert ptx_synchronization(PTX) == (
        Synchronization("atom.add", "relaxed", "gpu", False, True),
        Synchronization("ld", "acquire", "gpu", True, True),  # entered and repeated behind a barrier
        Synchronization("atom.add", "release", "gpu", False, True),  # a store lies between it and the barrier
        Synchronization("atom.cas", "acquire", "cta", True, False),
        Synchronization("red.add", "relaxed", "sys", False, False),
        Synchronization("fence", "acq_rel", "gpu", False, False),
        Synchronization("fence", "", "gpu", False, False),
        Synchronization("st", "release", "gpu", False, False),
    )


@pytest.mark.parametrize(
    ("left", "right", "behind"),
    [
        ("bar.sync 0;", "bar.sync 0;", True),
        ("", "bar.sync 0;", False),
        ("bar.sync 0;", "", False),
        ("bar.sync 0;", "bar.sync 0; st.global.b32 [%rd1], %r1;", False),
        ("bar.sync 0;", "@%p2 atom.global.gpu.relaxed.add.u32 %r2, [%rd1], 1; bar.sync 0;", True),
        ("bar.sync 0;", "ret;", True),
    ],
)
@pytest.mark.parametrize("before", ["", "bar.sync 0;"])
def test_a_barrier_is_asked_for_on_every_way(left: str, right: str, behind: bool, before: str) -> None:
    """One of two branches, with a loop behind them; and whether what both come from has a barrier already."""
    lines = [
        "st.global.b32 [%rd1], %r1;", before, "@%p1 bra $L__BB0_2;", left, "bra.uni $L__BB0_3;",
        "$L__BB0_2:", right, "$L__BB0_3:", "ld.global.b32 %r2, [%rd1];", "@%p3 bra $L__BB0_3;",
        "st.release.gpu.global.b32 [%rd1], %r1;", "ret;",
    ]  # fmt: skip
    *_, release = ptx_synchronization("\n".join(lines))
    assert release.after_barrier == (behind or (before != "" and "st.global" not in right))


def _code(*accesses: Access) -> MachineCode:
    return MachineCode(128, 0, 0, 0, 0, 0, "k", "sm_90", 8, 32, accesses, ())


def test_counts() -> None:
    code = _code(Access("load", 128, "", 1, "full", 4), Access("load", 32, "", 2, "scalar", 3))
    assert code.count("load", True) == code.count("load", True, "full", "masked") == 4
    assert code.count("load", False) == 3 and code.count("load", False, "full") == code.count("store", True) == 0
    assert code.widths("load") == {32: 3, 128: 4} and code.spill_bytes == 0


def test_table() -> None:
    code = _code(Access("load", 128, "", 1, "full", 4), Access("store", 32, "", 2, "full", 3))
    assert codegen.codegen_table([("fp32", code)]).splitlines()[-1].split() == [
        *("sm_90", "fp32", "128", "32", "0/0", "4/0", "0/3", "0/3")
    ]


def double(
    addresses: tl.tensor,
    counts: tl.tensor,
    sums: tl.tensor,
    counter: tl.tensor,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    UNMASKED: tl.constexpr,
) -> None:
    """Double a block whose address is in a table; announce it."""
    block = tl.multiple_of(tl.load(addresses).to(tl.pointer_type(DTYPE)), 16) + tl.arange(0, BLOCK)
    count = tl.load(counts)
    if UNMASKED and count >= BLOCK:
        x = tl.load(block)
        tl.store(block, (2 * x).to(DTYPE))
    else:
        mask = tl.arange(0, BLOCK) < count
        x = tl.load(block, mask=mask)
        tl.store(block, (2 * x).to(DTYPE), mask=mask)
    tl.store(sums + tl.arange(0, BLOCK), 1.0)
    if UNMASKED:
        tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < 1:
        pass


def rotate(a: tl.tensor, b: tl.tensor, c: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Needs three blocks in registers at once."""
    at = tl.arange(0, BLOCK)
    x, y, z = tl.load(a + at), tl.load(b + at), tl.load(c + at)
    tl.store(a + at, y)
    tl.store(b + at, z)
    tl.store(c + at, x)


def _compile_all() -> dict[str, dict[str, Any]]:
    doubling, rotation = triton.jit(double), triton.jit(rotate)
    signature = {"addresses": "*i64", "counts": "*i64", "sums": "*fp32", "counter": "*i32"}
    found = {}
    for target in ("sm_90", "gfx942"):
        for name, dtype, unmasked in (
            ("fp32", tl.float32, True),
            ("bf16", tl.bfloat16, True),
            ("m", tl.float32, False),
        ):
            constants = {"DTYPE": dtype, "BLOCK": 2048, "UNMASKED": unmasked}
            found[f"{target} {name}"] = compile_kernel(doubling, signature, constants, target, 4)
        constants = {"DTYPE": tl.float32, "BLOCK": 2048, "UNMASKED": True}
        found[f"{target} unaligned sums"] = compile_kernel(doubling, signature, constants, target, 4, attrs={})
        pointers = dict.fromkeys("abc", "*fp32")
        found[f"{target} hungry"] = compile_kernel(rotation, pointers, {"BLOCK": 65536}, target, 16)
    return {name: asdict(code) for name, code in found.items()}


@pytest.fixture(scope="module")
def compiled() -> dict[str, MachineCode]:
    command = [sys.executable, "-m", "tests.test_machine_code"]
    done = subprocess.run(command, cwd=ROOT, env=without_interpreter(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for name, code in json.loads(done.stdout).items():
        code["accesses"] = tuple(Access(**access) for access in code["accesses"])
        code["synchronization"] = tuple(Synchronization(**item) for item in code["synchronization"])
        found[name] = MachineCode(**code)
    return found


@pytest.mark.parametrize(("target", "threads"), [("sm_90", 128), ("gfx942", 256)])
@pytest.mark.parametrize(("dtype", "bits"), [("fp32", 32), ("bf16", 16)])
def test_unmasked_blocks_behind_a_table_are_wide(
    compiled: dict[str, MachineCode], target: str, threads: int, dtype: str, bits: int
) -> None:
    code = compiled[f"{target} {dtype}"]
    block = 2048 * bits // 128 // threads
    assert code.count("load", True, "full") == block
    assert code.count("store", True, "full") == block + 2048 * 32 // 128 // threads
    assert code.count("load", False, "full", "mixed", "unknown") == 0
    assert code.count("store", False, "full", "mixed", "unknown") == 0
    assert code.count("load", True, "masked") == code.count("store", True, "masked") == 0
    assert code.count("load", False, "masked") == code.count("store", False, "masked") == 2048 // threads
    assert code.spill_bytes == 0 and code.stack_bytes == 0 and 16 <= code.registers < 128


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_mask_from_a_loaded_length_or_a_missing_promise_is_narrow(
    compiled: dict[str, MachineCode], target: str
) -> None:
    code = compiled[f"{target} m"]
    assert code.count("load", True) == 0 and code.count("load", False, "masked") > 0
    unaligned = compiled[f"{target} unaligned sums"]
    assert unaligned.count("load", True, "full") > 0 and unaligned.count("store", False, "full") > 0


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_spills_are_seen(compiled: dict[str, MachineCode], target: str) -> None:
    code = compiled[f"{target} hungry"]
    assert code.spill_store_bytes > 0 and code.spill_load_bytes > 0 and code.stack_bytes > 0
    assert code.count("load", True, "full") > 0


def test_a_release_behind_a_barrier_is_told_from_one_without(compiled: dict[str, MachineCode]) -> None:
    for name, behind in (("sm_90 fp32", True), ("sm_90 m", False)):
        release, acquire = compiled[name].synchronization
        assert release.operation == "atom.add" and release.semantics == "release" and release.scope == "gpu"
        assert release.after_barrier == behind
        # Triton turns "add 0" into a load.
        assert acquire.operation == "ld" and acquire.semantics == "acquire" and acquire.scope == "gpu"
        assert acquire.before_barrier


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(codegen, "variants", lambda: iter([("toy", None, {}, {}, 4), ("bad", None, {}, {}, 8)]))

    def fake(kernel: Any, signature: Any, constants: Any, target: str, num_warps: int) -> MachineCode:
        if num_warps == 8:
            raise RuntimeError("not\n today")
        return _code(Access("load", 128, "k.py", 1, "full", 4))

    monkeypatch.setattr("bench.machine_code.compile_kernel", fake)
    out = tmp_path / "deeper" / "codegen.json"
    assert main(["codegen", "--targets", "sm_90", "--json", str(out)]) == 1
    record = json.loads(out.read_text())
    assert record["environment"]["triton"] == triton.__version__
    assert record["failures"] == ["sm_90 bad failed: RuntimeError: not today"]
    assert [(row["variant"], row["registers"], len(row["accesses"])) for row in record["results"]] == [("toy", 128, 1)]
    printed = capsys.readouterr().out
    assert "wide ld/st" in printed and "bad failed" in printed
    with pytest.raises(SystemExit) as stop:
        main(["codegen", "--targets", "sm_1"])
    assert stop.value.code == 2 and "sm_80, sm_90, sm_100, gfx942" in capsys.readouterr().err


def test_the_interpreter_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(SystemExit, match="TRITON_INTERPRET is set"):
        main(["codegen"])


if __name__ == "__main__":
    print(json.dumps(_compile_all()))
