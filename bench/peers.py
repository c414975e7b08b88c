"""Attention behind one signature: `PEERS[name](shape)` sets up and returns `attend(query, key, value)`, [B, H, L, D] each.

All are causal, with the same B, H, L, D and dtype; hashing and sorting are part of the call. Peers with shared QK ignore the key.
"""

from __future__ import annotations

import os
import shutil
from typing import NamedTuple

import torch
import torch.nn.functional as F
from cases import AbsentError
from torch.nn.attention import SDPBackend, sdpa_kernel

from lsh_kernels import LSHConfig, lsh_attention
from lsh_kernels.functional import triton_problem


class Shape(NamedTuple):
    """What a peer is set up for."""

    B: int
    H: int
    L: int
    D: int
    R: int
    C: int
    dtype: torch.dtype
    device: torch.device
    backward: bool


def ours(backend, preset=LSHConfig, separate=False, **fields):
    def build(shape):
        problem = triton_problem(torch.empty(0, dtype=shape.dtype, device=shape.device)) if backend == "triton" else None
        if problem:
            raise AbsentError(problem)
        config = preset(n_hashes=shape.R, chunk_length=shape.C, **fields)

        def attend(query, key, value):
            return lsh_attention(query, key if separate else None, value, config=config, is_causal=True, backend=backend)

        return attend

    return build


def exact(backend, is_causal=True):
    """SDPA held to one of its backends; without `is_causal` for a single query, which sees all keys."""

    def build(shape):
        if shape.device.type == "cpu" and backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            raise AbsentError("not a backend of the CPU")
        if is_causal and backend == SDPBackend.MATH and shape.device.type == "cpu":
            # the system would kill the whole run, where a GPU raises; scores, weights, and two gradients of theirs
            needed = (4 if shape.backward else 2) * shape.B * shape.H * shape.L**2 * shape.dtype.itemsize
            there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
            if needed > there // 2:
                raise AbsentError(
                    f"out of memory: needs {needed / 2**30:.0f} GiB, half of what is free is {there / 2**31:.0f} GiB"
                )

        def attend(query, key, value):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)

        return attend

    return build


def flex(shape):
    """FlexAttention over the R * C keys before a query and the query's own."""
    on_cpu = shape.device.type == "cpu"
    if on_cpu and shape.backward:
        raise AbsentError("on a CPU FlexAttention has no backward")
    if on_cpu and not shutil.which(os.environ.get("CXX", "g++")):
        raise AbsentError("on a CPU FlexAttention needs a C++ compiler")
    from torch.nn.attention.flex_attention import flex_attention

    # modes, lengths and batches may need more than the default of eight; without fullgraph what is not compiled runs dense
    torch._dynamo.config.recompile_limit = 64
    mask, compiled = sliding_window(shape), torch.compile(flex_attention, fullgraph=True)

    def attend(query, key, value):
        return compiled(query, key, value, block_mask=mask)

    if on_cpu:
        # here, or the minute that it takes would leave the case's providers fewer runs
        with torch.no_grad():
            attend(*tensors("gaussian", shape))
    return attend


def sliding_window(shape):
    """The block mask, straight from its block indices: a mask of every pair would not fit at long lengths."""
    from torch.nn.attention.flex_attention import BlockMask

    window, block = shape.R * shape.C, 128
    n_blocks, reach = -(-shape.L // block), -(-window // block)
    queries = torch.arange(n_blocks, dtype=torch.int32, device=shape.device)
    first = (queries - reach).clamp(min=0)
    keys = first[:, None] + torch.arange(n_blocks, dtype=torch.int32, device=shape.device)
    return BlockMask.from_kv_blocks(
        (queries - first + 1)[None, None],
        keys.clamp(max=n_blocks - 1)[None, None],
        BLOCK_SIZE=block,
        mask_mod=lambda b, h, i, j: (j <= i) & (i - j <= window),
        seq_lengths=(shape.L, shape.L),
    )


def reformer_pytorch(shape):
    """Needs lengths of whole pairs of chunks."""
    try:
        from reformer_pytorch.reformer_pytorch import LSHAttention
    except ImportError as error:
        raise AbsentError(f"reformer-pytorch: {error}") from error
    if shape.L % (2 * shape.C):
        raise AbsentError(f"reformer-pytorch takes lengths that {2 * shape.C} divides")
    layer = LSHAttention(bucket_size=shape.C, n_hashes=shape.R, causal=True, dropout=0.0)
    return lambda query, key, value: layer(query.flatten(0, 1), value.flatten(0, 1))[0].unflatten(0, query.shape[:2])


def hugging_face_layer(shape):
    """Hugging Face's layer, the first of a model's."""
    try:
        from transformers import ReformerConfig
        from transformers.models.reformer.modeling_reformer import LSHSelfAttention
    except ImportError as error:
        raise AbsentError(f"transformers: {error}") from error
    width = shape.H * shape.D
    config = ReformerConfig(
        num_attention_heads=shape.H, attention_head_size=shape.D, hidden_size=width, num_hashes=shape.R,
        lsh_attn_chunk_length=shape.C, num_buckets=list(LSHConfig(chunk_length=shape.C).factors(shape.L)), is_decoder=True,
        lsh_attention_probs_dropout_prob=0.0, axial_pos_embds_dim=[width // 2, width - width // 2],
    )  # fmt: skip
    return LSHSelfAttention(config, layer_idx=0).to(shape.device)


def hugging_face(shape):
    """Hugging Face's layer with its projections taken out: it gets projected vectors, as the others do."""
    layer = hugging_face_layer(shape)
    given = []
    layer.query_key, layer.value = torch.nn.Identity(), torch.nn.Identity()
    # both projections get the same hidden states: hand the values over instead
    layer.value.register_forward_hook(lambda *_: given.pop())

    def attend(query, key, value):
        given.append(value.transpose(1, 2).flatten(2))
        out = layer(query.transpose(1, 2).flatten(2)).hidden_states
        return out.unflatten(2, (shape.H, shape.D)).transpose(1, 2)

    return attend


SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
EXACT = {name: exact(backend) for name, backend in SDPA.items()}
OURS = {"lsh_kernels triton": ours("triton"), "lsh_kernels torch": ours("torch")}
PEERS = {
    **OURS, **EXACT, "FlexAttention window": flex, "reformer-pytorch": reformer_pytorch, "Hugging Face": hugging_face,
}  # fmt: skip
VARIANTS = {
    "lsh_kernels dedupe=False": ours("auto", dedupe=False),
    "lsh_kernels trax": ours("auto", LSHConfig.trax),
    "lsh_kernels separate keys": ours("auto", separate=True),
}


def tensors(kind, shape):
    """Query, key and value: "gaussian"; "clustered": 64 directions with sizes like 1 / rank, as trained models show; or
    "equal": one direction, so that every row falls into one bucket. Values are always Gaussian."""
    generator = torch.Generator(shape.device).manual_seed(0)

    def gaussian(*size):
        return torch.randn(size, generator=generator, device=shape.device)

    size = (shape.B, shape.H, shape.L, shape.D)
    query, key, value = (gaussian(*size) for _ in range(3))
    if kind == "clustered":
        sizes = 1 / torch.arange(1, 65, device=shape.device, dtype=torch.float32)
        cluster = torch.multinomial(sizes, shape.L, replacement=True, generator=generator)
        centres = gaussian(64, shape.D)[cluster]
        query, key = 0.3 * query + centres, 0.3 * key + centres
    elif kind == "equal":
        query = key = gaussian(shape.D).expand(size).contiguous()
    elif kind != "gaussian":
        raise ValueError(f"kind: got {kind!r}, wanted gaussian, clustered or equal")
    return [x.to(shape.dtype).detach().clone().requires_grad_(shape.backward) for x in (query, key, value)]


def build_call(peer, shape, kind="gaussian", depth=1):
    """Sets a peer up on its inputs; the call runs it, `depth` times with each output as the next values, and its backward."""

    def build():
        attend, inputs = peer(shape), tensors(kind, shape)
        dout = torch.randn_like(inputs[2])

        def call():
            query, key, out = inputs
            with torch.set_grad_enabled(shape.backward):
                for _ in range(depth):
                    out = attend(query, key, out)
            return torch.autograd.grad(out, inputs, dout, allow_unused=True) if shape.backward else out

        return call

    return build
