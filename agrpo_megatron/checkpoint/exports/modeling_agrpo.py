"""Masked diffusion language models of agrpo_megatron, for transformers 4.46 and newer.

One class for LLaDA, Dream, SDAR, LLaDA-MoE and LLaDA2, and for Llama, Qwen2 and Qwen3 that denoise:
it maps ids [B, S] to logits [B, S, V] for every position, masked or not. The tensors have the
published names of each family. Rows are padded at their end; there is no cache and no dropout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

STANDARD = {
    "embedding": "model.embed_tokens",
    "layer": "model.layers.{i}.",
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
LLADA = {
    "embedding": "model.transformer.wte",
    "layer": "model.transformer.blocks.{i}.",
    "attention_norm": "attn_norm",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "attn_out",
    "mlp_norm": "ff_norm",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
    "norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
}
LLADA2 = STANDARD | {
    "embedding": "model.word_embeddings",
    "qkv": "attention.query_key_value",
    "o": "attention.dense",
    "q_norm": "attention.query_layernorm",
    "k_norm": "attention.key_layernorm",
}
FITTING = {"use_cache": (None, False, True), "return_dict": (None, True)}  # values of inputs
USUAL = """
n_layers num_hidden_layers d_model hidden_size mlp_hidden_size intermediate_size
n_heads num_attention_heads n_kv_heads num_key_value_heads max_sequence_length
max_position_embeddings dense_intermediate_size intermediate_size
expert_intermediate_size moe_intermediate_size
"""


class AgrpoConfig(PretrainedConfig):
    """The family's keys of config.json, sizes also under their usual names (`USUAL`)."""

    model_type = "agrpo"

    def __init__(self, **values):
        pairs = zip(USUAL.split()[::2], USUAL.split()[1::2], strict=True)
        usual = {name: values[key] for key, name in pairs if key in values}
        super().__init__(**{**values, **usual})

    def value(self, key, default=None):
        """Return a key of config.json, or the default where the family has no such key."""
        found = getattr(self, key, None)
        return default if found is None else found

    @property
    def names(self):
        found = {"llada": LLADA, "llada2_moe": LLADA2}.get(self.agrpo_family, STANDARD)
        return found | {"head": found["embedding"]} if self.value("agrpo_tied") else found

    @property
    def qkv_bias(self):
        return self.agrpo_family in ("dream", "qwen2") or self.value("include_qkv_bias", False)

    @property
    def qk_norm(self):
        found = self.value("qk_layernorm", self.value("use_qk_norm", False))
        return found or self.agrpo_family in ("sdar", "sdar_moe", "qwen3")

    @property
    def dense_layers(self):  # the first layers, without experts
        if self.value("num_experts") is None:
            return self.num_hidden_layers
        return self.value("moe_layer_freq", []).count(0) + self.value("first_k_dense_replace", 0)

    @property
    def shared_width(self):  # of the shared experts; 0: there are none
        together = self.value("num_shared_experts", 0) * self.moe_intermediate_size
        return self.value("shared_expert_intermediate_size", together)

    @property
    def shared_name(self):
        return "mlp.shared_expert." if self.agrpo_family == "llada_moe" else "mlp.shared_experts."


class RMSNorm(nn.Module):
    def __init__(self, width, epsilon):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x):
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * normed.to(x.dtype)


class AgrpoModel(PreTrainedModel):
    """Ids to logits, with a language-model head."""

    config_class = AgrpoConfig
    base_model_prefix = ""
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.head_width = config.value("head_dim", config.hidden_size // config.num_attention_heads)
        hidden, names = config.hidden_size, config.names
        rows = config.value("embedding_size", config.vocab_size)
        self._add(names["embedding"], nn.Embedding(rows, hidden))
        for number in range(config.num_hidden_layers):
            self._add_attention(number)
            self._add_mlp(number)
        self._add(names["norm"], RMSNorm(hidden, config.rms_norm_eps))
        if names["head"] != names["embedding"]:
            self._add(names["head"], nn.Linear(hidden, rows, bias=False))
        self.post_init()

    def _add(self, name, module):
        """Register a module under a dotted name."""
        *parents, last = name.split(".")
        place = self
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = getattr(place, parent)
        place.add_module(last, module)

    def _name(self, number, part=None):
        names = self.config.names
        return names["layer"].format(i=number) + names.get(part, "")

    def _add_attention(self, number):
        config, hidden, width = self.config, self.config.hidden_size, self.head_width
        queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
        is_fused = "qkv" in config.names
        sizes = {"qkv": queries + 2 * keys} if is_fused else {"q": queries, "k": keys, "v": keys}
        for part, size in sizes.items():
            self._add(self._name(number, part), nn.Linear(hidden, size, bias=config.qkv_bias))
        self._add(self._name(number, "o"), nn.Linear(queries, hidden, bias=False))
        self._add(self._name(number, "attention_norm"), RMSNorm(hidden, config.rms_norm_eps))
        for part in ("q_norm", "k_norm") if config.qk_norm else ():
            self._add(self._name(number, part), RMSNorm(width, config.rms_norm_eps))

    def _add_mlp(self, number):
        config, hidden, layer = self.config, self.config.hidden_size, self._name(number)
        self._add(self._name(number, "mlp_norm"), RMSNorm(hidden, config.rms_norm_eps))
        if number < config.dense_layers:
            names = [config.names[part] for part in ("gate", "up", "down")]
            self._add_swiglu(layer, config.intermediate_size, names)
            return
        self._add(layer + "mlp.gate", nn.Linear(hidden, config.num_experts, bias=False))
        if config.value("moe_router_enable_expert_bias", False):
            bias = nn.Parameter(torch.zeros(config.num_experts))
            self.get_submodule(layer + "mlp.gate").register_parameter("expert_bias", bias)
        for expert in range(config.num_experts):
            self._add_swiglu(f"{layer}mlp.experts.{expert}.", config.moe_intermediate_size)
        if config.shared_width:
            self._add_swiglu(layer + config.shared_name, config.shared_width)

    def _add_swiglu(self, prefix, width, names=("gate_proj", "up_proj", "down_proj")):
        hidden = self.config.hidden_size
        for name, sizes in zip(names, [(hidden, width)] * 2 + [(width, hidden)], strict=True):
            self._add(prefix + name, nn.Linear(*sizes, bias=False))

    def get_input_embeddings(self):
        return self.get_submodule(self.config.names["embedding"])

    def get_output_embeddings(self):
        return self.get_submodule(self.config.names["head"])

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **others):
        """Return the logits [B, S, V]; `attention_mask` [B, S] is 0 at padding."""
        for name, value in others.items():
            if not any(value is fitting for fitting in FITTING.get(name, (None, False))):
                gives = "gives logits of whole rows, at positions 0 to S - 1, without cache"
                raise ValueError(f"{name} is given, and this model {gives}; leave it out")
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        mask, turns = self._mask(x, attention_mask), self._turns(x)
        for number in range(self.config.num_hidden_layers):
            normed = self._part(number, "attention_norm")(x)
            x = x + self._attention(number, normed, mask, turns)
            x = x + self._mlp(number, self._part(number, "mlp_norm")(x))
        normed = self.get_submodule(self.config.names["norm"])(x)
        head = self.get_parameter(f"{self.config.names['head']}.weight")
        return MaskedLMOutput(logits=F.linear(normed, head))

    def _part(self, number, part):
        return self.get_submodule(self._name(number, part))

    def _mask(self, x, attention_mask):
        """Return who sees whom [B or 1, 1, S, S]; None: all see all."""
        mask, block = None, self.config.value("block_size")
        if block is not None:  # a token sees the blocks up to its own
            blocks = torch.arange(x.shape[1], device=x.device) // block
            mask = (blocks[:, None] >= blocks)[None, None]
        if attention_mask is not None and not attention_mask.all():
            mask = attention_mask.bool()[:, None, None] & (True if mask is None else mask)
            itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
            mask = mask | itself  # also of padding, whose softmax would be NaN without a token
        return mask

    def _turns(self, x):
        """Return cosines and sines of the rotary embedding, [S, rotated / 2] float32 each."""
        config = self.config
        rotated = int(self.head_width * config.value("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotated, 2, device=x.device).float() / rotated
        turns = 1.0 / config.rope_theta**exponents
        if rope := config.value("agrpo_rope"):  # of Llama 3.1: slow turns are divided
            count = rope["original_max_position_embeddings"] * turns / (2 * torch.pi)
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            share = ((count - low) / (high - low)).clamp(0, 1)
            turns = turns * (share + (1 - share) / rope["factor"])
        angles = torch.arange(x.shape[1], device=x.device).float()[:, None] * turns
        return angles.cos(), angles.sin()

    def _attention(self, number, x, mask, turns):
        config, names = self.config, self.config.names
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        if "qkv" in names:
            sizes = [size * self.head_width for size in (heads, groups, groups)]
            q, k, v = self._part(number, "qkv")(x).split(sizes, -1)
        else:
            q, k, v = (self._part(number, part)(x) for part in "qkv")
        q, k, v = (part.unflatten(-1, (-1, self.head_width)) for part in (q, k, v))
        if config.qk_norm:
            q, k = self._part(number, "q_norm")(q), self._part(number, "k_norm")(k)
        q, k = _rotated(q, turns), _rotated(k, turns)
        k, v = (part.repeat_interleave(heads // groups, 2) for part in (k, v))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, mask)
        return self._part(number, "o")(mixed.transpose(1, 2).flatten(2))

    def _mlp(self, number, x):
        config, layer = self.config, self._name(number)
        if number < config.dense_layers:
            return self._swiglu(layer, x, [config.names[part] for part in ("gate", "up", "down")])
        flat = x.flatten(0, 1)
        chosen, weights = self._routed(layer, flat)
        result = torch.zeros_like(flat)
        for expert in chosen.unique().tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            found = self._swiglu(f"{layer}mlp.experts.{expert}.", flat[token])
            weight = weights[token, place, None].to(found.dtype)
            result = result.index_add(0, token, found * weight)
        if config.shared_width:
            result = result + self._swiglu(layer + config.shared_name, flat)
        return result.view_as(x)

    def _swiglu(self, prefix, x, names=("gate_proj", "up_proj", "down_proj")):
        gate, up, down = (self.get_submodule(prefix + name) for name in names)
        return down(F.silu(gate(x)) * up(x))

    def _routed(self, layer, x):
        """Return the experts of each token and their weights, [T, k] each; in float32."""
        config, router = self.config, self.get_submodule(layer + "mlp.gate")
        logits = x.float() @ router.weight.float().T
        is_sigmoid = config.value("score_function") == "sigmoid"
        scores = logits.sigmoid() if is_sigmoid else logits.softmax(-1)
        ranks = scores + getattr(router, "expert_bias", torch.zeros(())).float()
        groups = config.value("n_group", 1)
        if groups > 1:  # only experts of the groups with the best two experts
            grouped = ranks.unflatten(1, (groups, -1))
            best = grouped.topk(2).values.sum(-1).topk(config.topk_group).indices
            kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, True)
            ranks = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)
        chosen = ranks.topk(config.num_experts_per_tok).indices
        weights = scores.gather(1, chosen)
        is_several = config.num_experts_per_tok > 1 or not is_sigmoid  # a single sigmoid stays
        if config.value("norm_topk_prob", False) and is_several:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * config.value("routed_scaling_factor", 1.0)


def _rotated(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first numbers of each head by its position; x is [B, S, heads, head width]."""
    cosine, sine = (turn[:, None] for turn in turns)
    first, second, rest = x.float().tensor_split((cosine.shape[-1], 2 * cosine.shape[-1]), -1)
    rotated = [first * cosine - second * sine, second * cosine + first * sine, rest]
    return torch.cat(rotated, -1).to(x.dtype)
