"""Bytes that training holds on one GPU.

Shapes: T = B * L tokens of a micro-batch, N loss positions, D hidden, Q and K widths of queries and keys, F width of
the feed-forward part, E experts, k of them per token, R rank, V vocabulary, n GPUs, P numbers in the fast weights.
A formula with `a` counts in bytes of the activations' dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dllm.tools.estimate.shape import GATED, LayerShape, LinearShape, ModelShape
from dllm.utils.parsing import InputError

Engine = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
ENGINES = get_args(Engine)
SHARDED = ("fsdp2", "zero3")

WIDE = 4  # bytes of float32
QUANTISED = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # per weight: 4 bits, an 8-bit scale per 64, a float32 per 256 scales
OPTIMIZER_BLOCK = 256  # numbers that share a float32 scale in the 8-bit optimizer
BUCKET = 500_000_000  # numbers in DeepSpeed's gradient bucket, its default
LIVE = 1_000_000_000  # numbers that ZeRO-3 keeps gathered at most, its default
SUB_GROUP = 1_000_000_000  # numbers that ZeRO-3's optimizer moves at once, its default


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; names and meanings are those of the training flags.

    bucket_view: whether DDP's gradients live in its buckets, as under our trainers; False: a second copy of them there.
    dropout_mask_bytes: of a number that dropout looks at: 1 on a GPU; a CPU keeps a mask of the input's dtype.
    loss_share: N / T.
    fast_weight_rank: 0: no memory.
    fast_weight_fraction: share of the layers with fast weights.
    inner_steps: states of the inner loop.

    Raises:
        InputError: a combination that does not exist.
    """

    engine: Engine = "ddp"
    num_gpus: int = 1
    length: int = 4096
    batch_size: int = 1
    accumulation: int = 1
    dtype: str = "bfloat16"
    bf16: bool = False
    lora_rank: int = 0
    lora_dropout: float = 0.0
    load_in_4bit: bool = False
    optim_8bit: bool = False
    checkpointing: bool = True
    bucket_view: bool = True
    dropout_mask_bytes: int = 1
    loss_share: float = 0.5
    fast_weight_rank: int = 0
    fast_weight_fraction: float = 0.1
    inner_steps: int = 2

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise InputError(f"engine {self.engine!r} is unknown; allowed: {', '.join(ENGINES)}, all")
        if self.load_in_4bit and not self.lora_rank:
            raise InputError("4-bit weights cannot be trained themselves: add --lora True, or drop --load_in_4bit")
        if self.load_in_4bit and self.engine in SHARDED:
            raise InputError(f"4-bit weights are not sharded here: use ddp, zero1 or zero2 instead of {self.engine}")
        if self.optim_8bit and self.engine != "ddp":
            raise InputError(f"the 8-bit optimizer runs under ddp alone: drop it, or {self.engine}")

    @property
    def tokens(self) -> int:
        """T."""
        return self.batch_size * self.length

    @property
    def deepspeed(self) -> bool:
        """Whether the engine is DeepSpeed."""
        return self.engine.startswith("zero")

    @property
    def weight_bytes(self) -> int:
        """Of a weight that is not quantised. DeepSpeed under bf16 casts the model; FSDP2 under bf16 holds what is
        trained in float32 and gathers bfloat16; PEFT holds what is left beside 4-bit linears in float32."""
        if self.load_in_4bit or (self.engine == "fsdp2" and self.bf16 and not self.lora_rank):
            return WIDE
        return 2 if self.dtype == "bfloat16" or (self.deepspeed and self.bf16) else WIDE

    @property
    def adapter_bytes(self) -> int:
        """Of a LoRA weight: PEFT makes them float32; DeepSpeed under bf16 casts them too."""
        return 2 if self.deepspeed and self.bf16 else WIDE

    @property
    def autocast(self) -> bool:
        """Whether float32 weights compute in bfloat16 by autocast."""
        return self.bf16 and self.weight_bytes == WIDE and self.engine == "ddp" and not self.load_in_4bit

    @property
    def residual_bytes(self) -> int:
        """Of a number of the hidden state between layers."""
        return 2 if self.engine == "fsdp2" and self.bf16 else self.weight_bytes

    @property
    def compute_bytes(self) -> int:
        """Of a number inside a layer. A 4-bit linear gives back the dtype that it was given."""
        return 2 if self.autocast else self.residual_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    weights, gradients, optimizer: what the engine leaves of them here (`optimizer` with float32 copies of the weights).
    buffers: gathered weights, gradient buckets, copies made by autocast.
    fast: fast weights, their gradient and update, states that wait for the inner loop.
    activations: kept for backward, below the head.
    head: logits and their float32 log-softmax.
    peak: the most that is held at once (see `estimate_memory`).
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    fast: float
    activations: float
    head: float
    peak: float


def trained_numbers(shape: ModelShape, recipe: Recipe) -> int:
    """How many numbers the optimizer moves: LoRA matrices, or all weights."""
    return shape.num_low_rank(recipe.lora_rank) if recipe.lora_rank else shape.num_parameters


def weight_memory(shape: ModelShape, recipe: Recipe) -> float:
    """Bytes of all weights, before sharding: frozen ones as stored (or 4-bit), LoRA matrices on top."""
    quantised = shape.num_linear if recipe.load_in_4bit else 0
    base = quantised * QUANTISED + (shape.num_parameters - quantised) * recipe.weight_bytes
    return base + (trained_numbers(shape, recipe) * recipe.adapter_bytes if recipe.lora_rank else 0)


def copied_memory(shape: ModelShape, recipe: Recipe) -> float:
    """Bytes of the bfloat16 copies that autocast makes of float32 linears, head and LoRA matrices: 2 each. They last as
    long as what was computed with them; with checkpointing and frozen weights that is one layer, left out here."""
    if not recipe.autocast or (recipe.checkpointing and recipe.lora_rank):
        return 0
    adapters = trained_numbers(shape, recipe) if recipe.lora_rank else 0
    return 2 * (shape.num_linear + shape.vocabulary * shape.hidden + adapters)


def optimizer_memory(num_trained: int, recipe: Recipe) -> float:
    """Bytes of AdamW's two moments, before sharding; under DeepSpeed in float32 with a float32 copy of the weights,
    else in the weights' dtype, or 8-bit (one byte and a float32 per 256 numbers each)."""
    if recipe.optim_8bit:
        return 2 * num_trained * (1 + WIDE / OPTIMIZER_BLOCK)
    if recipe.deepspeed:
        return 3 * WIDE * num_trained
    return 2 * num_trained * trained_bytes(recipe)


def trained_bytes(recipe: Recipe) -> int:
    """Bytes of a trained weight, and of its gradient."""
    return recipe.adapter_bytes if recipe.lora_rank else recipe.weight_bytes


def reduced_bytes(recipe: Recipe) -> int:
    """Bytes of a number of a gradient as it is sent, which is as backward made it."""
    return recipe.compute_bytes if recipe.engine == "fsdp2" and not recipe.lora_rank else trained_bytes(recipe)


def gradient_memory(num_trained: int, recipe: Recipe) -> float:
    """Bytes of all gradients on one GPU.

    ZeRO-2, ZeRO-3 and FSDP2 keep a share of 1 / n. With several micro-batches FSDP2 reduces those of the last alone,
    as accelerate runs it, and keeps whole gradients until then.
    """
    if recipe.engine == "fsdp2" and recipe.num_gpus > 1 and recipe.accumulation > 1:
        return num_trained * reduced_bytes(recipe)
    shares = recipe.num_gpus if recipe.engine in (*SHARDED, "zero2") else 1
    return num_trained * trained_bytes(recipe) / shares


def step_memory(num_trained: int, recipe: Recipe) -> float:
    """Bytes of gradients in the optimizer step of DeepSpeed, at its largest: g m + g c + 4 c.

    That is the share m = P / n of the P trained numbers, g bytes each; of the c numbers that are moved at once a flat
    copy; and of that a float32 copy, which is none where g = 4. c = m, under ZeRO-3 at most 10^9.
    """
    share, own = num_trained / recipe.num_gpus, trained_bytes(recipe)
    moved = min(share, SUB_GROUP) if recipe.engine == "zero3" else share
    return own * share + moved * (own + (WIDE if own != WIDE else 0))


def norm_memory(width: int, tokens: int, recipe: Recipe, dtype_bytes: int) -> int:
    """What an RMS norm keeps: its input in float32, and if it is trained the normed input, 4 T W + a T W."""
    return tokens * width * (WIDE + (0 if recipe.lora_rank else dtype_bytes))


def input_memory(
    linears: list[LinearShape], tokens: int, recipe: Recipe, dtype_bytes: int, kept: bool = False
) -> float:
    """What linears that share an input x [T, I] keep of it, and what LoRA on them keeps.

    Trained: x once (a T I), under autocast a bfloat16 copy for each linear. Frozen: nothing. With LoRA each keeps its
    own float32 copy of x (bfloat16 under autocast), or all of them x itself where that is float32 and has no dropout;
    with dropout also a mask; and A x, [T, R].

    Args:
        linears: they.
        tokens: T.
        recipe: see `Recipe`.
        dtype_bytes: of x.
        kept: whether x is kept by somebody else already.
    """
    own = 2 if recipe.autocast else recipe.adapter_bytes
    width = linears[0].inputs
    if not recipe.lora_rank:
        if recipe.autocast and dtype_bytes != own:
            return len(linears) * 2 * tokens * width
        return 0 if kept else dtype_bytes * tokens * width
    adapted = sum(linear.has_lora for linear in linears)
    low_rank = adapted * tokens * recipe.lora_rank * own
    if own == dtype_bytes and not recipe.lora_dropout:
        return low_rank + (0 if kept or not adapted else own * tokens * width)
    mask = recipe.dropout_mask_bytes if recipe.lora_dropout else 0
    return low_rank + adapted * tokens * width * (own + mask)


def attention_memory(layer: LayerShape, hidden: int, tokens: int, recipe: Recipe) -> float:
    """What attention keeps: its norm, the linears' input, q, k, v, the output (a T (2 Q + 2 K)) and the log of the
    softmax's sum (4 T n_h); with norms of q and k theirs. Scores are never kept: the kernel recomputes them."""
    a, r = recipe.compute_bytes, recipe.residual_bytes
    inner = [linear for linear in layer.linears if linear.role in ("q_proj", "k_proj", "v_proj", "qkv_proj")]
    outer = [linear for linear in layer.linears if linear.role == "o_proj"]
    held = a * tokens * (2 * layer.query + 2 * layer.key) + WIDE * tokens * layer.heads
    normed = layer.query + layer.key
    if layer.has_qk_norm:
        held += norm_memory(normed, tokens, recipe, a)
    if layer.has_fused_qkv:
        # v is a view that keeps q and k beside it; in float32 these are what their norms keep anyway.
        held += 0 if layer.has_qk_norm and a == WIDE else a * tokens * normed
    held += norm_memory(hidden, tokens, recipe, r) + input_memory(inner, tokens, recipe, r)
    return held + input_memory(outer, tokens, recipe, a, kept=True)


def gated_memory(linears: list[LinearShape], tokens: int, recipe: Recipe, kept_input: bool) -> float:
    """What down(silu(gate x) * up x) keeps: gate, silu, up (3 a T F), the linears' inputs."""
    a, r = recipe.compute_bytes, recipe.residual_bytes
    inner = [linear for linear in linears if linear.role != "down_proj"]
    (down,) = [linear for linear in linears if linear.role == "down_proj"]
    held = 3 * a * tokens * down.inputs + input_memory(inner, tokens, recipe, r, kept_input)
    return held + input_memory([down], tokens, recipe, a)


def feed_forward_memory(layer: LayerShape, hidden: int, tokens: int, recipe: Recipe) -> float:
    """What the feed-forward part keeps: its norm; each gated block on its tokens (T k for the experts together); and of
    the routing the scores (4 T E), indices and weights, the tokens sorted by expert and the experts' answers (a T k D
    each)."""
    a, r = recipe.compute_bytes, recipe.residual_bytes
    gated = [linear for linear in layer.linears if linear.role in GATED]
    dense = [linear for linear in gated if not linear.is_routed]
    routed = [linear for linear in gated if linear.is_routed]
    held: float = norm_memory(hidden, tokens, recipe, r)
    if dense:
        held += gated_memory(dense, tokens, recipe, kept_input=False)
    if not routed:
        return held
    sent = tokens * layer.top_k
    held += WIDE * tokens * layer.num_experts + sent * (3 * 8 + 2 * WIDE)
    held += gated_memory(routed, sent, recipe, kept_input=False) + a * sent * hidden
    if not recipe.lora_rank and not dense and not recipe.autocast:
        held += r * tokens * hidden  # the router keeps its input
    if not recipe.lora_rank and layer.routes_in_float32 and r != WIDE:
        held += WIDE * tokens * hidden
    return held


def layer_memory(layer: LayerShape, hidden: int, tokens: int, recipe: Recipe) -> float:
    """What one layer keeps for its backward, without checkpointing."""
    return attention_memory(layer, hidden, tokens, recipe) + feed_forward_memory(layer, hidden, tokens, recipe)


def activation_memory(shape: ModelShape, recipe: Recipe) -> float:
    """Bytes kept for backward below the head: of all layers, or with checkpointing the layers' inputs, a T D each."""
    tokens, hidden = recipe.tokens, shape.hidden
    if recipe.checkpointing:
        return len(shape.layers) * tokens * hidden * recipe.residual_bytes
    held = sum(layer_memory(layer, hidden, tokens, recipe) for layer in shape.layers)
    # Nothing below the first LoRA matrix needs a gradient.
    return held - (WIDE * tokens * hidden if recipe.lora_rank else 0)


def head_memory(shape: ModelShape, recipe: Recipe, with_logits: bool = True) -> float:
    """Bytes of the final norm and the head: its input at the loss positions, logits (a N V), float32 log-softmax
    (4 N V)."""
    a, r, positions = recipe.compute_bytes, recipe.residual_bytes, round(recipe.tokens * recipe.loss_share)
    held = norm_memory(shape.hidden, recipe.tokens, recipe, r)
    if not recipe.lora_rank:
        held += a * positions * shape.hidden
    return held + positions * shape.vocabulary * (WIDE + (a if with_logits else 0))


def fast_memory(shape: ModelShape, recipe: Recipe, roles: tuple[str, ...]) -> float:
    """Bytes of the memory: fast weights, their gradient, its update and the fast weights before it (4 P float32), and
    the hidden states of the states before the anchor (a T D each). What the inner loop keeps of the layers above the
    split point is less than what the outer forward keeps of them afterwards, so it is in no peak."""
    if not recipe.fast_weight_rank:
        return 0
    numbers = shape.num_fast(recipe.fast_weight_rank, recipe.fast_weight_fraction, roles)
    waiting = (recipe.inner_steps - 1) * recipe.tokens * shape.hidden * recipe.residual_bytes
    return 4 * WIDE * numbers + waiting


def buffer_memory(shape: ModelShape, recipe: Recipe) -> float:
    """Bytes of what an engine gathers and buckets.

    DDP: a copy of the gradients, unless they live in the buckets. ZeRO: the gradient bucket; ZeRO-3 also up to 10^9
    gathered weights. FSDP2: what is outside the layers and two layers gathered, and one layer's whole gradient.
    """
    if recipe.num_gpus == 1:
        return 0
    trained, own = trained_numbers(shape, recipe), trained_bytes(recipe)
    if recipe.engine == "ddp":
        return 0 if recipe.bucket_view else trained * own
    largest = max(layer.num_parameters for layer in shape.layers)
    if recipe.engine == "fsdp2":
        gathered = (shape.num_outside + 2 * largest) * recipe.compute_bytes
        share = trained / shape.num_parameters if recipe.lora_rank else 1
        return gathered + share * largest * recipe.compute_bytes
    bucket = min(BUCKET, trained) * own
    return bucket + (min(LIVE, shape.num_parameters) * recipe.weight_bytes if recipe.engine == "zero3" else 0)


def estimate_memory(shape: ModelShape, recipe: Recipe, roles: tuple[str, ...] = GATED) -> Memory:
    """The terms and the peak.

    Sharding over n GPUs: weights are divided by n under FSDP2 and ZeRO-3, gradients there and under ZeRO-2 (see
    `gradient_memory`), the optimizer's state there and under ZeRO-1. What lasts is weights + optimizer + buffers +
    fast. The peak is the largest of three moments: the end of the forward (all activations and the head, no gradients
    yet, unless earlier micro-batches left some), the end of backward (all gradients, the activations of one layer), and
    under DeepSpeed the optimizer step (weights + optimizer + `step_memory`). With checkpointing one layer's activations
    come on top of the layers' inputs in the first two.

    Args:
        shape: the model.
        recipe: how it is trained.
        roles: linears with fast weights.
    """
    n, engine = recipe.num_gpus, recipe.engine
    trained = trained_numbers(shape, recipe)
    weights = weight_memory(shape, recipe) / (n if engine in SHARDED else 1)
    gradients = gradient_memory(trained, recipe)
    optimizer = optimizer_memory(trained, recipe) / (1 if engine == "ddp" else n)
    buffers = buffer_memory(shape, recipe) + copied_memory(shape, recipe)
    fast = fast_memory(shape, recipe, roles)
    activations, head = activation_memory(shape, recipe), head_memory(shape, recipe)
    one_layer = max(layer_memory(layer, shape.hidden, recipe.tokens, recipe) for layer in shape.layers)
    lasting = weights + optimizer + buffers + fast
    in_buckets = engine == "ddp" and n > 1 and recipe.bucket_view
    held = gradients if recipe.accumulation > 1 or in_buckets else 0
    after_forward = held + activations + (max(head, one_layer) if recipe.checkpointing else head)
    after_backward = gradients + one_layer
    in_step = weights + optimizer + step_memory(trained, recipe) if recipe.deepspeed else 0
    peak = max(lasting + max(after_forward, after_backward), in_step)
    return Memory(weights, gradients, optimizer, buffers, fast, activations, head, peak)


def traffic(shape: ModelShape, recipe: Recipe, roles: tuple[str, ...] = GATED) -> float:
    """Bytes that one GPU sends (and receives) per optimizer step, rings assumed.

    With s = (n - 1) / n, G bytes of gradients, W of weights in the dtype they are gathered in, M micro-batches:
        ddp     2 s G                 one all-reduce
        zero1   s G + s W_trained     reduce-scatter, then the new weights are gathered
        zero2   M s G + s W_trained   each micro-batch reduces
        zero3   M (2 s W + s G)       gathered for forward and for backward, frozen weights too
        fsdp2   2 M s W + s G         the last micro-batch reduces
    The memory adds K all-reduces of P float32: M K 2 s 4 P.
    """
    n, micro_batches = recipe.num_gpus, recipe.accumulation
    share = (n - 1) / n
    trained = trained_numbers(shape, recipe)
    gradients = share * trained * reduced_bytes(recipe)
    gathered = share * (shape.num_parameters * recipe.compute_bytes)
    if recipe.lora_rank:
        gathered += share * trained * trained_bytes(recipe)
    new_weights = share * trained * trained_bytes(recipe)
    volume = {
        "ddp": 2 * gradients,
        "zero1": gradients + new_weights,
        "zero2": micro_batches * gradients + new_weights,
        "zero3": micro_batches * (2 * gathered + gradients),
        "fsdp2": micro_batches * 2 * gathered + gradients,
    }[recipe.engine]
    if recipe.fast_weight_rank:
        numbers = shape.num_fast(recipe.fast_weight_rank, recipe.fast_weight_fraction, roles)
        volume += micro_batches * recipe.inner_steps * 2 * share * WIDE * numbers
    return volume
