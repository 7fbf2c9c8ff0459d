"""The model of testv2.py as a whole: the state law, masks, initialization, loss, sampling."""

import contextlib
import copy
import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DOCUMENTS,
    EOS,
    FORMS,
    GATES,
    ROOT,
    close,
    close_angles,
    examples,
    free_copy,
    piece_of,
    some_ids,
    tiny_config,
    wide,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import testv2
from testv2 import LowRankProjection, ModelState, TinyMambaModel, generate, make_optimizer
from tinymamba.cli import UserError
from tinymamba.kernels import ChunkedLoss, loss_and_gradients

FORM = pytest.mark.parametrize("form", FORMS)
PLAIN_KEYS = {"memory_every": 1, "memory_products": 0}
LAW = pytest.mark.parametrize(
    ("double", "tolerance"), [(False, 1e-4), (True, 1e-9)], ids=["float32", "float64"]
)


def same_state(one, two) -> bool:
    one, two = one.tensors(), two.tensors()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def close_states(one, two, tolerance):
    one, two = one.tensors(), two.tensors()
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith("phase"):
            close_angles(one[name], two[name], tolerance)
        else:
            close(one[name], two[name], tolerance, scale=1.0)


def prefilled(model, ids):
    """The state after ids."""
    return model.advance(ids, model.init_state(len(ids)))[1]


# ----------------------------------------------------------------------------- the state law


@st.composite
def texts_in_pieces(draw):
    """Chunk sizes, and ids (2, l) with EOS in random and in awkward places."""
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
    form=st.sampled_from(
        [
            {"rotating": 0.5},
            {"bc_conv": False},
            {"k_conv": False},
            {"qv_conv": False},
            PLAIN_KEYS,
            *FORMS.values(),
        ]
    ),
    double=st.booleans(),
)
def test_any_split_gives_the_logits_of_one_pass(
    gate, document_mask, text, window, d_conv, low_rank, form, double
):
    shape = {"window_size": window, "d_conv": d_conv, "low_rank": low_rank, "chunk_size": 8}
    model = wide(double, gate=gate, document_mask=document_mask, eos_id=EOS, **shape, **form)
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


@FORM
@pytest.mark.parametrize("document_mask", [False, True])
def test_logits_at_position_ten_million_equal_those_at_ten(document_mask, form):
    model = wide(document_mask=document_mask, eos_id=EOS, **FORMS[form])
    head, tail = some_ids(2, 11), some_ids(2, 30, seed=1)
    head[0, 4] = tail[1, 7] = EOS
    near, far = model.init_state(2), model.init_state(2)
    far.position += 10_000_000
    far.document_start += 10_000_000
    for piece in (head, tail):
        logits, near = model.advance(piece, near)
        far_logits, far = model.advance(piece, far)
        close(far_logits, logits, 1e-6)
    assert torch.equal(far.position, near.position + 10_000_000)


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


@FORM
def test_gradients_flow_through_a_split_as_through_one_pass(form):
    model = free_copy(wide(double=True, **FORMS[form]))
    ids, weights = some_ids(2, 21), list(model.parameters())
    whole = torch.autograd.grad(model(ids).square().mean(), weights)
    first, state = model.advance(ids[:, :13], model.init_state(2))
    second, _ = model.advance(ids[:, 13:], state)
    split = torch.autograd.grad(torch.cat((first, second), 1).square().mean(), weights)
    for got, want in zip(split, whole, strict=True):
        close(got, want, 1e-9)


# ----------------------------------------------------------------------------------- padding


def padding(kind, rows, L):
    """attention_mask (rows, l), different in each row; every row has a real token."""
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


@FORM
@pytest.mark.parametrize("document_mask", [False, True], ids=["one_text", "documents"])
def test_gradients_of_padded_rows_are_those_of_the_rows_alone(document_mask, form):
    shape = {"chunk_size": 8, **FORMS[form]}
    model = free_copy(wide(True, document_mask=document_mask, eos_id=EOS, **shape))
    ids, mask = some_ids(3, 29), padding("holes", 3, 29)
    ids[torch.rand(ids.shape, generator=torch.manual_seed(2)) < 0.2] = EOS
    weights = list(model.parameters())
    padded = model(ids, attention_mask=mask)[mask.bool()].square().sum()
    rows = zip(ids, mask.bool(), strict=True)
    alone = sum(model(row[None, real]).square().sum() for row, real in rows)
    pairs = zip(*(torch.autograd.grad(total, weights) for total in (padded, alone)), strict=True)
    for got, want in pairs:
        close(got, want, 1e-9)


@pytest.mark.parametrize("document_mask", [False, True], ids=["one_text", "documents"])
@pytest.mark.parametrize(
    ("window", "form"), [(1, "today's"), (8, "today's"), (8, "first"), (500, "today's")]
)
@LAW
def test_ragged_pieces_in_mid_session_equal_each_row_alone(
    double, tolerance, window, form, document_mask
):
    shape = {"window_size": window, "chunk_size": 8, **FORMS[form]}
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
@FORM
def test_a_change_in_one_document_leaves_the_next_unchanged(form, double, tolerance):
    model = wide(double, **DOCUMENTS, **FORMS[form])
    first, second = some_ids(2, 18), some_ids(2, 30, seed=1)
    first[:, -1] = EOS
    logits = model(torch.cat((first, second), dim=1))
    first[:, :-1] = first[:, :-1].flip(1) % 256 + 1
    again = model(torch.cat((first, second), dim=1))
    assert not torch.allclose(logits[:, :18], again[:, :18], atol=1e-2)
    close(again[:, 18:], logits[:, 18:], tolerance)


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
    ids, piece = some_ids(2, 20), piece_of(model, 20)
    x = F.embedding(ids, model.embedding.weight)
    for block in model.blocks:
        u = x / (x.square().mean(-1, keepdim=True) + block.norm.eps).sqrt() * block.norm.weight
        late = F.pad(u, (0, 0, 3, 0))  # u three tokens late, then two, one and none
        u = u + sum(late[:, k : k + 20] * block.conv.weight[:, k] for k in range(4))
        g = block.gate(u)[..., None]
        gate_half, up = block.mlp.in_proj(u).chunk(2, -1)
        mlp = block.mlp.out_proj(gate_half * gate_half.sigmoid() * up)
        ssm = block.ssm(u, piece, None)[0]
        attention = block.attention(u, piece, None)[0]
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


@pytest.mark.parametrize(
    "steps, share",
    [
        (12, 0.83),  # of the first loss; 0.75, without the DeepNet scaling 0.89
        pytest.param(50, 0.15, marks=pytest.mark.slow),  # 0.08; without the scaling 0.16
    ],
)
def test_two_hundred_layers_train_without_divergence(steps, share):
    shape = {"d_model": 8, "num_heads": 1, "ssm_head_dim": 8, "d_state": 2, "expand_factor": 1}
    rest = {"window_size": 4, "d_conv": 1, "vocab_size": 8, "bias": False, "lr": 1e-2}
    model = TinyMambaModel(tiny_config(n_layer=200, **shape, **rest))
    optimizer = make_optimizer(model, model.config)
    ids = torch.arange(3)[:, None] + torch.arange(13)  # counting, modulo 8
    losses = []
    for _ in range(steps):
        loss = model.loss(ids[:, :-1] % 8, ids[:, 1:] % 8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert max(losses) < losses[0] + 0.1
    assert np.mean(losses[-max(2, steps // 10) :]) < share * losses[0]


# ---------------------------------------------------------------------------- initialization


@pytest.mark.parametrize("deepnet", [True, False])
@pytest.mark.parametrize("low_rank", [0, 24])
def test_initial_weights_are_as_documented(low_rank, deepnet):
    D, N_LAYER = 128, 5
    shape = {"d_model": D, "n_layer": N_LAYER, "d_state": 64, "d_conv": 4}
    model = TinyMambaModel(tiny_config(low_rank=low_rank, deepnet=deepnet, **shape))
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

    shift = torch.zeros(3, D, 4)  # of queries, keys and values
    shift[1, :, 2:] = torch.tensor([1.0, -1.0])
    for taps in (
        torch.cat([block.conv.weight for block in model.blocks]),
        torch.cat([block.ssm.conv.weight for block in model.blocks]),
        torch.cat([block.attention.conv.weight - shift.flatten(0, 1) for block in model.blocks]),
    ):
        check_std(taps, 0.25 / math.sqrt(3))
        assert taps.abs().max() <= 0.25 + 1e-6
    for block in model.blocks:
        ssm, gate = block.ssm, block.gate.controller
        check(ssm.in_proj, D, 1.0)
        check(block.attention.qkv, D, (1.0, 1.0, beta))
        q, k, _ = testv2.last_layer(block.attention.qkv).weight.chunk(3)
        assert torch.equal(q, k)
        check(block.mlp.in_proj, D, 1.0)
        check(ssm.out_proj, 2 * D, beta)
        check(block.attention.out_proj, D, beta)
        check(block.mlp.out_proj, 2 * D, beta)
        close(block.residual_scale.detach(), torch.full((D,), 1 / alpha), 1e-6)
        assert not gate.weight.any()
        assert not gate.bias.any()
        A = ssm.A_log.exp()
        dt = F.softplus(ssm.dt_bias) - model.config.min_decay / A
        assert dt.min() >= 0.999e-3
        assert dt.max() <= 1.001e-1
        assert A.min() >= 0.999
        assert A.max() <= 16.01
        assert torch.equal(ssm.D, torch.ones_like(ssm.D))
        for norm in (block.norm, block.attention.q_norm, block.attention.k_norm):
            assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    memories = [block.attention.memory for block in model.blocks]
    assert [memory is not None for memory in memories] == [False, True, False, False, False]
    assert not memories[1].token_proj.weight.any()
    assert not memories[1].token_proj.bias.any()
    fading = memories[1].A_log.exp()
    assert 0.999e-4 <= fading.min() < fading.max() <= 1.001e-2


def test_first_steps_are_spread_evenly_on_a_log_scale_and_decays_evenly():
    config = tiny_config(d_model=256, ssm_head_dim=1, n_layer=4, num_heads=4)
    model = TinyMambaModel(config)
    steps = [F.softplus(b.ssm.dt_bias) - 0.05 / b.ssm.A_log.exp() for b in model.blocks]
    dt = torch.cat(steps).log10()
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
    model = free_copy(wide(True, tie_embeddings=tied))
    rows = 2 * 311
    assert rows % model.LOSS_CHUNK
    assert rows > model.LOSS_CHUNK
    ids, targets = some_ids(2, 311), some_ids(2, 311, seed=1)
    targets[0, :100] = targets[1, 5] = -100
    weights = dict(model.named_parameters())
    want = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    gradients = torch.autograd.grad(want, list(weights.values()))
    for loss in (model.loss(ids, targets), model(ids, targets)):
        close(loss, want, 1e-12)
        got = torch.autograd.grad(loss, list(weights.values()))
        for name, one, two in zip(weights, got, gradients, strict=True):
            assert two.any(), name
            close(one, two, 1e-9)


class Head(torch.nn.Linear):
    """An output layer of another class, as quantized ones are."""


@pytest.mark.parametrize("plain", [True, False])
def test_loss_never_holds_all_logits(plain):
    model = free_copy(wide(n_layer=1, vocab_size=101))
    model.head.__class__ = torch.nn.Linear if plain else Head
    model.LOSS_CHUNK = 64
    ids = some_ids(3, 100, vocab=101)
    rows, kept = [], []

    class Logits(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (101,):
                rows.append(out.numel() // 101)
            return out

    def keep(t):
        kept.append(t.numel() if t.shape[-1:] == (101,) else 0)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), Logits():
        loss = model.loss(ids, ids)
        loss.backward()
    assert max(rows) == 64 and sum(rows) >= 300
    assert sum(kept) <= 64 * 101


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_and_its_gradients_equal_those_of_pytorch(dtype):
    """With targets that do not count, a scale as of float16, and pieces of 10 tokens out of 47."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*s, generator=g).to(dtype) for s in ((47, 16), (23, 16)))
    weight, targets = weight.float(), torch.randint(23, (47,), generator=g)
    targets[[3, 20, 21]] = -100
    found = []
    for own in (True, False):
        h, w = (t.clone().requires_grad_() for t in (hidden, weight))
        if own:
            loss = ChunkedLoss.apply(h, w, targets, loss_and_gradients, 10)
        else:
            logits = h.double() @ w.to(dtype).double().mT
            loss = F.cross_entropy(logits, targets, reduction="sum")
        (1000 * loss).backward()
        assert (h.grad.dtype, w.grad.dtype) == (dtype, torch.float32)
        found.append((loss.detach().double(), h.grad.double(), w.grad.double()))
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for got, want in zip(*found, strict=True):
        close(got, want, bound)


def test_a_frozen_output_layer_costs_no_gradient_and_a_wrong_target_is_an_error():
    hidden, weight = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5)
    targets, given = torch.arange(7), []

    def step(*args):
        given.append(args[-1])
        return loss_and_gradients(*args)

    ChunkedLoss.apply(hidden, weight, targets, step, 4).backward()
    assert given == [False, False] and weight.grad is None and hidden.grad.any()
    for wrong in (-1, 11):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            ChunkedLoss.apply(hidden, weight, torch.full((7,), wrong), loss_and_gradients, 4)


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
    # Tails of the three convolutions, SSM, phase, keys and values of a layer; the only memory.
    floats = 3 * (32 + 2 * 8 + 3 * 32) + 64 * 8 + 1 + 2 * 7 * 32
    assert state.nbytes == 3 * ((c.n_layer * floats + 32 * 4 * 16) * 4 + 2 * 8)
    assert all(not t.any() for t in state.tensors().values())
    assert model.init_state(6).nbytes == 2 * state.nbytes
    assert prefilled(model, some_ids(3, 300)).nbytes == state.nbytes
    moved = state.to("meta")
    assert {t.device.type for t in moved.tensors().values()} == {"meta"}
    assert same_state(prefilled(model, some_ids(3, 5)).to("cpu"), prefilled(model, some_ids(3, 5)))


def test_the_state_of_the_demo_has_the_size_that_the_page_gives():
    with torch.device("meta"):
        state = TinyMambaModel(testv2.Config(**testv2.PRESETS["demo"])).init_state(1)
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert f"model is {state.nbytes / 1000:.0f} kB." in page


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
    [{}, {"tie_embeddings": False}, {"low_rank": 4}, {"bias": False}, FORMS["first"]],
    ids=str,
)
def test_parameter_counts_add_up_by_component(changes):
    model = TinyMambaModel(tiny_config(**changes))

    def size(*modules):
        return sum(p.numel() for m in modules for p in m.parameters())

    blocks = model.blocks
    want = {
        "embedding": size(model.embedding),
        "conv": size(*(b.conv for b in blocks)),
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
        full = [name for name, m in branch.named_children() if isinstance(m, torch.nn.Linear)]
        assert full == (["angle_proj"] if branch is block.ssm else [])  # n/2 rows: nothing to save


@pytest.mark.parametrize("low_rank", [0, 4])
def test_bias_false_leaves_no_projection_a_bias(low_rank):
    always = ("gate.controller", "memory.token_proj")
    model = TinyMambaModel(tiny_config(bias=False, low_rank=low_rank))
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert all(m.bias is None for n, m in linear.items() if not n.endswith(always))
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


COMPILED = {
    "softmax": {},
    "top_k": {"gate": "top_k", "low_rank": 8, **FORMS["first"]},
    "sparsemax": {"gate": "sparsemax", "checkpoint_activations": True, **DOCUMENTS},
}


@pytest.mark.parametrize("form", COMPILED)
def test_compiled_blocks_are_one_graph_and_equal_eager_ones(monkeypatch, form):
    """A graph for blocks with a memory, one for those without, and one of the loss."""
    model = free_copy(wide(True, n_layer=3, **COMPILED[form]))
    model.LOSS_CHUNK = 40
    ids = some_ids(2, 40)
    ids[0, 5] = EOS
    weights = list(model.parameters())
    want = model(ids, ids.roll(-1, 1))
    slopes = torch.autograd.grad(want, weights)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model.compile_blocks()
    graphs = 2 + model.config.memory
    for _ in range(2):
        loss = model(ids, ids.roll(-1, 1))
        close(loss, want, 1e-12)
        for got, slope in zip(torch.autograd.grad(loss, weights), slopes, strict=True):
            close(got, slope, 1e-9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        _, state = model.advance(ids, model.init_state(2))
        model.advance(ids[:, :1], state)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    copied = copy.deepcopy(model)  # computes with its own weights
    for block in copied.blocks:
        torch.nn.init.zeros_(block.residual_scale)
    assert copied(ids, ids).item() != pytest.approx(model(ids, ids).item(), abs=1e-3)
    model.compile_blocks(on=False)
    close(model(ids, ids.roll(-1, 1)), want, 0.0)


class Visits(TorchDispatchMode):
    """Operations that touch a tensor in host memory, and float64 scans that are slow on a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if any(t.device.type == "cpu" and t.numel() for t in tensors):
            self.found.append(str(func))
        if func is torch.ops.aten.cumsum.default and args[0].dtype == torch.float64:
            self.found += [] if args[1] in (-1, args[0].dim() - 1) else ["not the last dimension"]
        return out


@pytest.mark.parametrize("form", FORMS)
def test_a_step_on_a_device_needs_nothing_of_the_host(monkeypatch, form):
    """On the device `meta`, where tensors have no values: whoever reads one fails.

    The fused AdamW of PyTorch, which `meta` lacks, is left out.
    """
    monkeypatch.setattr(testv2, "to_autocast", lambda x: x)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with torch.device("meta"):
        model = TinyMambaModel(tiny_config(**FORMS[form]))
        ids = torch.zeros(2, 70, dtype=torch.int64)
        state = model.init_state(2)
    optimizer = testv2.make_optimizer(model, tiny_config())
    monkeypatch.setattr(optimizer.adamw, "step", lambda: None)
    with Visits() as visits:
        for _ in range(2):
            model(ids, ids).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for part in ids.split([69, 1], dim=1):
                _, state = model.advance(part, state)
    assert not visits.found


def test_the_graph_of_a_block_has_no_loop_over_the_text(monkeypatch):
    """As many operations for 8,192 tokens as for 4,096."""
    sizes = []

    def count(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return graph

    model = free_copy(wide(n_layer=1))
    for length in (4096, 8192):
        torch.compiler.reset()
        step = torch.compile(model.blocks[0].forward, backend=count, dynamic=False, fullgraph=True)
        ids = some_ids(1, length)
        context = model.make_context(ids, None, None, None)._replace(stateless=True)
        step(model.embedding(ids), context, None)
    assert len(sizes) == 2 and sizes[0] == sizes[1]


# --------------------------------------------------------------------------------- wrong calls


@pytest.mark.parametrize("rotating", [0.001, 0.25, 0.26, 0.5, 1.0])
def test_the_share_of_rotating_pairs_is_rounded_up_and_the_rest_stands_still(rotating):
    model = wide(rotating=rotating, d_state=16)
    turning = math.ceil(8 * rotating)
    assert model.blocks[0].ssm.angle_proj.out_features == turning
    state = prefilled(model, some_ids(2, 9))
    assert state.layers[0].phase.shape == (2, turning)
    phase = model.blocks[0].ssm.angle_proj(torch.randn(2, 9, 32))
    x = torch.randn(2, 9, 16)
    moved = (testv2.rotate_channels(x, phase) != x).any(1).any(0)  # (n,)
    pairs = torch.arange(8) < turning
    assert torch.equal(moved, torch.cat((pairs, pairs)))


def test_a_mask_of_another_shape_and_ids_without_tokens_are_refused():
    model = TinyMambaModel(tiny_config())
    with pytest.raises(ValueError, match="attention_mask"):
        model(some_ids(2, 60), attention_mask=torch.ones(2, 10))
    with pytest.raises(ValueError, match="need a token"):
        model(some_ids(2, 60)[:, :0])


def test_a_flipped_bit_in_the_tensors_of_a_saved_state_is_refused(tmp_path):
    model = TinyMambaModel(tiny_config())
    _, state = model.advance(some_ids(1, 9), model.init_state(1))
    state.save(tmp_path / "s.safetensors", model)
    raw = bytearray((tmp_path / "s.safetensors").read_bytes())
    raw[-40] ^= 16
    (tmp_path / "s.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match="damaged"):
        ModelState.load(tmp_path / "s.safetensors", model)
