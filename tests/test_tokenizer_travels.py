"""A checkpoint holds its tokenizer: every tool gives the same ids from any folder.

Two tokenizers have the same tokens under the same ids, and divide text otherwise: nothing but their
hashes tells them apart. `home` trained with one; the working folder has data of the other.
"""

import copy
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    TINY,
    assert_refused,
    brief_config,
    brief_flags,
    call,
    files_below,
    run_main,
    wide,
    write_tokens,
)

import benchmark
import export_model
import peft
import quantize
import serve
import streaming
from streaming import StreamingServer
from testv2 import Config, Trainer, load_model, save_folder
from tinymamba.checkpoint import load_checkpoint, save_checkpoint, save_model
from tinymamba.cli import UserError
from tinymamba.openai_api import Message
from tinymamba.tokenizer import (
    EOS_TOKEN,
    RunTokenizer,
    SimpleTokenizer,
    byte_alphabet,
    byte_level,
    hash_content,
    open_tokenizer,
)

TEXT = "12 plus 30 is 42.\n"
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
LATEST = "tinymamba_model_latest.pt"
MERGES = [("p", "l"), ("u", "s"), ("l", "u"), ("i", "s"), ("Ġ", "i"), ("Ġ", "p")]


def tokenizer_of(merges: list) -> SimpleTokenizer:
    """256 ids of bytes and merges, and an end-of-text id; an earlier merge goes first."""
    from tokenizers.models import BPE

    plain = byte_alphabet()[: 256 - len(MERGES)]
    tokens = [*plain, *(a + b for a, b in MERGES)]
    tokenizer = byte_level(BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.add_special_tokens([EOS_TOKEN])
    content = tokenizer.to_str()
    sha256 = hash_content("tokenizer.json", content)
    bare = {"name": "tokenizer.json", "content": content, "sha256": sha256}
    return SimpleTokenizer.from_dict(bare)


OWN, OTHER = tokenizer_of(MERGES), tokenizer_of(MERGES[::-1])
IDS = OWN.encode(TEXT)


def write_data(folder: Path, tokenizer: SimpleTokenizer, /, *names: str, **changes) -> Path:
    """Data as data/prepare.py writes them; changes of None leave a fact out of the .json."""
    folder.mkdir(parents=True, exist_ok=True)
    content = tokenizer.to_dict()["content"]
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    lines = [f"{a} plus {b} is {a + b}.\n" for a in range(12) for b in range(12)]
    for name in names or ("train", "val"):
        ids = tokenizer.encode("".join(lines))
        write_tokens(folder / f"{name}.bin", ids)
        facts = {"dtype": "int32", "vocab_size": 257, "eos_id": 256, "tokens": len(ids)}
        facts |= {"bytes": len("".join(lines)), "tokenizer": tokenizer.sha256, **changes}
        facts = {name: value for name, value in facts.items() if value is not None}
        (folder / f"{name}.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of two steps, and the folder of the run."""
    home = tmp_path_factory.mktemp("home")
    folder = write_data(home / "data" / "text", OWN)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS_TOKEN}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        done = call(*brief_flags(max_steps=2, checkpoint_interval=0))
    assert done.returncode == 0, done.stderr
    return home


@pytest.fixture
def home(trained, tmp_path, monkeypatch):
    """A copy of the run's folder, in which one stands."""
    shutil.copytree(trained, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def away(trained, tmp_path, monkeypatch):
    """A folder with the checkpoint, and with data of the other tokenizer where it looks first."""
    write_data(tmp_path / "away" / "data" / "text", OTHER)
    shutil.copy(trained / LATEST, tmp_path / "away" / "model.pt")
    monkeypatch.chdir(tmp_path / "away")
    return tmp_path / "away"


def succeed(main, *words) -> str:
    done = run_main(main, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def server(path, **changes) -> StreamingServer:
    return StreamingServer(path, device="cpu", **changes)


def served(path) -> serve.Api:
    return serve.Api(server(path), serve.Options(model_name="m"))


def ids_of(path) -> list[int]:
    return server(path).encode(TEXT)


# --------------------------------------------------------------------------------------- every tool


def by_streaming(place):
    said = succeed(streaming.main, "--checkpoint", "model.pt", "--prompt", TEXT,
                   "--max_tokens", 6, "--temperature", 0, "--device", "cpu")  # fmt: skip
    want = StreamingServer("model.pt", device="cpu", tokenizer=OWN)
    assert said == want.generate_text(IDS, max_new_tokens=6, temperature=0.0) + "\n"
    return ids_of("model.pt")


def by_serving(place):
    api = served("model.pt")
    messages = [Message(role="user", content="a")]
    assert api.template.encode(messages) == [*OWN.encode("user:a"), 256]
    return api.tokenizer.encode(TEXT)


def by_quantizing(place):
    succeed(quantize.main, "--checkpoint", "model.pt", "--output_dir", "made")
    return ids_of("made")


def by_exporting(place):
    succeed(export_model.main, "--checkpoint", "model.pt", "--format", "pytorch")
    assert ids_of("exported_models/pytorch/inference.pt") == IDS
    return ids_of("exported_models/pytorch")


def by_onnx(place):
    pytest.importorskip("onnxruntime")
    import onnx_generate

    by_exporting(place)  # of a graph, the files of the tokenizer are the same
    folder = Path("exported_models/pytorch")
    record = SimpleTokenizer(folder / "tokenizer.json").to_dict()
    assert onnx_generate.hash_content(record["content"]) == record["sha256"] == OWN.sha256
    return onnx_generate.open_tokenizer(folder).encode(TEXT).ids


def by_hugging_face(place):
    hf = pytest.importorskip("hf_integration")
    succeed(hf.main, "convert", "--checkpoint", "model.pt", "--output_dir", "hf")
    succeed(hf.main, "convert", "--checkpoint", "hf", "--output_dir", "back.pt")
    assert ids_of("back.pt") == ids_of("hf")
    hf.TinyMambaHFModel.from_pretrained("hf").save_pretrained("again")
    fast = hf.TinyMambaHFTokenizer.from_pretrained("hf")
    fast.save_pretrained("again")
    assert fast.chat_template == TEMPLATE and ids_of("again") == ids_of("hf")
    return fast.encode(TEXT)


def by_merging(place):
    write_data(place / "own", OWN)
    words = ["--checkpoint", "model.pt", "--train_data", "own/train.bin", "--steps", 1]
    words += ["--val_data", "own/val.bin", "--lora_rank", 2, "--merge", "--device", "cpu"]
    succeed(peft.main, *words, "--generate_samples", "false", "--validation_steps", 1)
    shutil.rmtree(place / "own")
    assert ids_of("adapter/merged.pt") == IDS
    assert load_checkpoint("adapter/adapter_latest.pt")["tokenizer"]["sha256"] == OWN.sha256
    return server("model.pt", adapters={"a": "adapter"}).encode(TEXT)


def by_benchmark(place):
    pytest.importorskip("transformers")
    options = SimpleNamespace(tinymamba_checkpoint="model.pt")
    setup = SimpleNamespace(options=options, device=torch.device("cpu"))
    return benchmark.open_for_harness(setup)["tokenizer"].encode(TEXT)


TOOLS = [by_streaming, by_serving, by_quantizing, by_exporting, by_onnx, by_hugging_face]
TOOLS += [by_merging, by_benchmark]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_every_tool_gives_the_ids_of_the_checkpoint_from_any_folder(tool, away):
    assert tool(away) == IDS != OTHER.encode(TEXT)


def test_what_is_written_holds_the_tokenizer_its_template_and_its_hash(away):
    by_quantizing(away)
    by_exporting(away)
    for folder in (away / "made", away / "exported_models" / "pytorch"):
        assert SimpleTokenizer(folder / "tokenizer.json").sha256 == OWN.sha256
        assert (folder / "chat_template.jinja").read_text() == TEMPLATE
        assert json.loads((folder / "config.json").read_text())["tokenizer_sha256"] == OWN.sha256
        again = load_model(folder).tokenizer
        assert again["special_tokens"] == {"eos_token": EOS_TOKEN}


def test_each_checkpoint_of_a_folder_has_its_own(home):
    write_data(home / "new", OTHER)
    done = call(*brief_flags(max_steps=1, train_data_path="new/train.bin", checkpoint_path="b.pt"))
    assert done.returncode == 0, done.stderr
    shutil.rmtree(home / "new")
    write_data(home / "data" / "text", OTHER)  # prepared anew: what lay there is gone
    assert ids_of(LATEST) == IDS
    assert ids_of("b.pt") == OTHER.encode(TEXT)


def test_copies_of_a_model_keep_the_tokenizer(trained):
    model = load_model(trained / LATEST)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert open_tokenizer(None, same, []).encode(TEXT) == IDS
    assert "tokenizer" not in model.state_dict()


# ----------------------------------------------------------------------- --tokenizer says otherwise


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (streaming.main, ["--prompt", "a", "--device", "cpu", "--tokenizer"]),
        (export_model.main, ["--format", "pytorch", "--vocab_file"]),
        ("hf_integration", ["--output_dir", "hf", "--tokenizer_file"]),
        (serve.main, ["--port", "0", "--device", "cpu", "--tokenizer"]),
    ],
    ids=["streaming", "export", "hf", "serve"],
)
def test_another_tokenizer_is_refused_and_both_are_named(main, words, away):
    if isinstance(main, str):
        main, words = pytest.importorskip(main).main, ["convert", *words]
    before, path = files_below(away), str(Path("data", "text", "tokenizer.json"))
    done = run_main(main, *words, path, "--checkpoint", "model.pt")
    assert_refused(done, path, OTHER.sha256[:12], OWN.sha256[:12], "leave it out")
    assert files_below(away) == before


def test_the_same_tokenizer_in_other_words_is_accepted(away):
    parts = json.loads(OWN.to_dict()["content"])
    parts["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst",
                           "stride": 0}  # fmt: skip
    model = {n: v for n, v in parts["model"].items() if v not in (None, False)}
    assert len(model) < len(parts["model"])  # earlier versions of the library leave fields out
    parts["model"] = model
    text = json.dumps(dict(reversed(parts.items())), indent=1)
    (away / "same.json").write_text(text.replace("\n", "\r\n"), newline="")
    assert SimpleTokenizer(away / "same.json").sha256 == OWN.sha256
    mine = server("model.pt", tokenizer="same.json").tokenizer
    assert mine.encode(TEXT) == IDS and mine.chat_template == TEMPLATE
    assert server("model.pt", tokenizer=OTHER).tokenizer is OTHER  # an object is never checked


def test_a_vocabulary_stands_for_a_tokenizer_json_only_if_it_divides_text_alike(tmp_path, bpe):
    def opened(name, record):
        return open_tokenizer(tmp_path / name, SimpleNamespace(tokenizer=record), [])

    tokens = [*byte_alphabet(), EOS_TOKEN]
    vocabularies = {"bytes.txt": tokens, "back.txt": tokens[::-1]}
    vocabularies["bpe.txt"] = [bpe.id_to_token(i) for i in range(bpe.get_vocab_size())]
    for name, lines in vocabularies.items():
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    single = SimpleTokenizer().to_dict()
    for name, content in (("bpe.json", bpe.to_str()), ("bytes.json", single["content"])):
        (tmp_path / name).write_text(content, encoding="utf-8")
    own = SimpleTokenizer(tmp_path / "bpe.json")
    listed = SimpleTokenizer(tmp_path / "bpe.txt")
    assert listed.decode(own.encode(TEXT)) == TEXT and len(listed) == len(own)
    assert opened("bytes.txt", single).encode(TEXT) == list(TEXT.encode())
    assert opened("bpe.json", listed.to_dict()).encode(TEXT) == own.encode(TEXT)
    for name, record in [("bpe.txt", own.to_dict()), ("back.txt", single), ("bpe.txt", single),
                         ("bytes.json", listed.to_dict())]:  # fmt: skip
        with pytest.raises(UserError, match="is another tokenizer"):
            opened(name, record)


def test_a_file_must_have_as_many_ids_as_the_object_that_a_model_was_trained_with(tmp_path):
    (tmp_path / "own.json").write_text(OWN.content, encoding="utf-8")
    model = SimpleNamespace(tokenizer={"class": "Foo", "vocab_size": 300})
    with pytest.raises(UserError, match="has 257 ids, but the model was trained with a Foo of 300"):
        open_tokenizer(tmp_path / "own.json", model, [])
    model.tokenizer["sha256"] = OWN.sha256
    assert open_tokenizer(tmp_path / "own.json", model, []).encode(TEXT) == IDS


@pytest.mark.parametrize("record", [None, {}, {"sha256": "0" * 64}, {"class": "Foo"}], ids=str)
def test_a_record_without_content_makes_no_tokenizer(record):
    with pytest.raises(UserError, match="none was found|is missing|with a Foo"):
        SimpleTokenizer.from_dict(record)


def test_line_ends_of_a_vocabulary_and_notations_of_merges_do_not_count(tmp_path, bpe):
    for end in ("\n", "\r\n"):
        (tmp_path / "vocab.txt").write_text(f"a{end}b{end}", newline="")
        hashes = {SimpleTokenizer(tmp_path / "vocab.txt").sha256}
        (tmp_path / "vocab.txt").write_text("\ufeffa\nb", encoding="utf-8")
        assert SimpleTokenizer(tmp_path / "vocab.txt").sha256 in hashes
    parts = json.loads(bpe.to_str())
    assert parts["model"]["merges"]
    hashes = set()
    for merges in ([list(m) for m in parts["model"]["merges"]],
                   [" ".join(m) for m in parts["model"]["merges"]]):  # fmt: skip
        parts["model"]["merges"] = merges
        (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
        hashes.add(SimpleTokenizer(tmp_path / "tokenizer.json").sha256)
    parts["model"]["merges"] = merges[::-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    assert len(hashes) == 1 and SimpleTokenizer(tmp_path / "tokenizer.json").sha256 not in hashes


# ------------------------------------------------------------------------------------------ folders


def test_a_folder_whose_tokenizer_was_replaced_or_lost_says_so(away):
    pytest.importorskip("onnxruntime")
    import onnx_generate

    by_quantizing(away)
    (away / "made" / "tokenizer.json").write_text(OTHER.content, encoding="utf-8")
    names = ["tokenizer.json", "config.json", OTHER.sha256[:12], OWN.sha256[:12]]
    done = run_main(streaming.main, "--checkpoint", "made", "--prompt", "a", "--device", "cpu")
    assert_refused(done, *names)
    done = run_main(lambda _: onnx_generate.open_tokenizer(Path("made")))
    assert_refused(done, *names)
    (away / "made" / "tokenizer.json").unlink()
    done = run_main(streaming.main, "--checkpoint", "made", "--prompt", "a", "--device", "cpu")
    assert_refused(done, "the file that belongs to the model is missing")
    (away / "mine.json").write_text(OWN.to_dict()["content"], encoding="utf-8")
    assert server("made", tokenizer="mine.json").encode(TEXT) == IDS
    with pytest.raises(UserError, match="than the model's own"):
        server("made", tokenizer="data/text/tokenizer.json")


def test_a_folder_of_the_first_release_takes_another_tokenizer_if_it_is_named(away):
    by_quantizing(away)
    config = json.loads((away / "made" / "config.json").read_text())
    del config["tokenizer_sha256"]
    (away / "made" / "config.json").write_text(json.dumps(config))
    assert ids_of("made") == IDS
    other = server("made", tokenizer="data/text/tokenizer.json")
    assert other.encode(TEXT) == OTHER.encode(TEXT)


def test_a_folder_without_a_tokenizer_takes_none_from_where_one_stands(away):
    save_folder(away, wide())
    assert server(away).tokenizer is None
    save_model("written.pt", load_model(away))
    assert server("written.pt").tokenizer is None
    done = run_main(streaming.main, "--checkpoint", "written.pt", "--prompt", "a")
    assert_refused(done, "none was found; pass --tokenizer")


def test_a_folder_that_transformers_saved_with_more_tokens_is_read(away):
    hf = pytest.importorskip("hf_integration")
    succeed(hf.main, "convert", "--checkpoint", "model.pt", "--output_dir", "hf")
    fast = hf.TinyMambaHFTokenizer.from_pretrained("hf")
    fast.add_special_tokens({"additional_special_tokens": [" plus"]})
    hf.TinyMambaHFModel.from_pretrained("hf").save_pretrained("again")
    fast.save_pretrained("again")
    added = open_tokenizer(None, load_model("again"), [])
    assert added.sha256 != OWN.sha256 and len(added) == 258


# ---------------------------------------------------------------------------------- old checkpoints


def test_an_old_checkpoint_takes_the_tokenizer_beside_it_or_its_data(away):
    saved = load_checkpoint("model.pt")
    del saved["tokenizer"]
    save_checkpoint("old.pt", saved)
    write_data(away / "data" / "text", OWN, tokenizer=None)
    assert ids_of("old.pt") == IDS
    (away / "tokenizer.json").write_text(OTHER.content, encoding="utf-8")
    assert ids_of("old.pt") == OTHER.encode(TEXT)
    (away / "tokenizer.json").unlink()
    succeed(quantize.main, "--checkpoint", "old.pt", "--output_dir", "made")
    shutil.rmtree(away / "data")
    assert ids_of("made") == IDS


def test_data_are_compared_with_the_tokenizer_beside_an_old_checkpoint(away):
    saved = load_checkpoint("model.pt")
    del saved["tokenizer"]
    save_checkpoint("old/model.pt", saved)
    (away / "old" / "tokenizer.json").write_text(OWN.content, encoding="utf-8")
    names, data = ["train.bin", OTHER.sha256[:12], OWN.sha256[:12]], "data/text/train.bin"
    old = ["--checkpoint", "old/model.pt"]
    done = run_main(peft.main, *old, "--steps", 1, "--device", "cpu")
    assert_refused(done, *names)
    words = ["--bits", 4, "--calibration_data", data, "--calibration_tokens", 64]
    assert_refused(run_main(quantize.main, *old, *words), *names)
    words = ["--benchmark_type", "perplexity", "--eval_dataset", data, "--device", "cpu"]
    done = run_main(benchmark.main, "--tinymamba_checkpoint", old[1], *words)
    assert_refused(done, *names)
    model = peft.attach(load_model("model.pt"), peft.AdapterConfig("lora", 2))
    model.tokenizer = OTHER.to_dict()
    peft.save_adapter(model, "adapter")
    with pytest.raises(UserError, match=f"{OTHER.sha256[:12]}.*use the checkpoint"):
        server("old/model.pt", adapters={"a": "adapter"})
    done = run_main(peft.main, *old, "--adapter", "adapter", "--merge")
    assert_refused(done, *names[1:])


def test_an_old_checkpoint_of_shards_that_are_elsewhere_has_no_tokenizer(away):
    saved = load_checkpoint("model.pt")
    del saved["tokenizer"]
    saved["config"]["train_data_path"] = "shards/*.bin"
    save_checkpoint("old.pt", saved)
    done = run_main(streaming.main, "--checkpoint", "old.pt", "--prompt", "a", "--device", "cpu")
    assert_refused(done, "none was found; pass --tokenizer")
    options = SimpleNamespace(tinymamba_checkpoint="old.pt")
    with pytest.raises(UserError, match="hf_integration.py --tokenizer_file"):
        benchmark.open_for_harness(SimpleNamespace(options=options, device=torch.device("cpu")))


@pytest.mark.parametrize("fact", [{"eos_id": 3}, {"vocab_size": 4096}, {"tokenizer": "0" * 64}],
                         ids=lambda fact: next(iter(fact)))  # fmt: skip
def test_data_that_contradict_an_old_checkpoint_do_not_give_it_a_tokenizer(away, fact):
    saved = load_checkpoint("model.pt")
    del saved["tokenizer"]
    save_checkpoint("old.pt", saved)
    write_data(away / "data" / "text", OTHER, **{"tokenizer": None, **fact})
    done = run_main(streaming.main, "--checkpoint", "old.pt", "--prompt", "a", "--device", "cpu")
    assert_refused(done, "train.bin")


# ----------------------------------------------------------------------------------- custom objects


class HuggingFaceTokenizerWrapper:
    """A tokenizer that no file describes."""

    encode, decode = staticmethod(OWN.encode), staticmethod(OWN.decode)

    def __len__(self):
        return 50257


def test_an_object_is_noted_by_class_and_size(home):
    mine = HuggingFaceTokenizerWrapper()
    trainer = Trainer(brief_config(max_steps=1, checkpoint_path="custom.pt"), tokenizer=mine)
    assert trainer.tokenizer is mine and trainer.run() == 0
    note = {"class": "HuggingFaceTokenizerWrapper", "vocab_size": 50257, "sha256": OWN.sha256}
    assert load_checkpoint("custom.pt")["tokenizer"] == note
    said = "the model was trained with a HuggingFaceTokenizerWrapper of 50257 ids; pass"
    words = ["--prompt", "a", "--device", "cpu"]
    assert_refused(run_main(streaming.main, "--checkpoint", "custom.pt", *words), said)
    succeed(quantize.main, "--checkpoint", "custom.pt", "--output_dir", "made")
    assert_refused(run_main(streaming.main, "--checkpoint", "made", *words), said)
    with pytest.raises(UserError, match="HuggingFaceTokenizerWrapper"):
        served("custom.pt")
    assert server("custom.pt", tokenizer="data/text/tokenizer.json").encode(TEXT) == IDS
    done = call("--resume", "--checkpoint_path", "custom.pt", "--max_steps", "2")
    assert done.returncode == 0, done.stderr
    assert load_checkpoint("custom.pt")["tokenizer"] == note
    shutil.rmtree("data")
    write_data(home / "data" / "text", OTHER)
    again = Config.from_dict({**load_checkpoint("custom.pt")["config"], "max_steps": 3})
    again.accept_changed_data = True
    with pytest.raises(UserError, match=f"{OTHER.sha256[:12]}.*{OWN.sha256[:12]}"):
        Trainer(again, tokenizer=mine, saved=load_checkpoint("custom.pt"))


# ------------------------------------------------------------------------ data of another tokenizer


def test_a_run_does_not_go_on_with_data_of_another_tokenizer(home):
    write_data(home / "data" / "text", OTHER)
    names = ["data/text/train.bin", OTHER.sha256[:12], OWN.sha256[:12]]
    before = files_below(home)
    done = call("--resume", "--max_steps", "3", "--accept_changed_data")
    assert_refused(done, *names, LATEST)
    tune = ["--checkpoint", LATEST, "--steps", 1, "--device", "cpu"]
    assert_refused(run_main(peft.main, *tune), *names)
    words = ["--checkpoint", LATEST, "--bits", 4, "--calibration_data", "data/text/train.bin"]
    assert_refused(run_main(quantize.main, *words, "--calibration_tokens", 64), *names)
    words = ["--tinymamba_checkpoint", LATEST, "--benchmark_type", "perplexity"]
    words += ["--eval_dataset", "data/text/train.bin", "--device", "cpu"]
    assert_refused(run_main(benchmark.main, *words), *names)
    assert files_below(home) == before


def test_a_run_goes_on_without_the_file_of_its_tokenizer(home):
    (home / "data" / "text" / "tokenizer.json").unlink()
    (home / "data").rename(home / "moved")
    words = ["--train_data_path", "moved/text/train.bin", "--val_data_path", "moved/text/val.bin"]
    done = call("--resume", "--max_steps", "3", *words, "--generate_samples", "true",
                "--generation_length", "2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "sample at step 3" in done.stdout
    assert load_checkpoint(LATEST)["tokenizer"]["chat_template"] == TEMPLATE
    (home / "moved" / "text" / "tokenizer.json").write_text(OWN.to_dict()["content"])
    (home / "moved" / "text" / "chat_template.jinja").write_text("new")
    assert call("--resume", "--max_steps", "4", *words).returncode == 0
    assert load_checkpoint(LATEST)["tokenizer"]["chat_template"] == "new"


MIXED = {  # how the second source is made, and what the error names besides both files
    "hash": (OTHER, {}, OTHER.sha256[:12]),
    "hash of the file beside it": (OTHER, {"tokenizer": None}, OTHER.sha256[:12]),
    "eos_id": (OWN, {"eos_id": 7}, "eos_id 7, not 256"),
    "vocab_size": (OWN, {"tokenizer": None, "vocab_size": 300}, "vocab_size 300, not 257"),
}


@pytest.mark.parametrize("role", ["train", "validation"])
@pytest.mark.parametrize("facts", MIXED)
def test_files_of_different_tokenizers_are_refused_by_name(home, facts, role):
    tokenizer, changes, fragment = MIXED[facts]
    write_data(home / "b", tokenizer, "more", **changes)
    if tokenizer is OWN:
        (home / "b" / "tokenizer.json").unlink()
    sources = {"train_data_path": ["data/text/train.bin", "b/more.bin"]}
    if role == "validation":
        sources = {"val_data_path": "b/more.bin", "enable_validation": True}
    before = files_below(home)
    done = call(*brief_flags(checkpoint_path="new.pt", max_steps=1, **sources))
    assert_refused(done, "b/more.bin", "data/text/train.bin", fragment)
    assert files_below(home) == before


def test_a_run_whose_data_have_only_a_hash_is_held_to_it(away):
    """What lies in the working folder afterwards has another hash."""
    (away / "data").rename(away / "other")
    for folder, facts in (("data/text", {}), ("silent", {"tokenizer": None})):
        (write_data(away / folder, OWN, **facts) / "tokenizer.json").unlink()
    words = brief_flags(max_steps=1, checkpoint_path="run.pt")
    assert call(*words).returncode == 0
    silent = ["--train_data_path", "silent/train.bin", "--checkpoint_path", "no.pt"]
    assert call(*words, *silent, "--enable_validation", "false").returncode == 0
    assert load_checkpoint("run.pt")["tokenizer"] == {"sha256": OWN.sha256}
    assert load_checkpoint("no.pt")["tokenizer"] == {}
    shutil.rmtree(away / "data")
    write_data(away / "data" / "text", OTHER)
    stream = ["--prompt", "a", "--device", "cpu", "--checkpoint"]
    assert_refused(run_main(streaming.main, *stream, "run.pt"), "is missing; pass --tokenizer")
    done = run_main(streaming.main, *stream, "run.pt", "--tokenizer", "data/text/tokenizer.json")
    assert_refused(done, OTHER.sha256[:12], OWN.sha256[:12], "pass that one")
    again = ["--resume", "--checkpoint_path", "run.pt", "--max_steps", 2, "--accept_changed_data"]
    assert_refused(call(*again), "train.bin", OTHER.sha256[:12], OWN.sha256[:12])
    (away / "silent" / "tokenizer.json").write_text(OTHER.content, encoding="utf-8")
    assert_refused(run_main(streaming.main, *stream, "no.pt"), "none was found")


ORDERS = {  # the folders of the sources, and the tokenizer of the run, or what an error names
    "one two": OWN,
    "two one": OWN,
    "one bare": "tokenizer.json",
    "bare two": OWN,
    "none two": OWN,
    "one none": OTHER,
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_tokenizer_of_several_files_is_the_one_that_they_name(order, away):
    (write_data(away / "one", OTHER) / "train.json").unlink()  # says nothing of what lies there
    write_data(away / "two", OWN)
    (write_data(away / "bare", OWN) / "tokenizer.json").unlink()
    (write_data(away / "none", OWN, tokenizer=None) / "tokenizer.json").unlink()
    sources = [[f"{folder}/train.bin"] for folder in order.split()]
    if isinstance(want := ORDERS[order], str):
        with pytest.raises(UserError, match=f"{want}.*{OTHER.sha256[:12]}.*{OWN.sha256[:12]}"):
            RunTokenizer(None, sources, 257)
        return
    run = RunTokenizer(None, sources, 257)
    assert run.record["sha256"] == want.sha256 == run.opened.sha256
    run.inherit(run.record, "itself")


def test_a_vocabulary_is_no_contradiction_to_the_hash_of_a_tokenizer_json(away):
    plain = SimpleTokenizer.from_dict(SimpleTokenizer().to_dict())
    folder = write_data(away / "text", plain)
    (folder / "tokenizer.json").unlink()
    lines = [*byte_alphabet(), EOS_TOKEN]
    (folder / "vocab.txt").write_text("\n".join(lines), encoding="utf-8")
    sources = [[f"text/{name}.bin"] for name in ("train", "val")]
    run = RunTokenizer(None, sources, 257)
    assert (run.record["name"], run.record["data_sha256"]) == ("vocab.txt", plain.sha256)
    (folder / "tokenizer.json").write_text(plain.content, encoding="utf-8")
    again, record = RunTokenizer(None, sources, 257), run.record
    again.inherit(record, "model.pt")
    assert again.record == record and again.opened.name == "vocab.txt"
    again.inherit({**record, "data_sha256": None}, "model.pt")  # of data without a hash
    with pytest.raises(UserError, match=plain.sha256[:12]):
        RunTokenizer(None, [["data/text/train.bin"]], 257).inherit(record, "model.pt")
    (folder / "vocab.txt").write_text("\n".join([*lines, "more"]), encoding="utf-8")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has 258 ids"):
        RunTokenizer(None, sources, 257)


def test_files_that_say_nothing_are_compared_by_nothing(home):
    write_data(home / "b", OTHER, "more")
    (home / "b" / "more.json").unlink()
    sources = ["data/text/train.bin", "b/more.bin"]
    done = call(*brief_flags(checkpoint_path="new.pt", max_steps=1, train_data_path=sources))
    assert done.returncode == 0, done.stderr
    assert load_checkpoint("new.pt")["tokenizer"]["sha256"] == OWN.sha256


def test_a_tokenizer_replaced_beside_its_data_is_refused(home):
    (home / "data" / "text" / "tokenizer.json").write_text(OTHER.content, encoding="utf-8")
    done = call(*brief_flags(checkpoint_path="new.pt", max_steps=1))
    assert_refused(done, "tokenizer.json", OTHER.sha256[:12], OWN.sha256[:12], "train.bin")


def test_data_of_more_ids_than_the_model_has_are_refused_with_the_flag_to_pass(home):
    done = call(*brief_flags(**{**TINY, "vocab_size": 200}, checkpoint_path="new.pt"))
    assert_refused(done, "vocab_size: 200, but the data has 257", "--vocab_size 257")


@pytest.mark.parametrize("facts", ['{"vocab_size": "257"}', '{"eos_id": 1.5}', '{"tokenizer": 3}'])
def test_a_json_of_other_types_is_refused(home, facts):
    (home / "data" / "text" / "train.json").write_text(facts)
    done = call(*brief_flags(checkpoint_path="new.pt", max_steps=1))
    assert_refused(done, "train.json", facts[2:].partition('"')[0], "fix it")


# ------------------------------------------------------------------------------- sessions, adapters


def test_a_chat_template_that_cannot_be_read_stops_only_the_chat(away, capsys):
    saved = load_checkpoint("model.pt")
    saved["tokenizer"]["chat_template"] = "{% generation %}{% endgeneration"
    save_checkpoint("model.pt", saved)
    api = served("model.pt")
    assert api.tokenizer.encode(TEXT) == IDS
    serve.warn(api)
    said = capsys.readouterr().err
    assert said.startswith("no chat: the model's chat template cannot be read") and said[-1] == "\n"
    with pytest.raises(serve.ApiError, match="chat template cannot be read") as error:
        api.template.encode([Message(role="user", content="a")])
    assert error.value.status_code == 400


def test_a_session_goes_on_with_its_own_tokenizer_only(away):
    mine = server("model.pt")
    mine.save_session(mine.create_session(), "s.safetensors")
    again = server("model.pt")
    again.load_session("s.safetensors")
    other = server("model.pt", tokenizer=OTHER)
    with pytest.raises(UserError, match=f"{OWN.sha256[:12]}.*{OTHER.sha256[:12]}"):
        other.load_session("s.safetensors")
    assert not other.sessions
    unknown = server("model.pt", tokenizer=HuggingFaceTokenizerWrapper.__new__(Small))
    unknown.load_session("s.safetensors")  # an object without a hash is not compared


class Small(HuggingFaceTokenizerWrapper):
    """As many ids as the model."""

    def __len__(self):
        return 257


def test_an_adapter_of_another_tokenizer_is_refused(away):
    model = peft.attach(load_model("model.pt"), peft.AdapterConfig("lora", 2))
    model.tokenizer = OTHER.to_dict()
    peft.save_adapter(model, "adapter")
    with pytest.raises(UserError, match=OTHER.sha256[:12]):
        peft.load_adapter(load_model("model.pt"), "adapter")
