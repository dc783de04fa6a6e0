#!/usr/bin/env python3
"""Writes crates/bitnet-inference/tests/golden/embed-*: tiny random embedding models, and the vectors that transformers computes with them in f32.

    scripts/make-embed-golden.py            (with the python of scripts/python-truth --print-python)

Each folder is a model as transformers loads it, with its tokenizer and, but for one, the files of sentence-transformers. golden.json has the texts;
golden.safetensors has of text N `tokens.N`, and `mean.N`, `cls.N`, `last.N` and `max.N` of its hidden states: each text alone, without padding.
"""

import json
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, BertModel, Gemma3TextConfig, Gemma3TextModel, Qwen3Config, Qwen3Model

OUT = Path(__file__).resolve().parents[1] / "crates/bitnet-inference/tests/golden"
WORDS = "a cat kitten sleep on the sofa market fell by two per cent ##ing ##s ##ten , . ? ! c d e f g h i k l m n o p r s t u v w x y z ##a ##c ##e ##i ##n ##o ##r ##t".split()
TEXTS = ["a cat sleeping on the sofa.", "A", "the markets fell by two per cent, two cats!", "kittens?", "the the the a cat on a sofa by the cat, two kittens sleeping on it.",
         "unknown ☃ words fell"]
# No dimension is a multiple of 16 columns; heads of 11.
BERT = dict(hidden_size=44, intermediate_size=76, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=24, type_vocab_size=3, layer_norm_eps=0.03,
            initializer_range=0.3)
DECODER = dict(hidden_size=44, intermediate_size=76, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=10, max_position_embeddings=96,
               initializer_range=0.2, bos_token_id=None, eos_token_id=1, pad_token_id=0, tie_word_embeddings=True)


def wordpiece():
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS)]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.add_special_tokens(vocab[:5])
    return tokenizer


def bytes_with_eos():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(["<pad>", "<eos>", *alphabet, "he", "Ġt", "Ġthe"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("h", "e"), ("Ġ", "t"), ("Ġt", "he")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", "$A $B:1 <eos>:1", [("<eos>", 1)])
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    return tokenizer


def sentence_files(folder, mode, hidden, normalize, **more):
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * normalize
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (path, kind) in enumerate(kinds)]
    modes = ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"]
    pooling = {"word_embedding_dimension": hidden, **{f"pooling_mode_{m}": m == mode for m in modes}, "include_prompt": True}
    (folder / "1_Pooling").mkdir()
    for name, value in [("modules.json", modules), ("1_Pooling/config.json", pooling), *more.items()]:
        (folder / name.replace("__json", ".json")).write_text(json.dumps(value, indent=2) + "\n")


def randomize(model, from_zero):
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                weights.copy_((not from_zero) + 0.2 * torch.randn_like(weights))
            elif name.endswith("bias"):
                weights.copy_(0.3 * torch.randn_like(weights))


def make(name, model, tokenizer, seed_files, encoder=None):
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    model.eval().save_pretrained(folder, safe_serialization=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}\n")
    seed_files(folder)
    state = load_file(folder / "model.safetensors")
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    settings = folder / "sentence_bert_config.json"
    limit = json.loads(settings.read_text())["max_seq_length"] if settings.exists() else model.config.max_position_embeddings
    tokenizer.enable_truncation(limit)
    encoder = encoder or model
    out = {}
    for i, text in enumerate(TEXTS):
        ids = tokenizer.encode(text).ids
        with torch.no_grad():
            states = encoder(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).last_hidden_state[0].double()
        out[f"tokens.{i}"] = torch.tensor(ids, dtype=torch.int32)
        pooled = {"mean": states.mean(0), "cls": states[0], "last": states[-1], "max": states.max(0).values}
        out.update({f"{mode}.{i}": vector.float() for mode, vector in pooled.items()})
    save_file({k: v.contiguous() for k, v in out.items()}, folder / "golden.safetensors")
    (folder / "golden.json").write_text(json.dumps({"texts": TEXTS}, indent=2, ensure_ascii=False) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokenizer.no_truncation()


def main():
    torch.manual_seed(7)
    words = wordpiece()
    config = BertConfig(vocab_size=words.get_vocab_size(), **BERT)
    model = BertModel(config)
    randomize(model, False)
    make("embed-bert", model, words, lambda f: sentence_files(f, "mean_tokens", 44, True, sentence_bert_config__json={"max_seq_length": 20, "do_lower_case": False}))

    # Names with `bert.`, heads beside the encoder, and no file of sentence-transformers.
    model = BertForMaskedLM(config)
    randomize(model, False)
    make("embed-bert-inside", model, words, lambda f: None, model.bert)

    text = bytes_with_eos()
    model = Qwen3Model(Qwen3Config(vocab_size=text.get_vocab_size(), **DECODER))
    randomize(model, False)
    prompts = {"prompts": {"query": "the cat: ", "document": ""}, "default_prompt_name": None}
    make("embed-qwen3", model, text, lambda f: sentence_files(f, "lasttoken", 44, True, config_sentence_transformers__json=prompts))

    config = Gemma3TextConfig(vocab_size=text.get_vocab_size(), **DECODER, query_pre_attn_scalar=17, sliding_window=6, layer_types=["sliding_attention", "full_attention"])
    model = Gemma3TextModel(config)
    randomize(model, True)
    make("embed-gemma3", model, text, lambda f: sentence_files(f, "mean_tokens", 44, False))


if __name__ == "__main__":
    main()
