#!/usr/bin/env python3
"""Kills `bitnet quantize` at random moments, lets it go on, and compares the bytes with those of an undisturbed run.

usage: check-resume.py BITNET CHECKPOINT WORK_FOLDER [--kills 20] [--seed 0] [-- QUANTIZE_FLAGS...]

Each round starts from nothing, is killed once with SIGKILL at a moment drawn uniformly from the time an undisturbed run takes, and is then
run again to its end. Also measured: peak resident memory of every run, which must stay within 1.2 times the largest tensor in f32 + 64 MiB.
Exit status 1 if any bytes differ or any run needs more memory.
"""
import argparse, hashlib, json, os, pathlib, random, signal, struct, subprocess, sys, time


def sha(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def largest_tensor_f32(folder):
    most = 0
    for path in pathlib.Path(folder).glob("*.safetensors"):
        with open(path, "rb") as f:
            (n,) = struct.unpack("<Q", f.read(8))
            for name, info in json.loads(f.read(n)).items():
                if name != "__metadata__":
                    count = 1
                    for d in info["shape"]:
                        count *= d
                    most = max(most, 4 * count)
    return most


def run(command, kill_after=None):
    """Returns (exit status or None if killed, seconds, peak bytes)."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    killed = False
    if kill_after is not None:
        try:
            process.wait(timeout=kill_after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            killed = True
    _, status, usage = os.wait4(process.pid, 0) if process.returncode is None else (0, process.returncode, None)
    peak = usage.ru_maxrss * 1024 if usage else 0
    return (None if killed else status), time.monotonic() - start, peak


def main():
    argv, extra = sys.argv[1:], []
    if "--" in argv:
        at = argv.index("--")
        argv, extra = argv[:at], argv[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bitnet")
    parser.add_argument("checkpoint")
    parser.add_argument("work")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    work = pathlib.Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    out = work / "out.safetensors"
    command = [args.bitnet, "quantize", args.checkpoint, "--out", str(out), "--quiet", *extra]
    bound = int(1.2 * largest_tensor_f32(args.checkpoint)) + (64 << 20)
    draw = random.Random(args.seed)
    failures = 0
    for leftover in work.glob("out.safetensors*"):
        leftover.unlink()
    status, seconds, peak = run(command)
    assert status == 0, f"the undisturbed run failed with {status}"
    expected = sha(out)
    most = peak
    print(f"undisturbed: {seconds:.1f} s, peak {peak >> 20} MiB (bound {bound >> 20} MiB), sha256 {expected[:16]}", flush=True)
    for i in range(args.kills):
        out.unlink()
        moment = draw.uniform(0, seconds)
        first, _, _ = run(command, moment)
        left = sorted(p.name for p in work.iterdir())
        resumed = 0
        if first is None:
            if not out.exists():
                journal = work / "out.safetensors.bitnet-journal"
                resumed = max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0
                status, _, peak = run(command)
                most = max(most, peak)
                if status != 0:
                    print(f"kill {i + 1}: the second run failed with {status}")
                    failures += 1
                    continue
        same = sha(out) == expected
        clean = sorted(p.name for p in work.iterdir()) == ["out.safetensors"]
        failures += not (same and clean)
        print(f"kill {i + 1} at {moment:.2f} s: {resumed} tensors kept, {'same bytes' if same else 'OTHER BYTES'}"
              f"{'' if clean else ', left behind: ' + ' '.join(left)}", flush=True)
    print(f"peak memory {most >> 20} MiB of {bound >> 20} MiB allowed")
    failures += most > bound
    print("ok" if failures == 0 else f"{failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
