#!/usr/bin/env python3
"""Kills `bitnet quantize` at random moments, lets it go on, and compares the bytes with those of an undisturbed run.

usage: check-resume.py BITNET CHECKPOINT WORK_FOLDER [--output out.safetensors] [--kills 20] [--seed 0] [-- QUANTIZE_FLAGS...]

--output may also name a folder or a .gguf; with --shard-size among the flags they become several files, all of which are compared.

Each round starts from nothing, is killed once with SIGKILL at a moment drawn uniformly from the time an undisturbed run takes, and is then
run again to its end. Also measured: peak resident memory of every run, which must stay within 1.2 times the largest tensor in f32 + 64 MiB.
Exit status 1 if any bytes differ or any run needs more memory.
"""
import argparse, hashlib, json, os, pathlib, random, shutil, signal, struct, subprocess, sys, time


def sha(folder):
    """The checksum of each file below a folder."""
    sums = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb") as f:
            sums[str(path.relative_to(folder))] = hashlib.file_digest(f, "sha256").hexdigest()
    return sums


def clear(folder):
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


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
    parser.add_argument("--output", default="out.safetensors")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    work = pathlib.Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    assert not any(work.iterdir()), f"{work} is not empty"
    out = work / args.output
    command = [args.bitnet, "quantize", args.checkpoint, "--out", str(out), "--quiet", *extra]
    bound = int(1.2 * largest_tensor_f32(args.checkpoint)) + (64 << 20)
    draw = random.Random(args.seed)
    failures = 0
    status, seconds, peak = run(command)
    assert status == 0, f"the undisturbed run failed with {status}"
    expected = sha(work)
    most = peak
    print(f"undisturbed: {seconds:.1f} s, peak {peak >> 20} MiB (bound {bound >> 20} MiB), {len(expected)} files", flush=True)
    for i in range(args.kills):
        clear(work)
        moment = draw.uniform(0, seconds)
        first, _, _ = run(command, moment)
        left = sorted(str(p.relative_to(work)) for p in work.rglob("*"))
        resumed = 0
        if first is None and sha(work) != expected:
            for journal in work.rglob("*.bitnet-journal"):
                resumed = max(0, journal.read_bytes().count(b"\n") - 1)
            status, _, peak = run(command)
            most = max(most, peak)
            if status != 0:
                print(f"kill {i + 1}: the second run failed with {status}")
                failures += 1
                continue
        found = sha(work)
        same = all(found.get(name) == sum for name, sum in expected.items())
        clean = found.keys() == expected.keys()
        failures += not (same and clean)
        print(f"kill {i + 1} at {moment:.2f} s: {resumed} tensors kept, {'same bytes' if same else 'OTHER BYTES'}"
              f"{'' if clean else ', left behind: ' + ' '.join(left)}", flush=True)
    clear(work)
    print(f"peak memory {most >> 20} MiB of {bound >> 20} MiB allowed")
    failures += most > bound
    print("ok" if failures == 0 else f"{failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
