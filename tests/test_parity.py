"""Parity in float64 with reformer-pytorch and with Hugging Face, given their buckets: outputs and gradients of q and v.

Both normalise their keys under autograd, so their gradients are comparable too. Rows without another key agree as well,
although each has its own finite mask value: the own value is all that is left in every implementation.
"""

import math
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LocalSelfAttention, LSHSelfAttention

import lsh_kernels
from lsh_kernels import LSHConfig, reference

# a GPU machine, which collects all tests and runs some, may be without it
LSHAttention = pytest.importorskip("reformer_pytorch", reason="reformer-pytorch is not installed").LSHAttention

B, H, D = 2, 3, 6

# where the own value is all there is, the lse of the peers are near -1e5: a grid of 1.5e-11 in float64
ATOL = 1e-10

IMPLEMENTATIONS = {
    "reference": SimpleNamespace(
        lsh_hash=reference.lsh_hash,
        lsh_attention=reference.lsh_attention,
        local_attention=reference.local_attention,
    ),
    "torch": SimpleNamespace(
        lsh_hash=lambda x, *args: lsh_kernels.lsh_hash(x, *args),
        lsh_attention=lambda *args, **options: lsh_kernels.lsh_attention(*args, backend="torch", return_lse=True, **options),
        local_attention=lambda *args, **options: lsh_kernels.local_attention(*args, backend="torch", return_lse=True, **options),
    ),
}


@pytest.fixture(params=IMPLEMENTATIONS)
def ours(request):
    return IMPLEMENTATIONS[request.param]


def inputs(length, n=2):
    """n leaves [B, H, L, D] in float64."""
    generator = torch.Generator().manual_seed(length)
    shape = (B, H, length, D)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(n)]


def draw_rotations(n_heads, n_hashes, width):
    return torch.randn(n_heads, D, n_hashes, width, generator=torch.Generator().manual_seed(width))


def drawing(rotations):
    """Makes the peer draw these rotations: its call of torch.randn has our layout, [heads, D, R, W_rot]."""

    def randn(shape, *, dtype, device):
        assert tuple(shape) == rotations.shape
        return rotations.to(device, dtype)

    return mock.patch.object(torch, "randn", randn)


@contextmanager
def default_float64():
    """The logarithms of copies that reformer-pytorch takes off its logits have the default dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def reformer_pytorch(q, v, rotations, *, chunk_length, causal, **options):
    """out [B, H, L, D] and buckets [B, H, R, L] of reformer-pytorch, which has no heads and N = L / C."""
    n_hashes, length = rotations.shape[2], q.shape[2]
    layer = LSHAttention(bucket_size=chunk_length, n_hashes=n_hashes, causal=causal, **options)
    with drawing(rotations), default_float64():
        out, _, buckets = layer(q.flatten(0, 1), v.flatten(0, 1))
    # its buckets are numbered on from round to round
    return out.view(B, H, length, D), buckets.view(B, H, n_hashes, length) % (length // chunk_length)


def select_inputs(layer, *names):
    """Weights that cut the hidden states into the inputs of the heads: [x_0 | x_1 ..], each [B, L, H * D]."""
    rows = torch.eye(len(names) * H * D, dtype=torch.float64).chunk(len(names))
    for name, weight in zip(names, rows, strict=True):
        getattr(layer, name).weight.data = weight


def hidden_states(*tensors):
    return torch.cat([x.transpose(1, 2).flatten(2) for x in tensors], dim=-1)


def split_heads(out):
    return out.unflatten(-1, (H, D)).transpose(1, 2)


def hugging_face(q, v, rotations, *, n_buckets, chunk_length, causal, before=1, after=0, key_padding_mask=None):
    """out [B, H, L, D] and buckets [B, H, R, L] (padding: N) of Hugging Face."""
    config = ReformerConfig(
        num_attention_heads=H, attention_head_size=D, hidden_size=2 * H * D, num_hashes=rotations.shape[2],
        num_buckets=list(n_buckets) if isinstance(n_buckets, tuple) else n_buckets, lsh_attn_chunk_length=chunk_length,
        lsh_num_chunks_before=before, lsh_num_chunks_after=after, is_decoder=causal,
        lsh_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer = LSHSelfAttention(config, layer_idx=0).double()
    select_inputs(layer, "query_key", "value")
    mask = None if key_padding_mask is None else ~key_padding_mask
    with drawing(rotations):
        result = layer(hidden_states(q, v), attention_mask=mask)
    buckets = result.buckets
    if buckets is not None:
        n = math.prod(n_buckets) if isinstance(n_buckets, tuple) else n_buckets
        # numbered on from round to round, with one bucket more where there is padding
        buckets = buckets % (n if mask is None else n + 1)
    return split_heads(result.hidden_states), buckets


def check(out, wanted, leaves, atol=ATOL, rows=None):
    """Outputs and gradients agree, on the rows [B, L] if given."""
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if rows is not None:
        weights, out, wanted = (x * rows[:, None, :, None] for x in (weights, out, wanted))
    torch.testing.assert_close(out, wanted, rtol=0, atol=atol)
    got, theirs = (torch.autograd.grad((x * weights).sum(), leaves) for x in (out, wanted))
    assert all(grad.abs().max() > 0.1 for grad in theirs)
    torch.testing.assert_close(got, theirs, rtol=0, atol=10 * atol)


# L, C, R: cycles of R * L / C chunks
SHAPES = [(16, 8, 1), (32, 8, 2), (48, 8, 3), (24, 4, 4), (40, 4, 1)]


# trax: chunks of all rounds in one cycle, across buckets, copies counted


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("length", "chunk_length", "n_hashes"), SHAPES)
def test_trax_equals_reformer_pytorch(ours, length, chunk_length, n_hashes, causal):
    q, v = inputs(length)
    n_buckets = length // chunk_length
    rotations = draw_rotations(1, n_hashes, n_buckets // 2)
    wanted, buckets = reformer_pytorch(q, v, rotations, chunk_length=chunk_length, causal=causal)
    assert torch.equal(ours.lsh_hash(q, rotations, n_buckets), buckets.int())
    config = LSHConfig.trax(n_hashes=n_hashes, n_buckets=n_buckets, chunk_length=chunk_length, norm_eps=0.0)
    # it divides its unit keys by sqrt(D)
    out, _ = ours.lsh_attention(q, None, v, config=config, is_causal=causal, buckets=buckets, scale=D**-0.5)
    check(out, wanted, (q, v))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("length", "chunk_length", "n_hashes", "before", "after", "n_buckets"),
    [
        (16, 8, 1, 1, 0, 2),
        (32, 8, 2, 1, 0, 8),
        (32, 8, 2, 0, 0, 4),
        (24, 4, 4, 0, 1, 6),
        (24, 4, 3, 1, 1, (2, 4)),
        (48, 8, 2, 2, 1, (4, 2)),
        (20, 4, 1, 1, 3, (2, 2, 2)),
        (12, 4, 2, 3, 2, 2),
    ],
)
def test_trax_equals_hugging_face(ours, length, chunk_length, n_hashes, before, after, n_buckets, causal):
    q, v = inputs(length)
    factors = n_buckets if isinstance(n_buckets, tuple) else (n_buckets,)
    rotations = draw_rotations(H, n_hashes, sum(factors) // 2)
    wanted, buckets = hugging_face(
        q, v, rotations, n_buckets=n_buckets, chunk_length=chunk_length, causal=causal, before=before, after=after
    )
    assert torch.equal(ours.lsh_hash(q, rotations, n_buckets), buckets.int())
    config = LSHConfig.trax(
        n_hashes=n_hashes, n_buckets=n_buckets, chunk_length=chunk_length, chunks_before=before, chunks_after=after
    )
    out, _ = ours.lsh_attention(q, None, v, config=config, is_causal=causal, buckets=buckets)
    check(out, wanted, (q, v))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_trax_with_padding_equals_hugging_face_on_real_rows(ours, causal):
    """Both give padding a bucket of its own. On padded rows they differ: ours are zeroed before use."""
    length, chunk_length, n_hashes = 32, 4, 2
    q, v = inputs(length)
    padding = torch.arange(length) >= torch.tensor([[length - 5], [13]])
    rotations = draw_rotations(H, n_hashes, 4)
    wanted, buckets = hugging_face(
        q, v, rotations, n_buckets=8, chunk_length=chunk_length, causal=causal, after=1, key_padding_mask=padding
    )
    assert (buckets.transpose(1, 3)[padding] == 8).all()
    config = LSHConfig.trax(n_hashes=n_hashes, n_buckets=8, chunk_length=chunk_length, chunks_after=1)
    out, _ = ours.lsh_attention(q, None, v, config=config, is_causal=causal, buckets=buckets, key_padding_mask=padding)
    check(out, wanted, (q, v), rows=~padding)


@pytest.mark.parametrize("length", [5, 8])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_trax_equals_hugging_face_up_to_one_chunk(ours, length, causal):
    """There Hugging Face computes full attention without self; every key is then seen the same number of times."""
    q, v = inputs(length)
    rotations = draw_rotations(H, 3, 2)
    wanted, _ = hugging_face(q, v, rotations, n_buckets=4, chunk_length=8, causal=causal)
    config = LSHConfig.trax(n_hashes=3, n_buckets=4, chunk_length=8)
    out, _ = ours.lsh_attention(q, None, v, config=config, is_causal=causal, rotations=rotations)
    check(out, wanted, (q, v))


# paper: within the bucket, pairs counted once


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("length", "chunk_length", "n_hashes"), SHAPES[1:])
def test_paper_equals_reformer_pytorch(ours, length, chunk_length, n_hashes, causal):
    q, v = inputs(length)
    n_buckets = length // chunk_length
    rotations = draw_rotations(1, n_hashes, n_buckets // 2)
    wanted, buckets = reformer_pytorch(
        q, v, rotations, chunk_length=chunk_length, causal=causal,
        allow_duplicate_attention=False, attend_across_buckets=False,
    )  # fmt: skip
    if n_hashes == 1:
        # with one round its first chunk looks back to the last one: no bucket may reach from one to the other
        ordered = buckets.sort(-1).values
        assert (ordered[..., chunk_length - 1] < ordered[..., -chunk_length]).all()
    config = LSHConfig.paper(n_hashes=n_hashes, n_buckets=n_buckets, chunk_length=chunk_length)
    out, _ = ours.lsh_attention(q, None, v, config=config, is_causal=causal, buckets=buckets, scale=D**-0.5)
    # the N copies of a pair weigh N / (N + 1e-9) there: weights are off by 1e-9, outputs by that times 2 max|v|
    check(out, wanted, (q, v), atol=2e-9 * v.abs().max().item())


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_paper_counting_copies_equals_reformer_pytorch(ours, causal):
    length, chunk_length, n_hashes, n_buckets = 48, 8, 3, 6
    q, v = inputs(length)
    rotations = draw_rotations(1, n_hashes, n_buckets // 2)
    wanted, buckets = reformer_pytorch(q, v, rotations, chunk_length=chunk_length, causal=causal, attend_across_buckets=False)
    config = LSHConfig.paper(n_hashes=n_hashes, n_buckets=n_buckets, chunk_length=chunk_length, dedupe=False)
    out, _ = ours.lsh_attention(q, None, v, config=config, is_causal=causal, buckets=buckets, scale=D**-0.5)
    check(out, wanted, (q, v))


# local attention


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("length", "chunk_length", "before", "after"),
    [(24, 4, 1, 0), (24, 4, 1, 1), (20, 4, 0, 2), (12, 4, 0, 0), (5, 8, 1, 0)],
)
def test_local_attention_equals_hugging_face(ours, length, chunk_length, before, after, causal, padded):
    q, k, v = inputs(length, n=3)
    # two positions at the start, so that causal rows without a target occur; those are not defined there
    padding = (torch.arange(length) < torch.tensor([[2], [0]])) if padded else torch.zeros(B, length, dtype=torch.bool)
    config = ReformerConfig(
        num_attention_heads=H, attention_head_size=D, hidden_size=3 * H * D, local_attn_chunk_length=chunk_length,
        local_num_chunks_before=before, local_num_chunks_after=after, is_decoder=causal,
        local_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer = LocalSelfAttention(config, layer_idx=0).double()
    select_inputs(layer, "query", "key", "value")
    wanted = split_heads(layer(hidden_states(q, k, v), attention_mask=~padding).hidden_states)
    out, lse = ours.local_attention(
        q, k, v, chunk_length=chunk_length, chunks_before=before, chunks_after=after, wrap=True, is_causal=causal,
        key_padding_mask=padding,
    )  # fmt: skip
    rows = lse.isfinite().all(1)
    assert rows.all() == (not (padded and causal))
    check(out, wanted, (q, k, v), rows=rows)
