"""data/prepare.py, interrupted at any point, goes on to the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import POSIX, assert_refused, killed_before, run_main

from data import encoding, prepare, unfinished
from tinymamba.cli import UserError
from tinymamba.tokenizer import byte_tokenizer

CHAOS = bool(os.environ.get("CHAOS"))
MOVES = (-18, -13, -9, -6, -4, -2, -1)  # points near the end, where files are moved
FOLDER = ".prepare-unfinished"
TEXT = "A line of text that says something, 日本語 too.\n"


def contents(folder):
    """The files in a folder, without the lock, which a kill leaves."""
    paths = (path for path in folder.glob("*.*") if path.is_file() and path.name[0] != ".")
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A folder with rows and a long text, in small chunks of which each is saved at once."""
    monkeypatch.setattr(encoding, "CHUNK_CHARS", 3000)
    monkeypatch.setattr(encoding, "BATCH_CHARS", 3000)
    monkeypatch.setattr(prepare, "SAVE_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(TEXT * 200, encoding="utf-8")
    rows = [json.dumps({"text": f"row {i}: {TEXT * (i % 9)}"}) + "\n" for i in range(20)]
    (tmp_path / "in" / "b.jsonl").write_text("".join(rows), encoding="utf-8")
    return tmp_path


def options(**changes):
    values = {"input": ["in"], "vocab_size": 300, "output_dir": "out", "val_fraction": 0.2}
    return prepare.Options(**{**values, **changes})


WRITES = [
    (prepare, "sync"), (unfinished, "sync"), (os, "replace"), (Path, "unlink"), (os, "rmdir"),
    (encoding.Encoder, "encoded"),
]  # fmt: skip


def run_and_kill(chosen, after):
    """Run until one of its writes, with `killed_before`."""
    return killed_before(lambda: prepare.prepare(chosen), after, WRITES)


@pytest.fixture
def whole(corpus):
    """What an unbroken run writes, and the number of its writes."""
    run_and_kill(options(output_dir="whole"), -1)
    return contents(corpus / "whole"), int((corpus / "writes").read_text())


@POSIX
def test_a_run_killed_at_any_point_goes_on_to_the_same_bits(corpus, whole):
    files, writes = whole
    assert writes > 100
    points = range(writes) if CHAOS else [0, 1, 3, *range(6, writes - 18, 40), *MOVES]
    for after in (point % writes for point in points):
        out = f"out{after}"
        assert run_and_kill(options(output_dir=out), after)
        if (corpus / out / FOLDER / "progress.json").exists():
            with pytest.raises(UserError, match="interrupted; pass --resume to go on with it, or"):
                prepare.prepare(options(output_dir=out))
        if contents(corpus / out) != files:
            prepare.prepare(options(output_dir=out, resume=True))
            assert not list((corpus / out).glob(".prepare-*"))
        assert contents(corpus / out) == files


@POSIX
def test_a_run_killed_again_and_again_comes_to_the_same_end(corpus, whole):
    kills = 0
    (corpus / "out").mkdir()
    while contents(corpus / "out") != whole[0]:
        assert run_and_kill(options(resume=True), 35) or kills > 3
        kills += 1
        assert kills < 40


@POSIX
def test_old_files_never_stand_beside_new_ones(corpus, whole):
    """A kill while files are moved: each file there is an old one, or each is a new one."""
    files, writes = whole
    (corpus / "out").mkdir()
    seen = set()
    for after in [writes + move for move in (range(-18, 0) if CHAOS else MOVES)] + [-1]:
        for name in files:
            (corpus / "out" / name).write_bytes(b"old")
        run_and_kill(options(force=True), after)
        found = contents(corpus / "out")
        there = {name: found[name] for name in files if name in found}
        assert there.items() <= files.items() or set(there.values()) == {b"old"}
        seen.add("old" if b"old" in there.values() else "all" if there == files else "some")
        if (corpus / "out" / FOLDER / "progress.json").exists():
            prepare.prepare(options(resume=True))
            assert contents(corpus / "out") == files
    assert seen == {"old", "some", "all"}


@POSIX
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 310}, "--vocab_size: 310 now, but 300 in the run to go on with; pass"),
        ({"val_fraction": 0.3}, "--val_fraction: 0.3 now, but 0.2"),
        ({"input": ["in", "in/a.txt"]}, "--input: "),
        ("touch", "--input: is not what it was when the run began; restore it"),
        ("tokenizer", "tokenizer.json: is not as it was written; "),
        ("given", "--tokenizer: is not what it was when the run began; restore it"),
        ("bin", "train.bin: has lost what was written; "),
        ("progress", "progress.json: is damaged, or of another version; "),
    ],
)
def test_a_run_does_not_go_on_with_something_else(corpus, capsys, change, message):
    given = {"tokenizer": "t.json", "eos_token": "a"} if change == "given" else {}
    byte_tokenizer().save("t.json")
    assert run_and_kill(options(**given), 30)
    folder = corpus / "out" / FOLDER
    if change == "touch":
        os.utime(corpus / "in" / "a.txt", (1, 1))
    elif change == "given":
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(["a line"])
        tokenizer.save("t.json")
    elif change == "bin":
        (folder / "train.bin").write_bytes(b"")
    elif isinstance(change, str):
        name = {"tokenizer": "tokenizer.json", "progress": "progress.json"}[change]
        (folder / name).write_text("{}")
    changes = change if isinstance(change, dict) else given
    with pytest.raises(UserError) as caught:
        prepare.prepare(options(resume=True, **changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert folder.exists()
    assert "goes on" not in capsys.readouterr().out
    prepare.prepare(options(force=True, **changes))
    assert not list((corpus / "out").glob(".*"))


@pytest.mark.parametrize("name", ["write_ids", "write_facts"])
def test_what_was_left_out_before_an_interruption_is_still_reported(corpus, monkeypatch, name):
    """Interrupted when the source with what is left out is written, and when all is."""
    (corpus / "rows.jsonl").write_text('{"text": "a"}\nnull\n{"text": "b"}\n')
    both = {"input": ["rows.jsonl"], "val_input": ["in/a.txt"], "tokenizer": "byte"}
    original = getattr(prepare.Run, name)

    def interrupted(run, *args):
        if run.progress.source:
            raise KeyboardInterrupt
        original(run, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare.Run, name, interrupted)
        prepare.prepare(options(**both))
    with pytest.raises(UserError, match=r"--strict: null row: 1 \(rows.jsonl:2\)"):
        prepare.prepare(options(**both, strict=True, resume=True))


def test_a_chat_template_that_was_moved_before_an_interruption_stays(corpus, monkeypatch):
    Path("t").mkdir()
    byte_tokenizer().save("t/tokenizer.json")
    Path("t/chat_template.jinja").write_text("theirs")
    given = {"tokenizer": "t", "eos_token": "a"}

    def interrupted(folder):
        if folder == Path("out"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(unfinished, "sync_folder", interrupted)
        prepare.prepare(options(**given))
    prepare.prepare(options(**given, resume=True))
    assert Path("out/chat_template.jinja").read_text() == "theirs"


def test_what_the_first_release_left_is_named_and_removed_with_force(corpus):
    (corpus / "out" / ".prepare-abc123").mkdir(parents=True)
    for resume in (False, True):
        with pytest.raises(UserError, match="abc123: was left by .*; pass --force to start again"):
            prepare.prepare(options(resume=resume))
    prepare.prepare(options(force=True))
    assert not list((corpus / "out").glob(".*"))


def test_resume_without_anything_to_go_on_with_begins(corpus):
    prepare.prepare(options(resume=True))
    with pytest.raises(UserError, match="exists; pass --force"):
        prepare.prepare(options(resume=True))


@POSIX
def test_a_second_run_in_the_same_folder_is_refused(corpus):
    (corpus / "out").mkdir()
    code = """
import sys
from pathlib import Path
from tinymamba.lock import hold_lock
with hold_lock(Path("out/.prepare.lock"), "out", "x"):
    print("held", flush=True)
    sys.stdin.read()
"""
    env = {**os.environ, "PYTHONPATH": str(Path(prepare.__file__).parent.parent)}
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
    )
    assert holder.stdout.readline() == b"held\n"
    done = run_main(prepare.main, "--input", "in", "--output_dir", "out", cwd=corpus)
    holder.communicate(b"")
    assert_refused(done, f"out: is in use by process {holder.pid}", "another --output_dir")
    prepare.prepare(options())


@POSIX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_a_run_that_goes_on(tmp_path, number):
    """The real command, with processes that encode, of which none may stay."""
    (tmp_path / "a.txt").write_text(TEXT * 45_000, encoding="utf-8")
    code = "from data import prepare; prepare.SAVE_SECONDS = 0.0; prepare.run_cli(prepare.main)"
    flags = ["--input", "a.txt", "--tokenizer", "byte", "--output_dir", "out"]
    env = {**os.environ, "PYTHONPATH": str(Path(prepare.__file__).parent.parent)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", code, *flags, "--workers", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, **pipes)
    deadline, progress = time.monotonic() + 60, tmp_path / "out" / FOLDER / "progress.json"
    while not progress.exists() or not json.loads(progress.read_text())["chunks"]:
        assert process.poll() is None and time.monotonic() < deadline
    process.send_signal(number)
    said, error = process.communicate(timeout=60)  # all who hold its pipes have ended, too
    assert process.returncode == {2: 130, 15: 143, 9: -9}[number], error
    if number != signal.SIGKILL:
        assert f"{FOLDER} is kept: the same command with --resume goes on" in said
        assert not error
    done = run_main(prepare.main, *flags, cwd=tmp_path)
    assert_refused(done, "pass --resume")
    done = run_main(prepare.main, *flags, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert run_main(prepare.main, *flags[:-1], "whole", cwd=tmp_path).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@POSIX
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("end", ["> /dev/full", ">&-", "2>&-", "| true"])
def test_a_console_that_fails_does_not_end_the_work(tmp_path, end):
    (tmp_path / "a.txt").write_text(TEXT * 300, encoding="utf-8")
    command = f"{sys.executable} {prepare.__file__} --input a.txt --vocab_size 1000 {end}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(contents(tmp_path / "data" / "text")) == 6
