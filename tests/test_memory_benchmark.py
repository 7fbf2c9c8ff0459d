"""benchmarks/memory.py and what it shares: tasks, peers, the command line, tables of rows."""

import functools
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import EXTRAS, assert_refused, flags, run_main, run_script, tiny_config, write_tokens
from torch import nn

from benchmarks import memory, memory_tasks, peers, quality
from benchmarks.memory_tasks import GROUPS, IGNORE
from benchmarks.peers import PEERS, Shape, build_peer, count, fit
from benchmarks.report import Column, best_rate, cell, sweep_table, write_between
from testv2 import Config, TinyMambaModel, make_optimizer
from tinymamba.cli import UserError


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# ------------------------------------------------------------------------------------ tasks


@pytest.mark.parametrize("pairs", (1, 4, 16))
def test_mqar_asks_for_the_value_that_followed_the_key(pairs):
    ids, targets = memory_tasks.mqar(8, 64, pairs, 64, random())
    assert ids.shape == targets.shape == (8, 64)
    back = iter(memory_tasks.distances_to_answers(ids, targets).tolist())
    for row, asked in zip(ids.tolist(), targets.tolist(), strict=True):
        keys, values = row[: 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == pairs and max(keys) < 32 <= min(values)
        where = [i for i, value in enumerate(asked) if value != IGNORE]
        assert len(where) == pairs and min(where) >= 2 * pairs
        found = dict(zip(keys, values, strict=True))
        assert all(asked[i] == found[row[i]] == row[i - next(back)] for i in where)


def test_induction_asks_for_the_token_after_the_only_other_marker():
    ids, targets = memory_tasks.induction(32, 20, 16, random())
    for row, asked in zip(ids.tolist(), targets.tolist(), strict=True):
        assert row.count(0) == 2 and row[-1] == 0
        assert asked[:-1] == [IGNORE] * 19 and asked[-1] == row[row.index(0) + 1]


def test_counting_asks_for_the_product_of_all_tokens_so_far():
    permutations = list(itertools.permutations(range(5)))
    for name, group in GROUPS.items():
        order = len(group.product)
        ids, targets = memory_tasks.counting(4, 37, group, random())
        assert ids[:, 0].eq(order).all() and targets[:, 0].eq(IGNORE).all()
        for row, asked in zip(ids[:, 1:].tolist(), targets[:, 1:].tolist(), strict=True):
            if order < 120:
                assert asked == [sum(row[: i + 1]) % order for i in range(37)]
                continue
            things = tuple(range(5))
            for element, product in zip(row, asked, strict=True):
                things = tuple(permutations[element][i] for i in things)
                assert permutations[product] == things, name
    assert [len(group.drawn) for group in GROUPS.values()] == [2, 5, 120, 11]


def test_a_passage_is_repeated_where_it_counts():
    old = torch.arange(3 * 1025).view(3, 1025)
    new, counts = memory_tasks.repeat_passage(old, random())
    for before, after, counted in zip(old, new, counts, strict=True):
        [changed] = (before != after).nonzero(as_tuple=True)
        begin, end = changed[0].item(), changed[-1].item() + 1
        gap = begin - (after[begin] - before[0]).item()
        assert end - begin == 64 and 200 <= gap <= 800
        assert after[begin:end].equal(before[begin - gap : end - gap])
        assert counted.nonzero()[:, 0].tolist() == list(range(begin + 4, end))


def test_nothing_out_of_reach_is_read_without_the_state():
    """Recall counts as far only where attention and convolutions cannot have found the answer."""
    config = tiny_config(window_size=4, memory=False)
    model, length = TinyMambaModel(config).eval(), 64
    reach = memory_tasks.reach(config.n_layer, config.window_size, config.d_conv)
    assert reach == 2 * (3 + 2 * 3) and memory.complete(memory.Options("recall_far")).reach == 26
    for block in model.blocks:
        nn.init.zeros_(block.ssm.out_proj.weight)
    embedded = torch.randn(1, length, config.d_model, requires_grad=True)
    ids = torch.zeros(1, length, dtype=torch.int64)
    model.run(ids, embedded=embedded)[0][0, -1].sum().backward()
    read = embedded.grad[0].abs().sum(1).nonzero()[:, 0]  # tokens that the last one depends on
    assert length - 1 - reach <= read.min() < length - 1 - config.window_size


# ------------------------------------------------------------------------------------ peers

SMALL = Shape(vocab=40, width=32, layers=2, heads=2, mlp=24, state=8)


@functools.cache
def peer(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_peer(name, SMALL).eval()


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_is_causal_in_float32_and_muon_gets_its_matrices(name):
    model = peer(name)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    table = model.get_input_embeddings()
    assert model.lm_head.weight is table.weight and getattr(table, "padding_idx", None) is None
    ids = torch.randint(40, (2, 20))
    changed = ids.clone()
    changed[:, 12] = (ids[:, 12] + 1) % 40
    with torch.no_grad():
        before, after = (model(i).logits for i in (ids, changed))
    assert torch.allclose(before[:, :12], after[:, :12], atol=1e-6)
    assert not torch.allclose(before[:, 13:], after[:, 13:], atol=1e-6)
    muon, *rest = make_optimizer(model, Config()).param_groups
    wanted = {m.weight for m in model.modules() if type(m) is nn.Linear} - {model.lm_head.weight}
    assert len(wanted) >= 4 and set(muon["params"]) == wanted
    others = {p for group in rest for p in group["params"]}
    assert others == {*model.parameters()} - wanted


def test_llama_conv_is_qwen3_with_convolutions_that_begin_small():
    import transformers as hf

    model = peer("llama_conv")
    heads = {"num_key_value_heads": 2, "head_dim": 16}
    plain = hf.Qwen3ForCausalLM(hf.Qwen3Config(**peers.transformer_settings(SMALL), **heads)).eval()
    weights = {name.replace(".module.", "."): t for name, t in model.state_dict().items()}
    convs = {name: weights.pop(name) for name in [*weights] if "conv_weight" in name}
    assert len(convs) == 4 and all(0.2 < t.abs().max() <= 0.25 for t in convs.values())
    plain.load_state_dict(weights)
    ids = torch.randint(40, (2, 20))
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-3)
        kept = [p.clone() for p in convs.values()]
        for weight in convs.values():  # the model's own
            weight.zero_()
        assert torch.equal(model(ids).logits, plain(ids).logits)
        for weight, value in zip(convs.values(), kept, strict=True):
            weight.copy_(value)


@torch.no_grad()
def test_llama_canon_and_llama_start_have_convolutions_in_attention():
    canon, start = peer("llama_canon").model.layers[0].self_attn, peer("llama_start").model.layers
    assert all(type(p) is peers.WithConv for p in (canon.q_proj, canon.k_proj, canon.v_proj))
    u = torch.randn(2, 9, 32)
    for attention in (layer.self_attn for layer in start):
        assert type(attention.q_proj) is type(attention.v_proj) is nn.Linear
        attention.k_proj.conv_weight.round_()  # without the random part
        queries, keys = attention.q_proj(u), attention.k_proj(u)
        torch.testing.assert_close(keys[:, 1:], queries[:, :-1])


def test_peers_have_the_size_of_tinymamba_in_every_task():
    seen = set()
    for task in memory.TASKS:
        config = memory.config_of(memory.complete(memory.Options(task)))
        key = (config.d_model, config.vocab_size, config.d_state)
        if key in seen:
            continue
        seen.add(key)
        with torch.device("meta"):
            ours = count(TinyMambaModel(config))
            for name in PEERS:
                shape = peers.peer_shape(name, config)
                assert count(build_peer(name, shape)) == pytest.approx(ours, rel=0.02), (task, name)
                assert name != "mamba2" or shape.state >= config.d_state
    assert len(seen) >= 5


def test_a_size_that_a_peer_cannot_have_is_refused():
    with pytest.raises(UserError, match="llama: width 32 and 2 layers cannot have 100 parameters"):
        fit("llama", SMALL, 100)


def test_an_older_transformers_is_refused(monkeypatch):
    old = SimpleNamespace(__version__="4.50.0", logging=SimpleNamespace(set_verbosity_error=int))
    monkeypatch.setattr(peers, "need", lambda name: old)
    with pytest.raises(UserError, match="4.50.0 has no OlmoHybrid; pip install transformers=="):
        build_peer("gated_delta", SMALL)
    assert f"transformers=={peers.TRANSFORMERS}" in EXTRAS["hf"]


# ------------------------------------------------------------------------------------ measures


def chosen(task: str, **changes) -> memory.Options:
    words = flags(**{"d_model": 32, "n_layer": 1, "models": "tinymamba", **changes})
    return memory.parse([task, *words])


@pytest.mark.parametrize("task", ["induction", "s5"])
def test_long_texts_are_read_in_chunks_as_in_one_pass(task, monkeypatch):
    options = chosen(task, test_samples=8)
    model = memory.build(options, "tinymamba").eval()
    nn.init.normal_(model.embedding.weight)
    texts = memory.draw(options, random(), 100, 8)
    whole = memory.right_answers(model, options, *texts).sum()
    monkeypatch.setattr(memory, "AT_ONCE", 10)
    monkeypatch.setattr(memory, "PASS", 7 * 8)
    in_chunks = memory.right_answers(model, options, *texts)
    assert in_chunks.sum() == whole and len(in_chunks) == (8 if task == "induction" else 800)


def test_peers_are_asked_only_for_what_they_can_read(monkeypatch, capsys):
    options = memory.parse(["parity", "--models", "tinymamba", "llama"])
    assert capsys.readouterr().out == "llama: read up to 4096 tokens only, as they do it at once\n"
    monkeypatch.setattr(memory, "AT_ONCE", 20)
    options = chosen("parity", read=[10, 30], test_samples=2)
    found = {n: memory.measure(memory.build(options, n), options, None) for n in memory.MODELS[:2]}
    assert [[*row["accuracy"]] for row in found.values()] == [[10, 30], [10]]


def test_steps_to_half_is_the_first_look_at_which_half_was_right(monkeypatch):
    looks = iter([(0.9, 0.4), (0.9, None), (0.2, 0.5)])  # and no further one
    monkeypatch.setattr(memory, "EVERY", 2)
    monkeypatch.setattr(memory, "recall", lambda *_: next(looks))
    options = chosen("recall_far", length=32, pairs=2, vocab_size=16, batch_size=1, steps=9)
    model = memory.build(options, "tinymamba")
    found = memory.train(model, options, 0, 1e-3, functools.partial(memory.draw, options))
    assert found["steps_to_half"] == 6 and found["loss"] > 0


def test_far_counts_the_answers_out_of_reach(monkeypatch):
    options = chosen("recall_far", length=64, pairs=4, vocab_size=32, window_size=2)
    monkeypatch.setattr(memory, "right_answers", lambda m, o, i, t: torch.arange(4 * 3) % 4 == 0)
    backs = torch.tensor([options.reach + 1, options.reach, 99] * 4)
    monkeypatch.setattr(memory_tasks, "distances_to_answers", lambda i, t: backs)
    # right are the answers 0, 4 and 8; far are 0, 2, 3, 5, 6, 8, 9 and 11
    assert memory.recall(None, options, 3) == (0.25, 0.25)


@pytest.mark.parametrize("bias, quiet", [(-20.0, True), (0.0, False)])
def test_the_largest_dt_is_that_of_tokens_that_do_not_matter(bias, quiet):
    options = chosen("induction", n_layer=2, length=64)
    model = memory.build(options, "tinymamba").eval()
    for block in model.blocks:
        nn.init.constant_(block.ssm.dt_bias, bias)
    steps = memory.largest_dt(model, options)
    assert [len(heads) for heads in steps] == [2, 2]
    assert all((dt == 0) == quiet for heads in steps for dt in heads)


def test_only_the_passage_counts_as_copied():
    class Copies(nn.Module):
        """Knows each token that was there 300 tokens before, and nothing else."""

        def forward(self, ids):
            said = ids.roll(299, 1)
            return 30.0 * nn.functional.one_hot(said, 5000).float()

    windows = torch.randint(1, 5000, (1025,), generator=random())
    options = memory.complete(memory.Options("far_copy"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_tasks, "GAP", (300, 300))
        losses = memory.copy_losses(Copies(), options, windows)
    assert losses["copy_loss"] < 0.01 and losses["rest_loss"] > 20


# ------------------------------------------------------------------------------ command line

BRIEF = {"steps": 1, "seeds": [0, 1], "lr": 1e-3, "test_samples": 2, "d_model": 32, "threads": 1}
COMMANDS = {
    "recall_far": {"length": 32, "pairs": 2, "vocab_size": 32, "models": ["tinymamba", "mamba2"]},
    "mod5": {"read": [8], "models": "gated_delta"},
    "induction": {"read": [16, 20], "length": 32, "models": "tinymamba"},
    "far_copy": {"data": ".", "batch_size": 1, "length": 864, "models": "llama_conv", "seeds": [0]},
}


@pytest.mark.parametrize("task", COMMANDS)
def test_memory_command(task, tmp_path):
    for name in ("train", "val"):
        write_tokens(tmp_path / f"{name}.bin", [7 * i % 4096 for i in range(2000)])
        (tmp_path / f"{name}.json").write_text('{"tokens": 2000, "bytes": 2000}')
    words = {**BRIEF, **COMMANDS[task]}
    done = run_main(memory.main, task, *flags(**words), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    models = words["models"] if isinstance(words["models"], list) else [words["models"]]
    rows = rows_of(tmp_path / "memory.jsonl")
    runs = [(seed, model) for seed in words["seeds"] for model in models]
    assert [(row["seed"], row["model"]) for row in rows] == runs
    for row in rows:
        assert (row["task"], row["variant"], row["lr"]) == (task, "", 1e-3)
        assert row["steps"] == 1 and row["d_model"] == 32 and math.isfinite(row["loss"])
        if task == "far_copy":
            assert row["copy_loss"] > 3 and row["rest_loss"] > 3 and row["bf16"] is True
            continue
        assert [*row["accuracy"]] == [str(n) for n in words.get("read", [32])]
        assert all(0 <= share <= 1 for share in row["accuracy"].values())
        extra = {"recall_far": {"far", "steps_to_half"}, "induction": {"dt"}}.get(task, set())
        assert extra <= row.keys()


def test_memory_command_in_its_own_process(tmp_path):
    (tmp_path / "notes.md").write_text("Before\n<!-- memory -->\nold\n<!-- /memory -->\nAfter\n")
    words = flags(**BRIEF, read=16, models="tinymamba", table="notes.md")
    done = run_script("benchmarks.memory", "parity", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "memory.jsonl")) == 2
    text = (tmp_path / "notes.md").read_text()
    assert text.startswith("Before\n<!-- memory -->\n**parity**\n\n| model | variant |")
    assert text.endswith("|\n<!-- /memory -->\nAfter\n") and "old" not in text
    assert "| tinymamba |  | `steps=1 read=[16] test_samples=2` | 0.001 (edge) | 2 |" in text


@pytest.mark.parametrize("script, task", [(memory, "parity"), (quality, "S")])
def test_a_variant_is_built_from_its_words(script, task, tmp_path):
    words, parameters = flags(steps=1, seeds=0, lr=1e-3, models="tinymamba"), []
    if script is quality:
        (tmp_path / "a").write_bytes(bytes(range(256)) * 5)
        words += flags(text=["a", "a"])
    else:
        words += flags(read=8, test_samples=2)
    for variant in ("", "memory=false k_conv=false"):
        done = run_main(script.main, task, *words, "--variant", variant, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        row = rows_of(tmp_path / f"{script.__name__.split('.')[1]}.jsonl")[-1]
        assert row["variant"] == variant and row["model"] == "tinymamba"
        parameters.append(row["parameters"])
    assert parameters[1] < parameters[0]


UNKNOWN = ["turn=all", "k_conv", "d_state=x", "d_state=0", "memory=maybe", "train_data_path=x"]


@pytest.mark.parametrize("words", UNKNOWN)
def test_unknown_words_of_a_variant_are_refused(words):
    with pytest.raises(UserError):
        peers.build_tinymamba(Config(d_model=32, num_heads=2), words)


@pytest.mark.parametrize("words, field", [
    (["recall_far", "--length", 32, "--pairs", 16], "--length"),
    (["recall_far", "--vocab_size", 16], "--vocab_size"),
    (["recall_far", "--read", 64], "--read"),
    (["recall_far", "--d_state", 7], "d_state"),
    (["recall_far", "--steps", 0], "--steps"),
    (["parity", "--pairs", 2], "--pairs"),
    (["induction", "--models", "llama", "--read", 8192], "--read"),
    (["induction", "--length", 16], "--length"),
    (["induction", "--models", "tinymamba", "llama", "--variant", "x"], "--variant"),
    (["far_copy", "--length", 500], "--length"),
    (["far_copy", "--models", "tinymamba"], "data/text/train.bin"),
    (["far_recall"], "task: far_recall"),
    ([], "task"),
    (["--table", "none.md"], "none.md"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(words, field, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "run", None)  # nothing is trained
    assert_refused(run_main(memory.main, *words, cwd=tmp_path), field)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------ tables

SHARE = Column("right", lambda row: row["right"], share=True)
LOSS = Column("loss", lambda row: row["right"], larger=False)


def sweep(**values: list) -> dict:
    """sweep(r2=[0.5, 0.6]): two seeds with the rate 2."""
    return {
        float(rate[1:]): {seed: {"right": right} for seed, right in enumerate(rights)}
        for rate, rights in values.items()
    }


@pytest.mark.parametrize("column, runs, best", [
    (SHARE, sweep(r1=[0.1], r2=[0.5], r3=[0.2]), (2, True)),
    (LOSS, sweep(r1=[0.1], r2=[0.5], r3=[0.2]), (1, False)),
    (SHARE, sweep(r1=[0.1], r2=[0.5], r3=[0.6]), (3, False)),
    (SHARE, sweep(r1=[0.1]), (1, False)),
    (SHARE, sweep(r1=[1.0], r2=[1.0], r3=[1.0]), (2, True)),  # nothing can be better
    (SHARE, sweep(r1=[0.5], r2=[0.5], r3=[0.5]), (2, False)),
    (SHARE, sweep(r1=[0.7], r2=[0.8, 0.1, 0.1], r3=[0.6]), (2, True)),  # by the seed they share
    (LOSS, sweep(r1=[2.0, 2.0], r2=[1.0, None], r3=[3.0, 3.0]), (1, False)),  # 2 diverged once
])  # fmt: skip
def test_the_best_rate_and_whether_worse_ones_are_on_both_sides(column, runs, best):
    assert best_rate(runs, column) == best


@pytest.mark.parametrize("column, values, text", [
    (SHARE, [1.0, 0.5, 1.0], "0.833 (0.500 to 1.000), 2 of 3 at 1"),
    (LOSS, [2.0], "2.000"),
    (Column("steps", lambda row: row["right"], digits=0), [900, None, 1700],
     "1,300 (900 to 1,700), 2 of 3 seeds"),
    (LOSS, [None], "none"),
])  # fmt: skip
def test_a_cell_says_mean_spread_and_what_is_missing(column, values, text):
    assert cell(column, [{"right": value} for value in values]) == text


def test_a_table_has_a_line_for_each_choice_of_settings():
    def row(model="a", variant="", lr=1.0, seed=0, right=0.5, n=16):
        return {"model": model, "variant": variant, "lr": lr, "seed": seed, "right": right,
                "n": n, "seconds": 9.6}  # fmt: skip

    rows = [row(right=0.1), row(), row(seed=1, right=0.7), row(variant="x y=1"), row("b", n=64)]
    assert sweep_table(rows, [LOSS], {"n": 16})[2:] == [
        "| a |  |  | 1 (edge) | 2 | 0.600 (0.500 to 0.700) | 10 |",  # the last row of a seed counts
        "| a | `x y=1` |  | 1 (edge) | 1 | 0.500 | 10 |",
        "| b |  | `n=64` | 1 (edge) | 1 | 0.500 | 10 |",
    ]


def test_a_file_without_markers_is_refused_and_kept(tmp_path):
    path = tmp_path / "notes.md"
    path.write_text("<!-- memory -->\n")
    with pytest.raises(UserError, match="has no markers"):
        write_between(str(path), "memory", ["new"])
    assert path.read_text() == "<!-- memory -->\n"
