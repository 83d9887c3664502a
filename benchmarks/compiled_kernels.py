"""Compiles every Triton kernel for Ampere and Hopper without a GPU and prints what the compiler made of it.

    python benchmarks/compiled_kernels.py [--json out.json]

Registers a thread, bytes spilled to local memory, shared memory of a block, and the number of tensor-core instructions
(HMMA: Ampere's, HGMMA: Hopper's warp-group form) in the machine code. Exits with 1 where a kernel spills, takes more
shared memory than the architecture gives a block, or misses tensor cores where it must use them.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

LARGEST_SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}


def compile_case(case, capability: int) -> dict:
    """Figures of one `CompileCase` on an architecture (80 or 90)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # What the launcher would find out about the arguments: pointers and sizes are multiples of 16 in real batches.
    names = list(case.signature)
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if case.signature[name].startswith(("*", "i"))
    }
    source = ASTSource(fn=case.kernel, signature=case.signature, constexprs=case.constants, attrs=aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage, assembly = (
            subprocess.run([cuobjdump, option, binary], check=True, capture_output=True, text=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = (int(re.search(rf"\b{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK"))
    return {
        "kernel": case.name,
        "architecture": f"sm_{capability}",
        "registers": registers,
        "spilled_bytes": stack if re.search(r"\b(STL|LDL)\b", assembly) else 0,
        "shared_bytes": compiled.metadata.shared,
        "hmma": len(re.findall(r"\bHMMA", assembly)),
        "hgmma": len(re.findall(r"\bHGMMA", assembly)),
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
    }


def faults(figures: dict, needs_tensor_cores: bool) -> list[str]:
    """What is wrong with a compiled kernel."""
    found = []
    largest = LARGEST_SHARED_BYTES[int(figures["architecture"][3:])]
    if figures["spilled_bytes"]:
        found.append(f"spills {figures['spilled_bytes']} bytes a thread")
    if figures["shared_bytes"] > largest:
        found.append(f"takes {figures['shared_bytes']} bytes of shared memory, a block has {largest}")
    if needs_tensor_cores and not figures["hmma"] + figures["hgmma"]:
        found.append("uses no tensor cores")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the table to this file too")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    from compile_cases import compile_cases  # the kernels are decorated when they are imported

    columns = ("registers", "spilled_bytes", "shared_bytes", "hmma", "hgmma", "num_warps", "num_stages")
    print(f"| {'kernel':66} | arch  | " + " | ".join(columns) + " |\n|" + "---|" * (2 + len(columns)))
    table, failed = [], False
    for capability in (80, 90):
        for case in compile_cases(capability):
            if arguments.only not in case.name:
                continue
            figures = compile_case(case, capability)
            row = " | ".join(f"{figures[column]:>{len(column)}}" for column in columns)
            print(f"| {figures['kernel']:66} | {figures['architecture']} | {row} |", flush=True)
            table.append(figures)
            for fault in faults(figures, case.tensor_cores):
                failed = True
                print(f"{figures['kernel']} on {figures['architecture']} {fault}", file=sys.stderr)
    if arguments.json:
        import triton

        arguments.json.write_text(json.dumps({"triton": triton.__version__, "kernels": table}, indent=1) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
