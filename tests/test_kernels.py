"""The scan of `tinymamba/kernels.py` against the recurrence, a loop and finite differences."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Census, close

from testv2 import selective_scan
from tinymamba import kernels
from tinymamba.kernels import ChunkedScan

METHODS = pytest.mark.parametrize("method", ["chunked", "sequential"])


def scan_inputs(L, dtype=torch.float64, batch=2, H=3, P=4, N=5, seed=0):
    """x, dt, A, B, C, D and a state; some heads forget within a token, some keep for hundreds."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    A = -torch.tensor([0.1, 1.0, 16.0, 4.0])[:H].double()
    dt = F.softplus(normal(batch, L, H) - 2)
    parts = normal(batch, L, H, P), dt, A, normal(batch, L, N), normal(batch, L, N), normal(H)
    return [t.to(dtype) for t in (*parts, normal(batch, H, P, N))]


def random_resets(L, batch=2):
    resets = torch.rand(batch, L, generator=torch.manual_seed(0)) < 0.1
    resets[0, 0] = resets[-1, -1] = True
    return resets


@pytest.fixture
def eight_chunks(monkeypatch, chunk_size):
    """Tiles of eight chunks, of one row or of as many rows as have eight."""
    monkeypatch.setattr(kernels, "CPU_TILE", 8 * chunk_size)


def scan_by_hand(x, dt, A, B, C, D, state, resets):
    """The recurrence as loops over numbers, in numpy float64."""
    x, dt, A, B, C, D, state = (t.double().numpy() for t in (x, dt, A, B, C, D, state))
    (batch, L, H, P), N = x.shape, B.shape[-1]
    y, end = np.zeros((batch, L, H, P)), np.zeros((batch, H, P, N))
    for b, head in itertools.product(range(batch), range(H)):
        h = state[b, head].copy()
        for t in range(L):
            if resets is not None and resets[b, t]:
                h = np.zeros_like(h)
            step = dt[b, t, head]
            h = math.exp(step * A[head]) * h + step * np.outer(x[b, t, head], B[b, t])
            y[b, t, head] = h @ C[b, t] + D[head] * x[b, t, head]
        end[b, head] = h
    return torch.from_numpy(y), torch.from_numpy(end)


def scan_and_gradients(inputs, resets, method, chunk_size):
    """y, the last state and the gradients of all seven inputs under a fixed loss."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    y, end = selective_scan(*inputs, resets, method, chunk_size)
    g = torch.manual_seed(9)
    loss = (y * torch.randn(y.shape, generator=g)).sum()
    loss = loss + (end * torch.randn(end.shape, generator=g)).sum()
    return y.detach(), end.detach(), *torch.autograd.grad(loss, inputs)


# The last five cases have more chunks than a tile takes, more rows, or both.
CASES = [
    (1, 64, 2), (2, 64, 2), (63, 64, 2), (64, 64, 2), (65, 64, 2), (200, 64, 2), (200, 1, 2),
    (17, 100, 2), (200, 2, 2), (5, 8, 19), (21, 8, 7), (70, 8, 3),
]  # fmt: skip


@pytest.mark.usefixtures("eight_chunks")
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.float32, 1e-4)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("with_resets", [False, True], ids=["plain", "resets"])
@pytest.mark.parametrize(("L", "chunk_size", "batch"), CASES)
def test_chunked_scan_equals_sequential_and_the_loop_by_hand(
    L, chunk_size, batch, with_resets, dtype, tolerance
):
    inputs = scan_inputs(L, dtype, batch)
    resets = random_resets(L, batch) if with_resets else None
    chunked = scan_and_gradients(inputs, resets, "chunked", chunk_size)
    sequential = scan_and_gradients(inputs, resets, "sequential", chunk_size)
    for got, want in zip(chunked, sequential, strict=True):
        assert got.dtype == dtype
        close(got, want, tolerance)
    assert chunked[-1].abs().max() > (1e-13 if with_resets else 1e-3)  # the first state's
    for got in (chunked, sequential):
        for part, want in zip(got, scan_by_hand(*inputs, resets), strict=False):
            close(part.double(), want, tolerance)


SLOPES = [(1, 4, 1), (2, 4, 1), (3, 4, 1), (4, 4, 1), (5, 4, 1), (19, 2, 1), (3, 2, 9), (1, 2, 17)]


@pytest.mark.usefixtures("eight_chunks")
@pytest.mark.parametrize("with_resets", [False, True], ids=["plain", "resets"])
@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "continued"])
@pytest.mark.parametrize(("L", "chunk_size", "batch"), SLOPES)
def test_gradients_of_the_chunked_scan_are_the_slopes_of_its_outputs(
    L, chunk_size, batch, with_state, with_resets
):
    inputs = [t.requires_grad_() for t in scan_inputs(L, batch=batch, H=2, P=1, N=2)]
    resets = torch.zeros(batch, L, dtype=torch.bool) if with_resets else None
    if with_resets:
        resets[0, L // 2] = resets[-1, -1] = True
    rest = (resets, "chunked", chunk_size)
    if with_state:
        f, given = (lambda *args: selective_scan(*args, *rest)), inputs
    else:
        f, given = (lambda *args: selective_scan(*args, None, *rest)), inputs[:-1]
    assert torch.autograd.gradcheck(f, given, eps=1e-6, atol=1e-6)


@pytest.mark.usefixtures("eight_chunks")
@pytest.mark.parametrize(("L", "chunk_size", "batch"), [(1, 4, 2), (5, 4, 2), (2, 1, 9)])
def test_gradients_of_the_function_itself_are_its_slopes(L, chunk_size, batch):
    """With decays that do not depend on dt, and with a single token, which the scan steps over."""
    x, dt, A, B, C, D, state = scan_inputs(L, batch=batch, H=2, P=2, N=2)
    inputs = [t.requires_grad_() for t in (x, dt, (dt * A).flip(1), B, C, D, state.mT)]
    assert torch.autograd.gradcheck(lambda *args: ChunkedScan.apply(*args, chunk_size), inputs)


def test_gradients_of_the_sequential_scan_are_the_slopes_of_its_outputs():
    inputs = [t.requires_grad_() for t in scan_inputs(5, batch=1, H=2, P=2, N=2)]
    resets = torch.tensor([[False, False, False, True, False]])
    f = lambda *args: selective_scan(*args, resets, "sequential")  # noqa: E731
    assert torch.autograd.gradcheck(f, inputs, eps=1e-6, atol=1e-6)


def test_each_output_alone_has_its_gradient():
    inputs = [t.requires_grad_() for t in scan_inputs(21)]
    for wanted in (0, 1):
        got, want = (
            torch.autograd.grad(
                selective_scan(*inputs, None, method, 4)[wanted].square().sum(),
                inputs, materialize_grads=True,
            )
            for method in ("chunked", "sequential")
        )  # fmt: skip
        for one, two in zip(got, want, strict=True):
            close(one, two, 1e-9)


def test_a_second_derivative_is_refused():
    inputs = [t.requires_grad_() for t in scan_inputs(5)]
    (slope,) = torch.autograd.grad(
        selective_scan(*inputs, None, "chunked", 4)[0].square().sum(), inputs[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_the_tiling_changes_no_result_nor_does_computing_tiles_again(monkeypatch):
    monkeypatch.setattr(kernels, "CPU_TILE", 32)
    inputs, resets = scan_inputs(75, batch=11), random_resets(75, 11)
    want = scan_and_gradients(inputs, resets, "chunked", 4)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # tiles of another size
    for got, there in zip(scan_and_gradients(inputs, resets, "chunked", 4), want, strict=True):
        close(got, there, 1e-12)


def test_gradients_of_the_rest_do_not_need_that_of_x(monkeypatch):
    monkeypatch.setattr(kernels, "CPU_TILE", 32)
    x, dt, A, B, C, D, state = scan_inputs(75, batch=11)
    inputs = [t.requires_grad_() for t in (dt, dt * A, B, C, D, state.mT.contiguous())]
    for_x = x.clone().requires_grad_()
    grads = [torch.autograd.grad(ChunkedScan.apply(first, *inputs, 4)[0].square().sum(), inputs)
             for first in (x, for_x)]  # fmt: skip
    for got, want in zip(*grads, strict=True):
        close(got, want, 1e-12)


def test_views_into_larger_tensors_are_scanned_like_copies():
    inputs = scan_inputs(37)
    x, dt, A, B, C, D, state = inputs
    joined = torch.cat((x.flatten(2), dt, B, C), dim=-1)
    parts = joined.split([x[0, 0].numel(), dt.shape[-1], B.shape[-1], C.shape[-1]], dim=-1)
    views = [parts[0].unflatten(-1, x.shape[2:]), parts[1], A, *parts[2:], D]
    assert not any(t.is_contiguous() for t in (views[0], views[1], views[3], views[4]))
    got = selective_scan(*views, state.mT.contiguous().mT, None, "chunked", 8)
    for one, two in zip(got, selective_scan(*inputs, None, "chunked", 8), strict=True):
        close(one, two, 1e-12)


@METHODS
def test_a_missing_state_is_zero_and_the_state_passes_between_calls(method):
    x, dt, A, B, C, D, state = scan_inputs(50)
    nothing = selective_scan(x, dt, A, B, C, D, None, None, method, 16)
    zeros = selective_scan(x, dt, A, B, C, D, torch.zeros_like(state), None, method, 16)
    assert all(torch.equal(a, b) for a, b in zip(nothing, zeros, strict=True))
    y, end = selective_scan(x, dt, A, B, C, D, state, None, method, 16)
    head, middle = selective_scan(
        x[:, :21], dt[:, :21], A, B[:, :21], C[:, :21], D, state, None, method, 16
    )
    tail, last = selective_scan(
        x[:, 21:], dt[:, 21:], A, B[:, 21:], C[:, 21:], D, middle, None, method, 16
    )
    close(torch.cat((head, tail), 1), y, 1e-12)
    close(last, end, 1e-12)


@pytest.mark.parametrize("everywhere", [False, True], ids=["tiles of a CPU", "larger tiles"])
def test_a_long_memory_crosses_from_tile_to_tile(monkeypatch, everywhere):
    if everywhere:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(kernels, "CPU_TILE", 8 * 3)
    L = 64 * 3 * 2 + 3 * 3 + 1  # three times the largest tile
    inputs = scan_inputs(L)
    inputs[2] = inputs[2] * 0.01
    chunked = scan_and_gradients(inputs, None, "chunked", 3)
    sequential = scan_and_gradients(inputs, None, "sequential", 3)
    for got, want in zip(chunked, sequential, strict=True):
        close(got, want, 1e-9)
    for got, want in zip(chunked, scan_by_hand(*inputs, None), strict=False):
        close(got, want, 1e-9)


@pytest.mark.parametrize("count", [4, 5, 16, 17, 75])  # one, two, two, three and four levels
def test_states_carried_through_groups_of_groups_equal_those_of_one_product(monkeypatch, count):
    g = torch.Generator().manual_seed(0)
    log_decay = -torch.rand(2, 3, count, generator=g).double().pow(4) * 40
    written = torch.randn(2, 3, count, 5, 4, generator=g).double()
    inputs = [log_decay, written, torch.randn(2, 3, 5, 4, generator=g).double()]
    inputs = [t.requires_grad_() for t in inputs]
    monkeypatch.setattr(kernels, "GROUP", 4)
    got, want = kernels.carry(*inputs), kernels.carry_in_group(*inputs)
    close(got, want, 1e-12)
    weight = torch.randn(want.shape, generator=g).double()
    slopes = (torch.autograd.grad((t * weight).sum(), inputs) for t in (got, want))
    for one, two in zip(*slopes, strict=True):
        close(one, two, 1e-11)


@pytest.mark.parametrize("strong", [1.6, 40.0])
@pytest.mark.parametrize("L", [64, 4096])
def test_float32_keeps_a_long_memory_exact_after_strong_forgetting(L, strong):
    x, _, _, B, C, D, state = scan_inputs(L, torch.float32, batch=1, H=1)
    dt = torch.rand(1, L, 1, generator=torch.manual_seed(0)) * 1e-3
    dt[:, : 3 * L // 4] = strong
    A = -torch.ones(1)
    x = x / dt[..., None]  # every token writes equally much
    D = D * 1e-3  # lest x itself hides the rest
    inputs = (x, dt, A, B, C, D, state)
    y, end = selective_scan(*inputs)
    exact = selective_scan(*(t.double() for t in inputs), method="sequential")
    skipped = D[:, None] * x
    close(y.double() - skipped, exact[0] - skipped, 1e-4)
    close(end.double(), exact[1], 1e-4)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
    ids=["float32", "bfloat16", "float16"],
)
@METHODS
def test_scan_is_finite_at_extreme_steps_and_decays(method, dtype, tolerance):
    x, dt, A, B, C, D, state = scan_inputs(150, dtype)
    dt, A = torch.full_like(dt, 100.0), torch.full_like(A, -16.0)
    inputs = [t.clone().requires_grad_() for t in (x, dt, A, B, C, D, state)]
    y, end = selective_scan(*inputs, None, method, 64)
    assert (y.dtype, end.dtype) == (dtype, torch.float32)
    assert torch.isfinite(y).all()
    assert torch.isfinite(end).all()
    (y.sum() + end.sum()).backward()
    assert all(torch.isfinite(t.grad).all() for t in inputs)
    x, B, C, D = x.float(), B.float(), C.float(), D.float()
    alone = 100 * x * (B * C).sum(-1)[..., None, None] + D[:, None] * x  # all else is forgotten
    close(y.detach().float(), alone, tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.01), (torch.float16, 0.002)], ids=["bf16", "fp16"]
)
@METHODS
def test_half_precision_is_near_float32_and_keeps_the_state_in_float32(method, dtype, tolerance):
    x, dt, A, B, C, D, state = scan_inputs(333, torch.float32, H=2, P=8, N=8)
    halves = [t.to(dtype) for t in (x, B, C)]
    x, B, C = (t.float() for t in halves)  # the rounding of the inputs is not the question
    want = scan_and_gradients((x, dt, A, B, C, D, state), None, "sequential", 64)
    got = scan_and_gradients((halves[0], dt, A, *halves[1:], D, state), None, method, 64)
    half = {0, 2, 5, 6}  # y and the gradients of x, B and C; the rest stays float32
    for i, (one, two) in enumerate(zip(got, want, strict=True)):
        assert one.dtype == (dtype if i in half else torch.float32)
        assert (one.float() - two).norm() < tolerance * two.norm(), i


def test_autocast_changes_nothing():
    inputs = scan_inputs(40, torch.float32)
    want = selective_scan(*inputs, None, "chunked", 16)
    with torch.autocast("cpu", torch.bfloat16):
        got = selective_scan(*inputs, None, "chunked", 16)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_steps_of_zero_leave_the_state_alone_and_all_gradients_as_they_are():
    x, dt, A, B, C, D, state = scan_inputs(30)
    still = torch.rand(dt.shape, generator=torch.manual_seed(0)) < 0.4
    inputs = (x, dt.masked_fill(still, 0.0), A, B, C, D, state)
    got, want = (scan_and_gradients(inputs, None, method, 8)
                 for method in ("chunked", "sequential"))  # fmt: skip
    for one, two in zip(got, want, strict=True):
        close(one, two, 1e-9)
    _, end = selective_scan(x, torch.zeros_like(dt), A, B, C, D, state, None, "chunked", 8)
    close(end, state, 1e-12)


@METHODS
def test_scan_does_not_mix_state_channels(method):
    *inputs, state = scan_inputs(70)
    bumped = state.clone()
    bumped[1, 0, 3, 2] += 1.0  # row 1, head 0, channel 3, state 2
    (y, end), (y2, end2) = (selective_scan(*inputs, s, None, method, 16) for s in (state, bumped))
    moved = (y != y2).any(1)  # (b, h, p)
    assert moved.nonzero().tolist() == [[1, 0, 3]]
    assert (end != end2).nonzero().tolist() in ([], [[1, 0, 3, 2]])
    x2 = inputs[0].clone()
    x2[0, 10, 1, 2] += 1.0
    y3, end3 = selective_scan(x2, *inputs[1:], state, None, method, 16)
    assert (y != y3).nonzero()[:, [0, 2, 3]].unique(dim=0).tolist() == [[0, 1, 2]]
    assert torch.equal(y[:, :10], y3[:, :10])
    assert (end != end3).nonzero()[:, :3].unique(dim=0).tolist() in ([], [[0, 1, 2]])


def test_scan_does_not_explode_at_long_length():
    x, dt, A, B, C, D, _ = scan_inputs(20_000, torch.float32, batch=1)
    y, end = selective_scan(x, dt, A, B, C, D)
    short, _ = selective_scan(x[:, :300], dt[:, :300], A, B[:, :300], C[:, :300], D)
    assert y.abs().max() < 10 * short.abs().max()
    assert torch.isfinite(end).all()


@pytest.mark.parametrize("everywhere", [False, True], ids=["tiles of a CPU", "larger tiles"])
def test_scan_loops_over_tiles_and_not_over_tokens_in_memory_linear_in_length(
    monkeypatch, everywhere
):
    if everywhere:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    tile = 64 * 32 if everywhere else kernels.CPU_TILE  # tokens
    counts, sizes = {}, {}
    for L in (tile // 16, tile, 2 * tile, 8 * tile):
        inputs = [t.requires_grad_() for t in scan_inputs(L, torch.float32, batch=1)]
        with Census() as census:
            y, _ = selective_scan(*inputs)
            y.sum().backward()
        counts[L], sizes[L] = census.operations, census.largest
    assert counts[tile] <= counts[tile // 16] + 10
    assert counts[2 * tile] <= 2 * counts[tile]
    assert counts[8 * tile] <= 8 * counts[tile]
    assert sizes[2 * tile] <= 2.1 * sizes[tile]
    assert sizes[8 * tile] <= 8.1 * sizes[tile]


def test_the_scan_of_nothing_is_nothing_and_an_unknown_method_is_refused():
    x, dt, A, B, C, D, state = scan_inputs(3)
    y, end = selective_scan(x[:, :0], dt[:, :0], A, B[:, :0], C[:, :0], D, state)
    assert y.shape == x[:, :0].shape and torch.equal(end, state)
    with pytest.raises(ValueError, match="chunkde"):
        selective_scan(x, dt, A, B, C, D, state, method="chunkde")


def test_scan_compiles_without_a_graph_break_and_equals_eager():
    torch._dynamo.reset()
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager", dynamic=False)
    inputs = [t.requires_grad_() for t in scan_inputs(40)]
    resets = random_resets(40)
    got = compiled(*inputs, resets, "chunked", 16)
    want = selective_scan(*inputs, resets, "chunked", 16)
    for one, two in zip(got, want, strict=True):
        close(one, two, 1e-12)
    gradients = [torch.autograd.grad(y.sum() + s.sum(), inputs) for y, s in (got, want)]
    for one, two in zip(*gradients, strict=True):
        close(one, two, 1e-10)
