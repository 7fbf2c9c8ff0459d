"""The model of testv2.py: scan, branches, gate, the state law, masks, initialisation, sampling."""

import copy
import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import testv2
from testv2 import (
    LowRankProjection,
    ModelState,
    Piece,
    RotaryEmbedding,
    TinyMambaModel,
    TokenAdaptiveGating,
    UserError,
    apply_rotary_pos_emb,
    generate,
    make_optimizer,
    selective_scan,
    sparsemax,
)

GATES = ("softmax", "top_k", "sparsemax")
EOS = 0
DOCUMENTS = {"document_mask": True, "eos_id": EOS}
LAW = pytest.mark.parametrize(
    ("double", "tolerance"), [(False, 1e-4), (True, 1e-9)], ids=["float32", "float64"]
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On tensors this small, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def examples(count):
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


@functools.cache
def wide(double=False, **changes) -> TinyMambaModel:
    """A model whose weights are far from their first values, so that every mistake shows.

    Shared between tests: copy it before changing it.
    """
    torch.manual_seed(1)
    model = TinyMambaModel(tiny_config(**changes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("A_log"):
                p.uniform_(-2.0, 2.7)
            elif name.endswith("dt_bias"):
                p.uniform_(-4.0, 0.5)
            elif name.endswith(("norm.weight", ".D")):
                p.normal_(1.0, 0.3)
            elif name.endswith("residual_scale"):
                p.normal_(0.7, 0.1)
            elif name.endswith("conv_weight") or "controller" in name:
                p.normal_(0.0, 0.5)
            else:
                p.normal_(0.0, 0.2)
    model.eval().requires_grad_(False)
    if double:
        model.double()
        exact_rope(model)
    return model


def exact_rope(model) -> None:
    """RoPE tables are float32; in float64 their rounding would hide what is tested."""
    for block in model.blocks:
        attention = block.attention
        theta = model.config.rope_theta ** (
            -torch.arange(0, attention.head_dim, 2, dtype=torch.float64) / attention.head_dim
        )
        angles = torch.arange(len(attention.cos)).double()[:, None] * theta
        attention.cos, attention.sin = angles.cos(), angles.sin()


def free_copy(model):
    return copy.deepcopy(model).requires_grad_(True)


def some_ids(rows, length, vocab=257, seed=0):
    """Random ids without EOS."""
    return torch.randint(1, vocab, (rows, length), generator=torch.manual_seed(seed))


def close(got, want, tolerance, scale=None):
    """|got - want| <= tolerance * scale: the largest |want|, at least 1e-3, unless it is given."""
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    if want.numel() == 0:
        return
    scale = max(want.abs().max().item(), 1e-3) if scale is None else scale
    error = (got - want).abs().max().item()
    assert error <= tolerance * scale, f"off by {error:.3g} at scale {scale:.3g}"


def same_state(one, two) -> bool:
    one, two = one.tensors(), two.tensors()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def close_states(one, two, tolerance):
    one, two = one.tensors(), two.tensors()
    assert one.keys() == two.keys()
    for name in one:
        close(one[name], two[name], tolerance, scale=1.0)


def prefilled(model, ids):
    """The state after ids."""
    return model.advance(ids, model.init_state(len(ids)))[1]


def no_piece():
    """One document from position 0, no padding."""
    return Piece(None, None)


class Census(TorchDispatchMode):
    """Counts the tensor operations run under it, and the numbers in the largest result."""

    def __init__(self):
        super().__init__()
        self.operations, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.layout == torch.strided:
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        return out


# -------------------------------------------------------------------------------------- scan


def scan_inputs(L, dtype=torch.float64, batch=2, H=3, P=4, N=5, seed=0):
    """x, dt, A, B, C and a state; some heads forget within a token, some keep for hundreds."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    A = -torch.tensor([0.1, 1.0, 16.0, 4.0])[:H].double()
    dt = F.softplus(normal(batch, L, H) - 2)
    parts = normal(batch, L, H, P), dt, A, normal(batch, L, N), normal(batch, L, N)
    return [t.to(dtype) for t in (*parts, normal(batch, H, P, N))]


def random_resets(L, seed=0):
    resets = torch.rand(2, L, generator=torch.manual_seed(seed)) < 0.1
    resets[0, 0] = resets[1, -1] = True
    return resets


def scan_by_hand(x, dt, A, B, C, state, resets):
    """The recurrence as loops over numbers, in numpy float64."""
    x, dt, A, B, C, state = (t.double().numpy() for t in (x, dt, A, B, C, state))
    (batch, L, H, P), N = x.shape, B.shape[-1]
    y, end = np.zeros((batch, L, H, P)), np.zeros((batch, H, P, N))
    for b, head in itertools.product(range(batch), range(H)):
        h = state[b, head].copy()
        for t in range(L):
            if resets is not None and resets[b, t]:
                h = np.zeros_like(h)
            step = dt[b, t, head]
            h = math.exp(step * A[head]) * h + step * np.outer(x[b, t, head], B[b, t])
            y[b, t, head] = h @ C[b, t]
        end[b, head] = h
    return torch.from_numpy(y), torch.from_numpy(end)


def scan_and_gradients(inputs, resets, method, chunk_size):
    """y, the last state and the gradients of all six inputs under a fixed loss."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    y, end = selective_scan(*inputs, resets, method, chunk_size)
    g = torch.manual_seed(9)
    loss = (y * torch.randn(y.shape, generator=g)).sum()
    loss = loss + (end * torch.randn(end.shape, generator=g)).sum()
    return y.detach(), end.detach(), *torch.autograd.grad(loss, inputs)


CASES = [(1, 64), (2, 64), (63, 64), (64, 64), (65, 64), (200, 64), (200, 1), (200, 2), (17, 100)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.float32, 1e-4)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("with_resets", [False, True], ids=["plain", "resets"])
@pytest.mark.parametrize(("L", "chunk_size"), CASES)
def test_chunked_scan_equals_sequential_and_the_loop_by_hand(
    L, chunk_size, with_resets, dtype, tolerance
):
    inputs = scan_inputs(L, dtype)
    resets = random_resets(L) if with_resets else None
    chunked = scan_and_gradients(inputs, resets, "chunked", chunk_size)
    sequential = scan_and_gradients(inputs, resets, "sequential", chunk_size)
    for got, want in zip(chunked, sequential, strict=True):
        assert got.dtype == dtype
        close(got, want, tolerance)
    for got in (chunked, sequential):
        for part, want in zip(got, scan_by_hand(*inputs, resets), strict=False):
            close(part.double(), want, tolerance)


@pytest.mark.parametrize("method", ["chunked", "sequential"])
def test_gradients_of_the_scan_are_the_slopes_of_its_outputs(method):
    inputs = [t.requires_grad_() for t in scan_inputs(5, batch=1, H=2, P=2, N=2)]
    resets = torch.tensor([[False, False, False, True, False]])

    def f(*args):
        return selective_scan(*args, resets, method, 2)

    assert torch.autograd.gradcheck(f, inputs, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["chunked", "sequential"])
def test_a_missing_state_is_zero_and_the_state_passes_between_calls(method):
    x, dt, A, B, C, state = scan_inputs(50)
    nothing = selective_scan(x, dt, A, B, C, None, None, method, 16)
    zeros = selective_scan(x, dt, A, B, C, torch.zeros_like(state), None, method, 16)
    assert all(torch.equal(a, b) for a, b in zip(nothing, zeros, strict=True))
    y, end = selective_scan(x, dt, A, B, C, state, None, method, 16)
    head, middle = selective_scan(
        x[:, :21], dt[:, :21], A, B[:, :21], C[:, :21], state, None, method, 16
    )
    tail, last = selective_scan(
        x[:, 21:], dt[:, 21:], A, B[:, 21:], C[:, 21:], middle, None, method, 16
    )
    close(torch.cat((head, tail), 1), y, 1e-12)
    close(last, end, 1e-12)


def test_a_scan_longer_than_one_span_of_chunks_is_still_exact():
    L = testv2.SPAN * 3 + 2 * 3 + 1
    inputs = scan_inputs(L)
    inputs[2] = inputs[2] * 0.01  # long memory, which must cross from span to span
    chunked = scan_and_gradients(inputs, None, "chunked", 3)
    sequential = scan_and_gradients(inputs, None, "sequential", 3)
    for got, want in zip(chunked, sequential, strict=True):
        close(got, want, 1e-9)
    for got, want in zip(chunked, scan_by_hand(*inputs, None), strict=False):
        close(got, want, 1e-9)


@pytest.mark.parametrize("strong", [1.6, 40.0])
@pytest.mark.parametrize("L", [64, 4096])
def test_float32_keeps_a_long_memory_exact_after_strong_forgetting(L, strong):
    x, _, _, B, C, state = scan_inputs(L, torch.float32, batch=1, H=1)
    dt = torch.rand(1, L, 1, generator=torch.manual_seed(0)) * 1e-3
    dt[:, : 3 * L // 4] = strong
    A = -torch.ones(1)
    x = x / dt[..., None]  # every token writes equally much
    y, end = selective_scan(x, dt, A, B, C, state)
    exact = selective_scan(*(t.double() for t in (x, dt, A, B, C, state)), method="sequential")
    close(y.double(), exact[0], 1e-4)
    close(end.double(), exact[1], 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["chunked", "sequential"])
def test_scan_is_finite_at_extreme_steps_and_decays(method, dtype):
    x, dt, A, B, C, state = scan_inputs(150, dtype)
    dt, A = torch.full_like(dt, 100.0), torch.full_like(A, -16.0)
    inputs = [t.clone().requires_grad_() for t in (x, dt, A, B, C, state)]
    y, end = selective_scan(*inputs, None, method, 64)
    assert y.dtype == end.dtype == torch.float32
    assert torch.isfinite(y).all()
    assert torch.isfinite(end).all()
    (y.sum() + end.sum()).backward()
    assert all(torch.isfinite(t.grad).all() for t in inputs)
    x, B, C = x.float(), B.float(), C.float()  # all is forgotten: each token sees itself alone
    close(y.detach(), 100 * x * (B * C).sum(-1)[..., None, None], 1e-4)


@pytest.mark.parametrize("method", ["chunked", "sequential"])
def test_scan_does_not_mix_state_channels(method):
    *inputs, state = scan_inputs(70)
    bumped = state.clone()
    bumped[1, 0, 3, 2] += 1.0  # row 1, head 0, channel 3, state 2
    (y, end), (y2, end2) = (selective_scan(*inputs, s, None, method, 16) for s in (state, bumped))
    moved = (y != y2).any(1)  # (B, H, P)
    assert moved.nonzero().tolist() == [[1, 0, 3]]
    assert (end != end2).nonzero().tolist() in ([], [[1, 0, 3, 2]])
    x2 = inputs[0].clone()
    x2[0, 10, 1, 2] += 1.0
    y3, end3 = selective_scan(x2, *inputs[1:], state, None, method, 16)
    assert (y != y3).nonzero()[:, [0, 2, 3]].unique(dim=0).tolist() == [[0, 1, 2]]
    assert torch.equal(y[:, :10], y3[:, :10])
    assert (end != end3).nonzero()[:, :3].unique(dim=0).tolist() in ([], [[0, 1, 2]])


def test_scan_neither_explodes_nor_loops_over_tokens_at_long_length():
    x, dt, A, B, C, _ = scan_inputs(20_000, torch.float32, batch=1)
    y, end = selective_scan(x, dt, A, B, C)
    short, _ = selective_scan(*(t[:, :300] for t in (x, dt)), A, B[:, :300], C[:, :300])
    assert y.abs().max() < 10 * short.abs().max()
    assert torch.isfinite(end).all()
    counts, sizes = {}, {}
    for L in (256, 4096, 8192):
        with Census() as census:
            selective_scan(x[:, :L], dt[:, :L], A, B[:, :L], C[:, :L])
        counts[L], sizes[L] = census.operations, census.largest
    assert counts[4096] <= counts[256] + 5
    assert counts[8192] <= 2 * counts[256] + 20
    assert sizes[8192] <= 2.1 * sizes[4096]  # memory is linear in L


# --------------------------------------------------------------------------------------- ssm


@pytest.mark.parametrize("L", [1, 2, 15, 16, 17, 80])
@pytest.mark.parametrize("scan", ["chunked", "sequential"])
def test_ssm_branch_equals_mamba2_of_transformers(scan, L):
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    from transformers import Mamba2Config

    ours = free_copy(wide(scan=scan).blocks[0].ssm)
    shape = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 8, "expand": 2}
    theirs = mamba2.Mamba2Mixer(
        Mamba2Config(
            **shape, n_groups=1, conv_kernel=4, chunk_size=16, use_bias=True, use_conv_bias=True,
            layer_norm_epsilon=ours.norm.eps, num_hidden_layers=1, time_step_limit=(0.0, math.inf),
        ),
        layer_idx=0,
    )  # fmt: skip
    names = {"conv_weight": "conv1d.weight", "conv_bias": "conv1d.bias"}
    weights = {names.get(name, name): t for name, t in ours.state_dict().items()}
    weights["conv1d.weight"] = weights["conv1d.weight"][:, None]
    theirs.load_state_dict(weights)
    u = torch.randn(2, L, 32)
    loss_weights = torch.randn(2, L, 32)

    def run(module, f):
        v = u.clone().requires_grad_()
        y = f(v)
        named = dict(module.named_parameters())
        gradients = torch.autograd.grad((y * loss_weights).sum(), [v, *named.values()])
        return y, gradients[0], dict(zip(named, gradients[1:], strict=True))

    y, du, dw = run(ours, lambda v: ours(v, no_piece(), None)[0])
    y2, du2, dw2 = run(theirs, theirs)
    close(y, y2, 1e-5)
    close(du, du2, 1e-4)
    for name, gradient in dw.items():
        close(gradient, dw2[names.get(name, name)].view_as(gradient), 1e-4)


def test_steps_and_both_projections_of_the_state_depend_on_the_input(monkeypatch):
    seen = {}

    def spy(x, dt, A, B, C, *rest, **named):
        seen.update(dt=dt, B=B, C=C)
        return selective_scan(x, dt, A, B, C, *rest, **named)

    monkeypatch.setattr(testv2, "selective_scan", spy)
    ssm = TinyMambaModel(tiny_config()).blocks[0].ssm  # at its first values
    ssm(torch.randn(1, 20, 32), no_piece(), None)
    assert set(seen) == {"dt", "B", "C"}
    for name, t in seen.items():
        assert (t[0, 4:].std(0) > 1e-6).all(), name
    assert (seen["dt"] > 0).all()


# --------------------------------------------------------------------------------- attention


def naive_attention(attention, u, W, theta=10000.0, begin=0):
    """Full softmax with a band mask; RoPE as complex numbers, by absolute position."""
    q, k, v = attention.qkv(u).unflatten(-1, (3, attention.n_heads, -1)).transpose(1, 3).unbind(2)
    L, width = q.shape[-2:]
    t = torch.arange(L)
    angles = t[:, None] * theta ** (-torch.arange(0, width, 2) / width)
    turn = torch.polar(torch.ones_like(angles), angles)
    q, k = (torch.complex(*x.chunk(2, -1)) * turn for x in (q, k))  # (B, A, L, F/2)
    scores = (q[..., :, None, :] * k[..., None, :, :].conj()).real.sum(-1) * width**-0.5
    gap = t[:, None] - t
    scores = scores.masked_fill((gap < 0) | (gap >= W), -math.inf)
    y = scores.softmax(-1) @ v
    return attention.out_proj(y.transpose(1, 2).flatten(2))


SHAPES = [(1, 1), (5, 1), (3, 8), (7, 8), (8, 8), (9, 8), (16, 8), (29, 8), (20, 5), (4, 100)]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("L", "W"), SHAPES)
def test_attention_equals_a_full_softmax_with_a_band_mask(L, W, fused):
    attention = wide(window_size=W, use_flash_attn=fused, low_rank=5).blocks[1].attention
    u = torch.randn(2, L, 32)
    y, keys, values = attention(u, no_piece(), None)
    assert y.shape == u.shape
    assert keys.shape == values.shape == (2, W - 1, 2, 16)
    close(y, naive_attention(attention, u, W), 1e-5)


@pytest.mark.parametrize(("L", "W"), SHAPES)
def test_attention_sees_exactly_the_last_window_tokens(L, W):
    attention = wide(window_size=W).blocks[0].attention
    u = torch.randn(2, L, 32, requires_grad=True)
    y = attention(u, no_piece(), None)[0]
    for t in {0, L // 2, max(0, L - 2), L - 1}:
        (gradient,) = torch.autograd.grad(y[1, t].square().sum(), u, retain_graph=True)
        assert not gradient[0].any()
        seen = gradient[1].abs().amax(-1) > 0
        assert seen.nonzero().flatten().tolist() == list(range(max(0, t - W + 1), t + 1))


def test_fused_attention_equals_the_softmax_written_out():
    ids = some_ids(2, 45)
    ids[0, [0, 5, 6, 30]] = EOS
    mask = torch.ones(2, 45)
    mask[1, :9] = 0
    models = [wide(use_flash_attn=fused, **DOCUMENTS) for fused in (True, False)]
    close(*(m(ids, attention_mask=mask) for m in models), 1e-5)


def test_windows_depend_neither_on_the_total_length_nor_on_other_rows():
    attention = wide(double=True).blocks[0].attention
    u = torch.randn(3, 50, 32, dtype=torch.float64)
    y = attention(u, no_piece(), None)[0]
    for L in (1, 7, 8, 9, 30):
        close(attention(u[:, :L], no_piece(), None)[0], y[:, :L], 1e-12)
    close(attention(u[1:2], no_piece(), None)[0], y[1:2], 1e-12)


def test_attention_costs_the_same_for_every_token():
    attention = wide().blocks[0].attention
    sizes = {}
    for L in (512, 4096):
        with Census() as census:
            attention(torch.randn(1, L, 32), no_piece(), None)
        sizes[L] = census.largest
    assert sizes[4096] <= 8.1 * sizes[512]


# -------------------------------------------------------------------------------------- rope


def test_rope_scores_depend_on_the_distance_alone_up_to_position_ten_million():
    rotary, t = RotaryEmbedding(16), torch.arange(20)
    q, k = torch.randn(20, 16), torch.randn(20, 16)

    def scores(offset):
        cos, sin = rotary(t + offset)
        assert cos.dtype == sin.dtype == torch.float32
        assert cos.shape == sin.shape == (20, 8)
        return apply_rotary_pos_emb(q, cos, sin) @ apply_rotary_pos_emb(k, cos, sin).T

    for offset in (1, 10, 10_000_000):
        close(scores(offset), scores(0), 2e-6)
    assert not torch.allclose(scores(0), q @ k.T, atol=0.1)
    for tables in (rotary(t), rotary(t + 10_000_000)):  # a rotation keeps lengths
        close(apply_rotary_pos_emb(q, *tables).norm(dim=-1), q.norm(dim=-1), 1e-6)


def test_rope_tables_are_exact_at_position_ten_million():
    positions = torch.tensor([10, 10_000_000])
    cos, sin = RotaryEmbedding(8)(positions)
    angles = positions.numpy()[:, None].astype(np.longdouble) * np.longdouble(10000) ** (
        -np.arange(0, 8, 2, dtype=np.longdouble) / 8
    )
    np.testing.assert_allclose(cos.numpy(), np.cos(angles).astype(float), atol=1e-6)
    np.testing.assert_allclose(sin.numpy(), np.sin(angles).astype(float), atol=1e-6)


@pytest.mark.parametrize("document_mask", [False, True])
def test_logits_at_position_ten_million_equal_those_at_ten(document_mask):
    model = wide(document_mask=document_mask, eos_id=EOS)
    head, tail = some_ids(2, 11), some_ids(2, 30, seed=1)
    head[0, 4] = tail[1, 7] = EOS
    near = prefilled(model, head)
    far = near.clone()
    far.position += 10_000_000
    far.document_start += 10_000_000
    logits, near = model.advance(tail, near)
    far_logits, far = model.advance(tail, far)
    close(far_logits, logits, 1e-6)
    assert torch.equal(far.position, near.position + 10_000_000)


def test_rope_refuses_odd_widths_and_mismatched_shapes():
    for width in (5, 1, 0):
        with pytest.raises(UserError, match="even"):
            RotaryEmbedding(width)
    with pytest.raises(UserError, match="num_heads"):
        tiny_config(d_model=30, num_heads=2)
    cos, sin = RotaryEmbedding(8)(torch.arange(6))
    for x in (torch.randn(2, 5, 8), torch.randn(2, 6, 10)):
        with pytest.raises(ValueError, match=r"\(2, . ?.*needs cos and sin"):
            apply_rotary_pos_emb(x, cos, sin)
    with pytest.raises(ValueError, match="needs cos and sin"):
        apply_rotary_pos_emb(torch.randn(2, 6, 8), cos, sin[:5])


# ----------------------------------------------------------------------------- the state law


@st.composite
def texts_in_pieces(draw):
    """Piece sizes, and ids (2, L) with EOS in random and in awkward places."""
    sizes = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 7, 8, 9, 17, 33]), min_size=1))
    sizes = [*sizes[:7], draw(st.integers(1, 20))]
    ends = [end - 1 for end in itertools.accumulate(sizes) if end]
    ids = some_ids(2, sum(sizes), seed=draw(st.integers(0, 99)))
    density = draw(st.sampled_from([0.0, 0.1, 0.6]))
    ids[torch.rand(ids.shape, generator=torch.manual_seed(1)) < density] = EOS
    for place in draw(st.sets(st.sampled_from(["first", "last", "ends", "begins", "run"]))):
        if place == "first":
            ids[1, 0] = EOS
        elif place == "last":
            ids[0, -1] = EOS
        elif place == "ends":
            ids[0, ends] = EOS
        elif place == "begins":
            ids[1, [end + 1 for end in ends[:-1]]] = EOS
        else:
            ids[1, ids.shape[1] // 2 :][:4] = EOS
    return sizes, ids


@pytest.mark.parametrize("document_mask", [False, True], ids=["one_text", "documents"])
@pytest.mark.parametrize("gate", GATES)
@examples(25)
@given(
    text=texts_in_pieces(),
    window=st.sampled_from([1, 2, 8, 500]),
    d_conv=st.sampled_from([1, 4]),
    low_rank=st.sampled_from([0, 6]),
    double=st.booleans(),
)
def test_any_split_gives_the_logits_of_one_pass(
    gate, document_mask, text, window, d_conv, low_rank, double
):
    shape = {"window_size": window, "d_conv": d_conv, "low_rank": low_rank, "chunk_size": 8}
    model = wide(double, gate=gate, document_mask=document_mask, eos_id=EOS, **shape)
    tolerance = 1e-9 if double else 1e-4
    sizes, ids = text
    state, logits = model.init_state(2), []
    nbytes = state.nbytes
    for piece in ids.split(sizes, dim=1):
        untouched = state.clone()
        out, new = model.advance(piece, state)
        assert out.shape == (*piece.shape, 257)
        assert same_state(state, untouched)
        assert new.nbytes == nbytes
        state = new
        logits.append(out)
    close(torch.cat(logits, dim=1), model(ids), tolerance, scale=1.0)
    whole_logits, whole = model.advance(ids, model.init_state(2))
    close(whole_logits, model(ids), tolerance, scale=1.0)
    close_states(state, whole, tolerance)
    assert state.position.tolist() == [ids.shape[1]] * 2


@pytest.mark.parametrize("gate", GATES)
def test_token_by_token_equals_one_pass_at_many_times_the_training_length(gate):
    model = wide(gate=gate, n_layer=1, num_heads=1)
    ids = some_ids(1, 400)
    assert ids.shape[1] > 10 * model.config.block_size
    state, logits = model.init_state(1), []
    for t in range(400):
        out, state = model.advance(ids[:, t : t + 1], state)
        logits.append(out)
    close(torch.cat(logits, dim=1), model(ids), 1e-4, scale=1.0)


def test_last_only_gives_the_last_column_alone():
    model, ids = wide(), some_ids(2, 9)
    full, after = model.advance(ids, model.init_state(2))
    last, after_last = model.advance(ids, model.init_state(2), last_only=True)
    close(last, full[:, -1:], 1e-6)
    assert same_state(after, after_last)


def test_advance_refuses_a_state_of_other_rows():
    model = wide()
    with pytest.raises(ValueError, match=r"2.*3"):
        model.advance(some_ids(2, 4), model.init_state(3))


def test_gradients_flow_through_a_split_as_through_one_pass():
    model = free_copy(wide(double=True))
    ids, weights = some_ids(2, 21), list(model.parameters())
    whole = torch.autograd.grad(model(ids).square().mean(), weights)
    first, state = model.advance(ids[:, :13], model.init_state(2))
    second, _ = model.advance(ids[:, 13:], state)
    split = torch.autograd.grad(torch.cat((first, second), 1).square().mean(), weights)
    for got, want in zip(split, whole, strict=True):
        close(got, want, 1e-9)


# ----------------------------------------------------------------------------------- padding


def padding(kind, rows, L):
    """attention_mask (rows, L), different in each row; every row has a real token."""
    index, count = torch.arange(L), torch.arange(rows)[:, None] * 5 + 2
    if kind == "left":
        return (index >= count).long()
    if kind == "right":
        return (index < L - count).long()
    mask = (torch.rand(rows, L, generator=torch.manual_seed(3)) < 0.5).long()
    mask[:, L // 2] = 1
    return mask


@pytest.mark.parametrize("document_mask", [False, True], ids=["one_text", "documents"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", ["left", "right", "holes"])
def test_padding_leaves_a_row_as_if_it_were_not_there(kind, gate, document_mask):
    model = wide(gate=gate, document_mask=document_mask, eos_id=EOS, chunk_size=8)
    ids, mask = some_ids(4, 37), padding(kind, 4, 37)
    ids[torch.rand(ids.shape, generator=torch.manual_seed(2)) < 0.2] = EOS  # real and padding
    for attention_mask in (mask, mask.bool(), mask.float()):
        logits, gates = model(ids, attention_mask=attention_mask, return_gates=True)
        for row in range(4):
            real = mask[row].bool()
            want, want_gates = model(ids[row : row + 1, real], return_gates=True)
            close(logits[row, real], want[0], 1e-5, scale=1.0)
            close(gates[:, row, real], want_gates[:, 0], 1e-5, scale=1.0)
    ids[mask == 0] = 200  # what stands under padding does not matter
    again = model(ids, attention_mask=mask)
    close(again[mask.bool()], logits[mask.bool()], 1e-6, scale=1.0)


@pytest.mark.parametrize("document_mask", [False, True], ids=["one_text", "documents"])
@pytest.mark.parametrize("window", [1, 8, 500])
@LAW
def test_ragged_pieces_in_mid_session_equal_each_row_alone(
    double, tolerance, window, document_mask
):
    shape = {"window_size": window, "chunk_size": 8}
    model = wide(double, document_mask=document_mask, eos_id=EOS, **shape)
    g = torch.manual_seed(4)
    state, texts, logits = model.init_state(4), [[] for _ in range(4)], [[] for _ in range(4)]
    for L in (9, 1, 14, 3, 20):
        ids = some_ids(4, L, seed=L)
        ids[torch.rand(ids.shape, generator=g) < 0.25] = EOS
        mask = torch.rand(ids.shape, generator=g) < torch.tensor([[0.9], [0.5], [0.2], [1.0]])
        mask[L % 4] = False  # a row that reads nothing
        out, new = model.advance(ids, state, attention_mask=mask)
        assert same_state(new.select([L % 4]), state.select([L % 4]))
        assert new.nbytes == state.nbytes
        state = new
        for row in range(4):
            texts[row] += ids[row, mask[row]].tolist()
            logits[row].append(out[row, mask[row]])
    assert state.position.tolist() == [len(text) for text in texts]
    for row, text in enumerate(texts):
        ids = torch.tensor([text])
        close(torch.cat(logits[row]), model(ids)[0], tolerance, scale=1.0)
        close_states(state.select([row]), prefilled(model, ids), tolerance)


# --------------------------------------------------------------------------------- documents


def packed_documents():
    documents = [some_ids(1, n, seed=n) for n in (5, 1, 20, 2, 9, 70)]
    for document in documents:
        document[0, -1] = EOS
    return documents


@pytest.mark.parametrize("scan", ["chunked", "sequential"])
@pytest.mark.parametrize("gate", GATES)
@LAW
def test_packed_documents_have_the_logits_of_each_document_alone(double, tolerance, gate, scan):
    model = wide(double, gate=gate, scan=scan, **DOCUMENTS)
    documents = packed_documents()
    packed = torch.cat(documents, dim=1)
    logits = model(packed).split([d.shape[1] for d in documents], dim=1)
    for document, got in zip(documents, logits, strict=True):
        close(got, model(document), tolerance, scale=1.0)
    forgetful, plain = model(packed), wide(double, gate=gate, scan=scan)(packed)
    assert not torch.allclose(forgetful[:, 5:], plain[:, 5:], atol=1e-2)


@pytest.mark.parametrize(
    ("double", "tolerance"), [(False, 1e-5), (True, 1e-11)], ids=["float32", "float64"]
)
def test_a_change_in_one_document_leaves_the_next_unchanged(double, tolerance):
    model = wide(double, **DOCUMENTS)
    first, second = some_ids(2, 18), some_ids(2, 30, seed=1)
    first[:, -1] = EOS
    logits = model(torch.cat((first, second), dim=1))
    first[:, :-1] = first[:, :-1].flip(1) % 256 + 1
    again = model(torch.cat((first, second), dim=1))
    assert not torch.allclose(logits[:, :18], again[:, :18], atol=1e-2)
    close(again[:, 18:], logits[:, 18:], tolerance, scale=1.0)


def test_a_document_mask_without_an_eos_id_is_refused():
    with pytest.raises(UserError, match="eos_id"):
        wide(document_mask=True)(some_ids(1, 4))


# --------------------------------------------------------------------- causality and batches


@pytest.mark.parametrize("document_mask", [False, True], ids=["one_text", "documents"])
@pytest.mark.parametrize("gate", GATES)
def test_outputs_never_depend_on_later_tokens(gate, document_mask):
    model = wide(True, gate=gate, document_mask=document_mask, eos_id=EOS, chunk_size=8)
    ids = some_ids(2, 40)
    ids[0, 10] = EOS
    logits = model(ids)
    for t in (0, 1, 8, 17, 38, 39):
        for new in (EOS, 123):
            changed = ids.clone()
            changed[:, t] = new
            again = model(changed)
            close(again[:, :t], logits[:, :t], 1e-12, scale=1.0)
            assert (again[:, t] != logits[:, t]).any()
            close(model(changed[:, : t + 1]), again[:, : t + 1], 1e-12, scale=1.0)


@pytest.mark.parametrize("document_mask", [False, True], ids=["one_text", "documents"])
@pytest.mark.parametrize("gate", GATES)
def test_rows_of_a_batch_never_touch_each_other(gate, document_mask):
    model = wide(True, gate=gate, document_mask=document_mask, eos_id=EOS)
    ids = some_ids(3, 30)
    ids[0, 12] = EOS
    state = prefilled(model, some_ids(3, 10, seed=5))
    changed = ids.clone()
    changed[0] = ids[0].flip(0) % 256
    close(model(changed)[1:], model(ids)[1:], 1e-12, scale=1.0)
    assert not torch.equal(model(changed)[0], model(ids)[0])
    logits, _ = model.advance(ids, state)
    again, _ = model.advance(changed, state)
    close(again[1:], logits[1:], 1e-12, scale=1.0)
    close(model(ids[2:]), model(ids)[2:], 1e-12, scale=1.0)


# ----------------------------------------------------------- block, number formats and depth


@pytest.mark.parametrize("gate", GATES)
def test_block_and_model_compute_the_documented_formula(gate):
    model = wide(True, gate=gate, tie_embeddings=False)
    ids = some_ids(2, 20)
    x = F.embedding(ids, model.embedding.weight)
    for block in model.blocks:
        u = x / (x.square().mean(-1, keepdim=True) + block.norm.eps).sqrt() * block.norm.weight
        g = block.gate(u)[..., None]
        gate_half, up = block.mlp.in_proj(u).chunk(2, -1)
        mlp = block.mlp.out_proj(gate_half * gate_half.sigmoid() * up)
        ssm = block.ssm(u, no_piece(), None)[0]
        attention = block.attention(u, no_piece(), None)[0]
        mix = g[..., 0, :] * ssm + g[..., 1, :] * attention + g[..., 2, :] * mlp
        x = x + block.residual_scale * mix
    x = x / (x.square().mean(-1, keepdim=True) + model.norm.eps).sqrt() * model.norm.weight
    close(model(ids), x @ model.head.weight.T, 1e-9)


@pytest.mark.parametrize("name", ["silu", "gelu", "relu"])
def test_every_activation_works_and_is_the_one_named(name):
    mlp, u = wide(activation=name).blocks[0].mlp, torch.randn(2, 7, 32)
    gate, up = mlp.in_proj(u).chunk(2, -1)
    normal = torch.distributions.Normal(0.0, 1.0)
    by_hand = {"silu": gate * gate.sigmoid(), "gelu": gate * normal.cdf(gate),
               "relu": gate * (gate > 0)}  # fmt: skip
    close(mlp(u), mlp.out_proj(by_hand[name] * up), 1e-5)


def extreme_model():
    """dt from 6e-6 to 8 in one model; one layer, for float16 is slow on a CPU."""
    model = TinyMambaModel(tiny_config(d_model=16, num_heads=1, ssm_head_dim=4, n_layer=2))
    with torch.no_grad():
        for block in model.blocks:
            block.ssm.dt_bias.copy_(torch.linspace(-12, 8, len(block.ssm.dt_bias)))
    return model.eval()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)], ids=["bf16", "fp16"]
)
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_half_precision_is_finite_and_near_float32_at_length_4096(how, dtype, tolerance):
    model, ids = extreme_model(), some_ids(1, 4096)
    cast = copy.deepcopy(model)
    with torch.no_grad():
        if how == "weights":
            cast.to(dtype)
            model.load_state_dict(cast.state_dict())  # the rounding of weights is not the question
            logits, want = cast(ids), model(ids)
            assert logits.dtype == dtype
            state = prefilled(cast, ids)
            assert all(layer.ssm.dtype == torch.float32 for layer in state.layers)
            assert all(torch.isfinite(t).all() for t in state.tensors().values())
        else:
            with torch.autocast("cpu", dtype=dtype):
                logits = model(ids)
            want = model(ids)
    logits = logits.float()
    assert torch.isfinite(logits).all()
    assert (logits - want).std() < tolerance * want.std()


def test_gradients_under_autocast_are_finite_and_near_float32():
    model, ids = extreme_model(), some_ids(1, 600)
    weights = list(model.parameters())
    want = torch.autograd.grad(model.loss(ids[:, :-1], ids[:, 1:]), weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
    got = torch.autograd.grad(loss, weights)
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(g).all() for g in got)
    flat_got, flat_want = (torch.cat([g.flatten() for g in gs]) for gs in (got, want))
    assert F.cosine_similarity(flat_got, flat_want, dim=0) > 0.99


def test_two_hundred_layers_train_without_divergence():
    shape = {"d_model": 8, "num_heads": 1, "ssm_head_dim": 8, "d_state": 2, "expand_factor": 1}
    rest = {"window_size": 4, "d_conv": 1, "vocab_size": 8, "bias": False, "lr": 1e-2}
    model = TinyMambaModel(tiny_config(n_layer=200, **shape, **rest))
    optimizer = make_optimizer(model, model.config)
    ids = torch.arange(3)[:, None] + torch.arange(13)  # counting, modulo 8
    losses = []
    for _ in range(50):
        loss = model.loss(ids[:, :-1] % 8, ids[:, 1:] % 8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert max(losses) < losses[0] + 0.1
    assert np.mean(losses[-5:]) < 0.65 * losses[0]  # 0.57; without the DeepNet scaling 0.71


# -------------------------------------------------------------------------------------- gate


@pytest.mark.parametrize("gate", ["softmax", "sparsemax"])
def test_gate_starts_exactly_uniform(gate):
    model = TinyMambaModel(tiny_config(gate=gate))
    _, gates = model(some_ids(2, 20), return_gates=True)
    assert gates.dtype == torch.float32
    assert torch.equal(gates, gates[0, 0, 0, 0].expand_as(gates))
    close(gates, torch.full_like(gates, 1 / 3), 1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_starts_with_k_branches_and_different_ones_for_different_tokens(k):
    model = TinyMambaModel(tiny_config(gate="top_k", gate_top_k=k))
    _, gates = model(some_ids(2, 64), return_gates=True)
    assert ((gates > 0).sum(-1) == k).all()
    assert (gates >= 0).all()
    close(gates.sum(-1), torch.ones(2, 2, 64), 1e-6)
    close(gates[gates > 0], torch.full((gates > 0).sum().view(1).tolist(), 1 / k), 0.01)
    used = (gates > 0).flatten(1, 2).float().mean(1)  # (n_layer, 3)
    assert (used > 0).all()
    assert k == 3 or (used < 1).all()


LOGITS = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3)


@pytest.mark.parametrize("gate", GATES)
@examples(100)
@given(logits=LOGITS | st.lists(st.floats(-3, 3, width=32), min_size=3, max_size=3))
@example(logits=[5.0, 5.0, 5.0])
@example(logits=[1e8, 1e8, 1e8])
@example(logits=[1e30, 0.0, -1e30])
@example(logits=[30000.0, 29999.75, 29999.5])
def test_every_gate_is_a_probability_vector(gate, logits):
    module = TokenAdaptiveGating(tiny_config(gate=gate))
    with torch.no_grad():
        module.controller.weight.zero_()
        module.controller.bias.copy_(torch.tensor(logits))
    weights = module(torch.randn(1, 2, 32))
    assert weights.shape == (1, 2, 3)
    assert weights.dtype == torch.float32
    assert (weights >= 0).all()
    close(weights.sum(-1), torch.ones(1, 2), 1e-6)
    for i, j in itertools.permutations(range(3), 2):
        if logits[i] > logits[j]:
            assert (weights[..., i] >= weights[..., j]).all()
    if gate == "top_k":
        assert ((weights > 0).sum(-1) <= 2).all()


def project_by_bisection(logits):
    """The nearest probability vector: max(z - tau, 0), with tau found by halving."""
    z = np.asarray(logits, dtype=np.float64)
    z = z - z.max()
    low, high = -2.0, 0.0
    for _ in range(100):
        tau = (low + high) / 2
        if np.maximum(z - tau, 0).sum() > 1:
            low = tau
        else:
            high = tau
    return np.maximum(z - tau, 0)


@examples(200)
@given(logits=LOGITS | st.lists(st.floats(-2, 2, width=32), min_size=2, max_size=6))
@example(logits=[0.0, 0.0, 0.0])
@example(logits=[-7.0, -7.0, -7.0])
@example(logits=[1e4, 1e4, 1e4])
@example(logits=[1e8, 1e8, 1e8])
@example(logits=[1e30, 1e30, -1e30])
@example(logits=[1.0, 0.0, 0.0])
@example(logits=[30000.0, 29999.75, 29999.5])
def test_sparsemax_is_the_projection_onto_the_simplex(logits):
    weights = sparsemax(torch.tensor(logits))
    want = project_by_bisection(np.float32(logits))
    np.testing.assert_allclose(weights.numpy(), want, atol=1e-6)
    assert abs(weights.sum().item() - 1) < 1e-6


def test_sparsemax_has_the_gradient_of_its_support():
    logits = torch.tensor([[0.3, 0.1, -2.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sparsemax, logits)
    (gradient,) = torch.autograd.grad(sparsemax(logits)[0, 0], logits)
    close(gradient, torch.tensor([[0.5, -0.5, 0.0]]).double(), 1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_return_gates_hands_out_the_weights_of_every_layer_and_token(gate):
    model, ids = wide(gate=gate, n_layer=3), some_ids(2, 11)
    logits, gates = model(ids, return_gates=True)
    assert torch.equal(logits, model(ids))
    assert gates.shape == (3, 2, 11, 3)
    close(gates.sum(-1), torch.ones(3, 2, 11), 1e-6)
    assert gates.std(dim=(1, 2)).min() > 1e-3  # content decides
    loss, gates_again = model(ids, ids, return_gates=True)
    assert loss.dim() == 0
    assert torch.equal(gates, gates_again)
    u = model.blocks[0].norm(model.embedding(ids))
    close(gates[0], model.blocks[0].gate(u), 1e-6)


@pytest.mark.parametrize("asked", ["some", "none", "all"])
@pytest.mark.parametrize("gate", ["top_k", "sparsemax"])
def test_an_mlp_that_skips_tokens_equals_one_that_does_not(gate, asked):
    block = free_copy(wide(gate=gate).blocks[0]).double()
    with torch.no_grad():
        push = {"some": [0.0, 0.0, 0.0], "none": [9.0, 9.0, -9.0], "all": [0.0, -9.0, 9.0]}[asked]
        block.gate.controller.weight *= 0.2
        block.gate.controller.bias.copy_(torch.tensor(push))
    x = torch.randn(2, 15, 32, dtype=torch.float64, requires_grad=True)
    rows = []
    block.mlp.register_forward_hook(lambda m, args, out: rows.append(out.numel() // 32))

    def dense(x):
        u = block.norm(x)
        g = block.gate(u)[..., None]
        ssm, attention = (f(u, no_piece(), None)[0] for f in (block.ssm, block.attention))
        mix = g[..., 0, :] * ssm + g[..., 1, :] * attention + g[..., 2, :] * block.mlp(u)
        return x + block.residual_scale * mix

    got, _, gates = block(x, no_piece(), None)
    asking = int((gates[..., 2] > 0).sum())
    assert asking == {"none": 0, "all": 30}.get(asked, asking)
    assert asked != "some" or 0 < asking < 30
    assert rows == [asking]
    want = dense(x)
    close(got, want, 1e-12)
    inputs = [x, *block.parameters()]
    loss_weights = torch.randn(2, 15, 32, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((y * loss_weights).sum(), inputs, materialize_grads=True)
        for y in (got, want)
    ]
    for one, two in zip(*gradients, strict=True):
        close(one, two, 1e-10)


# ---------------------------------------------------------------------------- initialisation


@pytest.mark.parametrize("deepnet", [True, False])
@pytest.mark.parametrize("low_rank", [0, 24])
def test_initial_weights_are_as_documented(low_rank, deepnet):
    D, N_LAYER = 128, 5
    config = tiny_config(d_model=D, n_layer=N_LAYER, low_rank=low_rank, deepnet=deepnet, d_conv=4)
    model = TinyMambaModel(config)
    assert model.head.weight is model.embedding.weight
    assert abs(model.embedding.weight.std().item() - 0.02) < 0.001
    assert torch.equal(model.norm.weight, torch.ones(D))
    alpha, beta = (N_LAYER**0.25, (4 * N_LAYER) ** -0.25) if deepnet else (1.0, 1.0)

    def check_std(weight, std):
        assert abs(weight.std().item() / std - 1) < 0.06
        assert abs(weight.mean().item()) < 0.06 * std

    def check(module, d_in, scale):
        last = module
        if low_rank:
            check_std(module.down.weight, d_in**-0.5)
            last, d_in = module.up, low_rank
        std = math.sqrt(2 / (5 * d_in))
        if isinstance(scale, tuple):  # queries, keys, values
            for part, s in zip(last.weight.chunk(3), scale, strict=True):
                check_std(part, s * std)
        else:
            check_std(last.weight, scale * std)
        assert not last.bias.any()

    for block in model.blocks:
        ssm, gate = block.ssm, block.gate.controller
        check(ssm.in_proj, D, 1.0)
        check(block.attention.qkv, D, (1.0, 1.0, beta))
        check(block.mlp.in_proj, D, 1.0)
        check(ssm.out_proj, 2 * D, beta)
        check(block.attention.out_proj, D, beta)
        check(block.mlp.out_proj, 2 * D, beta)
        close(block.residual_scale.detach(), torch.full((D,), 1 / alpha), 1e-6)
        assert not gate.weight.any()
        assert not gate.bias.any()
        dt, A = F.softplus(ssm.dt_bias), ssm.A_log.exp()
        assert dt.min() >= 0.999e-3
        assert dt.max() <= 1.001e-1
        assert A.min() >= 0.999
        assert A.max() <= 16.01
        assert torch.equal(ssm.D, torch.ones_like(ssm.D))
        assert ssm.conv_weight.abs().max() <= 0.5
        check_std(ssm.conv_weight, 0.5 / math.sqrt(3))
        assert not ssm.conv_bias.any()
        for norm in (block.norm, ssm.norm):
            assert torch.equal(norm.weight, torch.ones_like(norm.weight))


def test_first_steps_are_spread_evenly_on_a_log_scale_and_decays_evenly():
    config = tiny_config(d_model=256, ssm_head_dim=1, n_layer=4, num_heads=4)
    model = TinyMambaModel(config)
    dt = torch.cat([F.softplus(b.ssm.dt_bias) for b in model.blocks]).log10()
    A = torch.cat([b.ssm.A_log.exp() for b in model.blocks])
    for values, low, high in ((dt, -3.0, -1.0), (A, 1.0, 16.0)):
        share = ((values - low) / (high - low)).sort().values
        even = torch.linspace(0, 1, len(share))
        assert (share - even).abs().max() < 0.06  # Kolmogorov-Smirnov


def test_an_untied_head_is_its_own_and_seeds_decide_everything():
    model = TinyMambaModel(tiny_config(tie_embeddings=False))
    assert model.head.weight is not model.embedding.weight
    assert abs(model.head.weight.std().item() - 0.02) < 0.001
    weights = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        weights.append(TinyMambaModel(tiny_config()).fingerprint())
    assert weights[0] == weights[1] != weights[2]


# ------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_loss_is_the_cross_entropy_of_the_logits_in_value_and_gradients(tied):
    model = free_copy(wide(tie_embeddings=tied))
    rows = 2 * 311
    assert rows % model.LOSS_CHUNK
    assert rows > model.LOSS_CHUNK
    ids, targets = some_ids(2, 311), some_ids(2, 311, seed=1)
    targets[0, :100] = targets[1, 5] = -100
    weights = dict(model.named_parameters())
    want = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    gradients = torch.autograd.grad(want, list(weights.values()))
    for loss in (model.loss(ids, targets), model(ids, targets)):
        close(loss, want, 1e-6)
        got = torch.autograd.grad(loss, list(weights.values()))
        for name, one, two in zip(weights, got, gradients, strict=True):
            assert two.any(), name
            close(one, two, 1e-4)


def test_loss_never_holds_all_logits():
    model = free_copy(wide(n_layer=1, vocab_size=101))
    model.LOSS_CHUNK = 64
    ids = some_ids(3, 100, vocab=101)
    rows, kept = [], []
    model.head.register_forward_hook(lambda m, args, out: rows.append(out.numel() // 101))

    def keep(t):
        kept.append(t.numel() if t.shape[-1:] == (101,) else 0)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model.loss(ids, ids)
    assert max(rows) <= 64
    assert sum(rows) == 300
    assert sum(kept) <= 64 * 101
    loss.backward()
    assert max(rows) <= 64


def test_a_loss_without_targets_is_zero_and_not_nan():
    model, ids = free_copy(wide()), some_ids(1, 9)
    loss = model.loss(ids, torch.full_like(ids, -100))
    loss.backward()
    assert loss.item() == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_dropout_acts_in_training_only():
    model = free_copy(wide(dropout=0.5))
    ids = some_ids(1, 20)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


# ------------------------------------------------------------------------------------- state


def test_a_clone_and_its_original_go_separate_ways():
    model = wide()
    state = prefilled(model, some_ids(2, 9))
    twin = state.clone()
    assert same_state(state, twin)
    for t in twin.tensors().values():
        t.add_(1)
    assert not any(
        torch.equal(a, b)
        for a, b in zip(state.tensors().values(), twin.tensors().values(), strict=True)
    )


@pytest.mark.parametrize("L", [0, 1, 9])
def test_a_new_state_shares_no_memory_with_the_old(L):
    model = wide(**DOCUMENTS)
    old = prefilled(model, some_ids(2, 12))
    before = old.clone()
    _, new = model.advance(some_ids(2, L), old)
    for t in new.tensors().values():
        t.add_(1)
    assert same_state(old, before)


def test_select_gives_the_rows_asked_for_as_if_run_alone():
    model, ids, more = wide(**DOCUMENTS), some_ids(3, 12), some_ids(3, 6, seed=1)
    ids[1, 4] = EOS
    state = prefilled(model, ids)
    for rows in ([2, 0], [1], [1, 1, 1, 0], slice(1, 3), torch.tensor([0, 2])):
        part = state.select(rows)
        close_states(part, prefilled(model, ids[rows]), 1e-5)
        logits, after = model.advance(more[rows], part)
        close(logits, model(torch.cat((ids, more), 1)[rows])[:, 12:], 1e-4, scale=1.0)
        assert after.nbytes * 3 == state.nbytes * len(logits)
    before = state.clone()
    for t in state.select(slice(0, 3)).tensors().values():
        t.zero_()
    assert same_state(state, before)


def test_state_moves_and_knows_its_size():
    model = wide()
    state = model.init_state(3)
    c = model.config
    floats = 3 * (64 + 16) + 64 * 8 + 2 * 7 * 32  # conv tail, SSM, keys and values of a layer
    assert state.nbytes == 3 * (c.n_layer * floats * 4 + 2 * 8)
    assert all(not t.any() for t in state.tensors().values())
    assert model.init_state(6).nbytes == 2 * state.nbytes
    assert prefilled(model, some_ids(3, 300)).nbytes == state.nbytes
    moved = state.to("meta")
    assert {t.device.type for t in moved.tensors().values()} == {"meta"}
    assert same_state(prefilled(model, some_ids(3, 5)).to("cpu"), prefilled(model, some_ids(3, 5)))


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_a_saved_state_gives_bit_identical_logits(tmp_path, double):
    model = wide(double, **DOCUMENTS)
    ids = some_ids(2, 19)
    ids[0, 7] = EOS
    state = prefilled(model, ids)
    state.save(tmp_path / "a.safetensors", model)
    again = ModelState.load(tmp_path / "a.safetensors", model)
    assert same_state(state, again)
    piece = some_ids(2, 5, seed=8)
    assert torch.equal(model.advance(piece, again)[0], model.advance(piece, state)[0])
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_damaged_and_foreign_state_files_are_refused(tmp_path):
    model = wide()
    path = tmp_path / "state.safetensors"
    state = prefilled(model, some_ids(2, 9))
    state.save(path, model)
    good = path.read_bytes()
    with pytest.raises(UserError, match="state.safetensors"):
        ModelState.load(path, wide(gate="top_k"))  # the same shapes, another model
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[0].ssm.D[0] += 1e-3
    with pytest.raises(UserError, match="state.safetensors"):
        ModelState.load(path, other)
    with pytest.raises(UserError, match="missing"):
        ModelState.load(tmp_path / "missing", model)
    with pytest.raises(UserError):
        ModelState.load(tmp_path, model)
    torch.save({"a": 1}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match="foreign"):
        ModelState.load(tmp_path / "foreign.pt", model)
    for length in (0, 5, 8, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(UserError):
            ModelState.load(path, model)
    header = 8 + int.from_bytes(good[:8], "little")
    for at in [*range(16), *range(16, header, 3)]:
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << at % 7)]) + good[at + 1 :])
        with pytest.raises(UserError):
            ModelState.load(path, model)
    path.write_bytes(good)
    assert same_state(ModelState.load(path, model), state)


# -------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": False}, {"low_rank": 4}, {"bias": False}, {"gate": "top_k"}],
    ids=str,
)
def test_parameter_counts_add_up_by_component(changes):
    model = TinyMambaModel(tiny_config(**changes))

    def size(*modules):
        return sum(p.numel() for m in modules for p in m.parameters())

    blocks = model.blocks
    want = {
        "embedding": size(model.embedding),
        "ssm": size(*(b.ssm for b in blocks)),
        "attention": size(*(b.attention for b in blocks)),
        "mlp": size(*(b.mlp for b in blocks)),
        "gate": size(*(b.gate for b in blocks)),
        "norm": size(model.norm, *(b.norm for b in blocks)),
        "residual_scale": sum(b.residual_scale.numel() for b in blocks),
        "head": 0 if model.config.tie_embeddings else size(model.head),
        "total": sum(p.numel() for p in model.parameters()),
    }
    assert model.count_parameters() == want
    assert sum(want.values()) == 2 * want["total"]


@pytest.mark.parametrize("bias", [True, False])
def test_low_rank_projection_is_a_product_of_two_thin_matrices(bias):
    module = LowRankProjection(10, 7, 3, bias)
    assert sum(p.numel() for p in module.parameters()) == 3 * (10 + 7) + 7 * bias
    x = torch.randn(4, 10)
    matrix = module(torch.eye(10)) - module(torch.zeros(1, 10))
    assert torch.linalg.matrix_rank(matrix) == 3
    close(module(x), x @ matrix + module(torch.zeros(1, 10)), 1e-5)
    assert bool(module(torch.zeros(1, 10)).any()) == bias


def test_low_rank_covers_every_projection_of_the_branches():
    block = TinyMambaModel(tiny_config(low_rank=4)).blocks[0]
    for branch in (block.ssm, block.attention, block.mlp):
        kinds = [type(m) for m in branch.children() if isinstance(m, LowRankProjection)]
        assert len(kinds) == 2
        assert not any(isinstance(m, torch.nn.Linear) for m in branch.children())


@pytest.mark.parametrize("low_rank", [0, 4])
def test_bias_false_leaves_no_projection_a_bias(low_rank):
    model = TinyMambaModel(tiny_config(bias=False, low_rank=low_rank))
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert all(m.bias is None for n, m in linear.items() if "gate" not in n)
    with_bias = TinyMambaModel(tiny_config(bias=True, low_rank=low_rank))
    linear = {n: m for n, m in with_bias.named_modules() if isinstance(m, torch.nn.Linear)}
    assert all(m.bias is not None for n, m in linear.items() if n != "head" and "down" not in n)
    assert model(some_ids(1, 5)).shape == (1, 5, 257)


# ---------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("gate", GATES)
def test_greedy_generation_equals_the_argmax_of_full_passes(gate):
    model, ids = wide(gate=gate), some_ids(2, 7)
    want = ids
    for _ in range(20):
        want = torch.cat((want, model(want)[:, -1:].argmax(-1)), dim=1)
    assert len(want[:, 7:].unique()) > 5
    assert torch.equal(generate(model, ids, 20, temperature=0.0), want)
    assert torch.equal(generate(model, ids[1:], 20, temperature=0.0), want[1:])
    assert torch.equal(generate(model, ids, 0), ids)


def test_sampling_is_reproducible_and_follows_the_temperature():
    model, ids = wide(vocab_size=11, n_layer=1), some_ids(1, 6, vocab=11)

    def draw(seed, rows, count, temperature):
        g = torch.Generator().manual_seed(seed)
        return generate(model, ids.expand(rows, -1), count, temperature, generator=g)

    assert torch.equal(draw(1, 2, 15, 1.0), draw(1, 2, 15, 1.0))
    assert not torch.equal(draw(1, 2, 15, 1.0), draw(2, 2, 15, 1.0))
    for temperature in (0.5, 1.0, 2.0):
        drawn = draw(3, 4000, 1, temperature)[:, -1]
        share = drawn.bincount(minlength=11) / 4000
        want = (model(ids)[0, -1] / temperature).softmax(-1)
        assert (share - want).abs().max() < 0.03
        assert want.max() - want.min() > 0.1 / temperature


def test_generation_ends_at_eos_and_fills_the_rows_that_ended():
    model, ids = wide(), some_ids(3, 7)
    free = generate(model, ids, 30, temperature=0.0)[:, 7:]
    eos = free[0, 4].item()
    done = generate(model, ids, 30, temperature=0.0, eos_id=eos)[:, 7:]
    steps = [(row == eos).nonzero().flatten().tolist() for row in free]
    ends = [step[0] if step else 30 for step in steps]
    assert ends[0] <= 4
    assert len(set(ends)) > 1
    assert done.shape[1] == min(30, max(ends) + 1)
    for row, end in enumerate(ends):
        assert torch.equal(done[row, :end], free[row, :end][: done.shape[1]])
        assert (done[row, end:] == eos).all()
    alone = generate(model, ids[:1], 30, temperature=0.0, eos_id=eos)
    assert alone.shape[1] == 7 + ends[0] + 1


# ----------------------------------------------------------------------------------- compile


def compiled(f):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=False)


@pytest.mark.parametrize("gate", ["softmax", "top_k"])
def test_training_compiles_without_a_graph_break_and_equals_eager(gate):
    model = free_copy(wide(n_layer=1, gate=gate, **DOCUMENTS))
    model.LOSS_CHUNK = 32
    ids = some_ids(2, 20)
    ids[0, 5] = EOS
    weights = list(model.parameters())
    want = model(ids[:, :-1], ids[:, 1:])
    loss = compiled(model)(ids[:, :-1], ids[:, 1:])
    close(loss, want, 1e-6)
    pairs = zip(*(torch.autograd.grad(x, weights) for x in (loss, want)), strict=True)
    for got, gradient in pairs:
        close(got, gradient, 1e-4)


def test_scan_compiles_without_a_graph_break_and_equals_eager():
    inputs = [t.requires_grad_() for t in scan_inputs(40)]
    resets = random_resets(40)
    got = compiled(selective_scan)(*inputs, resets, "chunked", 16)
    want = selective_scan(*inputs, resets, "chunked", 16)
    for one, two in zip(got, want, strict=True):
        close(one, two, 1e-12)
    gradients = [torch.autograd.grad(y.sum() + s.sum(), inputs) for y, s in (got, want)]
    for one, two in zip(*gradients, strict=True):
        close(one, two, 1e-10)


# --------------------------------------------------------------------------------- wrong calls


def test_a_mask_of_another_shape_and_ids_without_tokens_are_refused():
    model = TinyMambaModel(tiny_config())
    with pytest.raises(ValueError, match="attention_mask"):
        model(some_ids(2, 60), attention_mask=torch.ones(2, 10))
    with pytest.raises(ValueError, match="must hold a token"):
        model(some_ids(2, 60)[:, :0])


def test_the_scan_of_nothing_is_nothing_and_an_unknown_method_is_refused():
    x, dt, A, B, C, state = scan_inputs(3)
    y, end = selective_scan(x[:, :0], dt[:, :0], A, B[:, :0], C[:, :0], state)
    assert y.shape == x[:, :0].shape and torch.equal(end, state)
    with pytest.raises(ValueError, match="chunkde"):
        selective_scan(x, dt, A, B, C, state, method="chunkde")


def test_a_flipped_bit_in_the_tensors_of_a_saved_state_is_refused(tmp_path):
    model = TinyMambaModel(tiny_config())
    _, state = model.advance(some_ids(1, 9), model.init_state(1))
    state.save(tmp_path / "s.safetensors", model)
    raw = bytearray((tmp_path / "s.safetensors").read_bytes())
    raw[-40] ^= 16
    (tmp_path / "s.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match="damaged"):
        ModelState.load(tmp_path / "s.safetensors", model)
