"""The branches of testv2.py: SSM, short convolution, attention with RoPE, and the gate over them.

Each is compared with a slow one that says the same in other words.
"""

import itertools
import math
import operator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DOCUMENTS,
    EOS,
    FIRST_FORM,
    FORMS,
    GATES,
    Census,
    close,
    close_angles,
    examples,
    free_copy,
    piece_of,
    some_ids,
    tiny_config,
    wide,
)
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import testv2
from testv2 import (
    LayerState,
    RotaryEmbedding,
    TinyMambaModel,
    TokenAdaptiveGating,
    apply_rotary_pos_emb,
    map_layers,
    running_phase,
    selective_scan,
    sparsemax,
)
from tinymamba.cli import UserError


def past_of(**parts) -> LayerState:
    """A LayerState of which one branch has its part only."""
    return LayerState(**{**dict.fromkeys(LayerState._fields), **parts})


def gradients(outputs, inputs):
    """Of a fixed sum over all outputs."""
    g = torch.manual_seed(9)
    loss = sum((y * torch.randn(y.shape, generator=g, dtype=torch.float64)).sum() for y in outputs)
    return torch.autograd.grad(loss, inputs, materialize_grads=True)


# --------------------------------------------------------------------------------------- ssm


def complex_pairs(t):
    return torch.complex(*t.chunk(2, dim=-1))


def turned(pairs, half_turns):
    return pairs * torch.polar(torch.ones_like(half_turns), math.pi * half_turns)


def angle_by_hand(a):
    """0 up to 1/2, then growing up to half a turn at 3/2; the same downwards."""
    return a.sign() * (a.abs() - 0.5).clamp(min=0, max=1)


def ssm_by_hand(ssm, u, past, begins, starts):
    """Token by token, with a state of complex numbers that tokens turn, change and read.

    begins (b, l) tells where a document begins, and starts (b, l) where that of a token began. Our
    states are kept as if never turned; of n/2 pairs only the first r turn.
    """
    z, x, B, C, dt = ssm.in_proj(u).split(ssm.sizes, dim=-1)
    angle = ssm.angle_proj(u)
    if ssm.config.bc_conv:
        tail = tail_of_ssm(ssm, past)
        B, C = conv_by_hand(ssm.conv.weight, torch.cat((B, C), -1), tail, starts).chunk(2, -1)
    x, B, C = x.unflatten(-1, (ssm.n_heads, -1)), complex_pairs(B), complex_pairs(C)
    still = B.shape[-1] - angle.shape[-1]
    dt, angle = (dt + ssm.dt_bias).exp().log1p(), F.pad(angle_by_hand(angle), (0, still))
    dt = dt - ssm.config.min_decay / ssm.A_log.exp().detach()
    dt = dt + dt.detach().clamp(max=0).neg()  # 0 where it would be below, with the same gradient
    phase = F.pad(past.phase, (0, still))
    h = turned(complex_pairs(past.ssm), -phase[:, None, None])
    ys = []
    for t in range(u.shape[1]):
        h = torch.where(begins[:, t, None, None, None], 0.0, h)
        decay = (-dt[:, t] * ssm.A_log.exp()).exp()[..., None, None]
        h = turned(h, -angle[:, t, None, None]) * decay
        h = h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, None, None]
        ys.append((h * C[:, t, None, None].conj()).real.sum(-1) + ssm.D[:, None] * x[:, t])
        phase = phase + angle[:, t]
    h = turned(h, phase[:, None, None])
    y = torch.stack(ys, dim=1).flatten(2) * z * z.sigmoid()
    return ssm.out_proj(y), torch.cat((h.real, h.imag), dim=-1), phase[:, : past.phase.shape[1]]


def tail_of_ssm(ssm, past):
    """The last B and C, which stand between the last inputs and those of attention."""
    c = ssm.config
    return past.conv.split([c.d_model, 2 * c.d_state, attention_channels(c)], dim=-1)[1]


def attention_channels(config) -> int:
    """How many channels the convolution in attention has: of keys, or of queries and values too."""
    return config.d_model * config.k_conv * (3 if config.qv_conv else 1)


def ssm_past(ssm, state, phase, tail) -> LayerState:
    """What the SSM branch reads of a LayerState, from what it gave."""
    around = ssm.config.d_model, attention_channels(ssm.config)
    tail = None if tail is None else F.pad(tail, around)
    return past_of(ssm=state, phase=phase, conv=tail)


def random_past(model, rows) -> LayerState:
    """A LayerState full of random values."""
    return map_layers(torch.randn_like, model.init_state(rows).layers[0])


@pytest.mark.parametrize("past", ["fresh", "continued"])
@pytest.mark.parametrize("documents", [False, True], ids=["one_text", "documents"])
@pytest.mark.parametrize("scan", ["chunked", "sequential"])
@pytest.mark.parametrize("L", [1, 2, 41])
@pytest.mark.parametrize("form", FORMS)
def test_ssm_branch_equals_a_turning_state_of_complex_numbers(form, L, scan, documents, past):
    shape = {"scan": scan, "low_rank": 5, **FORMS[form], "memory": False}
    model = wide(double=True, document_mask=documents, eos_id=EOS, **shape)
    ssm = free_copy(model.blocks[0].ssm)
    index, starts = torch.arange(L).expand(2, -1), torch.zeros(2, L, dtype=torch.int64)
    if documents:
        starts[0, L // 3 :], starts[1, L // 2 :], starts[1, L - 1 :] = L // 3, L // 2, L - 1
    before = model.init_state(2).layers[0]
    if past == "continued":
        starts = torch.where(starts == 0, -7, starts)
        before = random_past(model, 2)
    u = torch.randn(2, L, 32, dtype=torch.float64, requires_grad=True)
    inputs = [u, *ssm.parameters()]
    if past == "continued":
        inputs += [t.requires_grad_() for t in (before.ssm, before.phase, before.conv)]
    piece = piece_of(model, L, starts)
    y, state, phase, _ = ssm(u, piece, before if past == "continued" else None)
    want = ssm_by_hand(ssm, u, before, (starts == index) & documents, starts)
    close(y, want[0], 1e-9)
    close(state, want[1], 1e-9)
    close_angles(phase, want[2], 1e-9)
    pairs = zip(gradients((y, state), inputs), gradients(want[:2], inputs), strict=True)
    for got, gradient in pairs:
        close(got, gradient, 1e-9)


class Neutral(torch.nn.Module):
    """Stands where transformers' Mamba-2 normalizes: its gate remains."""

    def forward(self, y, z):
        return y * z * z.sigmoid()


@pytest.mark.parametrize("L", [1, 2, 15, 16, 17, 80])
@pytest.mark.parametrize("scan", ["chunked", "sequential"])
def test_ssm_branch_without_angles_equals_mamba2_of_transformers(scan, L):
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    from transformers import Mamba2Config

    model = wide(scan=scan, **FIRST_FORM)
    ours = free_copy(model.blocks[0].ssm)
    torch.nn.init.zeros_(ours.angle_proj.weight)
    torch.nn.init.zeros_(ours.angle_proj.bias)
    ours.angle_proj.requires_grad_(False)
    shape = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 8, "expand": 2}
    theirs = mamba2.Mamba2Mixer(
        Mamba2Config(
            **shape, n_groups=1, conv_kernel=1, chunk_size=16, use_bias=True, use_conv_bias=False,
            hidden_act="linear", num_hidden_layers=1, time_step_limit=(0.0, math.inf),
        ),
        layer_idx=0,
    )  # fmt: skip
    theirs.eval().norm = Neutral()

    weights = {name: t for name, t in ours.state_dict().items() if "angle_proj" not in name}
    theirs.load_state_dict({**weights, "conv1d.weight": torch.ones(80, 1, 1)})
    u = torch.randn(2, L, 32)
    loss_weights = torch.randn(2, L, 32)

    def run(module, f):
        v = u.clone().requires_grad_()
        y = f(v)
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        got = torch.autograd.grad((y * loss_weights).sum(), [v, *named.values()])
        return y, got[0], dict(zip(named, got[1:], strict=True))

    y, du, dw = run(ours, lambda v: ours(v, piece_of(model, L), None)[0])
    y2, du2, dw2 = run(theirs, theirs)
    close(y, y2, 1e-5)
    close(du, du2, 1e-4)
    for name, gradient in dw.items():
        close(gradient, dw2[name], 1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_steps_angles_and_both_projections_of_the_state_depend_on_the_input(monkeypatch, form):
    seen = {}

    def scan(x, dt, A, B, C, *rest):
        seen.update(dt=dt, B=B, C=C)
        return selective_scan(x, dt, A, B, C, *rest)

    def phase(angle, *rest):
        seen.update(angle=angle)
        return running_phase(angle, *rest)

    monkeypatch.setattr(testv2, "selective_scan", scan)
    monkeypatch.setattr(testv2, "running_phase", phase)
    model = TinyMambaModel(tiny_config(**FORMS[form]))  # at its first values
    model.blocks[0].ssm(torch.randn(1, 20, 32), piece_of(model, 20), None)
    assert set(seen) == {"dt", "B", "C", "angle"}
    for name, t in seen.items():
        assert (t[0, 4:].std(0) > 1e-6).all(), name
    assert (seen["dt"] >= (0 if form == "today's" else testv2.MIN_DT))[seen["dt"] != 0].all()
    assert (seen["dt"] > 0).any()
    assert (seen["angle"].abs() <= 1).all()


def test_a_step_of_zero_has_the_gradient_of_softplus():
    ssm = TinyMambaModel(tiny_config()).blocks[0].ssm
    raw = torch.linspace(-12, 4, 50)[:, None].expand(-1, ssm.n_heads).clone().requires_grad_()
    dt = ssm.step_sizes(raw)
    least = ssm.config.min_decay / ssm.A_log.exp()
    close(dt, (F.softplus(raw + ssm.dt_bias) - least).clamp(min=0), 1e-6)
    assert 0 < (dt == 0).float().mean() < 1
    dt.sum().backward()
    close(raw.grad, (raw + ssm.dt_bias).sigmoid(), 1e-6)
    faded = (-dt * ssm.A_log.exp()).exp()  # of the state, by a token
    assert (faded == 1).any() and (faded < 1).any()


def test_noise_on_steps_and_angles_is_for_training_only():
    ssm = TinyMambaModel(tiny_config(state_noise=0.15)).blocks[0].ssm
    x = torch.zeros(20_000)
    assert ssm.eval().noisy(x) is x
    assert ssm.train().noisy(x).std().item() == pytest.approx(0.15, rel=0.05)
    ssm.config.state_noise = 0.0
    assert ssm.noisy(x) is x


@pytest.mark.parametrize("scan", ["chunked", "sequential"])
@pytest.mark.parametrize("form", FORMS)
def test_a_state_that_no_token_asks_to_change_stays_the_same_bits(form, scan):
    model = TinyMambaModel(tiny_config(scan=scan, **FORMS[form]))
    ssm, u = model.blocks[0].ssm, torch.randn(2, 300, 32)
    written = model.init_state(2).layers[0]
    written = written._replace(ssm=torch.randn_like(written.ssm))
    with torch.no_grad():
        ssm.dt_bias.fill_(-12.0)  # a softplus of 6e-6, which alone would forget 3% of it
        ssm.angle_proj.bias.fill_(1.0)  # turns in every token
        _, state, *_ = ssm(u, piece_of(model, 300), written)
        assert torch.equal(state, written.ssm)
        ssm.dt_bias.fill_(-4.0)
        assert not torch.equal(ssm(u, piece_of(model, 300), written)[1], written.ssm)


def parity_machine(form):
    """An SSM, set by hand, whose output is +1 after an even number of ones and -1 after an odd.

    Input 0 is the bit, input 1 marks the begin: it alone has a step, and writes to the state. A one
    turns the state by half a turn, and every token reads.
    """
    model = TinyMambaModel(tiny_config(chunk_size=16, **FORMS[form])).requires_grad_(False)
    ssm = model.blocks[0].ssm
    z, x, B, C, dt = ssm.in_proj.bias.split(ssm.sizes)
    _, write, _, _, step = ssm.in_proj.weight.split(ssm.sizes)
    turn, least = ssm.angle_proj.weight, ssm.config.min_decay
    for layer in (ssm.in_proj, ssm.out_proj, ssm.angle_proj):
        layer.weight.zero_()
        layer.bias.zero_()
    ssm.D.zero_()
    ssm.A_log.zero_()
    ssm.dt_bias.fill_(-20.0)
    step[:, 1] = 20 + math.log(math.expm1(1 + least))  # dt = 1
    B[0] = C[0] = z[0] = 1.0
    write[0, 1], turn[0, 0] = 1.0, 100.0
    ssm.out_proj.weight[0, 0] = 1 / torch.tensor(1.0).sigmoid()  # of z * sigmoid(z)
    if ssm.conv is not None:
        ssm.conv.weight.zero_()
    return model, ssm


@pytest.mark.parametrize("form", FORMS)
def test_a_turning_state_tracks_parity_which_decays_cannot(form):
    model, ssm = parity_machine(form)
    bits = torch.rand(16, 257, generator=torch.manual_seed(0)) < 0.5
    bits[:, 0] = False  # the begin
    bits[0], bits[1, 1:] = False, True
    u = torch.zeros(16, 257, 32)
    u[..., 0], u[:, 0, 1] = bits, 1.0
    want = 1.0 - 2.0 * (bits.cumsum(1) % 2)
    close(ssm(u, piece_of(model, 257), None)[0][..., 0], want, 1e-4)
    past, outputs = None, []
    for t in range(257):
        y, *state = ssm(u[:, t : t + 1], piece_of(model, 1), past)
        past = ssm_past(ssm, *state)
        outputs.append(y[..., 0])
    close(torch.cat(outputs, dim=1), want, 1e-4)
    ssm.angle_proj.weight[:, 0] = 0.0  # no token turns
    close(ssm(u, piece_of(model, 257), None)[0][..., 0], torch.ones(16, 257), 1e-4)


def test_half_turns_do_not_drift_however_long_the_text():
    model, ssm = parity_machine("today's")
    *_, C, _ = ssm.in_proj.bias.split(ssm.sizes)
    C[0], C[4] = 0.0, 1.0  # reads across: nothing, so long as the state has turned by half turns
    u = torch.zeros(1, 100_000, 32)
    u[..., 0], u[0, 0, 1] = 1.0, 1.0
    y, *state = ssm(u, piece_of(model, 100_000), None)
    assert y[..., 0].abs().max() < 1e-5
    assert state[0].abs().max() > 0.99
    for t in range(1, 1000):
        y, *state = ssm(u[:, t : t + 1], piece_of(model, 1), ssm_past(ssm, *state))
    assert y[..., 0].abs().max() < 1e-5


# ------------------------------------------------------------------------------- running phase


def phase_in_pieces(angle, sizes):
    phase, parts = None, []
    for piece in angle.split(sizes, dim=1):
        parts.append(running_phase(piece, phase))
        phase = parts[-1][:, -1]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 256, 1000])
def test_a_compiled_sum_is_in_parts_and_the_same(length, monkeypatch):
    """So that Inductor does not split it on a GPU; see `running_sum`."""
    angle = torch.randn(2, length, 3).clamp(-1, 1)
    lengths = []

    def sums(x, dim):
        lengths.append(x.shape[dim])
        return cumsum(x, dim)

    cumsum = torch.Tensor.cumsum
    want = running_phase(angle, torch.ones(2, 3))
    monkeypatch.setattr(torch.Tensor, "cumsum", sums)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    close(running_phase(angle, torch.ones(2, 3)), want, 1e-6)
    assert max(lengths) <= 128 and len(lengths) == (1 if length <= 128 else 2)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)], ids=["f32", "f64"]
)
@pytest.mark.parametrize("sizes", [[300], [1] * 300, [299, 1], [7, 64, 1, 1, 128, 99]])
def test_any_split_gives_the_phase_of_one_pass(sizes, dtype, tolerance):
    angle = torch.randn(2, 300, 4, dtype=torch.float64).tanh().to(dtype)
    got = phase_in_pieces(angle, sizes)
    assert got.dtype == dtype
    assert (got >= 0).all() and (got < 2).all()
    close_angles(got.double(), angle.double().cumsum(1), tolerance)


def test_the_phase_is_exact_after_a_million_tokens_in_pieces():
    angle = (0.5 + torch.randn(1, 1_000_000, 2)).tanh()  # most turn the same way
    got = phase_in_pieces(angle, 997)[:, -1].double()
    exact = [[math.fsum(channel) for channel in angle[0].T.tolist()]]
    close_angles(got, torch.tensor(exact, dtype=torch.float64), 1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_padded_row_keeps_its_state(form):
    model = wide(**FORMS[form])
    ssm, u, past = model.blocks[0].ssm, torch.randn(3, 20, 32), random_past(model, 3)
    past = past._replace(phase=past.phase.remainder(2))
    lengths = torch.tensor([20, 7, 0])
    _, *new = ssm(u, piece_of(model, 20, lengths=lengths), past)
    new = ssm_past(ssm, *new)
    for row, length in enumerate(lengths.tolist()):
        one = slice(row, row + 1)
        alone = map_layers(operator.itemgetter(one), past)
        if length:
            _, *alone = ssm(u[one, :length], piece_of(model, length), alone)
            alone = ssm_past(ssm, *alone)
        close(new.ssm[one], alone.ssm, 1e-5)
        close_angles(new.phase[one], alone.phase, 1e-6)
        if ssm.conv is not None:
            close(tail_of_ssm(ssm, new)[one], tail_of_ssm(ssm, alone), 1e-6)
    assert torch.equal(new.phase[2], past.phase[2])
    assert torch.equal(new.ssm[2], past.ssm[2])


@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_document_does_not_depend_on_the_phase_at_its_begin(form):
    model = wide(double=True, document_mask=True, eos_id=EOS, **FORMS[form])
    ids, other = some_ids(2, 20), some_ids(2, 30, seed=1)
    ids[:, -1] = EOS
    _, state = model.advance(ids, model.init_state(2))
    logits, _ = model.advance(other, state)
    turned = state.clone()
    for layer in turned.layers:
        layer.phase.copy_(2 * torch.rand_like(layer.phase))
    close(model.advance(other, turned)[0], logits, 1e-11, scale=1.0)
    ssm, u = model.blocks[0].ssm, torch.randn(2, 30, 32, dtype=torch.float64)
    starts = torch.full((2, 30), -5)
    starts[:, 11:] = 11  # the document begins within the piece
    y, again = (ssm(u, piece_of(model, 30, starts), s.layers[0])[0] for s in (state, turned))
    close(again[:, 11:], y[:, 11:], 1e-9)


# -------------------------------------------------------------------------- short convolution


def conv_by_hand(weight, u, tail, starts):
    """u plus its k last values, tap by tap; a tap before `starts` is zero."""
    (batch, L, _), K = u.shape, weight.shape[1]
    rows = []
    for b, t in itertools.product(range(batch), range(L)):
        total = u[b, t]
        for k in range(K):
            source = t - (K - 1 - k)
            if source >= starts[b, t]:
                total = total + weight[:, k] * (u[b, source] if source >= 0 else tail[b, source])
        rows.append(total)
    return torch.stack(rows).view_as(u)


@pytest.mark.parametrize("past", ["fresh", "continued"])
@pytest.mark.parametrize("documents", [False, True], ids=["one_text", "documents"])
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("L", [1, 2, 3, 19])
def test_short_conv_equals_a_loop_over_taps(L, K, documents, past):
    model = wide(double=True, d_conv=K, document_mask=documents, eos_id=EOS)
    conv = free_copy(model.blocks[0].conv)
    u = torch.randn(2, L, 32, dtype=torch.float64, requires_grad=True)
    tail = torch.zeros(2, K - 1, 32, dtype=torch.float64)
    starts = torch.zeros(2, L, dtype=torch.int64)
    if past == "continued":
        tail, starts = torch.randn_like(tail), starts - torch.tensor([[1], [100]])
    if documents:
        starts[0, L // 3 :], starts[1, L // 2 :], starts[1, L - 1 :] = L // 3, L // 2, L - 1
    tail.requires_grad_()
    piece = piece_of(model, L, starts)
    y, new_tail = conv(u, piece, tail if past == "continued" else None)
    seen = starts if documents else starts.clamp(max=0) - (past == "continued") * 100
    want = conv_by_hand(conv.weight, u, tail, seen)
    close(y, want, 1e-12)
    close(new_tail, torch.cat((tail, u), dim=1)[:, L:], 1e-12)
    inputs = [u, conv.weight, *([tail] if past == "continued" else [])]
    pairs = zip(gradients([y], inputs), gradients([want], inputs), strict=True)
    for got, gradient in pairs:
        close(got, gradient, 1e-12)


@pytest.mark.parametrize("documents", [False, True], ids=["one_text", "documents"])
def test_short_conv_sees_exactly_its_last_taps_of_its_own_channel(documents):
    model = wide(document_mask=documents, eos_id=EOS)
    u = torch.randn(2, 12, 32, requires_grad=True)
    y = model.blocks[0].conv(u, piece_of(model, 12, torch.zeros(2, 12, dtype=torch.int64)), None)[0]
    for t in (0, 2, 5, 11):
        (gradient,) = torch.autograd.grad(y[1, t, 3], u, retain_graph=True)
        seen = gradient.nonzero().tolist()
        assert seen == [[1, s, 3] for s in range(max(0, t - 3), t + 1)]


def test_the_tail_of_a_padded_row_ends_with_its_last_token():
    model = wide()
    u, tail = torch.randn(4, 6, 32), torch.randn(4, 3, 32)
    lengths = torch.tensor([6, 4, 1, 0])
    _, new = model.blocks[0].conv(u, piece_of(model, 6, lengths=lengths), tail)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(new[row], torch.cat((tail[row], u[row, :length]))[-3:])


# --------------------------------------------------------------------------------- attention


def rms(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def taps_of(attention):
    """The convolutions of queries, keys and values, (3, d, k); zeros where there is none."""
    d = attention.n_heads * attention.head_dim
    if attention.conv is None:
        return torch.zeros(3, d, 1, dtype=attention.q_norm.weight.dtype)
    taps = attention.conv.weight
    return taps.unflatten(0, (3, d)) if len(taps) > d else F.pad(taps[None], (0,) * 4 + (1, 1))


def naive_attention(attention, u, W, starts, theta=10000.0):
    """Full softmax with a band mask; RoPE as complex numbers, by absolute position.

    starts (b, l) tells where the document of each token begins.
    """
    taps, qkv = taps_of(attention), attention.qkv(u).chunk(3, dim=-1)
    q, k, v = (conv_by_hand(taps[i], x, None, starts) for i, x in enumerate(qkv))
    q, k, v = (x.unflatten(-1, (attention.n_heads, -1)).transpose(1, 2) for x in (q, k, v))
    q, k = rms(q, attention.q_norm), rms(k, attention.k_norm)
    L, width = q.shape[-2:]
    t = torch.arange(L)
    angles = t[:, None] * theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    turn = torch.polar(torch.ones_like(angles), angles)
    q, k = (torch.complex(*x.chunk(2, -1)) * turn for x in (q, k))  # (b, a, l, f/2)
    scores = (q[..., :, None, :] * k[..., None, :, :].conj()).real.sum(-1) * width**-0.5
    gap = t[:, None] - t
    hidden = (gap < 0) | (gap >= W) | (t < starts[..., None])  # (b, l, l)
    scores = scores.masked_fill(hidden[:, None], -math.inf)
    y = scores.softmax(-1) @ v
    return attention.out_proj(y.transpose(1, 2).flatten(2))


SHAPES = [(1, 1), (5, 1), (3, 8), (7, 8), (8, 8), (9, 8), (16, 8), (29, 8), (20, 5), (4, 100)]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("documents", [False, True], ids=["one_text", "documents"])
@pytest.mark.parametrize("form", [*FORMS, "keys"])
@pytest.mark.parametrize(("L", "W"), SHAPES)
def test_attention_equals_a_full_softmax_with_a_band_mask(L, W, form, documents, fused):
    shape = {
        "window_size": W,
        "use_flash_attn": fused,
        "low_rank": 5,
        **FORMS.get(form, {"qv_conv": False}),
        "memory": False,
    }
    model = wide(double=True, document_mask=documents, eos_id=EOS, **shape)
    attention = free_copy(model.blocks[1].attention)
    starts = torch.zeros(2, L, dtype=torch.int64)
    if documents:
        starts[0, L // 3 :], starts[1, L // 2 :], starts[1, L - 1 :] = L // 3, L // 2, L - 1
    u = torch.randn(2, L, 32, dtype=torch.float64, requires_grad=True)
    y, keys, values, tail, _ = attention(u, piece_of(model, L, starts), None)
    assert y.shape == u.shape
    assert keys.shape == values.shape == (2, 2, W - 1, 16)
    if attention.conv is not None:
        inputs = attention.qkv(u) if attention.conv.channels > 32 else attention.qkv(u)[..., 32:64]
        close(tail, F.pad(inputs, (0, 0, 3, 0))[:, L:], 1e-12)
    want, inputs = naive_attention(attention, u, W, starts), [u, *attention.parameters()]
    close(y, want, 1e-9)
    for got, gradient in zip(gradients([y], inputs), gradients([want], inputs), strict=True):
        close(got, gradient, 1e-9)


def dense_attention(q, keys, values, W, starts):
    """Softmax over all keys, those of position -w to l-1, where a band and the document allow."""
    token, key = torch.arange(q.shape[2])[:, None], torch.arange(-W, q.shape[2])
    visible = (key <= token) & (key > token - W) & (key >= starts[:, None, :, None])
    scores = (q @ keys.mT) * q.shape[-1] ** -0.5
    return scores.masked_fill(~visible, -math.inf).softmax(-1) @ values


@pytest.mark.parametrize("first", [0, -3, -1000])  # where the first document begins
@pytest.mark.parametrize("documents", [False, True], ids=["one_text", "documents"])
@pytest.mark.parametrize(("L", "W"), SHAPES)
def test_both_ways_to_attend_equal_a_dense_softmax(monkeypatch, L, W, documents, first):
    attention = wide(double=True, window_size=W).blocks[0].attention
    starts = torch.full((2, L), first)
    if documents:
        starts[0, L // 3 :], starts[1, L // 2 :], starts[1, L - 1 :] = L // 3, L // 2, L - 1
    shape = {"dtype": torch.float64, "requires_grad": True}
    q = torch.randn(2, 2, L, 16, **shape)
    keys, values = (torch.randn(2, 2, W + L, 16, **shape) for _ in range(2))
    want = dense_attention(q, keys, values, W, starts)
    slopes = gradients([want], [q, keys, values])
    given = None if first == 0 and not documents else starts
    for attend, written_out in ((attention.attend_fused, False), (attention.attend_plain, True)):
        monkeypatch.setattr(attention, "is_plain", lambda *_, way=written_out: way)
        plain = [(None, False), (None, True)] if given is None else []
        for starts_given, new in [(starts, False), *plain]:
            mask = attention.mask(L, starts_given, q.device, new)
            assert (mask is None) == (new and not written_out and L <= W)
            got = attend(q, keys, values, mask)
            close(got, want, 1e-12)
            for one, two in zip(gradients([got], [q, keys, values]), slopes, strict=True):
                close(one, two, 1e-11)


class Calls(TorchDispatchMode):
    """Names of the operations that PyTorch carries out."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("documents", [False, True], ids=["one_text", "documents"])
@pytest.mark.parametrize("L", [1, 7, 45])
def test_fused_attention_is_fused(monkeypatch, L, documents):
    """PyTorch has one kernel for it, with and without gradients, and takes no other way."""
    attention = wide().blocks[0].attention
    monkeypatch.setattr(attention, "is_plain", lambda *_: False)
    starts = torch.zeros(2, L, dtype=torch.int64) if documents else None
    q = torch.randn(2, 2, L, 16, requires_grad=True)
    keys, values = (torch.randn(2, 2, 8 + L, 16, requires_grad=True) for _ in range(2))
    with Calls() as calls:
        attention.attend_fused(
            q, keys, values, attention.mask(L, starts, q.device)
        ).sum().backward()
    fused = "_scaled_dot_product_flash_attention_for_cpu"
    assert {fused, f"{fused}_backward"} <= calls.names
    assert not calls.names & {"bmm", "_softmax", "_safe_softmax"}


@pytest.mark.parametrize("L", [1, 7, 45])
def test_what_the_kernels_of_a_gpu_ask_of_fused_attention(monkeypatch, L):
    """Four dimensions, one dtype, dense last dimensions, a mask without gradient for every row."""
    seen = []
    attend = F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, is_causal=False):
        assert is_causal == (attn_mask is None) == (model.config.window_size >= L)
        seen.append((q, k, v, attn_mask))
        return attend(q, k, v, attn_mask=attn_mask, is_causal=is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model = wide()
    for block in model.blocks:
        monkeypatch.setattr(block.attention, "is_plain", lambda *_: False)
    with torch.autocast("cpu", torch.bfloat16):
        model(some_ids(3, L), some_ids(3, L))
    assert len(seen) == len(model.blocks)
    for q, k, v, mask in seen:
        assert q.dim() == k.dim() == v.dim() == 4
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        assert q.shape[:2] == k.shape[:2] == v.shape[:2] and k.shape == v.shape
        assert all(t.stride(-1) == 1 for t in (q, k, v))
        if mask is None:
            assert q.shape == k.shape  # nothing but the text itself
            continue
        assert mask.dtype == torch.bool
        assert mask.shape == (q.shape[0], 1, q.shape[2], k.shape[2])


@pytest.mark.parametrize("k_conv", [True, False])
@pytest.mark.parametrize("qv_conv", [True, False])
@pytest.mark.parametrize(("L", "W"), SHAPES)
def test_attention_sees_exactly_the_last_window_tokens(L, W, qv_conv, k_conv):
    """And the three before, through the oldest value, or its key: a single key's weight is 1."""
    model = wide(window_size=W, k_conv=k_conv, qv_conv=qv_conv)
    reach = W - 1 + (3 if k_conv and (qv_conv or W > 1) else 0)
    u = torch.randn(2, L, 32, requires_grad=True)
    y = model.blocks[0].attention(u, piece_of(model, L), None)[0]
    for t in {0, L // 2, max(0, L - 2), L - 1}:
        (gradient,) = torch.autograd.grad(y[1, t].square().sum(), u, retain_graph=True)
        assert not gradient[0].any()
        seen = gradient[1].abs().amax(-1) > 0
        assert seen.nonzero().flatten().tolist() == list(range(max(0, t - reach), t + 1))


def queries_and_keys(attention, u, piece):
    """What attention normalizes: queries and keys before RoPE, (b, l, d) each."""
    seen = []
    hooks = [
        norm.register_forward_hook(lambda module, args, out: seen.append(args[0].flatten(2)))
        for norm in (attention.q_norm, attention.k_norm)
    ]
    attention(u, piece, None)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
@pytest.mark.parametrize("d_conv", [1, 2, 4])
@pytest.mark.parametrize("low_rank", [0, 5])
@pytest.mark.parametrize("qv_conv", [True, False])
def test_a_key_is_at_first_the_query_of_the_token_before(qv_conv, low_rank, d_conv):
    """Exactly so without the random taps; the first token of a document has none before.

    A single tap cannot shift: keys then begin as the model's own.
    """
    shape = {"low_rank": low_rank, "d_conv": d_conv, "qv_conv": qv_conv}
    model = TinyMambaModel(tiny_config(**shape, **DOCUMENTS))
    starts = torch.zeros(2, 12, dtype=torch.int64)
    starts[1, 5:] = 5
    u, piece = torch.randn(2, 12, 32), piece_of(model, 12, starts)
    for attention in (block.attention for block in model.blocks):
        shift = torch.zeros_like(attention.conv.weight)
        if d_conv > 1:
            shift[32 * qv_conv :][:32, -2:] = torch.tensor([1.0, -1.0])
        assert 0.1 < ((attention.conv.weight - shift).abs() * 2 * d_conv**0.5).max() <= 1
        attention.conv.weight.copy_(shift)
        q, k = queries_and_keys(attention, u, piece)
        own = attention.qkv(u).chunk(3, dim=-1)[1]
        before = q.roll(1, dims=1)
        before[0, 0], before[1, [0, 5]] = 0.0, 0.0
        close(k, before if d_conv > 1 else own, 1e-6)
        assert torch.equal(own, q) == (d_conv > 1)


def test_fused_attention_equals_the_softmax_written_out():
    ids = some_ids(2, 45)
    ids[0, [0, 5, 6, 30]] = EOS
    mask = torch.ones(2, 45)
    mask[1, :9] = 0
    models = [wide(use_flash_attn=fused, document_mask=True, eos_id=EOS) for fused in (True, False)]
    close(*(m(ids, attention_mask=mask) for m in models), 1e-5)
    states = [m.init_state(2) for m in models]
    for piece in ids.split([3, 20, 1, 21], dim=1):  # shorter and longer than the window
        outs = [m.advance(piece, state) for m, state in zip(models, states, strict=True)]
        states = [state for _, state in outs]
        close(outs[0][0], outs[1][0], 1e-5)


@pytest.mark.parametrize("part", ["queries", "keys", "values"])
def test_the_size_of_queries_and_keys_does_not_matter(part):
    model = wide(double=True)
    plain, scaled = (free_copy(model.blocks[0].attention).requires_grad_(False) for _ in range(2))
    rows = slice(*{"queries": (0, 32), "keys": (32, 64), "values": (64, 96)}[part])
    for t in (scaled.qkv.weight, scaled.qkv.bias):
        t[rows] *= 7.5
    for attention in (plain, scaled):
        attention.q_norm.eps = attention.k_norm.eps = 0.0
    u = torch.randn(2, 21, 32, dtype=torch.float64)
    y, again = (a(u, piece_of(model, 21), None)[0] for a in (plain, scaled))
    if part == "values":
        assert not torch.allclose(again, y, rtol=0.1)
    else:
        close(again, y, 1e-12)


def test_windows_depend_neither_on_the_total_length_nor_on_other_rows():
    model = wide(double=True)
    attention = model.blocks[0].attention
    u = torch.randn(3, 50, 32, dtype=torch.float64)
    y = attention(u, piece_of(model, 50), None)[0]
    for L in (1, 7, 8, 9, 30):
        close(attention(u[:, :L], piece_of(model, L), None)[0], y[:, :L], 1e-12)
    close(attention(u[1:2], piece_of(model, 50), None)[0], y[1:2], 1e-12)


@pytest.mark.parametrize("fused", [True, False])
def test_attention_costs_the_same_for_every_token(monkeypatch, fused):
    model, sizes = wide(), {}
    for block in model.blocks:
        monkeypatch.setattr(block.attention, "is_plain", lambda *_: not fused)
    for L in (512, 4096):
        with Census() as census:
            model.blocks[0].attention(torch.randn(1, L, 32), piece_of(model, L), None)
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
    block = model.blocks[0]
    u, _ = block.conv(block.norm(model.embedding(ids)), piece_of(model, 11), None)
    close(gates[0], block.gate(u), 1e-6)


@pytest.mark.parametrize("asked", ["some", "none", "all"])
@pytest.mark.parametrize("gate", ["top_k", "sparsemax"])
def test_an_mlp_that_skips_tokens_equals_one_that_does_not(gate, asked):
    model = wide(double=True, gate=gate)
    block, piece = free_copy(model.blocks[0]), piece_of(model, 15)
    with torch.no_grad():
        push = {"some": [0.0, 0.0, 0.0], "none": [9.0, 9.0, -9.0], "all": [0.0, -9.0, 9.0]}[asked]
        block.gate.controller.weight *= 0.2
        block.gate.controller.bias.copy_(torch.tensor(push))
    x = torch.randn(2, 15, 32, dtype=torch.float64, requires_grad=True)
    rows = []
    block.mlp.register_forward_hook(lambda m, args, out: rows.append(out.numel() // 32))

    def dense(x):
        u, _ = block.conv(block.norm(x), piece, None)
        g = block.gate(u)[..., None]
        ssm, attention = (f(u, piece, None)[0] for f in (block.ssm, block.attention))
        mix = g[..., 0, :] * ssm + g[..., 1, :] * attention + g[..., 2, :] * block.mlp(u)
        return x + block.residual_scale * mix

    got, _, gates = block(x, piece, None)
    asking = int((gates[..., 2] > 0).sum())
    assert asking == {"none": 0, "all": 30}.get(asked, asking)
    assert asked != "some" or 0 < asking < 30
    assert rows == [asking]
    want = dense(x)
    close(got, want, 1e-12)
    inputs = [x, *block.parameters()]
    loss_weights = torch.randn(2, 15, 32, dtype=torch.float64)
    pairs = zip(*(
        torch.autograd.grad((y * loss_weights).sum(), inputs, materialize_grads=True)
        for y in (got, want)), strict=True)  # fmt: skip
    for one, two in pairs:
        close(one, two, 1e-10)
