#!/usr/bin/env python3
"""Writes optimizers.json: ten steps of torch's optimizers, and its schedules.

    python generate_optimizers.py      (torch of scripts/requirements-truth.txt)

The loss of step t is the sum of g_t * w, so that the gradients are given numbers: of a matrix of 5 x 7 and, in the tensor with one dimension,
of a vector of 7 without decay. `clip` is torch's clip_grad_norm_ before each step; `accumulate` averages pairs of gradients.
"""
import json
import pathlib

import torch

here = pathlib.Path(__file__).parent
torch.manual_seed(158)
STEPS = 10
weight, bias = torch.randn(5, 7), torch.randn(7)
# Magnitudes over several decades, and gradients that are zero.
gradients = [(torch.randn(5, 7) * 10.0 ** torch.randint(-4, 1, (5, 7)), torch.randn(7) * (torch.arange(7) > 0)) for _ in range(2 * STEPS)]


def numbers(t):
    return [float(x) for x in t.detach().flatten()]


def case(name, method, rate, decay, clip=None, accumulate=1, **options):
    w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    groups = [{"params": [w], "weight_decay": decay}, {"params": [b], "weight_decay": 0.0}]
    # One loop over elements, as the equations are documented; foreach and fused variants round elsewhere.
    optimizer = method(groups, lr=rate, foreach=False, **options)
    steps = []
    for t in range(STEPS):
        optimizer.zero_grad()
        for of_w, of_b in gradients[t * accumulate:(t + 1) * accumulate]:
            (((of_w * w).sum() + (of_b * b).sum()) / accumulate).backward()
        norm = torch.nn.utils.clip_grad_norm_([w, b], clip if clip else float("inf"))
        optimizer.step()
        steps.append({"norm": float(norm), "weight": numbers(w), "bias": numbers(b)})
    return {"name": name, "rate": rate, "decay": decay, "clip": clip, "accumulate": accumulate, "steps": steps}


O = torch.optim
cases = [
    case("sgd", O.SGD, 0.1, 0.0),
    case("sgd momentum", O.SGD, 0.05, 0.02, momentum=0.9),
    case("sgd nesterov", O.SGD, 0.05, 0.02, momentum=0.9, nesterov=True),
    case("adam", O.Adam, 0.01, 0.1),
    case("adamw", O.AdamW, 0.01, 0.1),
    case("adamw betas", O.AdamW, 0.003, 0.05, betas=(0.9, 0.95), eps=1e-6),
    case("adamw clipped", O.AdamW, 0.01, 0.1, clip=0.5),
    case("sgd clipped and accumulated", O.SGD, 0.1, 0.0, clip=0.5, accumulate=2, momentum=0.9),
]


def schedule(name, make, steps=20):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return {"name": name, "rates": rates}


S = torch.optim.lr_scheduler
schedules = [
    schedule("cosine", lambda o: S.CosineAnnealingLR(o, 20, eta_min=0.1)),
    schedule("linear", lambda o: S.LinearLR(o, 1.0, 0.1, 20)),
]
data = {"weight": numbers(weight), "bias": numbers(bias), "gradients": [[numbers(w), numbers(b)] for w, b in gradients], "cases": cases, "schedules": schedules}
(here / "optimizers.json").write_text(json.dumps(data))
