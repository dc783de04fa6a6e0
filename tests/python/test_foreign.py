"""Models that other programs quantized: the floats that we read are those of transformers."""

import json
import os

import torch
from conftest import dequantize, run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM


def test_fp8_blocks_as_transformers_dequantizes_them(tmp_path):
    torch.manual_seed(5)
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         vocab_size=50, max_position_embeddings=64, initializer_range=0.1, tie_word_embeddings=False, pad_token_id=0)
    folder, floats = tmp_path / "fp8", tmp_path / "floats"
    LlamaForCausalLM(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, w in list(tensors.items()):
        if "_proj" in name:
            tensors[name] = (w * 100).to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = torch.rand((w.shape[0] + 31) // 32, (w.shape[1] + 31) // 32) * 0.02
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic",
                                       "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(document))

    run("dequantize", folder, "--out", floats)
    ours = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32)
    fp8 = FineGrainedFP8Config(dequantize=True, weight_block_size=(32, 32))
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=fp8, dtype=torch.float32)
    ours, theirs = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, w in ours.items():
        assert torch.equal(w, theirs[name].float()), name


def test_pytorch_files_as_torch_loads_them(tmp_path):
    torch.manual_seed(6)
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                         vocab_size=50, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    folder = tmp_path / "bin"
    config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    expected = torch.load(folder / "pytorch_model.bin", weights_only=True)
    ours = dequantize(folder)
    assert ours.keys() == expected.keys()
    for name, w in expected.items():
        assert torch.equal(torch.from_numpy(ours[name]), w.float()), name


class Call:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_pickle_that_calls_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a.weight": torch.zeros(4, 4), "b": Call()}, "m.bin")
    assert "system" in run("dequantize", "m.bin", "--out", "o.safetensors", status=2)
    assert not (tmp_path / "executed").exists()
