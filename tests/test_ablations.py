"""benchmarks/ablations.py: every switch, the recurrences, the command line, the rows of docs/."""

import dataclasses
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, assert_refused, run_main, run_script

from benchmarks import ablations
from benchmarks.ablations import Settings, build, lines_of, parse_run, read_rows, train, words
from tinymamba.cli import UserError, describe_fields

TINY = {
    "d_model": 16, "n_layer": 2, "inner": 16, "ssm_head_dim": 8, "d_state": 4, "hidden": 16,
    "window_size": 4, "block_size": 12, "batch_size": 2, "steps": 1, "warmup": 1,
}  # fmt: skip
SWITCHES = [
    {name: value} for name, values in Settings.CHOICES.items() for value in values
    if value != getattr(Settings, name)
] + [
    {f.name: not f.default} for f in dataclasses.fields(Settings) if isinstance(f.default, bool)
] + [
    {"rot": "tanh"},  # the defaults
    {"ssm_conv": 4, "ssm_silu": True}, {"block_conv": 0}, {"block_conv": 8}, {"dropout": 0.1},
    {"weight_decay": 0.1}, {"gate_scale": 3.0}, {"kind": "mamba2", "d_model": 32},
    {"order": "sequential", "gate": "none", "block_conv": 0, "value_residual": True},
    {"rot": "exact", "angle_float32": True}, {"delta": True, "rot": "none"},
    {"trapezoid": True, "bc_norm": True, "bc_bias": True}, {"hidden": 0, "parameters": 30_000},
    {"rank": 12}, {"rank": 12, "hidden": 0, "parameters": 30_000}, {"init": 1.0, "deepnet": False},
    {"bigrams": 64}, {"loops": 2},
]  # fmt: skip
BYTES = torch.arange(400) * 7 % 256


def settings(**changes) -> Settings:
    return Settings(**{**TINY, **changes}).validate()


def noisy(model):
    """With weights far from their first values, so that every mistake shows."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("changes", SWITCHES, ids=words)
def test_a_step_is_finite_and_no_output_knows_later_bytes(changes):
    s = settings(**changes)
    model = build(s)
    before = [p.clone() for p in model.parameters()]
    [loss] = train(model, BYTES, s, seed=0)
    assert 3 < loss < 12
    assert any((p != q).any() for p, q in zip(model.parameters(), before, strict=True))

    model = noisy(model).eval()
    ids = torch.randint(256, (2, 12))
    other = torch.cat((ids[:, :7], (ids[:, 7:] + 1) % 256), 1)
    with torch.no_grad():
        change = (model(ids) - model(other)).abs().amax((0, 2))  # (l,)
    assert change[:7].max() < 1e-4 < 1e-2 < change[7:].min()


@pytest.mark.parametrize("step", ["euler", "trapezoid", "delta_rule"])
def test_the_matrix_form_is_the_recurrence(step):
    s = settings(delta=step == "delta_rule", trapezoid=step == "trapezoid")
    ssm = noisy(ablations.SSM(s)).double()
    torch.set_default_dtype(torch.float64)
    u, x = torch.randn(2, 9, 16), torch.randn(2, 2, 9, 8)
    b, c = F.normalize(torch.randn(2, 1, 9, 4), dim=-1), torch.randn(2, 1, 9, 4)
    dt, log_decay = torch.rand(2, 9, 2), -torch.rand(2, 9, 2)
    total = log_decay.cumsum(1).transpose(1, 2)
    decay = (total[..., :, None] - total[..., None, :]).exp().tril()
    y = getattr(ssm, step)(u, x, b, c, dt, decay)

    state, last, outputs = torch.zeros(2, 2, 8, 4), torch.zeros(2, 2, 8, 4), []
    for t in range(9):
        write = x[:, :, t, :, None] * b[:, :, t, None]  # (b, h, p, n)
        a, step_size = log_decay[:, t, :, None, None].exp(), dt[:, t, :, None, None]
        if step == "euler":
            state = a * state + step_size * write
        elif step == "trapezoid":
            share = torch.sigmoid(ssm.share_proj(u))[:, t, :, None, None]
            state = a * (state + (1 - share) * step_size * last) + share * step_size * write
        else:
            beta = 2 * torch.sigmoid(ssm.beta_proj(u))[:, t, :, None, None]
            known = (state * b[:, :, t, None]).sum(-1, keepdim=True) * b[:, :, t, None]
            state = a * (state - beta * known) + beta * write
        last = write
        outputs.append((state * c[:, :, t, None]).sum(-1) + ssm.D[:, None] * x[:, :, t])
    torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(y, torch.stack(outputs, dim=2))


def test_gates():
    logits = torch.tensor([[3.0, 2.0, -1.0], [0.2, 0.1, 0.0]])
    gates = {
        name: ablations.branch_weights(logits, name) for name in ("softmax", "top2", "sparsemax")
    }
    for weights in gates.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(2))
    assert (gates["top2"] > 0).tolist() == [[True, True, False]] * 2
    expected = torch.tensor([[1.0, 0.0, 0.0], [13 / 30, 1 / 3, 7 / 30]])
    torch.testing.assert_close(gates["sparsemax"], expected)


def test_schedules():
    s = settings(steps=100, warmup=10)
    cosine = [ablations.rate(step, s) for step in range(100)]
    wsd = [ablations.rate(step, dataclasses.replace(s, schedule="wsd")) for step in range(100)]
    assert cosine[0] == wsd[0] == 0.1 and cosine[10] == wsd[10] == wsd[60] == 1
    assert cosine[55] == pytest.approx(0.5) and wsd[80] == 0.5 and cosine[99] < wsd[99] < 0.03


def test_hidden_is_chosen_for_the_number_of_parameters():
    model = build(settings(hidden=0, parameters=60_000))
    assert abs(ablations.count_parameters(model) - 60_000) < 400


def test_the_command_line_writes_a_row_the_table_and_the_picture(tmp_path):
    for name in ("train.txt", "val.txt"):
        (tmp_path / name).write_bytes(bytes(BYTES.tolist()))
    (tmp_path / "notes.md").write_text("Before\n<!-- rows -->\nold\n<!-- /rows -->\nAfter\n")
    size = words(TINY)
    text = ["--text", "train.txt", "val.txt", "--seeds", 3, "--base", "first"]
    runs = ["--run", f"first {size}", f"second {size} gate=none"]
    files = ["--output", "rows.jsonl", "--table", "notes.md", "--plot", "rows.png"]
    done = run_main(ablations.main, *text, *runs, *files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = read_rows(tmp_path / "rows.jsonl")
    assert [json.loads(line) for line in done.stdout.splitlines()] == [first, second]
    assert first["base"] is None and second["base"] == "first" and first["seed"] == 3
    assert second["settings"] == {**TINY, "gate": "none"} and first["nats_per_byte"] > 3
    assert [line.changed for line in lines_of([first, second])] == [TINY, {"gate": "none"}]
    text = (tmp_path / "notes.md").read_text()
    assert text.startswith("Before\n<!-- rows -->\n|") and text.endswith("<!-- /rows -->\nAfter\n")
    assert "old" not in text and "| second | 3 | first | `gate=none` |" in text
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_a_diverged_run_is_a_row_too():
    rows = [{"name": name, "base": base, "seed": 0, "settings": {}, "nats_per_byte": nats}
            for name, base, nats in (("a", None, 1.0), ("b", "a", None))]  # fmt: skip
    assert [line.percent for line in lines_of(rows)] == ["", ""]


def test_a_bad_field_is_one_line(tmp_path):
    text = ["--text", "train.txt", "val.txt"]
    done = run_main(ablations.main, "--run", "R gait=none", *text, cwd=tmp_path)
    assert_refused(done, "gait", "--help")
    assert_refused(run_main(ablations.main, "--run", "R", cwd=tmp_path), "--text: a run needs two")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text, field", [
    ("", "run"), ("gate=none", "run"), ("R gate", "gate"), ("R gate=soft", "gate"),
    ("R lr=fast", "lr"), ("R steps=0", "steps"), ("R tie=maybe", "tie"), ("R norms=2", "norms"),
    ("R num_heads=3", "num_heads"), ("R ssm_head_dim=60", "ssm_head_dim"),
    ("R d_state=3", "d_state"), ("R delta=true trapezoid=true", "delta"),
    ("R kind=llama", "hidden"), ("R dropout=1", "dropout"),
])  # fmt: skip
def test_runs_that_cannot_be_are_refused(text, field):
    with pytest.raises(UserError) as error:
        parse_run(text)
    assert str(error.value).startswith(f"{field}: ") and "; " in str(error.value)


def test_the_rows_of_docs_can_be_run_and_stand_in_the_table(tmp_path):
    rows = read_rows(ROOT / "docs" / "ablations.jsonl")
    names = {row["name"] for row in rows}
    for row in rows:
        assert parse_run(f"{row['name']} {words(row['settings'])}") == (
            row["name"],
            row["settings"],
        )
        assert row["base"] is None or row["base"] in names - {row["name"]}
        s = Settings(**row["settings"]).validate()
        assert s.hidden in (0, row["hidden"]) and row["nats_per_byte"] < 2
    page = ROOT / "docs" / "ablations.md"
    shutil.copy(page, tmp_path)
    words_of_table = ["--output", page.with_suffix(".jsonl"), "--table", page.name]
    done = run_script("benchmarks.ablations", *words_of_table, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / page.name).read_text() == page.read_text(), "run --table docs/ablations.md"


def test_every_setting_is_described():
    assert [*describe_fields(Settings)] == [field.name for field in dataclasses.fields(Settings)]
