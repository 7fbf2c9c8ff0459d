"""tinymamba/fused.py and attention.py: passes by hand against autograd and the plain formulas."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from tinymamba import attention, delta_rule, fused
from tinymamba.kernels import ResidualConv, loss_and_gradients

WIDTH = 8


def silu_halves(both):
    gate, x = both.chunk(2, dim=-1)
    return F.silu(gate) * x


def rotate_plainly(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def by_constant_angles(f):
    angle = torch.linspace(0, 3, 20).view(5, 4)
    return lambda x: f(x, angle.cos().to(x), angle.sin().to(x))


def sum_plainly(gates, *branches):
    return sum(g[..., None] * t for g, t in zip(gates.unbind(-1), branches, strict=True))


def features_plainly(x):
    products = torch.cat([x * x.roll(-r, dims=-1) for r in (1, 2, 3)], dim=-1)
    return F.normalize(products, dim=-1)


def attend_plainly(q, keys, values):
    """Every query sees all keys of two blocks at once, and a mask says which."""
    own = torch.ones(4, 4, dtype=torch.bool).tril()
    seen = torch.cat((~own, own), dim=1).repeat(3, 1, 1)
    seen[0, :, :4] = False  # before the text
    pairs = (torch.cat((t[:-1], t[1:]), dim=2) for t in (keys, values))
    keys, values = pairs
    scores = (q @ keys.mT).masked_fill(~seen[:, None], -torch.inf)
    return scores.softmax(-1) @ values


def attend_fused(q, keys, values):
    hidden = torch.ones(4, 4, dtype=torch.bool).triu(1)[None, None]
    return attention.attend_to_window(q, keys, values, hidden)


def conv_plainly(u, tail, weight):
    history = torch.cat((tail, u), dim=1)
    return u + F.conv1d(history.mT, weight[:, None], groups=len(weight)).mT


TOKENS = (2, 3, 5)
CASES = {
    "norm_of_a_vector": (
        lambda x, w: fused.rms_norm(x, w, 1e-5),
        lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w,
        [(WIDTH,), (WIDTH,)],
    ),
    "norm": (
        lambda x, w: fused.rms_norm(x, w, 1e-5),
        lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w,
        [(*TOKENS, WIDTH), (WIDTH,)],
    ),
    "rotation": (
        by_constant_angles(fused.rotate),
        by_constant_angles(rotate_plainly),
        [(*TOKENS, WIDTH)],
    ),
    "learned_rotation": (fused.rotate, rotate_plainly, [(*TOKENS, WIDTH), (3, 5, 4), (3, 5, 4)]),
    "silu": (fused.silu_product, silu_halves, [(*TOKENS, WIDTH)]),
    "sum": (
        lambda gates, *branches: fused.weighted_sum(gates, list(branches)),
        sum_plainly,
        [(2, 5, 3)] + 3 * [(2, 5, WIDTH)],
    ),
    "addition": (
        fused.add_scaled,
        lambda x, scale, update: x + scale * update,
        [(2, 5, WIDTH), (WIDTH,), (2, 5, WIDTH)],
    ),
    "features": (
        lambda x: delta_rule.key_features(x, 3, x.dtype),
        features_plainly,
        [(*TOKENS, WIDTH)],
    ),
    "attention": (attend_fused, attend_plainly, [(3, 2, 4, 6), (4, 2, 4, 6), (4, 2, 4, 6)]),
    "conv": (ResidualConv.apply, conv_plainly, [(2, 9, WIDTH), (2, 3, WIDTH), (WIDTH, 4)]),
    "conv_in_parts": (ResidualConv.apply, conv_plainly, [(2, 600, 2), (2, 3, 2), (2, 4)]),
    "conv_of_a_new_text": (
        lambda u, weight: ResidualConv.apply(u, None, weight),
        lambda u, weight: conv_plainly(u, torch.zeros_like(u[:, :3]), weight),
        [(2, 9, WIDTH), (WIDTH, 4)],
    ),
}


def draw(shapes, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def run(f, tensors):
    """The output and all gradients."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    y = f(*tensors)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y.detach(), *torch.autograd.grad((y * weights.to(y.dtype)).sum(), tensors)]


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_plain_formula(name):
    by_hand, plain, shapes = CASES[name]
    for got, want in zip(run(by_hand, draw(shapes)), run(plain, draw(shapes)), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_in_bfloat16_the_error_is_that_of_the_dtype(name):
    by_hand, plain, shapes = CASES[name]
    got = run(by_hand, draw(shapes, torch.bfloat16))
    exact = run(plain, [t.double() for t in draw(shapes, torch.bfloat16)])
    for one, two in zip(got, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - two).norm() <= 0.02 * two.norm()


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_the_same_without_gradients(name):
    by_hand, _, shapes = CASES[name]
    tensors = draw(shapes, torch.float32)
    learned = by_hand(*(t.clone().requires_grad_() for t in tensors))
    assert isinstance(learned.grad_fn, torch.autograd.function.BackwardCFunction)
    with torch.no_grad():
        assert torch.equal(by_hand(*tensors), learned)
    with torch.inference_mode():
        assert torch.equal(by_hand(*tensors), learned)


def test_a_compiled_graph_sees_plain_formulas():
    graphs = []

    def keep(graph, _):
        graphs.append(str(graph.graph))
        return graph

    tensors = [t.requires_grad_() for t in draw([(2, 5, 16)])]
    run = torch.compile(fused.silu_product, backend=keep, fullgraph=True)
    torch.testing.assert_close(run(*tensors), silu_halves(*tensors))
    assert len(graphs) == 1 and "silu" in graphs[0]


def test_the_gates_and_branches_may_have_another_dtype_than_the_stream():
    x, scale, update = (t.float() for t in draw([(2, 5, WIDTH), (WIDTH,), (2, 5, WIDTH)]))
    update = update.bfloat16()
    got = run(fused.add_scaled, [x, scale, update])
    assert [t.dtype for t in got] == [torch.float32] * 3 + [torch.bfloat16]
    want = run(lambda x, s, u: x + s * u.float(), [x, scale, update])
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one.float(), two.float(), atol=0.03, rtol=0.03)


def test_the_loss_and_its_gradients_are_those_of_cross_entropy():
    hidden, weight = draw([(7, WIDTH), (11, WIDTH)])
    targets = torch.tensor([0, 10, -100, 3, 3, -100, 7])
    hidden[0] *= 300  # the right token has a probability that float64 cannot hold
    loss, dhidden, dweight = loss_and_gradients(hidden, weight, targets, True)

    def plain(hidden, weight):
        return F.cross_entropy(hidden @ weight.mT, targets, reduction="sum")

    tensors = [t.requires_grad_() for t in (hidden, weight)]
    want = plain(*tensors)
    torch.testing.assert_close(loss, want.detach(), atol=1e-10, rtol=1e-12)
    for one, two in zip((dhidden, dweight), torch.autograd.grad(want, tensors), strict=True):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-10)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has mallopt")
def test_memory_that_a_step_frees_is_used_again():
    """Page faults of a tensor of 64 MB that is made and freed ten times, without and with it."""
    code = """
import resource, torch
from tinymamba.runtime import reuse_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
without, known = faults(), reuse_memory()
print(int(known), without, min(faults() for _ in range(6)))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    known, without, reused = map(int, result.stdout.split())
    if not known:
        pytest.skip("this C library has no mallopt")
    assert reused * 10 < without
