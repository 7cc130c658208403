"""Window, compressed state and store in one layer: recall what a query needs, compress the rest.

Ours, from InfLLM (arXiv:2402.04617) and AHN (arXiv:2510.07318) or LoLCATs (arXiv:2410.10254).

Equations (one head; l = t - W leaves the window as t arrives, into the store and into the state)::

    far(t)        = what t recalls of the store, as in `infllm`
    near_t, lse_t = softmax attention of q_t over window and far(t), log of its normaliser [V], []
    ahn:      out_t = near_t + A (RMSNorm(S_t^T q_t / (s |q_t|)) * silu(w_g . x_t))   A starts at 0
    lolcats:  out_t = (near_t + w_t phi(q_t)^T S_t) / (1 + w_t phi(q_t)^T z_t)    c starts at 0
              w_t   = c exp(b - gamma lse_t)

S, s, z and phi are those of `ahn` and `lolcats`, whose training fits them here too: attention
transfer then asks of the state what window and recalled tokens leave of full attention.

The state's parameters are named `*.memory.state.<name>`, those of plain AHN or LoLCATs
`*.memory.<name>`, with the same shapes where their configs agree (`state_heads`, `rule`,
`center_keys`). So a state that was trained alone is taken over by its names::

    trained = memory_parameters(memretrofit.from_pretrained("owner/lolcats"))
    own = memory_parameters(memretrofit.patch(base, LOLCATS_RECALL))
    with torch.no_grad():
        for name, parameter in trained.items():
            own[name.replace(".memory.", ".memory.state.")].copy_(parameter)

Differs from the papers: a recalled token is also in the state, so that it counts twice, under the
common normaliser of LoLCATs too; the weight w_t shrinks as the recalled mass in lse_t grows. For
what each part differs in, see `infllm`, `ahn` and `lolcats`.

Reduces to: `infllm` while the state is silent (A = 0, c = 0); `ahn` or `lolcats` while the store is
empty, which is as long as nothing has left; the base model until then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig
from memretrofit.modules.composed import ComposedMemory
from memretrofit.modules.feature_map import FeatureMapMemory
from memretrofit.modules.memory import AttentionMemory
from memretrofit.modules.positions import Positions
from memretrofit.modules.recall import Granularity, RecallMemory, block_faults
from memretrofit.modules.recurrent import RecurrentMemory, Rule
from memretrofit.modules.slab import Placement
from memretrofit.patching.sites import AttentionSite
from memretrofit.patching.surgery import patch_attention

PAPER = "arXiv:2402.04617, arXiv:2510.07318, arXiv:2410.10254"
FAMILY = "recall"
IDENTITY = "none"
"""Its state starts silent, but it recalls from the first token that leaves the window."""


@dataclass(frozen=True, kw_only=True)
class ComposedConfig(MethodConfig):
    """How much is kept exactly, how much comes back, and how the rest is compressed."""

    sliding_window: int = 512
    """Tokens attended exactly, the current one included, sinks not included."""
    num_sink_tokens: int = 4
    """First tokens of each row, never evicted."""
    state: Literal["ahn", "lolcats"] = "ahn"
    """What holds the rest: a recurrent state whose read is added, or feature maps that share the
    normaliser.
    """
    rule: Rule = "gated_delta"
    """How AHN's state is written; LoLCATs has one rule."""
    state_heads: Literal["query", "key_value"] = "query"
    """A state per query head as published, or per KV head: smaller by their ratio."""
    key_space: Literal["post_rope", "pre_rope"] = "post_rope"
    """Whether keys and queries meet the state with or without their positions."""
    center_keys: bool = False
    """Subtract a learned mean from the keys of AHN's state; LoLCATs always has one."""
    block_size: int = 16
    """Tokens that are stored and fetched together; at most the window."""
    top_k: int = 32
    """Blocks that a query fetches: top_k * block_size tokens."""
    granularity: Granularity = "head"
    """Who chooses: each query head, the heads of a KV head together, or all heads of a layer."""
    positions: Positions = "clamp"
    """Where fetched keys stand; see `infllm`."""
    position_group: int = 8
    """Far tokens that share a position under `grouped`: W + T / position_group positions are used.
    """
    placement: Placement = "device"
    """Where the store lies; see `infllm`."""
    hot_bytes: int = 0
    """Bytes on the device, for each layer, of blocks that were fetched last from host or disk."""
    layers_to_transform: tuple[int, ...] | None = None
    """Layers to patch; None patches every layer with full softmax attention."""

    def problems(self) -> list[str]:
        """A block beyond the window, or a choice that the state does not have."""
        found = block_faults(self.block_size, self.sliding_window)
        if self.state == "lolcats" and (self.rule != "gated_delta" or self.center_keys):
            found.append(
                f"rule={self.rule!r} and center_keys={self.center_keys} are choices of "
                "state='ahn'; leave them at their defaults for state='lolcats'"
            )
        return found


AHN_RECALL = ComposedConfig(state="ahn")
"""AHN-GatedDeltaNet behind window and store."""
LOLCATS_RECALL = ComposedConfig(state="lolcats")
"""LoLCATs behind window and store."""


def patch_composed(model: PreTrainedModel, config: ComposedConfig) -> None:
    """Give each selected attention layer a store and a state.

    Raises:
        UnsupportedModelError, ConfigError, NoTargetError, StateError: see `memretrofit.patch`.
    """
    patch_attention(
        model, config, lambda site: ComposedMemory(_recall(site, config), _state(site, config))
    )


def _recall(site: AttentionSite, config: ComposedConfig) -> RecallMemory:
    return RecallMemory(
        sliding_window=config.sliding_window,
        num_sink_tokens=config.num_sink_tokens,
        block_size=config.block_size,
        top_k=config.top_k,
        granularity=config.granularity,
        positions=config.positions,
        position_group=config.position_group,
        placement=config.placement,
        hot_bytes=config.hot_bytes,
        num_key_value_heads=site.num_key_value_heads,
        key_dim=site.key_dim,
        value_dim=site.value_dim,
    )


def _state(site: AttentionSite, config: ComposedConfig) -> AttentionMemory:
    per_query = config.state_heads == "query"
    shared = {
        "num_heads": site.num_heads,
        "num_state_heads": site.num_heads if per_query else site.num_key_value_heads,
        "key_dim": site.key_dim,
        "value_dim": site.value_dim,
        "sliding_window": config.sliding_window,
        "num_sink_tokens": config.num_sink_tokens,
    }
    if config.state == "lolcats":
        return FeatureMapMemory(key_space=config.key_space, **shared)
    return RecurrentMemory(
        rule=config.rule,
        hidden_size=site.hidden_size,
        key_space=config.key_space,
        center_keys=config.center_keys,
        **shared,
    )
