#!/usr/bin/env python3
"""The mixed-precision search on all-MiniLM-L6-v2 against uniform settings of equal or larger size, by the error of the layers' outputs.

    scripts/check-mixed.py BITNET MODEL WORK [--target-bpw 2.5]

Torch runs the model on some sentences and writes the second moments of each layer's input as a calibration file; bitnet quantizes with the
search and with every uniform setting; torch then measures on other sentences what each of them does to the output of each layer,
sum |(W - W^) x|^2. Exit status 1 if a uniform setting that is not smaller is not worse.
"""
import argparse
import json
import pathlib
import subprocess
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

SENTENCES = """The cat sat on the warm windowsill and watched the rain. Prices rose by four percent in the second quarter.
She had never seen the sea before, and it frightened her a little. Compile the program with all warnings turned on.
Photosynthesis turns light, water and carbon dioxide into sugar. Where is the nearest railway station, please?
The committee will meet again on Tuesday to vote on the budget. He wrote three symphonies before he was twenty.
A prime number has exactly two divisors. They walked along the river until the lamps were lit.
Add two cups of flour, a pinch of salt and knead the dough. The patient was given antibiotics for ten days.
This camera takes poor pictures in low light. Mount Kilimanjaro is the highest mountain in Africa.
The court dismissed the appeal without giving reasons. My grandmother kept bees behind the orchard.
An index makes reading faster and writing slower. We regret to inform you that the flight is cancelled.
Who was the first woman to win a Nobel prize? The striker scored twice in the last five minutes.""".replace("\n", " ").split(". ")

parser = argparse.ArgumentParser()
parser.add_argument("bitnet")
parser.add_argument("model", type=pathlib.Path)
parser.add_argument("work", type=pathlib.Path)
parser.add_argument("--target-bpw", default="2.5")
args = parser.parse_args()
args.work.mkdir(parents=True, exist_ok=True)

tokenizer, model = AutoTokenizer.from_pretrained(args.model), AutoModel.from_pretrained(args.model).eval()
stored = load_file(args.model / "model.safetensors")
layers = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and f"{name}.weight" in stored}


def moments(sentences):
    """E[x x^T] at the input of each layer, and the number of tokens."""
    sums, tokens = {}, 0
    hooks = []
    for name, module in layers.items():
        def hook(_, inputs, name=name):
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + x.T @ x
            counts[name] = counts.get(name, 0) + len(x)
        hooks.append(module.register_forward_pre_hook(hook))
    counts = {}
    with torch.no_grad():
        for sentence in sentences:
            model(**tokenizer(sentence, return_tensors="pt"))
    for hook in hooks:
        hook.remove()
    return sums, counts


sums, counts = moments(SENTENCES[::2])
calibration = {"version": 1, "layers": {
    name: {"tokens": counts[name], "min": 0.0, "max": 0.0, "sum_squares": s.diagonal().tolist(), "reach": 0.0, "bins": [0] * 2048}
    for name, s in sums.items()}}
(args.work / "calibration.json").write_text(json.dumps(calibration))
test, test_counts = moments(SENTENCES[1::2])


def run(*arguments):
    done = subprocess.run([args.bitnet, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{arguments}: {done.stderr}")
    return done.stdout


def measure(name, *flags):
    packed, floats = args.work / f"{name}.safetensors", args.work / f"{name}-floats.safetensors"
    only = [f for layer in layers for f in ("--include", layer)]
    report = json.loads(run("--json", "quantize", args.model, "--out", packed, "--force", "--quiet", *only, *flags))
    run("dequantize", packed, "--out", floats, "--force", "--quiet")
    back, error, power = load_file(floats), 0.0, 0.0
    for layer in layers:
        w = stored[layer].double()
        e = w - back[layer].double()
        # sum |E x|^2 over the test tokens = trace(E S E^T)
        error += ((e @ test[layer]) * e).sum().item()
        power += ((w @ test[layer]) * w).sum().item()
    return report["totals"]["quantized_bits_per_weight"], error, 10 * torch.log10(torch.tensor(power / error)).item()


calibrated = ["--calibration", args.work / "calibration.json"]
settings = {f"--target-bpw {args.target_bpw} --calibration": ["--target-bpw", args.target_bpw, *calibrated],
            f"--target-bpw {args.target_bpw}": ["--target-bpw", args.target_bpw]}
for group in (16, 32, 64):
    settings[f"ternary optimal group:{group} f16"] = ["--threshold", "optimal", "--granularity", f"group:{group}", "--scale-dtype", "f16", *calibrated]
for group in (16, 32, 64):
    for mapping in ("symmetric", "asymmetric"):
        settings[f"int2 {mapping} clip search group:{group} f16"] = [
            "--precision", "int2", "--mapping", mapping, "--clip", "search", "--granularity", f"group:{group}", "--scale-dtype", "f16", *calibrated]
rows = {}
print(f"{'setting':<46} {'bits/weight':>11} {'output error':>13} {'SQNR dB':>8}")
for i, (name, flags) in enumerate(settings.items()):
    rows[name] = measure(str(i), *flags)
    print(f"{name:<46} {rows[name][0]:>11.3f} {rows[name][1]:>13.4g} {rows[name][2]:>8.2f}", flush=True)
best = next(iter(rows.values()))
wrong = [name for name, row in list(rows.items())[2:] if row[0] >= best[0] and row[1] <= best[1]]
if best[0] > float(args.target_bpw) or wrong:
    sys.exit(f"not better than {wrong}, at {best[0]} bits")
