#!/usr/bin/env python3
"""Measures the peak memory of `bitnet quantize` on shapes and settings that ask for most of it.

usage: check-memory.py BITNET [WORK_FOLDER]

Every run must stay within 1.2 times its largest tensor in f32 plus 64 MiB. Exit status 1 if one does not.
"""
import json, multiprocessing, os, pathlib, struct, subprocess, sys, tempfile

N = 1 << 25
SETTINGS = {
    "wide": [[], ["--granularity", "tensor", "--threshold", "median"], ["--precision", "int8", "--granularity", "group:32"]],
    "tall": [[], ["--layout", "auto"], ["--planes", "2", "--granularity", "tensor"], ["--precision", "int8"],
             ["--transposed", "a.weight"], ["--transposed", "a.weight", "--granularity", "tensor", "--threshold", "median"]],
    "mixed": [["--granularity", "tensor", "--threshold", "optimal"], ["--precision", "binary", "--split", "optimal", "--granularity", "tensor"]],
}


def make(name, path):
    """Writes one input. In a process of its own: a child's peak memory counts from what its parent has when it starts."""
    import numpy as np

    draw = np.random.default_rng(0)
    weights, dtype, cols = draw.standard_normal(N, dtype=np.float32) * 0.02, "F32", 2048
    if name == "wide":
        dtype, cols = "F16", N // 2
    if name == "mixed":
        # Nine tenths near 1 and one tenth near 3: two fixed points of the optimal threshold, with most weights between them.
        weights, dtype = np.where(draw.random(N) < 0.9, 1 + 10 * weights, 3 + 10 * weights), "F16"
    weights = weights.reshape(-1, cols)
    raw = weights.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
    header = json.dumps({"a.weight": {"dtype": dtype, "shape": list(weights.shape), "data_offsets": [0, len(raw)]}}).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw)


def main():
    bitnet = sys.argv[1]
    work = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else pathlib.Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    bound = int(1.2 * 4 * N) + (64 << 20)
    failed = 0
    for name, settings in SETTINGS.items():
        path = work / f"{name}.safetensors"
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(name, path))
        maker.start()
        maker.join()
        for flags in settings:
            out = work / "out.safetensors"
            command = [bitnet, "quantize", str(path), "--out", str(out), "--force", "--quiet", "--threads", "2", *flags]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            peak = usage.ru_maxrss * 1024
            good = status == 0 and peak <= bound
            failed += not good
            print(f"{name} {' '.join(flags) or '(defaults)'}: {peak >> 20} MiB of {bound >> 20}{'' if good else ' FAILED'}", flush=True)
            out.unlink(missing_ok=True)
        path.unlink()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
