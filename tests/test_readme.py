"""The example in README.md, pasted as it stands; only the name of the base is another."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import memretrofit

README = Path(__file__).parent.parent / "README.md"
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def save_small_base(folder: Path) -> None:
    words = {
        word: number for number, word in enumerate(["?", "A", "long", "book", "first", "page"])
    }
    tokenizer = Tokenizer(WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?", pad_token="?", return_token_type_ids=False
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(words),
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def test_the_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    example = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    code = example.group(1)
    assert NAME in code
    save_small_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace(NAME, str(tmp_path / "base")), names)
    assert "added parameters" in capsys.readouterr().out
    assert (tmp_path / "my-memory" / "memory.safetensors").is_file()
    again = memretrofit.from_pretrained(tmp_path / "my-memory")
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, names["model"](ids).logits)


def test_the_example_is_short():
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    assert len([line for line in code.group(1).splitlines() if line.strip()]) <= 12
