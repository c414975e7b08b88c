"""The oracle against cases worked out by hand, explicit Python loops, and published numbers."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from lsh_kernels import LSHConfig, reference

# sorted by bucket: 0 2 4 5 7 | 1 3 6
BUCKETS = [0, 1, 0, 1, 0, 0, 1, 0]


def f64(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def as_buckets(*rounds):
    """Buckets [1, 1, R, L] from one list per round."""
    return torch.tensor(rounds)[None, None]


def seen(counts):
    """The keys that each query of the only head sees, one string of positions per query; a copy is listed again."""
    assert counts.shape[:2] == (1, 1)
    return ["".join(str(j) * n for j, n in enumerate(row)) for row in counts[0, 0].tolist()]


def shared_seen(config, *rounds, is_causal=False, padded=()):
    length = len(rounds[0])
    mask = torch.tensor([[j in padded for j in range(length)]]) if padded else None
    counts = reference.candidates(
        config, as_buckets(*rounds), length, length, shared=True, is_causal=is_causal, key_padding_mask=mask
    )
    return seen(counts)


# hashing and sorting


def test_lsh_hash_is_the_argmax_of_the_projections_and_their_negatives():
    x = torch.tensor([[3.0, 1.0], [-3.0, 1.0], [1.0, -4.0], [2.0, 2.0], [0.0, 0.0]])[None, None]
    rotations = torch.eye(2)[None, :, None, :]  # y = x: [y, -y] = (x0, x1, -x0, -x1)
    # the tie (2, 2) goes to the lowest index, and so does the zero vector
    assert reference.lsh_hash(x, rotations, 4).tolist() == [[[[0, 2, 3, 0, 0]]]]
    assert reference.lsh_hash(x, rotations, 4).dtype == torch.int32


def test_lsh_hash_combines_factors_lowest_first():
    x = torch.tensor([[1.0, 2.0, -5.0], [-1.0, -9.0, 5.0], [8.0, -2.0, -5.0]])[None, None]
    rotations = torch.eye(3)[None, :, None, :]
    # the first factor hashes (x0, x1), the second x2, where 0 means positive
    assert reference.lsh_hash(x, rotations, (4, 2)).tolist() == [[[[1 + 4 * 1, 3 + 4 * 0, 0 + 4 * 1]]]]


def test_lsh_hash_shares_the_rotations_of_a_group_of_heads():
    x = f64(2, 4, 7, 3)
    rotations = f64(2, 3, 2, 4, seed=1)
    got = reference.lsh_hash(x, rotations, 8)  # [2, 4, 2, 7]
    for h in range(4):
        for r in range(2):
            y = x[:, h] @ rotations[h // 2, :, r]
            assert torch.equal(got[:, h, r], torch.cat([y, -y], -1).argmax(-1).int())
    assert torch.equal(reference.lsh_hash(x, rotations[:1], 8)[:, 3], reference.lsh_hash(x[:, 3:], rotations[:1], 8)[:, 0])


def test_lsh_hash_keeps_nan_rows_in_range():
    x = torch.full((1, 1, 1, 3), math.nan)
    assert 0 <= reference.lsh_hash(x, f64(1, 3, 1, 2), (2, 2)).item() < 4


def test_bucket_sort_is_stable_clamps_and_puts_padding_last():
    buckets = as_buckets([1, 0, 99, 0, 1, -7, 3])
    assert reference.bucket_sort(buckets, 4).tolist() == [[[[1, 3, 5, 0, 4, 2, 6]]]]
    mask = torch.tensor([[False, True, False, False, True, False, False]])
    order = reference.bucket_sort(buckets, (2, 2), mask)
    assert order.tolist() == [[[[3, 5, 0, 2, 6, 1, 4]]]]
    assert order.dtype == torch.int32


# candidates, by hand. Order of the keys in all of these: 0 2 4 5 7 | 1 3 6


@pytest.mark.parametrize(
    ("fields", "is_causal", "wanted"),
    [
        ({"span": "window", "window": 2}, True, ["", "", "0", "1", "02", "24", "13", "45"]),
        ({"span": "window", "window": 2}, False, ["24", "36", "045", "16", "0257", "247", "13", "45"]),
        ({"span": "bucket"}, True, ["", "", "0", "1", "02", "024", "13", "0245"]),
        ({"span": "bucket"}, False, ["2457", "36", "0457", "16", "0257", "0247", "13", "0245"]),
        # chunks of 3 slots: 0 2 4, 5 7 1, 3 6
        (
            {"span": "chunk", "within_bucket": False},
            False,
            ["24", "02457", "04", "1567", "02", "01247", "1357", "01245"],
        ),
        ({"span": "chunk", "within_bucket": False}, True, ["", "0", "0", "1", "02", "0124", "135", "01245"]),
        ({"span": "chunk", "within_bucket": True}, False, ["24", "", "04", "16", "02", "0247", "13", "0245"]),
        ({"span": "chunk", "within_bucket": True}, True, ["", "", "0", "1", "02", "024", "13", "0245"]),
        (
            {"span": "chunk", "within_bucket": False, "chunks_before": 0, "chunks_after": 1},
            False,
            ["12457", "3567", "01457", "6", "01257", "1367", "3", "1356"],
        ),
    ],
)
def test_candidates_shared(fields, is_causal, wanted):
    config = LSHConfig(n_hashes=1, n_buckets=2, chunk_length=3, **fields)
    assert shared_seen(config, BUCKETS, is_causal=is_causal) == wanted


def test_candidates_window_defaults_to_chunk_length():
    config = LSHConfig(n_hashes=1, n_buckets=2, chunk_length=2)
    assert shared_seen(config, BUCKETS, is_causal=True) == ["", "", "0", "1", "02", "24", "13", "45"]


def test_candidates_padding_is_sorted_into_a_bucket_of_its_own():
    # 2 and 7 are padding: 0 4 5 | 1 3 6 | 2 7
    window = LSHConfig(n_hashes=1, n_buckets=2, window=2)
    assert shared_seen(window, BUCKETS, padded=(2, 7)) == ["45", "36", "", "16", "05", "04", "13", ""]
    # chunks 0 4 5, 1 3 6, 2 7: with attention across buckets a padded query sees real keys
    chunk = LSHConfig(n_hashes=1, n_buckets=2, chunk_length=3, span="chunk", within_bucket=False, dedupe=False, chunks_after=1)
    assert shared_seen(chunk, BUCKETS, padded=(2, 7)) == [
        "13456", "03456", "136", "01456", "01356", "01346", "01345", "136"
    ]  # fmt: skip


def test_candidates_buckets_out_of_range_are_clamped():
    config = LSHConfig(n_hashes=1, n_buckets=2, span="bucket")
    wild = [-9, 1, 0, 2, -1, 0, 2**31 - 1, 0]
    assert shared_seen(config, wild) == shared_seen(config, BUCKETS)
    mask = {"padded": (6,)}
    assert shared_seen(config, wild, **mask) == shared_seen(config, BUCKETS, **mask)
    assert separate_seen(config, wild, wild) == separate_seen(config, BUCKETS, BUCKETS)


def test_candidates_count_rounds_and_dedupe_counts_them_once():
    # window 1, not causal: round 0 has the neighbours of 0 2 | 1 3, round 1 those of 0 1 2 3
    rounds = [0, 1, 0, 1], [0, 0, 0, 0]
    plain = LSHConfig(n_hashes=2, n_buckets=2, window=1, dedupe=False)
    assert shared_seen(plain, *rounds) == ["12", "023", "013", "12"]
    assert shared_seen(plain, rounds[1], rounds[1]) == ["11", "0022", "1133", "22"]
    assert shared_seen(LSHConfig(n_hashes=2, n_buckets=2, window=1), rounds[1], rounds[1]) == ["1", "02", "13", "2"]


def test_candidates_local_round_is_one_more_round_in_identity_order():
    fields = {"n_hashes": 1, "n_buckets": 2, "window": 2, "local_window": 1}
    # hashed: ["24", "36", "045", "16", "0257", "247", "13", "45"]
    assert shared_seen(LSHConfig(**fields), BUCKETS) == [
        "124", "0236", "01345", "1246", "02357", "2467", "1357", "456"
    ]  # fmt: skip
    assert shared_seen(LSHConfig(dedupe=False, **fields), BUCKETS) == [
        "124", "0236", "01345", "1246", "023557", "24467", "1357", "456"
    ]  # fmt: skip
    assert shared_seen(LSHConfig(**fields), BUCKETS, is_causal=True) == ["", "0", "01", "12", "023", "24", "135", "456"]
    # padded positions stay in place there, as queries too, and are no keys: 3 does not get 1 instead of 2
    assert shared_seen(LSHConfig(**fields), BUCKETS, padded=(2, 7)) == [
        "145", "036", "13", "146", "035", "046", "135", "6"
    ]  # fmt: skip


def test_candidates_wrap_runs_over_the_rounds_and_a_short_last_chunk():
    # chunks of 2: round 0 has 01, 23, 4 and round 1 (order 2 3 4 0 1) has 23, 40, 1: a cycle of six
    config = LSHConfig.trax(n_hashes=2, n_buckets=2, chunk_length=2)
    rounds = [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]
    assert shared_seen(config, *rounds) == ["11234", "004", "01334", "01224", "02233"]
    assert shared_seen(config, *rounds, is_causal=True) == ["", "00", "01", "0122", "02233"]
    # the local round stays out of the cycle
    local = LSHConfig.trax(n_hashes=2, n_buckets=2, chunk_length=2, local_window=1)
    assert shared_seen(local, *rounds) == ["111234", "00024", "0113334", "0122244", "022333"]


def test_candidates_wrap_sees_each_chunk_at_most_once():
    fields = {"n_hashes": 1, "n_buckets": 2, "chunk_length": 2, "chunks_before": 1, "chunks_after": 1}
    # two chunks: the one before is the one after
    assert shared_seen(LSHConfig.trax(**fields), [0, 0, 0, 0]) == ["123", "023", "013", "012"]
    one = LSHConfig.trax(n_hashes=1, n_buckets=2, chunk_length=4, chunks_before=5)
    assert shared_seen(one, [0, 0, 0]) == ["12", "02", "01"]


def separate_seen(config, q_buckets, k_buckets, **options):
    q_len, k_len = len(q_buckets), len(k_buckets)
    pair = as_buckets(q_buckets), as_buckets(k_buckets)
    return seen(reference.candidates(config, pair, q_len, k_len, shared=False, **options))


def test_candidates_separate_keys_of_another_length():
    # L = 3, S = 5; keys sorted: 0 1 3 4 | 2. e_i counts the keys with 3j <= 5i: j <= 0, 1, 3
    keys = [0, 0, 1, 0, 0]
    window = LSHConfig(n_hashes=1, n_buckets=4, window=1)
    # bucket 0: e = 1, 2, 3 -> slots [e - 2, e + 1) = 0..1, 0..2, 1..3
    assert separate_seen(window, [0, 0, 0], keys) == ["01", "013", "134"]
    # bucket 1 (slot 4): e = 4, 4, 5 -> slots 2..4, 2..4, 3..5, but only those of the bucket; bucket 2 is empty
    assert separate_seen(window, [1, 1, 1], keys) == ["2", "2", "2"]
    assert separate_seen(window, [2, 0, 3], keys) == ["", "013", ""]
    bucket = LSHConfig(n_hashes=1, n_buckets=4, span="bucket")
    assert separate_seen(bucket, [0, 1, 2], keys) == ["0134", "2", ""]
    # key 1 is padding: 0 3 4 | 2 | 1 and e = 1, 1, 2
    mask = torch.tensor([[False, True, False, False, False]])
    assert separate_seen(window, [0, 0, 0], keys, key_padding_mask=mask) == ["03", "03", "034"]


def test_candidates_separate_keys_of_the_same_length():
    q_buckets, k_buckets = [0, 0, 1, 0, 1], [1, 0, 0, 0, 1]  # keys sorted: 1 2 3 | 0 4
    window = LSHConfig(n_hashes=1, n_buckets=2, window=1)
    # e = 0, 1, 4, 3, 5
    assert separate_seen(window, q_buckets, k_buckets, is_causal=True) == ["", "1", "0", "23", "04"]
    assert separate_seen(window, q_buckets, k_buckets) == ["1", "12", "04", "23", "04"]
    bucket = LSHConfig(n_hashes=1, n_buckets=2, span="bucket")
    assert separate_seen(bucket, q_buckets, k_buckets, is_causal=True) == ["", "1", "0", "123", "04"]
    # chunks of 2: queries 01 32 4, wait for slots: 0 1 3 | 2 4 -> 01, 32, 4; keys 12, 30, 4
    chunk = LSHConfig(n_hashes=1, n_buckets=2, chunk_length=2, span="chunk", within_bucket=False)
    assert separate_seen(chunk, q_buckets, k_buckets) == ["12", "12", "0123", "0123", "034"]
    paper = LSHConfig.paper(n_hashes=1, n_buckets=2, chunk_length=2)
    assert separate_seen(paper, q_buckets, k_buckets) == ["12", "12", "0", "123", "04"]
    wrap = LSHConfig.trax(n_hashes=1, n_buckets=2, chunk_length=2)
    assert separate_seen(wrap, q_buckets, k_buckets) == ["124", "124", "0123", "0123", "034"]
    local = LSHConfig(n_hashes=1, n_buckets=2, window=1, local_window=1)
    assert separate_seen(local, q_buckets, k_buckets, is_causal=True) == ["0", "01", "012", "23", "034"]


# candidates, against loops over slots


def orders_by_hand(buckets, padded, n_buckets):
    """Slots in sorted order, as (bucket, position), from one round's list; padding in bucket n_buckets."""
    return sorted((n_buckets if j in padded else b, j) for j, b in enumerate(buckets))


def counts_by_hand(config, q_rounds, k_rounds, padded, is_causal, shared):
    """N_ij of one head by walking over the slots of each query's interval."""
    n_buckets, C, W = config.n_buckets, config.chunk_length, config.window_length
    L, S, R = len(q_rounds[0]), len(k_rounds[0]), len(q_rounds)
    N = [[0] * S for _ in range(L)]
    k_orders = [orders_by_hand(k, padded, n_buckets) for k in k_rounds]
    q_orders = [orders_by_hand(q, padded if shared else (), n_buckets) for q in q_rounds]
    n = -(-S // C)

    def visit(i, own_bucket, order, slots):
        for slot in slots:
            if 0 <= slot < S:
                bucket, j = order[slot]
                if own_bucket is not None and bucket != own_bucket:
                    continue
                if j in padded or (is_causal and j > i) or (shared and i == j):
                    continue
                N[i][j] += 1

    for r in range(R):
        for slot, (bucket, i) in enumerate(q_orders[r]):
            if config.span == "bucket":
                visit(i, bucket, k_orders[r], range(S))
            elif config.span == "window" and shared:
                visit(i, bucket, k_orders[r], range(slot - W, slot + 1 + (0 if is_causal else W)))
            elif config.span == "window":
                start = sum(b < bucket for b, _ in k_orders[r])
                e = start + sum(b == bucket and j * L <= i * S for b, j in k_orders[r])
                visit(i, bucket, k_orders[r], range(e - W - 1, e + (0 if is_causal else W)))
            elif config.wrap:
                g = r * n + slot // C
                near = {(g + d) % (R * n) for d in range(-config.chunks_before, config.chunks_after + 1)}
                for chunk in near:
                    visit(i, None, k_orders[chunk // n], range(chunk % n * C, min((chunk % n + 1) * C, S)))
            else:
                c = slot // C
                own_bucket = bucket if config.within_bucket else None
                slots = range((c - config.chunks_before) * C, (c + 1 + config.chunks_after) * C)
                visit(i, own_bucket, k_orders[r], slots)
    if config.local_window:
        w = config.local_window
        for i in range(L):
            visit(i, None, [(0, j) for j in range(S)], range(i - w, i + w + 1))
    return [[min(x, 1) if config.dedupe else x for x in row] for row in N]


SPANS = {
    "window": {"span": "window", "window": 3},
    "window counts local": {"span": "window", "window": 2, "dedupe": False, "local_window": 2},
    "bucket": {"span": "bucket"},
    "bucket local": {"span": "bucket", "local_window": 1},
    "paper": {"span": "chunk", "chunks_after": 1},
    "chunk across": {"span": "chunk", "within_bucket": False, "dedupe": False, "chunks_before": 2},
    "chunk across dedupe": {"span": "chunk", "within_bucket": False, "chunks_before": 0, "chunks_after": 2},
    "trax": {"span": "chunk", "within_bucket": False, "dedupe": False, "wrap": True},
    "trax local": {
        "span": "chunk", "within_bucket": False, "dedupe": False, "wrap": True, "chunks_before": 2, "chunks_after": 1,
        "local_window": 2,
    },
}  # fmt: skip


# L, S, R, C, N
WALKS = [(13, 13, 2, 4, 4), (12, 12, 3, 4, 2), (3, 3, 2, 4, 2), (1, 1, 1, 4, 2), (7, 11, 2, 4, 4)]


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
def test_candidates_equal_a_walk_over_slots(span, shared):
    rng = random.Random(f"{span} {shared}")
    for L, S, R, C, n_buckets in WALKS:
        for is_causal in (False, True):
            config = LSHConfig(n_hashes=R, n_buckets=n_buckets, chunk_length=C, **SPANS[span])
            if L != S and (shared or is_causal or config.local_window or config.span == "chunk"):
                continue
            H, Hkv = (2, 2) if shared else (4, 2)
            for n_padded in (0, rng.randint(1, S), S):
                padded = set(rng.sample(range(S), n_padded))
                q = torch.tensor(rng.choices(range(n_buckets), k=H * R * L)).view(1, H, R, L)
                k = torch.tensor(rng.choices(range(n_buckets), k=Hkv * R * S)).view(1, Hkv, R, S)
                mask = torch.tensor([[j in padded for j in range(S)]])
                counts = reference.candidates(
                    config, k if shared else (q, k), L, S, shared=shared, is_causal=is_causal, key_padding_mask=mask
                )
                q = k if shared else q
                for h in range(H):
                    k_rounds = k[0, h // (H // Hkv)].tolist()
                    wanted = counts_by_hand(config, q[0, h].tolist(), k_rounds, padded, is_causal, shared)
                    assert counts[0, h].tolist() == wanted


# outputs and lse, against loops


def softmax_by_hand(q, k, v, N, scale):
    """One head: out and lse of rows that have a target, with math.exp."""
    out, lse = [], []
    for i, row in enumerate(N):
        s = [scale * sum(a * b for a, b in zip(q[i], key, strict=True)) for key in k]
        weights = [n * math.exp(x) for n, x in zip(row, s, strict=True)]
        lse.append(math.log(sum(weights)))
        out.append([sum(w * x for w, x in zip(weights, column, strict=True)) / sum(weights) for column in zip(*v, strict=True)])
    return out, lse


@pytest.mark.parametrize("dedupe", [True, False])
def test_lsh_attention_shared_weighs_copies(dedupe):
    buckets = as_buckets(BUCKETS, BUCKETS[::-1], [0] * 8)
    config = LSHConfig(n_hashes=3, n_buckets=2, window=2, dedupe=dedupe, norm_eps=0.25)
    q, v = f64(1, 1, 8, 3), f64(1, 1, 8, 5, seed=1)
    out, lse = reference.lsh_attention(q, None, v, config=config, buckets=buckets, scale=1.5)
    rounds = buckets[0, 0].tolist()
    N = counts_by_hand(config, rounds, rounds, (), False, True)
    assert dedupe or max(map(max, N)) > 1
    rows = q[0, 0].tolist()
    keys = [[a / math.sqrt(sum(b * b for b in row) + 3 * 0.25) for a in row] for row in rows]
    wanted_out, wanted_lse = softmax_by_hand(rows, keys, v[0, 0].tolist(), N, 1.5)
    torch.testing.assert_close(out[0, 0], torch.tensor(wanted_out, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(lse[0, 0], torch.tensor(wanted_lse, dtype=torch.float64), rtol=0, atol=1e-14)


def test_lsh_attention_identical_rounds_raise_lse_by_their_logarithm():
    q, v = f64(1, 1, 8, 4), f64(1, 1, 8, 4, seed=1)
    results = {}
    for n_hashes in (1, 3):
        config = LSHConfig(n_hashes=n_hashes, n_buckets=2, window=2, dedupe=False)
        results[n_hashes] = reference.lsh_attention(q, None, v, config=config, buckets=as_buckets(*[BUCKETS] * n_hashes))
    torch.testing.assert_close(results[3][0], results[1][0], rtol=0, atol=1e-14)
    torch.testing.assert_close(results[3][1], results[1][1] + math.log(3), rtol=0, atol=1e-14)


def test_lsh_attention_separate_keys_with_grouped_heads():
    H, Hkv, L, S, D = 4, 2, 3, 6, 2
    config = LSHConfig(n_hashes=2, n_buckets=2, span="bucket")
    q, k, v = f64(1, H, L, D), f64(1, Hkv, S, D, seed=1), f64(1, Hkv, S, 3, seed=2)
    q_buckets = torch.zeros(1, H, 2, L, dtype=torch.int32)
    q_buckets[:, :, 1, 0] = 1
    k_buckets = torch.tensor([[0, 1, 1, 0, 0, 1], [0, 0, 1, 0, 1, 1]]).repeat(1, Hkv, 1, 1)
    k_buckets[:, 1] = 1 - k_buckets[:, 0]
    out, lse = reference.lsh_attention(q, k, v, config=config, buckets=(q_buckets, k_buckets))
    assert out.shape == (1, H, L, 3) and lse.shape == (1, H, L)
    for h in range(H):
        g = h // 2
        N = counts_by_hand(config, q_buckets[0, h].tolist(), k_buckets[0, g].tolist(), (), False, False)
        wanted = softmax_by_hand(q[0, h].tolist(), k[0, g].tolist(), v[0, g].tolist(), N, D**-0.5)
        torch.testing.assert_close(out[0, h], torch.tensor(wanted[0], dtype=torch.float64), rtol=0, atol=1e-14)
        torch.testing.assert_close(lse[0, h], torch.tensor(wanted[1], dtype=torch.float64), rtol=0, atol=1e-14)


def test_lsh_attention_with_one_round_of_whole_buckets_is_masked_softmax():
    """The paper's equation: P_i = the earlier positions of i's bucket, or i itself where there are none."""
    q, v = f64(2, 3, 17, 4), f64(2, 3, 17, 4, seed=1)
    buckets = torch.randint(0, 4, (2, 3, 1, 17), generator=torch.Generator().manual_seed(2))
    config = LSHConfig(n_hashes=1, n_buckets=4, span="bucket")
    out, _ = reference.lsh_attention(q, None, v, config=config, is_causal=True, buckets=buckets)
    b = buckets[:, :, 0]
    logits = torch.einsum("bhid,bhjd->bhij", q, F.normalize(q, dim=-1))
    logits[..., range(17), range(17)] -= 1e5
    hidden = (b[..., :, None] != b[..., None, :]) | torch.ones(17, 17, dtype=torch.bool).triu(1)
    wanted = logits.masked_fill(hidden, -math.inf).softmax(-1) @ v
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-14)


def test_lsh_attention_from_rotations_equals_that_from_buckets():
    q, k, v = f64(2, 4, 9, 6), f64(2, 2, 9, 6, seed=1), f64(2, 2, 9, 3, seed=2)
    rotations = f64(2, 6, 2, 3, seed=3)
    config = LSHConfig(n_hashes=2, n_buckets=(2, 4), window=3)
    pair = reference.lsh_hash(q, rotations, (2, 4)), reference.lsh_hash(k, rotations, (2, 4))
    got = reference.lsh_attention(q, k, v, config=config, rotations=rotations)
    assert torch.equal(got[0], reference.lsh_attention(q, k, v, config=config, buckets=pair)[0])
    shared = reference.lsh_attention(k, None, v, config=config, rotations=rotations)
    assert torch.equal(shared[0], reference.lsh_attention(k, None, v, config=config, buckets=pair[1])[0])
    # n_buckets=None follows the number of keys: 2 * 16 / 4 = 8, one factor
    free = LSHConfig(n_hashes=2, chunk_length=4)
    q, v, rotations = f64(1, 1, 16, 6), f64(1, 1, 16, 3), f64(1, 6, 2, 4)
    fixed = LSHConfig(n_hashes=2, chunk_length=4, n_buckets=8)
    assert torch.equal(
        reference.lsh_attention(q, None, v, config=free, rotations=rotations)[0],
        reference.lsh_attention(q, None, v, config=fixed, rotations=rotations)[0],
    )


# rows without another key


def test_lsh_attention_shared_token_alone_attends_itself():
    q = torch.tensor([[3.0, 4.0], [0.6, 0.8], [1.0, 0.0]], dtype=torch.float64)[None, None].requires_grad_()
    v = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)[None, None].requires_grad_()
    config = LSHConfig(n_hashes=2, n_buckets=2, window=1)
    buckets = as_buckets([0, 0, 1], [0, 0, 1])
    out, lse = reference.lsh_attention(q, None, v, config=config, is_causal=True, buckets=buckets)
    # 0 and 2 are alone; 1 sees only 0, s_10 = (0.6, 0.8).(0.6, 0.8) = 1
    assert out.flatten().tolist() == [1.0, 1.0, 4.0]
    torch.testing.assert_close(lse.flatten(), torch.tensor([5 - 1e5, 1.0, 1 - 1e5], dtype=torch.float64), rtol=0, atol=1e-10)
    d_out = torch.autograd.grad(out[0, 0, 2, 0], (q, v), retain_graph=True)
    assert d_out[0].count_nonzero() == 0 and d_out[1].flatten().tolist() == [0, 0, 1]
    # lse_0 = ||q_0|| - 1e5 has the gradient q_0 / ||q_0||
    (d_lse,) = torch.autograd.grad(lse[0, 0, 0], q)
    wanted = torch.tensor([[0.6, 0.8], [0, 0], [0, 0]], dtype=torch.float64)
    torch.testing.assert_close(d_lse[0, 0], wanted, rtol=0, atol=1e-14)


def test_lsh_attention_shared_self_weighs_nothing_beside_another_key():
    q, v = f64(1, 1, 3, 2), f64(1, 1, 3, 2, seed=1)
    config = LSHConfig(n_hashes=1, n_buckets=2, span="bucket")
    one = as_buckets([0, 0, 0])
    out, _ = reference.lsh_attention(q, None, v, config=config, is_causal=True, buckets=one)
    assert torch.equal(out[0, 0, 1], v[0, 0, 0])
    # key 0 is padding: 1 has no other key left, and 0 (a query too) has no target at all
    mask = torch.tensor([[True, False, False]])
    out, lse = reference.lsh_attention(q, None, v, config=config, is_causal=True, buckets=one, key_padding_mask=mask)
    assert torch.equal(out[0, 0], torch.stack([torch.zeros(2, dtype=torch.float64), v[0, 0, 1], v[0, 0, 1]]))
    assert lse[0, 0, 0] == -math.inf and lse[0, 0, 1] < -9e4 and lse[0, 0, 2].abs() < 10


def test_lsh_attention_separate_token_without_target_attends_its_own_key():
    q, k, v = (f64(1, 1, 3, 2, seed=s).requires_grad_() for s in range(3))
    config = LSHConfig(n_hashes=1, n_buckets=4, span="bucket")
    pair = as_buckets([0, 1, 2]), as_buckets([2, 2, 1])
    out, lse = reference.lsh_attention(q, k, v, config=config, is_causal=True, buckets=pair, scale=0.5)
    # query 2 sees keys 0 and 1 of its bucket and not its own; queries 0 and 1 see nothing
    assert torch.equal(out[0, 0, :2], v[0, 0, :2])
    own = 0.5 * (q * k).sum(-1)
    torch.testing.assert_close(lse[0, 0, :2], own[0, 0, :2], rtol=0, atol=1e-14)
    weights = (0.5 * q[0, 0, 2] @ k[0, 0, :2].T).softmax(-1)
    torch.testing.assert_close(out[0, 0, 2], weights @ v[0, 0, :2], rtol=0, atol=1e-14)
    grads = torch.autograd.grad(lse[0, 0, 1], (q, k), retain_graph=True)
    torch.testing.assert_close(grads[0][0, 0, 1], 0.5 * k[0, 0, 1])
    torch.testing.assert_close(grads[1][0, 0, 1], 0.5 * q[0, 0, 1])
    assert not any(g.any() for g in torch.autograd.grad(out[0, 0, :2].sum(), (q, k)))


def check_no_target(out, lse, inputs):
    assert not out.any() and (lse == -math.inf).all()
    grads = torch.autograd.grad(out.sum() + lse.masked_fill(lse == -math.inf, 0).sum(), inputs)
    assert not any(g.any() for g in grads)  # NaN is "any" too


def test_rows_without_a_target_are_zero_with_zero_gradients():
    q, k, v = (f64(1, 1, 3, 2, seed=s).requires_grad_() for s in range(3))
    everything = torch.ones(1, 3, dtype=torch.bool)
    config = LSHConfig(n_hashes=1, n_buckets=4, span="bucket", local_window=1)
    zeros = as_buckets([0, 0, 0])
    # all padded, shared and separate
    check_no_target(*reference.lsh_attention(q, None, v, config=config, buckets=zeros, key_padding_mask=everything), (q, v))
    check_no_target(
        *reference.lsh_attention(q, k, v, config=config, buckets=(zeros, zeros), key_padding_mask=everything), (q, k, v)
    )
    check_no_target(*reference.local_attention(q, k, v, window=1, key_padding_mask=everything), (q, k, v))
    # no key in the bucket, and L != S: there is no own key
    config = LSHConfig(n_hashes=1, n_buckets=4)
    check_no_target(
        *reference.lsh_attention(q[:, :, :2], k, v, config=config, buckets=(as_buckets([0, 1]), as_buckets([2, 2, 3]))),
        (q, k, v),
    )


def test_a_padded_query_without_target_gets_no_fallback_key():
    q, k, v = (f64(1, 1, 3, 2, seed=s) for s in range(3))
    pair = as_buckets([0, 1, 2]), as_buckets([3, 3, 3])
    mask = torch.tensor([[False, True, False]])
    config = LSHConfig(n_hashes=1, n_buckets=4)
    out, lse = reference.lsh_attention(q, k, v, config=config, buckets=pair, key_padding_mask=mask)
    assert torch.equal(out[0, 0, ::2], v[0, 0, ::2]) and not out[0, 0, 1].any()
    assert lse.isfinite().flatten().tolist() == [True, False, True]


# normalisation, gradients, dtypes, padding


@pytest.mark.parametrize("norm_eps", [0.0, 1e-2])
def test_zero_vectors_normalise_to_zero_without_gradient(norm_eps):
    q = f64(1, 1, 3, 2)
    q[0, 0, 1] = 0
    q.requires_grad_()
    v = f64(1, 1, 3, 2, seed=1)
    config = LSHConfig(n_hashes=1, n_buckets=2, span="bucket", norm_eps=norm_eps)
    out, lse = reference.lsh_attention(q, None, v, config=config, buckets=as_buckets([0, 0, 0]))
    # query 0 has key 1 with logit 0, query 1 has all its logits 0
    key = q / (q.square().sum(-1, keepdim=True) + 2 * norm_eps + (q == 0).all(-1, keepdim=True)).sqrt()
    s_02 = q[0, 0, 0] @ key[0, 0, 2]
    torch.testing.assert_close(lse[0, 0, 0], torch.log(1 + s_02.exp()), rtol=0, atol=1e-14)
    torch.testing.assert_close(out[0, 0, 1], v[0, 0, ::2].mean(0), rtol=0, atol=1e-14)
    # as a query the zero vector has a gradient; as a key (in lse_0, where it counts with logit 0) it has none
    (grad,) = torch.autograd.grad(lse[0, 0, 0], q, retain_graph=True)
    assert not grad[0, 0, 1].any() and grad.isfinite().all()
    (grad,) = torch.autograd.grad(lse[0, 0, 1], q)
    torch.testing.assert_close(grad[0, 0, 1], key[0, 0, ::2].mean(0).detach(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
def test_gradients_pass_gradcheck_through_out_and_lse(shared):
    config = LSHConfig(n_hashes=2, n_buckets=2, window=2, dedupe=False, norm_eps=1e-3)
    buckets = as_buckets([0, 1, 0, 1, 0], [1, 1, 0, 0, 0])
    mask = torch.tensor([[False, True, False, False, False]])
    q, k, v = (f64(1, 1, 5, 2, seed=s).requires_grad_() for s in range(3))

    def attend(q, v, k=None):
        out, lse = reference.lsh_attention(
            q, k, v, config=config, is_causal=True, key_padding_mask=mask, dropout_p=0.3, seed=torch.tensor(5),
            buckets=buckets if k is None else (buckets, buckets.flip(-1)),
        )  # fmt: skip
        return out, lse.masked_fill(lse == -math.inf, 0).clamp(min=-1e4)

    assert torch.autograd.gradcheck(attend, (q, v) if shared else (q, v, k))


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_padded_values_reach_no_output_and_no_gradient(span, shared, poison):
    config = LSHConfig(n_hashes=2, n_buckets=4, chunk_length=4, **SPANS[span])
    mask = torch.zeros(2, 13, dtype=torch.bool)
    mask[1, 3:9] = True
    buckets = torch.randint(0, 4, (2, 2, 2, 13), generator=torch.Generator().manual_seed(0))
    results = []
    for fill in (0.0, poison):
        q, k, v = (f64(2, 2, 13, 3, seed=s) for s in range(3))
        for x in (q if shared else k, v):
            x[1, :, 3:9] = fill
        inputs = [x.requires_grad_() for x in ((q, v) if shared else (q, k, v))]
        key, ids = (None, buckets) if shared else (k, (buckets, buckets))
        out, lse = reference.lsh_attention(q, key, v, config=config, key_padding_mask=mask, buckets=ids)
        grads = torch.autograd.grad(out.square().sum() + lse.masked_fill(lse == -math.inf, 0).sum(), inputs)
        results.append((out, lse, *grads))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_dtypes_keep_the_softmax_in_fp32(dtype):
    q, k, v = (f64(2, 2, 33, 8, seed=s).to(dtype) for s in range(3))
    config = LSHConfig(n_hashes=2, n_buckets=2, window=8)
    buckets = torch.randint(0, 2, (2, 2, 2, 33), generator=torch.Generator().manual_seed(0))
    for key, ids in ((None, buckets), (k, (buckets, buckets))):
        truth, truth_lse = reference.lsh_attention(q, key, v, config=config, buckets=ids)
        out, lse = reference.lsh_attention(q, key, v, config=config, buckets=ids, dtype=dtype)
        assert out.dtype == dtype and lse.dtype == torch.float32
        assert truth.dtype == truth_lse.dtype == torch.float64
        eps = torch.finfo(dtype).eps
        assert 0 < (out.double() - truth).abs().max() < 8 * eps * truth.abs().max()
        assert (lse.double() - truth_lse).abs().max() < 8 * eps * truth_lse.abs().max()


# dropout

# Random123, kat_vectors: philox4x32 with 7 rounds, counter and key all zero, all one bits, and digits of pi
PHILOX_7 = [
    (0x0, (0x0, 0x0, 0x0, 0x0), "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (0xFFFFFFFF_FFFFFFFF, (0xFFFFFFFF,) * 4, "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (0x299F31D0_A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), "4dfccaba 190a87f0 c47362ba b6b5242a"),
]


@pytest.mark.parametrize(("seed", "counter", "wanted"), PHILOX_7)
def test_philox_gives_the_published_numbers(seed, counter, wanted):
    words = reference.philox4x32(seed, [np.uint64(c) for c in counter], n_rounds=7)
    assert " ".join(f"{int(w):08x}" for w in words) == wanted


@triton.jit
def _philox_words_kernel(seed_ptr, words_ptr, H, L, S, BLOCK: tl.constexpr):
    """One program writes word 0 of every (i, j) of one (b, h)."""
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    words, _, _, _ = tl.philox(tl.load(seed_ptr), j, i, h, b, n_rounds=7)  # [BLOCK, BLOCK]
    offs = ((b * H + h) * L + i) * S + j
    tl.store(words_ptr + offs, words.to(tl.int32, bitcast=True), mask=(i < L) & (j < S))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 123_456_789_012_345])
def test_dropout_mask_is_the_one_of_tritons_philox(seed):
    B, H, L, S, p = 2, 3, 5, 7, 0.4
    device = "cpu" if triton.knobs.runtime.interpret else "cuda"
    words = torch.empty(B, H, L, S, dtype=torch.int32, device=device)
    _philox_words_kernel[(B * H,)](torch.tensor(seed, device=device), words, H, L, S, BLOCK=8)
    words = words.cpu().numpy().view(np.uint32)
    wanted = torch.from_numpy(words >= round(p * 2**32))
    assert torch.equal(reference.dropout_mask(torch.tensor([seed]), B, H, L, S, p), wanted)


def test_dropout_mask_compares_with_the_rounded_threshold():
    word = int(reference.philox4x32(3, [np.uint64(0)] * 4, n_rounds=7)[0])
    assert reference.dropout_mask(torch.tensor(3), 1, 1, 1, 1, word / 2**32)
    assert not reference.dropout_mask(torch.tensor(3), 1, 1, 1, 1, (word + 1) / 2**32)


def test_dropout_mask_keeps_the_right_share():
    seed = torch.tensor(7)
    assert reference.dropout_mask(seed, 1, 1, 2, 3, 0.0).all()
    assert not reference.dropout_mask(seed, 1, 1, 2, 3, 1.0).any()
    keep = reference.dropout_mask(seed, 2, 2, 100, 100, 0.3)
    assert keep.shape == (2, 2, 100, 100) and keep.dtype == torch.bool
    # 40,000 draws: the standard deviation of the mean is 0.0023
    assert abs(keep.double().mean().item() - 0.7) < 0.01
    # a longer call has the same mask where it overlaps
    assert torch.equal(keep[:1, :1, :5, :9], reference.dropout_mask(seed, 1, 1, 5, 9, 0.3))
    assert not torch.equal(keep, reference.dropout_mask(seed + 1, 2, 2, 100, 100, 0.3))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
def test_dropout_scales_kept_probabilities_and_leaves_lse_alone(shared):
    q, k = f64(2, 2, 8, 4), None if shared else f64(2, 2, 8, 4, seed=1)
    eye = torch.eye(8, dtype=torch.float64).expand(2, 2, 8, 8)  # out is the matrix of weights
    buckets = as_buckets(BUCKETS, [1, 1, 1, 1, 0, 0, 0, 0]).repeat(2, 2, 1, 1)
    config = LSHConfig(n_hashes=2, n_buckets=2, window=3, dedupe=False)
    ids = buckets if shared else (buckets, buckets.flip(-1))
    options = {"config": config, "is_causal": True, "buckets": ids, "seed": torch.tensor(3)}
    probs, lse = reference.lsh_attention(q, k, eye, **options)
    assert (probs[:, :, 0, 0] == 1).all()
    dropped, dropped_lse = reference.lsh_attention(q, k, eye, dropout_p=0.5, **options)
    keep = reference.dropout_mask(options["seed"], 2, 2, 8, 8, 0.5)
    torch.testing.assert_close(dropped, probs * keep * 2, rtol=0, atol=1e-14)
    assert torch.equal(dropped_lse, lse)
    # the row that has only itself is dropped in some heads and doubled in the others
    assert set(dropped[:, :, 0, 0].flatten().tolist()) == {0.0, 2.0}
    nothing, lse_too = reference.lsh_attention(q, k, eye, dropout_p=1.0, **options)
    assert not nothing.any() and torch.equal(lse_too, lse)


# local attention


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"window": 1}, ["01", "012", "123", "234", "34"]),
        ({"window": 1, "is_causal": True}, ["0", "01", "12", "23", "34"]),
        ({"chunk_length": 2}, ["01", "01", "0123", "0123", "234"]),
        ({"chunk_length": 2, "is_causal": True}, ["0", "01", "012", "0123", "234"]),
        ({"chunk_length": 2, "chunks_before": 0, "chunks_after": 1}, ["0123", "0123", "234", "234", "4"]),
        ({"chunk_length": 2, "wrap": True}, ["014", "014", "0123", "0123", "234"]),
        ({"chunk_length": 2, "wrap": True, "is_causal": True}, ["0", "01", "012", "0123", "234"]),
        ({"chunk_length": 2, "wrap": True, "chunks_before": 2, "chunks_after": 2}, ["01234"] * 5),
        ({"chunk_length": 9, "wrap": True}, ["01234"] * 5),
    ],
)
def test_local_attention_sees_the_right_keys(fields, wanted):
    q, k = f64(2, 4, 5, 3), f64(2, 2, 5, 3, seed=1)
    v = torch.eye(5, dtype=torch.float64).expand(2, 2, 5, 5)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3] = True
    probs, lse = reference.local_attention(q, k, v, key_padding_mask=mask, **fields)
    for b in range(2):
        N = [[int(str(j) in row and not (b == 1 and j == 3)) for j in range(5)] for row in wanted]
        for h in range(4):
            by_hand = softmax_by_hand(q[b, h].tolist(), k[b, h // 2].tolist(), torch.eye(5).tolist(), N, 3**-0.5)
            torch.testing.assert_close(probs[b, h], torch.tensor(by_hand[0], dtype=torch.float64), rtol=0, atol=1e-14)
            torch.testing.assert_close(lse[b, h], torch.tensor(by_hand[1], dtype=torch.float64), rtol=0, atol=1e-14)
            # exact zeros, not merely small
            assert ((probs[b, h] != 0) == torch.tensor(N, dtype=torch.bool)).all()


def test_local_attention_has_dropout_and_no_fallback():
    q, k = f64(1, 1, 4, 3), f64(1, 1, 4, 3, seed=1)
    v = torch.eye(4, dtype=torch.float64)[None, None]
    mask = torch.tensor([[True, False, False, False]])
    options = {"window": 1, "is_causal": True, "key_padding_mask": mask, "seed": torch.tensor(11)}
    probs, lse = reference.local_attention(q, k, v, scale=2.0, **options)
    assert not probs[0, 0, 0].any() and lse[0, 0, 0] == -math.inf and probs[0, 0, 1].tolist() == [0, 1, 0, 0]
    torch.testing.assert_close(lse[0, 0, 1], 2 * (q * k).sum(-1)[0, 0, 1], rtol=0, atol=1e-14)
    dropped, _ = reference.local_attention(q, k, v, scale=2.0, dropout_p=0.25, **options)
    keep = reference.dropout_mask(options["seed"], 1, 1, 4, 4, 0.25)
    torch.testing.assert_close(dropped, probs * keep / 0.75, rtol=0, atol=1e-14)


# what it refuses


def test_bad_arguments_raise():
    q, k = f64(1, 1, 4, 3), f64(1, 1, 5, 3)
    config = LSHConfig(n_hashes=1, n_buckets=2)
    buckets, pair = as_buckets([0] * 4), (as_buckets([0] * 4), as_buckets([0] * 5))
    with pytest.raises(ValueError, match="exactly one"):
        reference.lsh_attention(q, None, q, config=config)
    with pytest.raises(ValueError, match="exactly one"):
        reference.lsh_attention(q, None, q, config=config, buckets=buckets, rotations=f64(1, 3, 1, 1))
    with pytest.raises(ValueError, match="seed"):
        reference.lsh_attention(q, None, q, config=config, buckets=buckets, dropout_p=0.1)
    with pytest.raises(ValueError, match="wanted 4"):
        reference.lsh_attention(q, k, k, config=config, buckets=pair, is_causal=True)
    for fields in ({"local_window": 1}, {"span": "chunk"}):
        with pytest.raises(ValueError, match="wanted 4"):
            reference.lsh_attention(q, k, k, config=LSHConfig(n_hashes=1, n_buckets=2, **fields), buckets=pair)
    with pytest.raises(ValueError, match="exactly one"):
        reference.local_attention(q, q, q)
    with pytest.raises(ValueError, match="exactly one"):
        reference.local_attention(q, q, q, window=1, chunk_length=1)
    with pytest.raises(ValueError, match="wrap"):
        reference.local_attention(q, q, q, window=1, wrap=True)
    with pytest.raises(ValueError, match="wanted 4"):
        reference.local_attention(q, k, k, window=1)
