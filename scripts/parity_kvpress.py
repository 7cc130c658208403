"""SnapKV and PyramidKV beside kvpress: the tokens that both keep, and what a prefill costs.

kvpress pins an older Transformers, so it lives in an environment of its own, outside this one:

    python3.11 -m venv /path/to/kvpress_env
    /path/to/kvpress_env/bin/pip install torch==2.13.0 "transformers<5.3" kvpress==0.5.5
    python scripts/parity_kvpress.py /path/to/kvpress_env/bin/python

Each side runs in processes of its own, on the same weights and the same tokens. Compared are

- the rule: kvpress's kept tokens against `ops.eviction` on the keys and queries that kvpress saw;
- the method: the keys in the state of a patched model, after a prompt that ends at its first prune,
  against the rule on kvpress's keys;
- the cost: seconds and growth of the peak memory, of a prefill and of decoding after it.

kvpress spreads PyramidKV's steps over budgets that include the window, the paper's code over what
is kept beside it. So the rule is compared at the budgets of kvpress, the method at its own, and
both are printed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

LAYERS, HEADS, GROUPS, HEAD_DIM = 8, 8, 4, 32
WINDOW, KERNEL, BETA = 64, 5, 20
VOCABULARY = 1000
STEPS = 64
SAME = 1e-2


def model_of(weights: Path) -> LlamaForCausalLM:
    """A random Llama whose attention is far from uniform; the first call makes its weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=688,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=16384,
        initializer_range=0.06,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    if weights.exists():
        model.load_state_dict(load_file(weights))
    else:
        save_file(model.state_dict(), weights)
    return model


def tokens(length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (1, length), generator=generator)


def press_of(name: str, ratio: float):
    from kvpress import PyramidKVPress, SnapKVPress

    sizes = {"compression_ratio": ratio, "window_size": WINDOW, "kernel_size": KERNEL}
    return SnapKVPress(**sizes) if name == "snapkv" else PyramidKVPress(**sizes, beta=BETA)


def config_of(name: str, budget: int, interval: int):
    from memretrofit import EvictionConfig

    return EvictionConfig(
        sliding_window=WINDOW,
        num_sink_tokens=0,
        budget=budget,
        interval=interval,
        observation_window=WINDOW,
        kernel_size=KERNEL,
        pyramid_beta=1 if name == "snapkv" else BETA,
    )


@torch.no_grad()
def keep_theirs(case: dict, folder: Path) -> None:
    """What kvpress keeps, with the keys and queries that it was given."""
    from kvpress.utils import get_prerope_query_states
    from transformers.models.llama.modeling_llama import rotate_half

    model, seen = model_of(folder / "weights.safetensors"), {}
    press = press_of(case["method"], 1 - case["budget"] / case["length"])
    compress = press.compress

    def look(module, hidden, keys, values, attentions, kwargs):
        kept, kept_values = compress(module, hidden, keys, values, attentions, kwargs)
        cos, sin = (x[:, None, -WINDOW:] for x in kwargs["position_embeddings"])
        query = get_prerope_query_states(module, hidden[:, -WINDOW:])
        index = (keys[0, :, None] == kept[0, :, :, None]).all(-1).int().argmax(-1)
        seen[f"key.{module.layer_idx}"] = keys.clone()
        seen[f"query.{module.layer_idx}"] = query * cos + rotate_half(query) * sin
        seen[f"index.{module.layer_idx}"] = index.sort(-1).values
        return kept, kept_values

    press.compress = look
    with press(model):
        model(tokens(case["length"], case["seed"]), past_key_values=DynamicCache())
    save_file({k: x.contiguous() for k, x in seen.items()}, folder / "theirs.safetensors")


@torch.no_grad()
def keep_ours(case: dict, folder: Path) -> dict:
    """Heads that were compared, and those that differ from what kvpress kept."""
    from memretrofit import patch
    from memretrofit.ops.eviction import best, snapkv_scores

    length, budget = case["length"], case["budget"]
    theirs = load_file(folder / "theirs.safetensors")
    model = patch(
        model_of(folder / "weights.safetensors"),
        config_of(case["method"], budget, interval=length - WINDOW),
    )
    cache = model(tokens(length, case["seed"])).past_key_values
    result = {"rule heads": 0, "rule differs": 0, "method heads": 0, "method differs": 0}
    budgets = []
    for layer in range(LAYERS):
        key, index = theirs[f"key.{layer}"], theirs[f"index.{layer}"]
        scores = snapkv_scores(theirs[f"query.{layer}"], key, kernel_size=KERNEL)

        def kept(count: int, scores: torch.Tensor = scores) -> torch.Tensor:
            valid = torch.ones(1, scores.shape[-1], dtype=torch.bool)
            return best(scores, valid, torch.tensor([count]), count)[0]

        count = index.shape[-1] - WINDOW
        result["rule heads"] += GROUPS
        result["rule differs"] += (kept(count) != index[:, :count]).any(-1).sum().item()
        held, *_, counts, _, _ = cache.layers[layer].state
        own = int(counts[0, 0])
        expected = key[0].gather(1, kept(own)[..., None].expand(-1, -1, HEAD_DIM))
        apart = (held[0, :, -own:] - expected).abs().amax((-1, -2))
        result["method heads"] += GROUPS
        result["method differs"] += (apart > SAME).sum().item()
        budgets.append((count, own))
    return result | {"budgets (kvpress, ours)": budgets}


@torch.no_grad()
def cost(case: dict, folder: Path) -> dict:
    """Seconds and growth of the peak memory (MiB), of a prefill and of `STEPS` tokens after it."""
    model, ids = model_of(folder / "weights.safetensors"), tokens(case["length"], 0)
    cache, chunk = DynamicCache(), case["chunk"] or case["length"]
    if case["side"] == "ours":
        from memretrofit import patch

        patch(model, config_of(case["method"], case["budget"], interval=512))
    before, begin = _peak(), time.perf_counter()
    if case["side"] == "theirs":
        with press_of(case["method"], 1 - case["budget"] / case["length"])(model):
            model(ids, past_key_values=cache, logits_to_keep=1)
    else:
        for part in ids.split(chunk, dim=1):
            model(part, past_key_values=cache, logits_to_keep=1)
    prefill, peak = time.perf_counter() - begin, _peak() - before
    begin = time.perf_counter()
    for step in range(STEPS):
        place = torch.tensor([[case["length"] + step]])
        model(ids[:, step : step + 1], past_key_values=cache, position_ids=place)
    decode = time.perf_counter() - begin
    return {
        "prefill tokens/s": round(case["length"] / prefill),
        "peak MiB": round(peak, 1),
        "decode tokens/s": round(STEPS / decode, 1),
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(python: str, task: str, case: dict, folder: Path) -> dict:
    command = [python, __file__, python, "--task", task, "--case", json.dumps(case)]
    done = subprocess.run([*command, "--folder", str(folder)], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("kvpress_python", help="the interpreter of kvpress's environment")
    parser.add_argument(
        "--length", type=int, default=8192, help="tokens of the prompt whose cost is measured"
    )
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.task:
        task = {"keep_theirs": keep_theirs, "keep_ours": keep_ours, "cost": cost}[given.task]
        print(json.dumps(task(given.case, given.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        compare(given.kvpress_python, given.length, Path(name))


def compare(theirs: str, length: int, folder: Path) -> None:
    model_of(folder / "weights.safetensors")
    total: dict[str, int] = {}
    for method in ("snapkv", "pyramidkv"):
        for size, budget in ((512, 256), (1000, 250), (2048, 512)):
            for seed in range(2):
                case = {"method": method, "length": size, "budget": budget, "seed": seed}
                run(theirs, "keep_theirs", case, folder)
                found = run(sys.executable, "keep_ours", case, folder)
                print(case, found, flush=True)
                for key in ("rule heads", "rule differs", "method heads", "method differs"):
                    total[key] = total.get(key, 0) + found[key]
    print("in all:", total)
    arms = [("theirs", 0), ("ours", 0), ("ours", 512), ("base", 0)]
    for side, chunk in arms:
        case = {"side": side, "method": "snapkv", "length": length, "budget": 1024, "chunk": chunk}
        print(
            side,
            f"chunks of {chunk or length}:",
            run(theirs if side == "theirs" else sys.executable, "cost", case, folder),
            flush=True,
        )


if __name__ == "__main__":
    main()
