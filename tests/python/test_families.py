"""Tiny models of many families, made by transformers: what is selected, and that the results load again.

Selected are linear layers of blocks, whatever their names; embeddings, heads, classifiers, routers and position tables stay, bit for bit.
"""

import json

import numpy as np
import pytest
import torch
import transformers
from conftest import figure, run, run_json, same, tensors_of
from decoder import decode, read_file
from transformers import AutoConfig
from transformers.integrations.bitnet import BitLinear, unpack_weights

SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=300, max_position_embeddings=48)
GROUPED = dict(SMALL, num_key_value_heads=2, head_dim=16, pad_token_id=0)
GPT2 = dict(n_embd=64, n_layer=2, n_head=4, n_positions=48, vocab_size=300)
T5 = dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=300)
MOE = dict(GROUPED, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1)
# Class, model type and sizes.
FAMILIES = [
    ("GPT2LMHeadModel", "gpt2", GPT2), ("LlamaForCausalLM", "llama", GROUPED), ("Qwen2ForCausalLM", "qwen2", GROUPED), ("Qwen3ForCausalLM", "qwen3", GROUPED),
    ("MistralForCausalLM", "mistral", GROUPED), ("Gemma3ForCausalLM", "gemma3_text", GROUPED), ("Phi3ForCausalLM", "phi3", GROUPED),
    ("BertForMaskedLM", "bert", SMALL), ("BertForSequenceClassification", "bert", dict(SMALL, num_labels=3)), ("T5ForConditionalGeneration", "t5", T5),
    ("Qwen3MoeForCausalLM", "qwen3_moe", MOE), ("GPTNeoXForCausalLM", "gpt_neox", SMALL), ("LlamaForSequenceClassification", "llama", GROUPED),
]
EXPERTS = dict(SMALL, num_key_value_heads=2, head_dim=16, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0)
# Stored otherwise than [out, in] in two dimensions: what of them is [in, out].
ORIENTED = [
    ("GPT2LMHeadModel", "gpt2", dict(GPT2, add_cross_attention=True), ".h."), ("OpenAIGPTLMHeadModel", "openai-gpt", GPT2, ".h."),
    ("ImageGPTForCausalImageModeling", "imagegpt", GPT2, ".h."), ("GptOssForCausalLM", "gpt_oss", EXPERTS, ".experts."),
    ("Llama4ForCausalLM", "llama4_text", dict(EXPERTS, intermediate_size_mlp=128), ".experts."), ("GraniteMoeForCausalLM", "granitemoe", EXPERTS, None),
    ("MixtralForCausalLM", "mixtral", EXPERTS, None), ("Qwen3MoeForCausalLM", "qwen3_moe", MOE, None),
]
# transformers' bitnet has no layer for a part of these, and what the refusal says of it.
REFUSED = {"GPT2LMHeadModel": "Conv1D", "Qwen3MoeForCausalLM": "experts"}


def make(name, kind, sizes, folder, **options):
    torch.manual_seed(5)
    model = getattr(transformers, name)(AutoConfig.for_model(kind, **sizes)).eval()
    model.save_pretrained(folder, **options)
    return model


def load(name, folder):
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


@pytest.mark.parametrize("name, kind, sizes", FAMILIES, ids=[f[0] for f in FAMILIES])
def test_a_family(name, kind, sizes, tmp_path):
    source, quantized, floats = tmp_path / "source", tmp_path / "quantized", tmp_path / "floats"
    model = make(name, kind, sizes, source)
    report = run_json("quantize", source, "--out", quantized)
    selected = {t["name"] for t in report["tensors"] if t["layout"]}
    before = tensors_of(source)
    modules = dict(model.named_modules())
    for tensor in selected:
        # transformers joins the experts of a file when it loads them.
        module = modules.get(tensor.removesuffix(".weight"))
        assert ".experts." in tensor or type(module).__name__ in ("Linear", "Conv1D"), f"{tensor} is {module}"
        assert not set(before[tensor].shape) & {300, 48, 3, 8}, f"{tensor} is an embedding, a head or a router"
    # Every linear layer in a block is selected, routers and relative positions apart.
    linear = {f"{n}.weight" for n, m in modules.items() if type(m).__name__ in ("Linear", "Conv1D") and any(p.isdigit() for p in n.split("."))}
    assert linear - selected <= {n for n in linear if n not in before or 8 in before[n].shape}
    run("dequantize", quantized, "--out", floats)
    load(name, floats)
    after = tensors_of(floats)
    assert set(after) == set(before)
    assert all(same(after[n], before[n]) for n in before if n not in selected)
    kept = sum(w.size for n, w in before.items() if n not in selected) / sum(w.size for w in before.values())
    figure(f"families, {name}: {len(selected)} of {len(before)} tensors quantized, {kept:.1%} of the weights stay floats")


@pytest.mark.parametrize("name, kind, sizes", FAMILIES, ids=[f[0] for f in FAMILIES])
def test_a_family_as_hf_bitnet(name, kind, sizes, tmp_path):
    """transformers finds packed weights exactly where it puts its layers, or the folder is not written."""
    source, out, floats = tmp_path / "source", tmp_path / "out", tmp_path / "floats"
    make(name, kind, sizes, source)
    options = []
    if name in REFUSED:
        assert REFUSED[name] in run("quantize", source, "--out", out, "--format", "hf-bitnet", status=2)
        if name == "GPT2LMHeadModel":
            return
        options = ["--exclude", "*.experts.*"]
    run("quantize", source, "--out", out, "--format", "hf-bitnet", *options)
    run("dequantize", out, "--out", floats)
    names = {n for n, t in tensors_of(out).items() if t.dtype.name == "uint8"}
    model, expected = load(name, out), tensors_of(floats)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BitLinear)}
    assert {f"{n}.weight" for n in layers} == names, json.loads((out / "config.json").read_text())["quantization_config"]
    for layer, module in layers.items():
        theirs = unpack_weights(module.weight, torch.float32) / module.weight_scale.float()
        assert (theirs.numpy() == expected[f"{layer}.weight"]).all(), layer
    figure(f"families, {name} as hf-bitnet: {len(layers)} layers' weights equal")


def absmean(w):
    """b1.58 with a scale for each row, by its definition."""
    scale = np.abs(w.astype(np.float64)).mean(-1, keepdims=True)
    return (np.clip(np.rint(w / scale), -1, 1) * scale).astype(np.float32)


@pytest.mark.parametrize("name, kind, sizes, inputs_first", ORIENTED, ids=[o[1] for o in ORIENTED])
def test_a_scale_belongs_to_an_output(name, kind, sizes, inputs_first, tmp_path):
    """transformers' own classes say which way round a weight is: Conv1D multiplies by W, Linear by its transpose, experts as their forward pass does."""
    source, quantized, floats = tmp_path / "source", tmp_path / "quantized", tmp_path / "floats"
    # As the model has them in memory: mixtral and qwen3_moe stacked too.
    model = make(name, kind, sizes, source, save_original_format=False)
    conv1d = {f"{n}.weight" for n, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    selected = {t["name"] for t in run_json("quantize", source, "--out", quantized)["tensors"] if t["layout"]}
    turned = {t["name"] for t in run_json("inspect", quantized, "--headers")["tensors"] if t["transposed"]}
    assert turned == {n for n in selected if inputs_first and inputs_first in n}
    assert conv1d <= turned and (conv1d == turned or inputs_first == ".experts.")
    run("dequantize", quantized, "--out", floats)
    load(name, floats)
    before, after = tensors_of(source), tensors_of(floats)
    _, stored = read_file(quantized / "model.safetensors")
    document = run_json("verify", quantized) and json.loads(read_file(quantized / "model.safetensors")[0]["bitnet.document"])
    for tensor, w in before.items():
        if tensor not in selected:
            assert same(after[tensor], w), tensor
            continue
        turn = (lambda w: np.swapaxes(w, -1, -2)) if tensor in turned else (lambda w: w)
        np.testing.assert_allclose(after[tensor], turn(absmean(turn(w))), rtol=1e-6, err_msg=tensor)
        entry = document["tensors"][tensor]
        assert same(decode(entry, stored)[1], after[tensor]), tensor
        assert stored[entry["scale"]][1] == [turn(w).shape[-2] * (w.shape[0] if w.ndim == 3 else 1)]
    stacks = [n for n in selected if before[n].ndim == 3]
    assert len(stacks) == (0 if conv1d else 4)
    figure(f"orientation, {kind}: {len(turned)} of {len(selected)} weights [in, out], {len(stacks)} stacks of experts")
