"""Initial weights: a pure function of seed, name and shape, and distributed as the rules say."""

import math
import weakref

import pytest
import torch
from helpers import FORMS, tiny_config

from testv2 import TinyMambaModel
from tinymamba import initial_weights
from tinymamba.initial_weights import init_weights, initial_values


def values(model: TinyMambaModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(some: dict, others: dict) -> None:
    assert some.keys() == others.keys()
    assert [name for name, t in some.items() if not torch.equal(t, others[name])] == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("changes", [{}, {"low_rank": 4, "gate": "top_k", "tie_embeddings": False}])
def test_every_parameter_is_a_function_of_seed_name_and_shape(form, changes):
    config = tiny_config(**FORMS[form], **changes)
    model = TinyMambaModel(config)
    init_weights(model, seed=5)
    first = values(model)
    for name, want in reversed(first.items()):
        assert torch.equal(initial_values(name, want.shape, config, 5), want), name
    init_weights(model, seed=6)
    fixed = (".bias", ".D", "norm.weight", "residual_scale", "token_proj.weight")
    fixed += () if config.gate == "top_k" else ("controller.weight",)
    kept = {name for name, t in values(model).items() if torch.equal(t, first[name])}
    assert kept == {name for name in first if name.endswith(fixed)}


def test_a_model_takes_one_number_of_the_global_generator():
    torch.manual_seed(7)
    models = [TinyMambaModel(tiny_config()) for _ in range(2)]
    after = torch.get_rng_state()
    torch.manual_seed(7)
    again = TinyMambaModel(tiny_config())
    assert_same(values(models[0]), values(again))
    assert not torch.equal(models[0].embedding.weight, models[1].embedding.weight)
    torch.randint(2**63 - 1, ())
    assert torch.equal(torch.get_rng_state(), after)


def test_neither_size_nor_dtype_nor_device_of_the_rest_counts():
    config = tiny_config(deepnet=False, memory=False)
    model, deeper = TinyMambaModel(config), TinyMambaModel(tiny_config(n_layer=3, deepnet=False))
    double = TinyMambaModel(config).double()
    for each in (model, deeper, double):
        init_weights(each, seed=1)
    rest = {name: t for name, t in values(deeper).items() if name in values(model)}
    assert_same(values(model), rest)
    assert_same({name: t.double() for name, t in values(model).items()}, values(double))
    state = torch.get_rng_state()
    with torch.device("meta"):
        empty = TinyMambaModel(config)
    assert all(p.is_meta for p in empty.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_values_of_one_parameter_are_in_memory_at_a_time(monkeypatch):
    alive: list = []

    def fill(p, made):
        assert not any(ref() is not None for ref in alive[:-1]), "an earlier one is still there"
        alive.append(weakref.ref(made))

    monkeypatch.setattr(initial_weights, "fill_parameter", fill)
    model = TinyMambaModel(tiny_config())
    assert len(alive) == len(list(model.parameters()))


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="blocks.0.ssm.new"):
        initial_values("blocks.0.ssm.new", (3,), tiny_config(), 0)


def largest_gap(sample: torch.Tensor, distribution) -> float:
    """Kolmogorov-Smirnov: the largest difference of the shares below a value, times sqrt(n)."""
    share = distribution(sample.double().flatten().sort().values)
    even = (torch.arange(len(share)) + 0.5) / len(share)
    return (share - even).abs().max().item() * math.sqrt(len(share))


def normal(deviation: float):
    return lambda x: 0.5 + 0.5 * torch.erf(x / (deviation * math.sqrt(2)))


def uniform(low: float, high: float):
    return lambda x: ((x - low) / (high - low)).clamp(0, 1)


WIDTH, BETA = 64, (4 * 2) ** -0.25  # of two blocks
SHIFT = torch.tensor([0.0, 0.0, 1.0, -1.0])
RULES = {  # a parameter, the size that its values have, and their distribution
    "embedding.weight": ((500, WIDTH), normal(0.02)),
    "blocks.0.ssm.in_proj.weight": ((300, WIDTH), normal(math.sqrt(0.4 / WIDTH))),
    "blocks.0.ssm.in_proj.down.weight": ((300, WIDTH), normal(WIDTH**-0.5)),
    "blocks.1.mlp.out_proj.up.weight": ((300, 16), normal(BETA * math.sqrt(0.4 / 16))),
    "blocks.1.attention.out_proj.weight": ((300, WIDTH), normal(BETA * math.sqrt(0.4 / WIDTH))),
    "blocks.0.ssm.angle_proj.weight": ((300, WIDTH), normal(math.sqrt(0.4 / WIDTH))),
    "blocks.0.conv.weight": ((900, 4), uniform(-0.25, 0.25)),
    "blocks.0.ssm.A_log": ((4000,), lambda x: uniform(1, 16)(x.exp())),
    "blocks.0.attention.memory.A_log": ((4000,), uniform(math.log(1e-4), math.log(1e-2))),
}


@pytest.mark.parametrize("name", RULES)
def test_values_follow_their_rule(name):
    """The gap exceeds 1.95 once in a thousand draws; a scale that is off by a fifth, always."""
    shape, distribution = RULES[name]
    sample = initial_values(name, shape, tiny_config(d_model=WIDTH), 1)
    assert largest_gap(sample, distribution) < 1.95
    if name != "blocks.0.ssm.A_log":
        assert largest_gap(1.2 * sample, distribution) > 1.95


def test_step_sizes_and_keys_follow_what_they_depend_on():
    config = tiny_config(d_model=WIDTH, min_decay=0.05)
    A_log = initial_values("blocks.0.ssm.A_log", (4000,), config, 1)
    raw = initial_values("blocks.0.ssm.dt_bias", (4000,), config, 1)
    dt = torch.nn.functional.softplus(raw.double()) - 0.05 * (-A_log.double()).exp()
    assert largest_gap(dt.log(), uniform(math.log(1e-3), math.log(1e-1))) < 1.95
    q, k, v = initial_values("blocks.0.attention.qkv.weight", (3 * WIDTH, WIDTH), config, 1).chunk(
        3
    )
    assert torch.equal(q, k)
    assert largest_gap(q, normal(math.sqrt(0.4 / WIDTH))) < 1.95
    assert largest_gap(v, normal(BETA * math.sqrt(0.4 / WIDTH))) < 1.95
    taps = initial_values("blocks.0.attention.conv.weight", (3 * 900, 4), config, 1).chunk(3)
    for part, shift in zip(taps, (0.0, SHIFT, 0.0), strict=True):
        assert largest_gap(part - shift, uniform(-0.25, 0.25)) < 1.95


def test_parameters_are_independent_of_one_another():
    config, names = tiny_config(), [f"blocks.{i}.mlp.in_proj.weight" for i in range(40)]
    made = torch.stack([initial_values(name, (500, 2), config, 3).flatten() for name in names])
    made /= made.norm(dim=1, keepdim=True)
    between = (made @ made.T).fill_diagonal_(0)
    assert between.abs().max() < 5 * made.shape[1] ** -0.5  # deviations
