"""One token at a time (tinymamba/decode.py): it equals the general path; when it is taken."""

import contextlib

import pytest
import torch
from helpers import DOCUMENTS, FIRST_FORM, adapted, close, close_angles, free_copy, some_ids, wide

import testv2
from hf_integration import TinyMambaHFModel
from peft import AdapterConfig, merge_adapter
from quantize import quantize_model
from streaming import StreamingServer, column_major_weights
from testv2 import RMSNorm, TinyMambaModel, generate
from tinymamba import decode
from tinymamba.decode import why_general
from tinymamba.kernels import QuantizedLinear
from tinymamba.live import LiveBatch

FORMS = {
    "plain": {},
    "top_k": {"gate": "top_k"},
    "sparsemax": {"gate": "sparsemax"},
    "documents": DOCUMENTS,
    "first": FIRST_FORM,
    "k_conv": {"qv_conv": False, "bias": False, "activation": "gelu"},
    "memories": {"memory_every": 1, "memory_products": 0, "tie_embeddings": False},
    "small": {"d_conv": 1, "window_size": 1, "d_state": 2, "use_flash_attn": False},
}  # fmt: skip


@contextlib.contextmanager
def general():
    """In here, `run` takes the general path: the reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testv2, "why_general", lambda *_: "it is the reference")
        yield


@pytest.fixture
def steps(monkeypatch):
    """How many tokens went the short way: the length of this list."""
    seen, step, live = [], decode.step, LiveBatch.step

    def counted(*arguments):
        seen.append(1)
        return step(*arguments)

    def counted_live(*arguments):
        seen.append(1)
        return live(*arguments)

    monkeypatch.setattr(testv2, "step", counted)
    monkeypatch.setattr(LiveBatch, "step", counted_live)
    return seen


def begun(model, rows=1, length=5):
    """A state after a few tokens, and the next ones (b, 1)."""
    ids = some_ids(rows, length + 1, model.config.vocab_size)
    with torch.no_grad():
        return model.advance(ids[:, :length], model.init_state(rows))[1], ids[:, length:]


def same_step(model, ids, state):
    """The new state after one token, which both paths must give, and the old one left as it is."""
    before = {name: t.clone() for name, t in state.tensors().items()}
    hidden, new, gates = model.run(ids, state)
    for name, t in state.tensors().items():
        assert torch.equal(t, before[name]), name
    with general():
        want_hidden, other, want_gates = model.run(ids, state)
    close(model.head(hidden), model.head(want_hidden), 1e-5)
    close(gates, want_gates, 1e-5)
    got, want = new.tensors(), other.tensors()
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        if name.endswith("phase"):  # each path is as far from float64
            close_angles(got[name], want[name], 1e-4)
        else:
            close(got[name], want[name], 1e-5)
    return new


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_token_has_the_logits_gates_and_states_of_the_general_path(form, rows):
    model = wide(n_layer=3, **FORMS[form])
    ids = some_ids(rows, 24)
    ids[0, [0, 6, 7, 15]] = 0  # the id that ends a document, if one does
    state = model.init_state(rows)
    for token in ids.split(1, dim=1):
        assert why_general(model, token, state) is None
        state = same_step(model, token, state)


@torch.no_grad()
def test_a_document_that_a_user_begins_is_read_as_by_the_general_path():
    model = wide()
    state, ids = begun(model, rows=3)
    state = state.begin_document(torch.tensor([True, False, True]))
    same_step(model, ids, same_step(model, ids, state))


@pytest.mark.parametrize("rows", [1, decode.FEW_ROWS + 1])
@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_the_general_path(rows):
    exact = free_copy(wide()).eval()
    model = free_copy(exact).to(torch.bfloat16).eval()
    exact.load_state_dict({n: t.float() for n, t in model.state_dict().items()})
    ids, errors = some_ids(rows, 16), []
    want = exact.advance(ids, exact.init_state(rows))[0]
    for way in (contextlib.nullcontext, general):
        state, total = model.init_state(rows), 0.0
        for t in range(16):
            with way():
                logits, state = model.advance(ids[:, t : t + 1], state)
            total += (logits[:, 0].float() - want[:, t]).norm().item()
        errors.append(total)
    assert errors[0] <= 1.05 * errors[1]


@pytest.mark.usefixtures("elsewhere")
@torch.inference_mode()
def test_plain_models_take_the_short_way_wherever_they_decode(steps):
    model = free_copy(wide()).eval()
    generate(model, some_ids(1, 3), 4)
    assert len(steps) == 3
    server = StreamingServer(model)
    list(server.answer([1, 2, 3], as_ids=True, max_new_tokens=5, eos_token_id=-1))
    assert len(steps) == 3 + 4
    hf = TinyMambaHFModel.of(free_copy(wide())).eval()
    hf.generate(some_ids(1, 3), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert len(steps) == 3 + 4 + 4


def hooked(model):
    model.blocks[1].mlp.out_proj.register_forward_hook(lambda *_: None)


def forward_of_its_own(model):
    model.blocks[0].__dict__["forward"] = model.blocks[0].forward


def own_class(model):
    class Norm(RMSNorm):
        pass

    model.blocks[0].norm = Norm(model.config.d_model)


def plain_function_in_a_slot(model):
    model.blocks[0].attention.prefix = torch.zeros_like


CHANGES = {
    "slot": plain_function_in_a_slot,
    "blocks.0.norm is a Norm": own_class,
    "hooks": hooked,
    "forward of its own": forward_of_its_own,
    "training": lambda model: model.train(),
    "training mode": lambda model: model.blocks[0].dropout.train(),
    "another dtype": lambda model: model.double(),
}


@pytest.mark.parametrize("why", CHANGES)
@torch.no_grad()
def test_a_change_of_the_model_sends_it_the_general_way_at_once(why, steps):
    model = free_copy(wide()).eval()
    state, ids = begun(model)
    model.advance(ids, state)
    assert len(steps) == 1
    CHANGES[why](model)
    if why == "another dtype":
        state, _ = begun(model)
    model.advance(ids, state)
    assert len(steps) == 1
    assert why in why_general(model, ids, state)


def with_quantized_gate():
    model = free_copy(wide()).eval()
    model.blocks[0].gate.controller = QuantizedLinear(32, 3, True, 8, "dynamic", 8)
    return model.requires_grad_(False)


@pytest.mark.parametrize(("bits", "mode"), [(8, "weight_only"), (8, "dynamic"), (4, "weight_only")])
@torch.no_grad()
def test_quantized_layers_are_multiplied_as_on_the_general_path(bits, mode, steps):
    """To the rounding of activations, by which a tiny difference before it becomes a step."""
    model = quantize_model(wide(n_layer=3, d_model=64, num_heads=4), bits, mode, group_size=32)
    state, ids = begun(model, rows=3, length=9)
    logits, new = model.advance(ids, state)
    assert len(steps) == 1 and why_general(model, ids, state) is None
    with general():
        want, other = model.advance(ids, state)
    exact = bits == 8 and mode == "weight_only"
    assert (logits - want).norm() <= (1e-4 if exact else 0.02) * want.norm()
    for name, t in other.tensors().items():
        if t.is_floating_point() and not name.endswith("phase"):
            assert (new.tensors()[name] - t).norm() <= (1e-4 if exact else 0.02) * t.norm(), name


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: adapted(AdapterConfig("lora", 2, 4.0)), "LoRALinear"),
        (lambda: adapted(AdapterConfig("prefix", prefix_length=2)), "Slot"),
        (lambda: adapted(AdapterConfig("state_offset")), "Slot"),
        (with_quantized_gate, "gate.controller is a QuantizedLinear"),
        (lambda: wide(low_rank=4), "LowRankProjection"),
    ],
)
@torch.no_grad()
def test_models_with_other_parts_go_the_general_way(make, why, steps):
    model = make()
    state, ids = begun(model)
    model.advance(ids, state)
    assert not steps
    assert why in why_general(model, ids, state)


def test_calls_of_another_kind_go_the_general_way(steps, monkeypatch):
    model = free_copy(wide()).eval()
    state, ids = begun(model)
    assert "gradients" in why_general(model, ids, state)
    model.advance(ids, state)[0].sum().backward()
    with torch.no_grad():
        model.advance(ids, state, attention_mask=torch.ones_like(ids))
        model.advance(torch.cat((ids, ids), 1), state)
        model.run(ids, state, embedded=model.embedding(ids))
        model.run(ids, state, ends=ids == 1)
        model.run(ids, state, attend=lambda attend, q, k, v, context: attend(q, k, v, context.mask))
        model(ids)
        with torch.autocast("cpu", torch.bfloat16):
            assert "autocast" in why_general(model, ids, state)
            model.advance(ids, state)
        hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        model.advance(ids, state)
        hook.remove()
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            assert "graph" in why_general(model, ids, state)
        monkeypatch.setattr(decode, "is_in_graph", lambda: True)
        assert "graph" in why_general(model, ids, state)
    assert not steps


@torch.no_grad()
def test_hooks_of_users_run_for_every_token():
    model, seen = free_copy(wide()).eval(), []
    state, ids = begun(model)
    model.advance(ids, state)
    hook = model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    model.advance(ids, state)
    assert seen == [1]
    hook.remove()
    assert why_general(model, ids, state) is None


def train(model):
    ids = some_ids(2, 9)
    with torch.enable_grad():
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()


def load_others(model):
    model.load_state_dict(TinyMambaModel(model.config).state_dict())


def write_data(model):
    for p in model.parameters():
        p.data.mul_(1.1)


def swap_data(model):
    for p in model.parameters():
        p.data = 0.9 * p.data


def replace_parameters(model):
    for m in model.modules():
        for name, p in m._parameters.items():
            if p is not None:
                setattr(m, name, torch.nn.Parameter(0.9 * p.detach()))


def merge(model):
    other = adapted(AdapterConfig("lora", 2, 4.0))
    merge_adapter(other)
    model.load_state_dict({n.replace(".base_layer", ""): t for n, t in other.state_dict().items()
                           if "adapters" not in n})  # fmt: skip


def change_settings(model):
    model.blocks[0].ssm.config.min_decay = 0.2
    model.blocks[1].mlp.activation = torch.relu
    model.rotary.theta = 100.0


WRITES = [train, load_others, write_data, swap_data, replace_parameters, merge, change_settings,
          column_major_weights]  # fmt: skip


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
@torch.no_grad()
def test_weights_and_settings_are_never_stale(write):
    model = free_copy(wide()).eval()
    state, ids = begun(model)
    before = model.advance(ids, state)[0]
    write(model)
    assert why_general(model, ids, state) is None
    if write is not column_major_weights:
        assert (model.advance(ids, state)[0] - before).abs().max() > 1e-3
    same_step(model, ids, state)


@torch.no_grad()
def test_a_model_that_is_gone_leaves_nothing_behind():
    model = free_copy(wide()).eval()
    state, ids = begun(model)
    model.advance(ids, state)
    count = len(decode.PLANS)
    assert model in decode.PLANS
    del model
    assert len(decode.PLANS) == count - 1


def test_caches_do_not_depend_on_the_default_dtype_of_their_first_call():
    decode.turns.cache_clear()
    decode.root.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert decode.turns(6, 2).dtype == decode.root(3.0).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_batch_of_no_rows_is_read():
    model = wide()
    with torch.no_grad():
        logits, state = model.advance(torch.zeros(0, 1, dtype=torch.int64), model.init_state(0))
    assert logits.shape == (0, 1, model.config.vocab_size) and len(state.position) == 0
