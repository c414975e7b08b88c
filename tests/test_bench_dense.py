"""The dense yardstick computes attention and its gradients."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("triton")
from attention_problems import assert_within_budget
from dense import dense_bwd, dense_fwd


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("block_m, block_n, scale", [(32, 16, 0.3), (16, 32, -1.0)])
def test_bench_dense_is_attention(block_m, block_n, scale, dtype, device):
    inputs = [torch.randn(2, 2, 64, 32, device=device, dtype=dtype) for _ in range(4)]

    def attend(dtype):
        q, k, v, dout = (x.to(dtype) for x in inputs)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, scale=scale)
        return out.detach(), torch.autograd.grad(out, (q, k, v), dout)

    q, k, v, dout = inputs
    out, lse = dense_fwd(q, k, v, scale, block_m, block_n)
    grads = dense_bwd(q, k, v, out, lse, dout, scale, block_m, block_n)
    (want, want_grads), (rounded, rounded_grads) = attend(torch.float64), attend(dtype)
    logits = q.double() @ k.double().mT * scale
    torch.testing.assert_close(lse * math.log(2), logits.logsumexp(-1).float(), rtol=1e-5, atol=1e-5)
    assert_within_budget(out, want, rounded)
    for grad, *others in zip(grads, want_grads, rounded_grads, strict=True):
        assert_within_budget(grad, *others)
