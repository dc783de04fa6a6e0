#!/usr/bin/env python3
"""Writes the files of this folder, and expected.json: each tensor as torch.load(weights_only=True)
gives it. Needs torch (2.15 made the committed files)."""
import collections
import json
import pathlib
import zipfile

import torch

HERE = pathlib.Path(__file__).parent
torch.manual_seed(0)


def describe(tensor):
    kind = str(tensor.dtype).removeprefix("torch.")
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return {"dtype": kind, "shape": list(tensor.shape), "bytes": bytes(raw.tolist()).hex()}


class Evil:
    def __reduce__(self):
        import os

        return (os.system, ("touch /tmp/bitnet-quant-pickle-ran",))


base = torch.randn(4, 3)
state = collections.OrderedDict(
    {
        "f32": torch.randn(2, 3),
        "f16": torch.randn(2, 3).half(),
        "bf16": torch.randn(5).bfloat16(),
        "f64": torch.randn(2, 2, 2).double(),
        "i64": torch.tensor([-1, 2**40]),
        "u8": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "whole": base,
        "rows 1..3 of it": base[1:3],
        "f8": torch.randn(3, 2).to(torch.float8_e4m3fn),
        "one row, odd strides": base[:1].expand(1, 3).as_strided((1, 3), (7, 1)),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
)
large = torch.randn(6, 5, 4)
strided = {
    "transposed": base.t(),
    "columns": base[:, 1:],
    "every second row": base[::2],
    "repeated": torch.randn(3).expand(4, 3),
    "repeated inside": torch.randn(3, 1).half().expand(3, 5),
    "permuted": large.permute(2, 0, 1),
    "part of permuted": large.permute(2, 1, 0)[1:3, :, 2:5],
    "transposed bf16": torch.randn(7, 3).bfloat16().t(),
    "transposed f8": torch.randn(3, 2).to(torch.float8_e4m3fn).t(),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "one row": torch.randn(4, 9)[:, 3],
    "i64": torch.arange(12).reshape(3, 4).t(),
}
linear = torch.nn.Linear(3, 2)
old = {"_use_new_zipfile_serialization": False}
# torch does not load F8 from the old format.
old_state = {k: v for k, v in state.items() if k != "f8"} | {"transposed": base.t()}
files = {
    "state.bin": (state, {}),
    "protocol4.bin": (state, {"pickle_protocol": 4}),
    "module.bin": (linear.state_dict(), {}),
    "nested.bin": ({"epoch": 3, "state_dict": {"w": state["f32"]}, "lr": 0.1}, {}),
    "strided.bin": (strided, {}),
    "evil.bin": ({"w": base, "x": Evil()}, {}),
    "two.bin": ({"model": {"w": base}, "ema": {"w": base}}, {}),
    "legacy.bin": (collections.OrderedDict(old_state), old),
    "legacy-nested.bin": ({"epoch": 3, "state_dict": linear.state_dict()}, old),
    "legacy-protocol4.bin": (linear.state_dict(), old | {"pickle_protocol": 4}),
    "legacy-evil.bin": ({"w": base, "x": Evil()}, old),
}
expected = {}
for name, (value, options) in files.items():
    torch.save(value, HERE / name, **options)
    if name not in ("evil.bin", "two.bin", "legacy-evil.bin"):
        loaded = torch.load(HERE / name, weights_only="protocol4" not in name)
        loaded = loaded.get("state_dict", loaded)
        expected[name] = {key: describe(tensor) for key, tensor in loaded.items()}
with zipfile.ZipFile(HERE / "state.bin") as plain:
    with zipfile.ZipFile(HERE / "compressed.bin", "w", zipfile.ZIP_DEFLATED) as packed:
        for member in plain.namelist():
            packed.writestr(member, plain.read(member))
(HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
