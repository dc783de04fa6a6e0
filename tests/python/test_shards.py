"""Outputs in several files: shards with an index in transformers, split GGUF sets in llama.cpp and the gguf package."""

import inspect
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import document_of, make_llama, run, run_json, same, tensors_of
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file
from test_llama_cpp import gguf_logits, open_gguf
from test_transformers import check, load, random_llama
from transformers import AutoModelForCausalLM, PreTrainedModel


def shards(folder):
    return sorted(p.name for p in folder.glob("*.safetensors"))


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_hf_bitnet_in_shards(linear_class, tmp_path):
    source, out = random_llama(tmp_path / "source", torch.bfloat16, False), tmp_path / "out"
    run("quantize", source, "--out", out, "--format", "hf-bitnet", "--linear-class", linear_class, "--shard-size", "40KB")
    assert len(shards(out)) >= 5
    check(out, linear_class, torch.bfloat16, tmp_path, f"{len(shards(out))} shards", 14)


def test_floats_in_shards(tmp_path):
    """The tensors of one file, in shards that huggingface_hub would make; transformers loads and saves the same model."""
    source, whole, out = random_llama(tmp_path / "source", torch.float32, True), tmp_path / "whole", tmp_path / "out"
    run("dequantize", source, "--out", whole)
    run("dequantize", source, "--out", out, "--shard-size", "100KB")
    assert shards(whole) == ["model.safetensors"] and len(shards(out)) >= 5
    a, b = tensors_of(whole), tensors_of(out)
    assert a.keys() == b.keys() and all(same(a[n], b[n]) for n in a)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in a.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(out / file)
    # In this order, and without a tensor that has a file of its own, both cut at the same places.
    state = {n: torch.from_numpy(a[n]) for file in shards(out) for n in index["weight_map"] if index["weight_map"][n] == file}
    theirs = split_torch_state_dict_into_shards(state, max_shard_size="100KB")
    assert max(t.nbytes for t in a.values()) > 100_000 or theirs.tensor_to_filename == index["weight_map"]
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    one = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    assert all(torch.equal(p, one.get_parameter(n)) for n, p in model.named_parameters())


def test_default_size_is_that_of_transformers():
    assert inspect.signature(PreTrainedModel.save_pretrained).parameters["max_shard_size"].default == "50GB"


def test_a_sharded_source(tmp_path):
    """What transformers sharded is read, and written in other shards."""
    source, out = tmp_path / "source", tmp_path / "out"
    load(random_llama(tmp_path / "model", torch.float32, False), torch.float32).save_pretrained(source, max_shard_size="300KB")
    assert len(shards(source)) > 2
    run("dequantize", source, "--out", out, "--shard-size", "150KB")
    assert len(shards(out)) > len(shards(source))
    a, b = tensors_of(source), tensors_of(out)
    assert a.keys() == b.keys() and all(same(a[n], b[n]) for n in a)


def test_verify_of_shards(tmp_path):
    source, out = random_llama(tmp_path / "source", torch.float32, False), tmp_path / "out"
    run("quantize", source, "--out", out, "--shard-size", "20KB")
    assert run_json("verify", out)["whole"]
    first, *others = shards(out)
    document = document_of(out / first)
    assert document["files"].keys() >= {"config.json", "model.safetensors.index.json"}
    assert document["checksums"].keys() == tensors_of(out).keys()
    for file in others:
        with safe_open(out / file, framework="numpy") as f:
            assert f.metadata() == {"format": "pt"}


@pytest.mark.parametrize("tie", [False, True])
def test_a_split_set_in_llama_cpp(tie, tmp_path):
    model = make_llama(tmp_path / "model", tie=tie, seed=5)
    whole, out = tmp_path / "whole.gguf", tmp_path / "set" / "q.gguf"
    out.parent.mkdir()
    run("quantize", model, "--out", whole)
    files = run_json("quantize", model, "--out", out, "--shard-size", "300KB")["files"]
    assert len(files) > 2 and files == sorted(str(p) for p in out.parent.iterdir())
    ids = list(range(5, 30))
    a, b = gguf_logits(open_gguf(whole), ids), gguf_logits(open_gguf(files[0]), ids)
    assert np.array_equal(a, b) and np.abs(a).max() > 0.1
    single, names = gguf.GGUFReader(whole), []
    tensors = {t.name: t for t in single.tensors}
    for i, file in enumerate(files):
        reader = gguf.GGUFReader(file)
        for key, kind, value in [("no", gguf.GGUFValueType.UINT16, i), ("count", gguf.GGUFValueType.UINT16, len(files)),
                                 ("tensors.count", gguf.GGUFValueType.INT32, len(tensors))]:
            field = reader.get_field(f"split.{key}")
            assert field.types == [kind] and field.contents() == value
        own = [k for k in reader.fields if not k.startswith(("split.", "GGUF."))]
        assert own == ([k for k in single.fields if not k.startswith("GGUF.")] if i == 0 else [])
        assert sum(t.n_bytes for t in reader.tensors) <= 300_000 or len(reader.tensors) == 1
        for t in reader.tensors:
            theirs = tensors[t.name]
            assert t.tensor_type == theirs.tensor_type and list(t.shape) == list(theirs.shape) and np.array_equal(t.data, theirs.data)
            names.append(t.name)
    assert names == list(tensors)


def test_a_set_without_a_file_does_not_open(tmp_path):
    """What makes the order of the renames right: llama.cpp opens no set that lacks a file."""
    model = make_llama(tmp_path / "model", seed=5)
    files = run_json("quantize", model, "--out", tmp_path / "q.gguf", "--shard-size", "300KB")["files"]
    for missing in (files[0], files[-1]):
        missing = Path(missing)
        content = missing.read_bytes()
        missing.unlink()
        with pytest.raises(ValueError):
            open_gguf(files[0])
        missing.write_bytes(content)
    open_gguf(files[0])
