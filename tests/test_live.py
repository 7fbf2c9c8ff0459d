"""Batches whose states change in place (tinymamba/live.py): they equal tinymamba/decode.py."""

import itertools

import pytest
import torch
from helpers import DOCUMENTS, FIRST_FORM, close, close_angles, free_copy, some_ids, wide

from quantize import quantize_model
from streaming import StreamingServer, fill_gaps, head_norms
from testv2 import ModelState, TinyMambaModel
from tinymamba.live import LiveBatch, LiveModel, why_not_live

pytestmark = pytest.mark.usefixtures("elsewhere")


FORMS = {
    "plain": {},
    "biases": {"bias": True, "tie_embeddings": False},
    "documents": DOCUMENTS,
    "first": FIRST_FORM,
    "k_conv": {"qv_conv": False, "bias": False, "activation": "gelu"},
    "memories": {"memory_every": 1, "memory_products": 0},
    "small": {"d_conv": 2, "window_size": 1, "d_state": 2},
}


def begun(model, *lengths):
    """States of one row each, after so many tokens."""
    states = []
    for row, length in enumerate(lengths):
        ids = some_ids(1, length, model.config.vocab_size, seed=row)
        states.append(model.advance(ids, model.init_state(1))[1].clone())
    return states


def assert_same(got, want, tolerance=1e-4):
    """Two states are equal, except inputs of convolutions from before a document."""
    got, want = (state.forget_inputs().tensors() for state in (got, want))
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype and got[name].is_contiguous(), name
        (close_angles if name.endswith("phase") else close)(got[name], want[name], tolerance)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_rows_that_join_and_leave_decode_as_if_alone(form):
    model = free_copy(wide(n_layer=3, **FORMS[form])).eval()
    assert why_not_live(model) is None
    want = begun(model, 3, 9, 30)
    batch = LiveBatch(LiveModel(model)).regroup([], want)
    ids = some_ids(6, 30, model.config.vocab_size)
    ids[:, [4, 11]] = 0  # the id that ends a document, if one does
    for t, column in enumerate(ids.T):
        if t == 10:
            new = begun(model, 1, 20)
            batch.regroup([2, 1], new)
            want = [want[2], want[1], *new]
        if t == 20:
            batch.regroup([0, 3], [])
            want = [want[0], want[3]]
        now = column[: len(want)]
        hidden, logits, gates, _ = batch.step(now)
        norms = head_norms(batch, [*range(len(want))])
        batch.commit()
        for row, state in enumerate(want):
            expected, want[row], weights = model.run(now[row : row + 1, None], state)
            close(hidden[row], expected[0], 1e-4)
            close(logits[row], model.head(expected)[0, 0], 1e-4)
            close(gates[:, row], weights[:, 0], 1e-4)
            (by_state,) = head_norms(want[row], [0])
            for got, layer in zip(norms[row], by_state, strict=True):
                close(torch.from_numpy(got), torch.from_numpy(layer), 1e-4)
    assert_same(batch.select([1, 0]), ModelState.join(want[::-1]))


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_the_general_path():
    exact = free_copy(wide()).eval()
    model = free_copy(exact).to(torch.bfloat16).eval()
    exact.load_state_dict({name: t.float() for name, t in model.state_dict().items()})
    ids, errors = some_ids(3, 16), [0.0, 0.0]
    want = exact.advance(ids, exact.init_state(3))[0]
    state, batch = model.init_state(3), LiveBatch(LiveModel(model))
    batch.regroup([], [model.init_state(1) for _ in range(3)])
    for t in range(16):
        logits, state = model.advance(ids[:, t : t + 1], state)
        for i, found in enumerate((logits[:, 0], batch.step(ids[:, t])[1])):
            errors[i] += (found.float() - want[:, t]).norm().item()
        batch.commit()
    assert errors[1] <= 1.05 * errors[0]
    again = batch.select([0, 1, 2])
    assert_same(LiveBatch(batch.live).regroup([], [again.select([i]) for i in range(3)])
                .select([0, 1, 2]), again, 0)  # fmt: skip


@torch.no_grad()
def test_copies_are_of_the_state_before_a_step_and_are_never_written_to():
    model = free_copy(wide(**DOCUMENTS)).eval()
    batch = LiveBatch(LiveModel(model)).regroup([], begun(model, 5, 40))
    copies = []
    for t in range(2 * model.config.window_size + 3):
        before = batch.select([0, 1])
        batch.step(torch.tensor([t % 5, 7]))
        during = batch.select([0, 1])
        for name, tensor in before.tensors().items():
            assert torch.equal(during.tensors()[name], tensor), name
        copies.append((before, before.clone()))
        batch.commit()
    for state, then in copies:
        for name, tensor in then.tensors().items():
            assert torch.equal(state.tensors()[name], tensor), name


def tokens_of(answer):
    return [token.id for chunk in answer for token in chunk.tokens]


def talk(server, session, count, seed):
    """The next ids of a session."""
    answer = server.answer([seed], session, as_ids=True, max_new_tokens=count, seed=seed)
    return tokens_of(answer)


def test_forks_and_files_of_a_session_whose_neighbors_decode_are_right(tmp_path):
    server, alone = (StreamingServer(free_copy(wide())) for _ in range(2))
    other = server.answer([9], server.create_session(), as_ids=True, max_new_tokens=60, seed=1)
    session, file = server.create_session(), tmp_path / "s.safetensors"
    reference = alone.create_session()
    next(other)
    answer = server.answer([3], session, as_ids=True, max_new_tokens=50, seed=2)
    for _ in range(7):
        next(answer), next(other)
    assert isinstance(server.decoder.batch_state, LiveBatch)
    assert len(server.decoder.batch) == 2
    answer.close()
    fork = server.fork_session(session)
    server.save_session(session, file)
    answer = alone.answer([3], reference, as_ids=True, max_new_tokens=50, seed=2)
    for _ in range(7):
        next(answer)
    answer.close()
    want = talk(alone, reference, 20, 4)
    names = (session, fork, server.load_session(file))
    assert [talk(server, name, 20, 4) for name in names] == [want] * 3
    rest = tokens_of(other)
    assert rest == tokens_of(alone.answer([9], as_ids=True, max_new_tokens=60, seed=1))[8:]


@pytest.mark.parametrize("way", ["in place", "replaced", "loaded"])
@torch.no_grad()
def test_an_answer_begins_with_the_weights_that_the_model_has(way):
    server = StreamingServer(free_copy(wide()))
    first = talk(server, None, 12, 3)
    model = server.model
    if way == "in place":
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    elif way == "replaced":
        for block in model.blocks:
            block.mlp.out_proj.weight = torch.nn.Parameter(-block.mlp.out_proj.weight)
    else:
        torch.manual_seed(3)
        model.load_state_dict(TinyMambaModel(model.config).state_dict())
    want = talk(StreamingServer(free_copy(model)), None, 12, 3)
    assert talk(server, None, 12, 3) == want != first


@torch.no_grad()
def test_a_hook_that_comes_while_a_session_answers_runs_from_the_next_answer_on():
    server, seen = StreamingServer(free_copy(wide())), []
    first = server.answer([1], as_ids=True, max_new_tokens=30, seed=1)
    next(first), next(first)
    assert isinstance(server.decoder.batch_state, LiveBatch)
    hook = server.model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    second = server.answer([2], as_ids=True, max_new_tokens=30, seed=1)
    next(second), next(second)
    assert seen and isinstance(server.decoder.batch_state, ModelState)
    hook.remove()
    rest = [tokens_of(first), tokens_of(second)]
    server = StreamingServer(free_copy(wide()))
    want = [server.answer([i], as_ids=True, max_new_tokens=30, seed=1) for i in (1, 2)]
    assert rest == [tokens_of(answer)[2:] for answer in want]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: quantize_model(wide(), 8), "quantized"),
        (lambda: wide(gate="top_k"), "sparse gate"),
        (lambda: wide(d_conv=1), "sparse gate"),
        (lambda: free_copy(wide()).double(), "dtype"),
        (lambda: free_copy(wide()).train(), "training"),
        (lambda: wide(low_rank=4), "LowRankProjection"),
    ],
)
def test_other_models_decode_as_before(make, why):
    assert why in why_not_live(make())


def test_without_onednn_models_decode_as_before(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "oneDNN" in why_not_live(wide())


def test_gaps_are_filled_by_the_last_rows():
    for stay in itertools.chain.from_iterable(
        itertools.combinations(range(6), n) for n in range(7)
    ):
        order = fill_gaps([*stay])
        assert sorted(order) == [*stay]
        assert all(old == row or old >= len(stay) for row, old in enumerate(order))
