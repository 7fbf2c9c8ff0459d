"""The folder of a sharded run: its promises are those of the file, tested in the same ways."""

import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    LATEST,
    LINUX,
    POSIX,
    ROOT,
    assert_refused,
    assert_refuses,
    brief_flags,
    call,
    examples,
    free_port,
    killed_before,
    run_main,
    run_script,
    run_two_ranks,
    two_ranks,
    write_tokens,
)
from hypothesis import given
from hypothesis import strategies as st

import export_model
import hf_integration
import peft
import quantize
import streaming
from testv2 import load_model
from tinymamba import checkpoint, distributed, shard_files, sharded_checkpoint
from tinymamba.checkpoint import (
    MANIFEST,
    digest,
    is_checkpoint,
    load_checkpoint,
    load_newest,
    run_files,
    save_checkpoint,
    sibling,
)
from tinymamba.cli import UserError
from tinymamba.initial_weights import TABLES
from tinymamba.sharded_checkpoint import checksum, join, save_sharded, split
from tinymamba.tokenizer import byte_tokenizer

PREVIOUS, BEST = sibling(LATEST, "previous"), sibling(LATEST, "best")
SHARD = "shard_00000.safetensors"


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """The folder in which two processes have trained, and what they have seen."""
    place = tmp_path_factory.mktemp("group")
    (place / "data" / "text").mkdir(parents=True)
    text = "".join(f"{a} plus {b} is {a + b}.\n" for a in range(30) for b in range(30))
    for name in ("train", "val"):
        write_tokens(place / "data" / "text" / f"{name}.bin", text)
    byte_tokenizer().save(str(place / "data" / "text" / "tokenizer.json"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run_two_ranks(script="sharded_worker.py")
    return place, json.loads((place / "seen").read_text())


@pytest.fixture
def folder(group, tmp_path, monkeypatch) -> Path:
    """A copy of a folder that two processes wrote, as the newest checkpoint in a fresh place."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(group[0] / "whole.pt", LATEST)
    return LATEST


def small_state(step: int = 1) -> dict:
    weight = torch.arange(6.0).view(2, 3) + step
    groups = [{"betas": (0.9, 0.95), "params": [0, 1]}]
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}, 1: {}}, "param_groups": groups}
    model = {"a": weight, "tied": weight, "view": weight.T, "none": torch.zeros(0, 3)}
    return {"model": model, "optimizer": optimizer, "global_step": step,
            "progress": {"lowest": float("inf"), "$": None, "folder": "ü"}}  # fmt: skip


def sign_again(folder: Path, change) -> None:
    """Change a manifest as one who means harm can: its checksum is right."""
    path = folder / MANIFEST
    body = json.loads(path.read_bytes())
    del body["checksum"]
    change(body)
    path.write_text(json.dumps({**body, "checksum": checksum(body)}))


# --------------------------------------------------------------------------------- two processes


def test_a_folder_holds_what_the_file_of_one_process_would(group):
    place, _ = group
    folder, file = (load_checkpoint(place / name) for name in ("whole.pt", "gathered.pt"))
    assert digest(folder) == digest({**file, "format_version": 3})
    assert folder["model"]["head.weight"] is folder["model"]["embedding.weight"]
    assert {p.name for p in (place / "whole.pt").iterdir()} == {
        MANIFEST, SHARD, "shard_00001.safetensors"
    }  # fmt: skip
    sizes = [path.stat().st_size for path in (place / "whole.pt").glob("shard_*")]
    assert max(sizes) < 1.1 * min(sizes)


def test_the_best_are_kept_as_folders_too(group):
    place, _ = group
    best = load_checkpoint(place / "whole.pt")["progress"]["best"]
    assert {name for _, name in best} == {p.name for p in place.glob("whole_step*.pt")}
    assert len(best) == 2
    assert load_checkpoint(place / "whole_best.pt")["val_loss"] == best[0][0]
    assert load_checkpoint(place / "whole_previous.pt")["global_step"] == 4


def test_no_process_assembles_a_tensor_to_save_it_and_a_copy_is_of_its_own_shards(group):
    seen = group[1]
    assert seen["gathers"] == 0
    memory = seen["memory"]
    assert memory["staged"] <= memory["own"] < 0.6 * memory["whole"]
    assert memory["shared"] == 0


def test_a_resumed_sharded_run_is_bitwise_the_uninterrupted_one_and_async_changes_nothing(group):
    place, _ = group
    whole, halves = (load_checkpoint(place / f"{name}_previous.pt") for name in ("whole", "halves"))
    assert whole["global_step"] == halves["global_step"] == 4
    for part in ("model", "optimizer", "data", "tokens_seen"):
        assert digest(whole[part]) == digest(halves[part]), part
    history = [saved["progress"]["history"]["train"] for saved in (whole, halves)]
    assert history[0] == history[1]


def test_ddp_reads_a_folder_and_fsdp_a_file(group):
    """The last state of "halves" is damaged since, that of "whole" has the same bits."""
    place, seen = group
    whole = load_checkpoint(place / "gathered.pt")
    for name in ("halves", "gathered"):
        assert seen[name] == [digest(whole["model"]), digest(whole["optimizer"])], name


def test_a_new_run_from_a_folder_reads_only_its_own_rows(group):
    weights = load_checkpoint(group[0] / "whole.pt")["model"]
    found, read, _ = group[1]["begun"]
    assert found == digest(weights)
    rest = [t.nbytes for name, t in weights.items() if name not in TABLES]
    assert 0.4 < read / sum(rest) < 0.6


def test_a_step_of_a_sharded_run_is_profiled_by_its_parts(group):
    assert {"SSM: scan", "MLP", "head and loss", "optimizer"} <= {*group[1]["begun"][2]}


def test_a_full_disk_of_one_process_is_told_by_all_and_the_last_save_stays(group):
    place, seen = group
    said = seen["full disk"]
    assert said.startswith("whole.pt: cannot be written (process 1: ") and "No space" in said
    assert not seen["left after it"]
    assert load_checkpoint(place / "whole.pt")["global_step"] == 6


def test_all_processes_agree_on_the_one_before_if_one_shard_is_damaged(group):
    place, seen = group
    assert seen["after damage"] == 4
    assert (place / "halves.pt.damaged.1").is_dir() and not (place / "halves.pt").exists()


# --------------------------------------------------------------------------------- damaged folders


def test_every_flipped_bit_of_any_file_is_caught(folder):
    whole, dice, refused = digest(load_checkpoint(folder)), random.Random(0), 0
    files = sorted(folder.iterdir())
    for number in range(60):
        path = files[number % len(files)]
        good = path.read_bytes()
        raw, at = bytearray(good), dice.randrange(len(good))
        raw[at] ^= 1 << dice.randrange(8)
        path.write_bytes(raw)
        try:
            assert digest(load_checkpoint(folder)) == whole, f"byte {at} of {path.name}"
        except UserError as e:
            refused += 1
            assert "damaged" in str(e)
        path.write_bytes(good)
    assert refused > 55, "at most an e of a float became an E"


@pytest.mark.parametrize("name", [SHARD, "shard_00001.safetensors", MANIFEST])
def test_a_file_that_is_cut_or_missing_is_refused_by_name(folder, name):
    good = (folder / name).read_bytes()
    for end in (0, len(good) // 2, len(good) - 1):
        (folder / name).write_bytes(good[:end])
        with pytest.raises(UserError, match=f"damaged.*{name}"):
            load_checkpoint(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        load_checkpoint(folder)
    with pytest.raises(UserError, match=name):
        load_model(folder)


def test_a_file_that_does_not_belong_to_it_is_never_read(folder):
    before = digest(load_checkpoint(folder))
    (folder / ".nfs0001").write_bytes(b"open elsewhere")
    (folder / "shard_00002.safetensors").write_bytes(b"of a larger run")
    assert digest(load_checkpoint(folder)) == before


class Code:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def put_code(body: dict) -> None:
    (LATEST / SHARD).write_bytes(pickle.dumps(Code()))
    size, sha256 = (LATEST / SHARD).stat().st_size, sharded_checkpoint.hash_file(LATEST / SHARD)
    body["files"][SHARD] = {"bytes": size, "sha256": sha256}
    body["tensors"] = {"model/x": {"dtype": "uint8", "shape": [1], "chunks": [[SHARD, [0], [1]]]}}
    body["values"] = {"model": {"x": {"$tensor": "model/x"}}}


HOSTILE = {
    "code": put_code,
    "another file": lambda b: b["files"].update({"../../etc/passwd": b["files"].pop(SHARD)}),
    "no dtype": lambda b: next(iter(b["tensors"].values())).update(dtype="load"),
    "too large": lambda b: next(iter(b["tensors"].values())).update(
        shape=[1 << 50], chunks=[[SHARD, [0], [1 << 50]]]
    ),
    "holes": lambda b: next(iter(b["tensors"].values()))["chunks"].pop(),
    "other shapes": lambda b: b["tensors"].update(
        {
            "model/norm.weight": {
                "dtype": "float32",
                "shape": [8, 4],
                "chunks": [[SHARD, [0, 0], [8, 4]]],
            }
        }  # fmt: skip
    ),
    "no tensor": lambda b: b["values"].update(model={"x": {"$tensor": "y"}}),
    "not a dict": lambda b: b.update(files=[]),
    "no hash": lambda b: b["files"][SHARD].pop("sha256"),
    "negative": lambda b: next(iter(b["tensors"].values())).update(
        shape=[-1, -4], chunks=[[SHARD, [0, 0], [1, 4]]]
    ),
    "a list": lambda b: b.update(values=[1]),
    "no values": lambda b: b.pop("values"),
    "other format": lambda b: b.update(format="tinymamba-sharded-2"),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_folder_is_refused_and_runs_no_code(folder, change, monkeypatch):
    sign_again(folder, change)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle is read"))
    with pytest.raises(UserError, match=str(folder)):
        load_checkpoint(folder)
    assert not Path("ran").exists()


@examples(20)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3)
    | st.tuples(inner, inner)
    | st.dictionaries(st.text("$ab", max_size=2) | st.integers(), inner, max_size=3),
    max_leaves=9,
))  # fmt: skip
def test_plain_values_survive_as_they_are(value):
    text = json.dumps(split(value)[0], allow_nan=False)
    assert repr(join(json.loads(text), {})) == repr(value)


def test_what_is_no_plain_value_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="progress/when.*set"):
        save_sharded(tmp_path / "m.pt", {"progress": {"when": {1}}})
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------- kills and disks


def save_twice() -> None:
    save_sharded(LATEST, small_state(3), PREVIOUS)
    save_sharded(BEST, small_state(3))


KILL_PLACES = [
    (os, "fsync"), (os, "replace"), (shutil, "rmtree"), (Path, "unlink"), (Path, "mkdir"),
    (shard_files, "write_shard"), (sharded_checkpoint, "write_manifest"),
]  # fmt: skip


@POSIX
def test_kill_9_at_any_point_of_a_save_leaves_good_checkpoints(place, monkeypatch):
    """At most the save that was killed is lost; what it replaces never is before it is there."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a kill loses nothing that was written
    after, found = 0, set()
    for path, step in ((PREVIOUS, 1), (LATEST, 2), (BEST, 2)):
        save_sharded(Path("before") / path, small_state(step))
    while True:
        for path in place.glob("*.pt*"):
            checkpoint.remove_checkpoint(path)
        shutil.copytree("before", ".", dirs_exist_ok=True)
        if not killed_before(save_twice, after, KILL_PLACES):
            break
        newest, best = load_newest(LATEST, None)["global_step"], load_checkpoint(BEST)
        assert newest in (2, 3) and best["global_step"] in (2, 3), after
        found.add((newest, best["global_step"]))
        (save_sharded, save_checkpoint)[after % 2](LATEST, small_state(4), PREVIOUS)
        (save_checkpoint, save_sharded)[after % 2](BEST, small_state(4))
        assert load_checkpoint(LATEST)["global_step"] == load_checkpoint(BEST)["global_step"] == 4
        assert load_checkpoint(PREVIOUS)["global_step"] == newest
        after += 1
    assert after > 25 and found == {(2, 2), (3, 2), (3, 3)}


def test_a_finished_folder_that_has_not_got_its_name_yet_belongs_to_its_run(place):
    """Killed between two renames: it is read, moved aside and listed under the name it gets."""
    save_sharded("x_latest.pt", small_state(1))
    Path("x_latest.pt").rename("x_latest.pt.tmp")
    assert load_checkpoint("x_latest.pt")["global_step"] == 1 and is_checkpoint("x_latest.pt")
    checkpoint.move_aside(Path("x_latest.pt"))
    assert load_checkpoint("x_latest.pt.1")["global_step"] == 1
    assert not Path("x_latest.pt.tmp").exists() and not is_checkpoint("x_latest.pt")


def test_a_folder_that_is_replaced_while_it_is_read_is_read_anew(place, monkeypatch):
    save_sharded(LATEST, small_state(1))
    wrong = sharded_checkpoint.Manifest.what_is_wrong

    def replacing(manifest, name):
        if manifest.values["global_step"] == 1:
            save_sharded(LATEST, small_state(2))
        return wrong(manifest, name)

    monkeypatch.setattr(sharded_checkpoint.Manifest, "what_is_wrong", replacing)
    assert load_checkpoint(LATEST)["global_step"] == 2


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_disk_that_fails_is_one_error_and_the_last_save_stays(place, monkeypatch, broken):
    save_sharded(LATEST, small_state(1))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(UserError, match=f"{LATEST}: cannot be written.*No space left"):
        save_sharded(LATEST, small_state(2), PREVIOUS)
    assert load_checkpoint(LATEST)["global_step"] == 1 and not Path(f"{LATEST}.tmp").exists()


def test_an_unreadable_shard_is_never_put_in_place(place, monkeypatch):
    """A disk that takes the bytes and gives back others."""
    save_sharded(LATEST, small_state(1))
    monkeypatch.setattr(shard_files, "hash_file", lambda _: "other")
    with pytest.raises(UserError, match="gives back other bytes"):
        save_sharded(LATEST, small_state(2), PREVIOUS)
    assert load_checkpoint(LATEST)["global_step"] == 1


def test_a_shard_that_the_first_process_does_not_see_is_an_error(place, monkeypatch):
    """Two machines without a common disk."""
    write = shard_files.write_shard

    def elsewhere(path, tensors):
        facts = write(path, tensors)
        path.unlink()
        return facts

    monkeypatch.setattr(shard_files, "write_shard", elsewhere)
    with pytest.raises(UserError, match="do not see the same folder"):
        save_sharded(LATEST, small_state(2))
    assert not is_checkpoint(LATEST)


@pytest.mark.parametrize(
    "saves", [[save_sharded, save_checkpoint], [save_checkpoint, save_sharded]]
)
def test_files_and_folders_replace_each_other(place, saves):
    for step in range(1, 7):
        saves[step // 2 % 2](LATEST, small_state(step), PREVIOUS)
        saves[step % 2](BEST, small_state(step))
        assert load_checkpoint(LATEST)["global_step"] == step
        assert load_checkpoint(BEST)["global_step"] == step
        if step > 1:
            assert load_checkpoint(PREVIOUS)["global_step"] == step - 1
    assert sorted(map(str, place.glob("*.pt*"))) == sorted(
        str(place / name) for name in (LATEST, PREVIOUS, BEST)
    )
    assert [str(file) for file in run_files(LATEST)] == [str(f) for f in (LATEST, BEST, PREVIOUS)]


@pytest.mark.parametrize("name", [LATEST, PREVIOUS, f"{LATEST}.tmp"])
@pytest.mark.parametrize("save", [save_sharded, save_checkpoint])
def test_a_folder_of_something_else_is_never_replaced(place, name, save):
    Path(name).mkdir()
    (Path(name) / "notes.txt").write_text("mine")
    if name == PREVIOUS:
        save(LATEST, small_state(1))
    with pytest.raises(UserError, match="cannot be written"):
        save(LATEST, small_state(2), PREVIOUS)
    assert (Path(name) / "notes.txt").read_text() == "mine"


# ------------------------------------------------------------------------------ one process, tools


@pytest.fixture
def resumable(group, place) -> Path:
    """A sharded run's newest folder and the one before, beside the data of the run."""
    shutil.copytree(group[0] / "data", "data", dirs_exist_ok=True)
    shutil.copytree(group[0] / "whole.pt", LATEST)
    shutil.copytree(group[0] / "whole_previous.pt", PREVIOUS)
    return place


def test_one_process_resumes_the_folder_and_falls_back_as_with_files(resumable):
    """Step 6 has a damaged shard, and the manifest of step 4 is good."""
    with open(LATEST / SHARD, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    words = ["--max_steps", 8, "--batch_size", 4, "--checkpoint_interval", 0]
    said = call("--resume", *words)
    assert said.returncode == 0, said.stderr
    assert f"warning: {LATEST}: is damaged: the checksum of {SHARD} is wrong" in said.stdout
    assert f"continuing from {PREVIOUS}" in said.stdout and "steps 4 to 8" in said.stdout
    assert Path(f"{LATEST}.damaged.1").is_dir() and LATEST.is_file() and PREVIOUS.is_dir()


def test_without_a_good_folder_there_is_an_error_and_no_new_start(resumable):
    for path in (LATEST, PREVIOUS):
        (path / SHARD).write_bytes(b"damaged")
    assert_refuses("--resume", naming=[str(LATEST), "damaged", SHARD])


def test_a_folder_is_another_runs_checkpoint_where_a_file_would_be(resumable):
    words = brief_flags(max_steps=1)
    assert_refuses(*words, "--init_from", PREVIOUS, naming=["init_from", "--checkpoint_path"])
    assert_refuses(*words, "--checkpoint_path", "data", naming=["checkpoint_path", "file name"])
    twin = "tinymamba_model.pt"
    assert_refuses(*words, "--checkpoint_path", twin, naming=["share", str(BEST)])
    branch = ["--resume_from", PREVIOUS, "--checkpoint_path", "b.pt", "--batch_size", 4]
    assert "steps 4 to 5" in call(*branch, "--max_steps", 5).stdout
    shutil.copytree(PREVIOUS, "c.pt")
    (Path("c.pt") / SHARD).write_bytes(b"damaged")
    damaged = ["--resume_from", "c.pt", "--checkpoint_path", "d.pt"]
    assert_refuses(*damaged, naming=["c.pt", "damaged", SHARD])


def test_one_process_begins_with_the_weights_of_a_folder(resumable, monkeypatch):
    words = brief_flags(max_steps=1, lr=0, init_from=LATEST, checkpoint_path="new.pt")
    model = load_model(LATEST, mapped=True)
    assert {n for n, p in model.named_parameters() if not p.is_meta} == set(TABLES)
    done = call(*words)
    assert done.returncode == 0, done.stderr
    assert digest(load_checkpoint("new.pt")["model"]) == digest(load_checkpoint(LATEST)["model"])

    def of_two(values, device):  # this process and one that has read another folder
        return [a + b for a, b in zip(values, (1.0, 5.0, 25.0), strict=True)]

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "all_reduce", of_two)
        assert_refused(call(*words), str(LATEST), "the processes read it")

    def replaced(manifest, targets):
        if len(targets) > 2:  # not only the tables
            shutil.copy(manifest.folder / MANIFEST, "copy")
            os.replace("copy", manifest.folder / MANIFEST)

    monkeypatch.setattr(sharded_checkpoint, "read_tensors", replaced)
    assert_refused(call(*words), str(LATEST), "was replaced while it was read")


def test_one_process_goes_on_from_the_carried_states_of_a_folder(group, resumable):
    expected = load_checkpoint(group[0] / "carried.pt")
    assert expected["carried_state"]["position"].tolist() == [4 * 32] * 8
    shutil.copytree(group[0] / "carried_previous.pt", "carried.pt")
    done = call("--checkpoint_path", "carried.pt", "--resume", "--batch_size", 4)
    assert "steps 2 to 4" in done.stdout, done.stderr
    found = load_checkpoint("carried.pt")
    two, one = (dict(run["progress"]["history"]["train"]) for run in (expected, found))
    assert two == pytest.approx(one, abs=1e-5)
    for name, t in expected["carried_state"].items():
        torch.testing.assert_close(found["carried_state"][name], t, atol=1e-4, rtol=1e-3)


def test_no_path_is_mistaken_for_a_folder(place):
    for path in ("", ".", "data", "no.pt"):
        assert not is_checkpoint(path)
        with pytest.raises(UserError, match="no such checkpoint|not a file name|no such file"):
            load_checkpoint(path)


def test_a_new_run_moves_the_folders_of_an_earlier_one_aside(resumable):
    before = digest(load_checkpoint(LATEST))
    said = call(*brief_flags(max_steps=1)).stdout
    for path in (LATEST, PREVIOUS):
        assert f"{path} of an earlier run is now {path}.1" in said
    assert digest(load_checkpoint(f"{LATEST}.1")) == before and LATEST.is_file()


TOOLS = {
    "export_model": (export_model, ["--format", "pytorch"]),
    "quantize": (quantize, ["--bits", 8]),
    "convert": (hf_integration, ["--tokenizer_file", "data/text/tokenizer.json"]),
    "peft": (peft, ["--method", "state_offset", "--max_steps", 1]),
}


def test_every_tool_takes_the_folder(group, resumable):
    models = [load_model(path) for path in (LATEST, group[0] / "gathered.pt")]
    assert digest(models[0].state_dict()) == digest(models[1].state_dict())
    assert models[0].tokenizer == models[1].tokenizer
    for name, (script, words) in TOOLS.items():
        command = [name] if name == "convert" else []
        files = ["--checkpoint", LATEST, "--output_dir", name]
        done = run_main(script.main, *command, *files, *words)
        assert done.returncode == 0 and list(Path(name).rglob("*.safetensors")), done.stderr
    said = []
    for source in (LATEST, group[0] / "gathered.pt"):
        words = ["--checkpoint", source, "--prompt", "1 plus", "--max_tokens", 3]
        said.append(run_main(streaming.main, *words, "--temperature", 0).stdout)
    assert said[0] == said[1] != ""


# ---------------------------------------------------------------------------------------- chaos


def wait_until(holds, process: subprocess.Popen) -> None:
    until = time.monotonic() + 100
    while not holds():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        os.sched_yield()


@pytest.mark.slow
@LINUX
def test_kill_9_of_both_processes_at_any_moment_loses_at_most_one_save_interval(place):
    """Every second kill waits until the folder is being written."""
    size = {"d_model": 128, "num_heads": 4, "vocab_size": 4096, "checkpoint_interval": 1}
    words = brief_flags(max_steps=10**6, batch_size=2, **size)
    reached, inside, dice = 0, 0, random.Random(0)
    for number in range(6):
        with two_ranks(*words, "--parallel", "fsdp", "--resume", "auto") as both:
            first = next(line for line in both[0].stdout if line.startswith("saved"))
            moment = time.monotonic() + dice.uniform(0.0, 0.5)
            wait_until(lambda m=moment: time.monotonic() > m, both[0])
            if number % 2:
                wait_until(Path(f"{LATEST}.tmp").exists, both[0])
            for process in both:
                process.send_signal(signal.SIGSTOP)
            inside += Path(f"{LATEST}.tmp").exists()
            for process in both:
                process.kill()
            rest = both[0].stdout.read()
        said = [first, *(line for line in rest.splitlines() if line.startswith("saved"))]
        found, last = load_newest(LATEST, None)["global_step"], int(said[-1].split()[-1])
        assert found > reached and found >= last, (found, last, reached)
        reached = found
    assert inside >= 2, f"{inside} of 6 kills were inside a save"


@pytest.mark.slow
@POSIX
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_the_whole_group_or_to_one_saves_the_folder(place, name):
    words = brief_flags(max_steps=10**6, batch_size=2, async_save="true")
    for targets in ([0, 1], [1]):
        with two_ranks(*words, "--parallel", "fsdp") as both:
            assert any(line.startswith("step 4/") for line in both[0].stdout)
            for rank in targets:
                both[rank].send_signal(getattr(signal, name))
            if name == "SIGUSR1":
                assert any("writing" in line for line in both[0].stdout)
                wait_until(lambda: is_checkpoint(LATEST), both[0])
            else:
                ended = [process.communicate(timeout=60) for process in both]
                assert [p.returncode for p in both] == [143, 143], ended
        assert load_checkpoint(LATEST)["global_step"] >= 4
        assert call(*brief_flags(max_steps=1)).returncode == 0  # moves it aside
        checkpoint.remove_checkpoint(LATEST)


@pytest.mark.slow
@POSIX
def test_any_number_of_processes_continues_from_the_folder_of_any_other(place):
    """Two, four, three and one: the losses are those of one process all the time."""
    words = brief_flags(gradient_accumulation_steps=1, schedule="constant", parallel="fsdp")
    losses = []
    for ranks in ([1, 1, 1, 1], [2, 4, 3, 1]):
        for number, processes in enumerate(ranks):
            batch = ["--batch_size", 12 // processes, "--max_steps", 2 * number + 2]
            resume = ["--resume", *batch] if number else [*words, *batch]
            launch = [f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
            done = run_script(
                "torch.distributed.run", *launch, ROOT / "testv2.py", *resume, cwd=place
            )
            assert done.returncode == 0, done.stderr
            assert LATEST.is_dir() == (processes > 1)
        losses.append([loss for _, loss in load_checkpoint(LATEST)["progress"]["history"]["train"]])
    assert len(losses[0]) == 8 and losses[1] == pytest.approx(losses[0], abs=1e-5)
