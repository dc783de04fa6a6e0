"""Conversations: the prompt tokens of `bitnet run --chat` are those of transformers' apply_chat_template.

The templates are those of crates/bitnet-inference/tests/golden/chat, which behave as the models that they are named after;
scripts/make-chat-golden.py writes what transformers renders of them, and a test of the crate compares whole conversations.
"""

import json

import pytest
from conftest import ROOT, make_llama, run_json
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

GOLDEN = ROOT / "crates/bitnet-inference/tests/golden/chat"
CONVERSATIONS = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))["conversations"]
# python.jinja writes the time to the second; the crate's test has a fixed clock.
TEMPLATES = sorted(p.stem for p in GOLDEN.glob("*.jinja") if p.stem != "python")
SPECIALS = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny llama with a tokenizer of bytes and special tokens."""
    path = tmp_path_factory.mktemp("chat") / "model"
    make_llama(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize("tools", [False, True], ids=["plain", "tools"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_tokens(folder, tmp_path, name, tools):
    template = (GOLDEN / f"{name}.jinja").read_text(encoding="utf-8")
    specials = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**specials, "chat_template": template}), encoding="utf-8")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **specials)
    conversation = CONVERSATIONS["tools" if tools else "question"]
    flags = []
    if tools:
        (tmp_path / "tools.json").write_text(json.dumps(conversation["tools"]), encoding="utf-8")
        flags = ["--tools", tmp_path / "tools.json"]
    want = tokenizer.apply_chat_template(conversation["messages"], chat_template=template, tools=conversation["tools"],
                                         tokenize=True, add_generation_prompt=True, return_dict=False)
    prompt = conversation["messages"][0]["content"]
    got = run_json("run", folder, "--chat", "--prompt", prompt, "-n", "1", *flags)
    assert got["prompt_tokens"] == want
