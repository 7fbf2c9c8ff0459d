"""The chunked passes of tinymamba/delta_rule.py against the recurrence and another library."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import Census, close

from tinymamba import delta_rule
from tinymamba.delta_rule import (
    GatedDeltaRule,
    carry_in_graph,
    carry_in_loop,
    delta_in_one_tile,
    delta_sequential,
    key_features,
    run_delta_rule,
    scripted_loop,
    unit_lower_inverse,
)

EXACT = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.float32, 1e-4)],
    ids=["float64", "float32"],
)


def rule_inputs(L, dtype=torch.float64, batch=6, P=4, N=6, seed=0):
    """x, beta, log_decay, K, C and a state (b, p, n).

    Keys repeat, some tokens write nothing, all, or twice the difference, and some erase the state.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    beta = torch.rand(batch, L, generator=g, dtype=torch.float64) * 2
    special = torch.randint(0, 6, beta.shape, generator=g)
    for kind, value in enumerate((0.0, 1.0, 2.0)):
        beta[special == kind] = value
    log_decay = -F.softplus(normal(batch, L) - 3)
    log_decay[torch.randint(0, 12, log_decay.shape, generator=g) == 0] = -30.0
    log_decay[torch.randint(0, 4, log_decay.shape, generator=g) == 0] = 0.0
    K = F.normalize(normal(batch, L, N), dim=-1)
    K[:, 1::3] = K[:, :-1:3] if L > 1 else K[:, 1::3]  # a third are those of the token before
    C = F.normalize(normal(batch, L, N), dim=-1)
    parts = (normal(batch, L, P), beta, log_decay, K, C, normal(batch, P, N))
    return [t.to(dtype) for t in parts]


def results(rule, inputs):
    """y, the last state and the gradients of all inputs under a fixed loss."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    y, end = rule(*inputs)
    g = torch.manual_seed(9)
    loss = (y * torch.randn(y.shape, generator=g)).sum()
    loss = loss + (end * torch.randn(end.shape, generator=g)).sum()
    return y.detach(), end.detach(), *torch.autograd.grad(loss, inputs)


def chunked(run, chunk_size):
    """A form of the rule with the arguments of `delta_sequential`."""

    def rule(x, beta, log_decay, K, C, state):
        y, end = run(x, beta, log_decay, K.to(x.dtype), C.to(x.dtype), state.mT, chunk_size)
        return y, end.mT

    return rule


# Lengths around a chunk, and of several tiles of 32 tokens; batches of more rows than a tile takes.
CASES = [
    (1, 1, 2), (40, 1, 2), (1, 8, 2), (7, 8, 2), (8, 8, 2), (9, 8, 2), (100, 8, 1), (21, 8, 9),
    (11, 12, 2), (13, 12, 2), (50, 12, 3), (31, 32, 2), (32, 32, 2), (33, 32, 2), (130, 32, 2),
]  # fmt: skip


@EXACT
@pytest.mark.parametrize(("L", "chunk_size", "batch"), CASES)
def test_chunks_equal_the_recurrence_in_outputs_states_and_gradients(
    monkeypatch, L, chunk_size, batch, dtype, tolerance
):
    monkeypatch.setattr(delta_rule, "CPU_TILE", 32)
    inputs = rule_inputs(L, dtype, batch)
    want = results(delta_sequential, inputs)
    got = results(chunked(GatedDeltaRule.apply, chunk_size), inputs)
    for one, two in zip(got, want, strict=True):
        assert one.dtype == dtype
        close(one, two, tolerance)
    monkeypatch.setattr(delta_rule, "is_writing_graph", lambda: True)
    for one, two in zip(chunked(delta_in_one_tile, chunk_size)(*inputs), want, strict=False):
        close(one, two, tolerance)


def test_gradients_of_the_rest_do_not_need_that_of_x(monkeypatch):
    monkeypatch.setattr(delta_rule, "CPU_TILE", 32)
    x, *inputs = rule_inputs(130)
    inputs = [t.requires_grad_() for t in (*inputs[:-1], inputs[-1].mT.contiguous())]
    grads = [torch.autograd.grad(GatedDeltaRule.apply(first, *inputs, 8)[0].square().sum(), inputs)
             for first in (x, x.clone().requires_grad_())]  # fmt: skip
    for got, want in zip(*grads, strict=True):
        close(got, want, 1e-12)


def test_gradients_are_the_slopes_of_the_outputs(monkeypatch):
    monkeypatch.setattr(delta_rule, "CPU_TILE", 4)
    inputs = rule_inputs(7, batch=3, P=2, N=2)
    inputs[2] -= 0.1  # at 0 it has a slope on one side only
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(chunked(GatedDeltaRule.apply, 2), inputs, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision_is_near_float32_and_keeps_the_state_in_float32(dtype, tolerance):
    x, beta, log_decay, K, C, state = rule_inputs(200, torch.float32, P=8, N=16)
    beta = beta / 2
    x, K, C = (t.to(dtype) for t in (x, K, C))
    want = results(delta_sequential, [x.float(), beta, log_decay, K.float(), C.float(), state])
    got = results(chunked(GatedDeltaRule.apply, 32), [x, beta, log_decay, K, C, state])
    half = {0, 2, 5, 6}  # y and the gradients of x, K and C
    for i, (one, two) in enumerate(zip(got, want, strict=True)):
        assert one.dtype == (dtype if i in half else torch.float32)
        assert (one.float() - two).norm() < tolerance * two.norm(), i


@pytest.mark.parametrize("chunk_size", [25, 31, 32, 100])
def test_one_key_for_a_whole_text_costs_no_digits(chunk_size):
    x, beta, log_decay, K, C, state = rule_inputs(200, batch=1)
    K, log_decay = K[:, :1].expand_as(K), torch.zeros_like(log_decay)
    inputs = [x, torch.full_like(beta, 0.98), log_decay, K, C, state]
    want = results(delta_sequential, inputs)
    got = results(chunked(GatedDeltaRule.apply, chunk_size), [t.float() for t in inputs])
    for one, two in zip(got, want, strict=True):
        close(one.double(), two, 1e-4)


@pytest.mark.parametrize("q", range(1, 34))
def test_the_inverse_equals_that_of_linalg_and_stays_exact_for_equal_keys(q):
    g = torch.Generator().manual_seed(q)
    A = torch.randn(3, 2, q, q, generator=g, dtype=torch.float64).tril(-1)
    A = A / A.norm(dim=-1, keepdim=True).clamp(min=1.0)
    identity = torch.eye(q, dtype=torch.float64)
    close(unit_lower_inverse(A), torch.linalg.inv(identity + A), 1e-11)
    keys = F.normalize(1 + 0.01 * torch.randn(q, 8, generator=g, dtype=torch.float64), dim=-1)
    A = 2 * (keys @ keys.T).tril(-1)
    close(unit_lower_inverse(A.float()).double(), torch.linalg.inv(identity + A), 3e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("count", [1, 2, 3, 8, 21])
def test_a_graph_carries_states_as_the_loop_does(count):
    g, q = torch.Generator().manual_seed(0), 3
    shapes = (1, 1), (q, 1), (q, 1), (q, q), (q, 4), (q, 5)  # as of through_chunk
    parts = [torch.randn(count, 2, *shape, generator=g).double() / 2 for shape in shapes]
    state = torch.randn(2, 5, 4, generator=g).double()
    want = carry_in_loop(state, parts)
    for run in (carry_in_graph, scripted_loop()):
        for one, two in zip(run(state, parts), want, strict=True):
            close(one, two, 1e-11)


def test_torch_compile_sees_each_pass_as_one_operation():
    inputs = [t.requires_grad_() for t in rule_inputs(20)]
    settings = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(delta_rule.delta_forward, (*inputs[:5], inputs[5].mT, 8), **settings)
    run = torch.compile(chunked(GatedDeltaRule.apply, 8), backend="aot_eager", fullgraph=True)
    want = results(chunked(GatedDeltaRule.apply, 8), inputs)
    for one, two in zip(results(run, inputs), want, strict=True):
        close(one, two, 1e-12)


@pytest.mark.parametrize("stepwise", [True, False], ids=["stepwise", "chunked"])
def test_a_value_is_read_back_by_its_key_until_another_replaces_it(stepwise):
    """Three values under orthogonal keys, then a fourth under the first key, then questions."""
    keys, x = torch.eye(4).double(), torch.randn(1, 7, 3, dtype=torch.float64)
    written = [0, 1, 2, 0, 3, 3, 3]
    beta = torch.tensor([1, 1, 1, 1, 0, 0, 0]).double()[None]
    K, C = keys[written][None], keys[[0, 0, 2, 0, 0, 1, 2]][None]
    state, still = torch.zeros(1, 3, 4).double(), torch.zeros(1, 7).double()
    y, end = run_delta_rule(x, beta, still, K, C, state, 3, stepwise)
    close(y[0], x[0, [0, 0, 2, 3, 3, 1, 2]], 1e-12)
    close(end[0].movedim(-1, 0)[:3], x[0, [3, 1, 2]], 1e-12)
    assert not end[..., 3].any()


@pytest.mark.parametrize("stepwise", [True, False], ids=["stepwise", "chunked"])
def test_tokens_that_write_nothing_leave_the_state_the_same_bits(stepwise):
    x, beta, log_decay, K, C, state = rule_inputs(300, torch.float32)
    nothing, still = torch.zeros_like(beta), torch.zeros_like(log_decay)
    _, end = run_delta_rule(x, nothing, still, K, C, state, 32, stepwise)
    assert torch.equal(end, state)


@pytest.mark.parametrize("chunk_size", [8, 32])
def test_outputs_and_states_equal_those_of_transformers(chunk_size):
    theirs = pytest.importorskip("transformers.models.olmo_hybrid.modeling_olmo_hybrid")
    x, beta, log_decay, K, C, state = rule_inputs(70, torch.float32)
    inputs = [t[:, :, None] for t in (C * C.shape[-1] ** 0.5, K, x)]  # they divide queries by it
    rates = {"g": log_decay[..., None], "beta": beta[..., None]}
    for rule in (theirs.torch_recurrent_gated_delta_rule, theirs.torch_chunk_gated_delta_rule):
        settings = {"initial_state": state.mT[:, None], "output_final_state": True}
        want, last = rule(*inputs, **rates, **settings)
        y, end = run_delta_rule(x, beta, log_decay, K, C, state, chunk_size, False)
        close(y, want[:, :, 0], 1e-4)
        close(end, last.mT[:, 0], 1e-4)


def test_features_of_a_key_are_its_products_and_have_length_1():
    x = torch.randn(3, 5, generator=torch.manual_seed(0), dtype=torch.float64)
    want = torch.tensor([[v[i] * v[(i + r) % 5] for r in (1, 2) for i in range(5)] for v in x])
    close(key_features(x, 2, torch.float64), F.normalize(want.double(), dim=-1), 1e-12)
    close(key_features(x, 0, torch.float64), F.normalize(x, dim=-1), 1e-12)
    lengths = key_features(1e3 * x, 4, torch.bfloat16).float().norm(dim=-1)
    close(lengths, torch.ones(3), 5e-3)
    assert not key_features(torch.zeros(2, 5), 2, torch.float32).any()


def test_the_rule_loops_over_tiles_in_memory_linear_in_length():
    counts, sizes = {}, {}
    for L in (64, 1024, 2048, 8192):
        with Census() as census:
            results(chunked(GatedDeltaRule.apply, 32), rule_inputs(L, torch.float32, batch=1))
        counts[L], sizes[L] = census.operations, census.largest
    assert counts[8192] <= 8 * counts[1024]
    for one, two in itertools.pairwise(sizes):
        assert sizes[two] <= 1.1 * two / one * sizes[one]
