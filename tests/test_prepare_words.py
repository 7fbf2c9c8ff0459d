"""The words of data/prepare.py and their ids are those of the library `tokenizers`."""

import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from data import encoding, numbering, vocabulary, words
from data.merges import learn, learn_merges
from tinymamba.tokenizer import EOS_TOKEN, byte_alphabet, byte_level, byte_tokenizer

CODE = Path(random.__file__).read_text(encoding="utf-8")[:20_000]
PARTS = [
    *[
        "'s",
        "'ll",
        "'",
        "’s",
        "a",
        "Z" * 129,
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\x1c",
        "\x85",
        "\xa0",
    ],
    *["\u3000", "\u2028", "é", "日本語", "ſ", "🙂", "²", "٣", "7" * 130, "!?" * 70, "_", "\u0301"],
    *["\0", " " * 130, EOS_TOKEN, "\ufeff", "\U0001d7d9", "\U00020000", "\U000e0001", "\U0010ffff"],
]
hostile = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=12).map("".join)
often = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def learned(rule, text=CODE * 2 + "日本語 wörter's " * 50):
    """A tokenizer that finds words by a rule, learned by the library."""
    tokenizer = byte_level(models.BPE())
    if rule == words.BOUNDED:
        tokenizer = vocabulary.bounded_byte_level(models.BPE())
    alphabet, specials = byte_alphabet(), [EOS_TOKEN]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return encoding.plain(tokenizer)


KINDS = {"gpt2": learned(words.GPT2), "bounded": learned(words.BOUNDED), "bytes": byte_tokenizer()}
ENCODERS = {}
for name, kind in KINDS.items():
    encoding.plain(kind)
    ENCODERS[name] = words.fast_encoder(kind, "uint16")


@given(hostile)
@example("")
@example("".join(PARTS) * 2)
@example("a \n" * 40 + "é\n\n x" + CODE[:500])
@example("we've they're I'll 'vex 'rex 'l 'v 'ev 'er 'd'm't's")
@example("!" * 128 + "'s " + "'" * 129 + "ve" + "'s" + "a" * 300 + "\u3000" * 129 + "'" * 128 + "s")
@example("!" * 128 + "'s" + "é" * 200 + " " + "日" * 300)
@often
def test_words_are_those_of_the_library(text):
    for name, rule in (("gpt2", words.GPT2), ("bounded", words.BOUNDED)):
        found = KINDS[name].pre_tokenizer.pre_tokenize_str(text)
        assert words.Words(rule)(text) == [text[begin:end] for _, (begin, end) in found]


@pytest.mark.parametrize("name", KINDS)
@given(text=hostile)
@example(text="".join(PARTS) * 3)
@example(text=CODE)
@often
def test_ids_are_those_of_the_library(name, text):
    ids = KINDS[name].encode(text, add_special_tokens=False).ids
    assert np.frombuffer(ENCODERS[name](text), np.uint16).tolist() == ids


def test_every_character_has_the_class_that_the_library_gives_it():
    points = np.array([*range(0xD800), *range(0xE000, sys.maxunicode + 1)])
    text, own = "".join(map(chr, points)), words.classes_of(points)
    for rule, kind in {r"\p{L}": words.LETTER, r"\p{N}": words.NUMBER, r"\s": words.WHITE}.items():
        marked = normalizers.Replace(Regex(rule), "\ue000").normalize_str(text)
        is_member = (words.code_points(marked) == 0xE000) & (points != 0xE000)
        assert (is_member == (own == kind)).all()


@given(st.lists(hostile, min_size=1, max_size=5))
@example(["", "a ", "", " b", "'", "s", " \u3000", "\u3000x", "!" * 128 + "'s"])
@often
def test_texts_of_one_block_do_not_touch_each_other(texts):
    for name in ("gpt2", "bounded"):
        assert list(ENCODERS[name].each(texts)) == [ENCODERS[name](text) for text in texts]
    counted = words.Words(words.BOUNDED)
    each = Counter(word for text in texts for word in counted(text))
    assert counted.count(texts) == counted.count(texts) == each


@pytest.mark.parametrize("factors", [(1, 0), (1 << 63, 1 << 63), None])
def test_words_with_equal_keys_or_slots_keep_their_numbers(monkeypatch, factors):
    if factors:
        monkeypatch.setattr(numbering, "FACTORS", np.array(factors, np.uint64))
    monkeypatch.setattr(numbering, "FIRST_SLOTS", 4)
    drawn = random.Random(0)
    made = ["".join(drawn.choices("ab\0é", k=drawn.randrange(1, 25))) for _ in range(300)]
    numbers, known = numbering.WordNumbers(), {}
    for _ in range(20):
        chosen = [word.encode() for word in drawn.choices(made, k=100)]
        places = np.cumsum([0, *map(len, chosen)])
        block = b"".join(chosen) + bytes([numbering.END] * numbering.PADDING)
        for word, number in zip(chosen, numbers(block, places).tolist(), strict=True):
            assert known.setdefault(word, number) == number
            assert numbers.words[number] == word
    assert len(set(known.values())) == len(known) == len(numbers.words) - 1


def test_words_are_forgotten_and_found_again(monkeypatch):
    monkeypatch.setattr(words, "KEPT_BYTES", 300)
    encoder = words.fast_encoder(KINDS["bounded"], "int32")
    ids = KINDS["bounded"].encode(CODE, add_special_tokens=False).ids
    for _ in range(2):
        assert np.frombuffer(encoder(CODE), np.int32).tolist() == ids
    for line in CODE.splitlines():
        expected = KINDS["bounded"].encode(line, add_special_tokens=False).ids
        assert np.frombuffer(encoder(line), np.int32).tolist() == expected
        kept = encoder.ids.numbers.words
        assert sum(map(len, kept)) == encoder.ids.numbers.size <= 300 + len(line)


ALPHABET = {name: i for i, name in enumerate(byte_alphabet())}, []


def test_tokenizers_with_other_rules_are_left_to_the_library():
    def changed(change, kind="gpt2"):
        tokenizer = Tokenizer.from_str(KINDS[kind].to_str())
        change(tokenizer)
        return words.fast_encoder(tokenizer, "int32")

    def set_splits(**rules):
        return lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(**rules))

    def drop(tokenizer):
        tokenizer.model.dropout = 0.1

    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(), KINDS["gpt2"].pre_tokenizer])
    assert changed(lambda t: None)
    assert changed(set_splits(add_prefix_space=False, trim_offsets=False))
    assert changed(lambda t: t.add_special_tokens(["<|im_end|>"]))
    assert not changed(set_splits(add_prefix_space=True))
    assert not changed(set_splits(add_prefix_space=False, use_regex=False))  # merges whole texts
    assert not changed(lambda t: t.add_tokens([AddedToken("def")]))
    assert not changed(lambda t: setattr(t, "normalizer", normalizers.NFC()))
    assert not changed(lambda t: setattr(t, "pre_tokenizer", digits))
    assert not changed(drop)
    for model in (models.BPE({"a": 0}, []), models.BPE(*ALPHABET, end_of_word_suffix="</w>")):
        assert not changed(lambda t, model=model: setattr(t, "model", model))
    assert changed(lambda t: setattr(t, "model", models.BPE(*ALPHABET)))
    assert not words.fast_encoder(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "int32")


# ------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize("letters", ["ab ", "a ", "abc", "aab\n=  ", "xyz日é🙂 ", "0a' s"])
def test_merges_are_those_of_the_library(letters):
    drawn = random.Random(letters)
    for count in (0, 5, 50, 400, 3000):
        text = "".join(drawn.choices(letters, k=count))
        for size in (257, 263, 300, 700):
            check_merges(text, size)


def test_merges_of_code_are_those_of_the_library():
    check_merges(CODE + "日本語 " * 9, 1500)


@pytest.mark.parametrize("most", [10**9, 2000])
def test_known_words_have_the_ids_that_the_tokenizer_gives_them(most):
    counts = words.Words(words.BOUNDED).count([CODE, "日本語 wörter's aaaaaaa " * 9, "A" * 300])
    vocab, merges, known = learn(counts, [EOS_TOKEN], 900, most)
    model, names = models.BPE(vocab, merges), byte_alphabet()
    ids = iter(known.ids.tolist())
    for word, count in zip(known.words, known.counts.tolist(), strict=True):
        written = "".join(names[byte] for byte in word)
        assert [next(ids) for _ in range(count)] == [t.id for t in model.tokenize(written)]
    assert next(ids, None) is None
    left = counts.keys() - {word.decode() for word in known.words}
    assert bool(left) == (most == 2000) and sum(map(len, known.words)) <= most
    rarest = min(counts[word.decode()] for word in known.words)
    assert all(counts[word] <= rarest for word in left)


def test_no_word_is_known_where_two_merges_give_one_token():
    assert learn({"ab": 9, "c": 1}, ["ab"], 300, 10**9)[2] is None


def test_known_words_are_encoded_as_others_are():
    tokenizer, known = vocabulary.learn_bpe([CODE], vocabulary.Learning(600, 10**9))
    assert len(known.words) > 500
    encoder = words.fast_encoder(encoding.plain(tokenizer), "uint16", known)
    encoder.ids.tokenizer = None  # nothing is left for it
    ids = tokenizer.encode(CODE, add_special_tokens=False).ids
    assert np.frombuffer(encoder(CODE), np.uint16).tolist() == ids


def check_merges(text, size):
    tokenizer = vocabulary.bounded_byte_level(models.BPE())
    alphabet, specials = byte_alphabet(), [EOS_TOKEN]
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    own = vocabulary.train_bpe([text], vocabulary.Learning(size, 10**9))
    assert own.to_str() == tokenizer.to_str()


def test_the_order_of_words_and_parts_changes_nothing_that_is_learned():
    lines = CODE.splitlines(keepends=True)
    drawn = random.Random(0)
    counts = words.Words(words.BOUNDED).count(lines)
    shuffled = drawn.sample([*counts.items()], len(counts))
    assert learn_merges(dict(shuffled), [], 400) == learn_merges(counts, [], 400)
    table = words.WordTable()
    for line in drawn.sample(lines, len(lines)):
        table.add(words.Words(words.BOUNDED).count([line]))
    assert table.counts == counts and not table.has_forgotten


def test_too_many_words_are_forgotten_but_the_frequent_ones_stay(monkeypatch, capsys):
    rare = (f" rare{i}" for i in range(10**9))
    table = words.WordTable(longest=5000)
    total = Counter()
    for i in range(200):
        counts = {" often": 3, " late": 2 * (i > 150)} | {next(rare): 1 for _ in range(30)}
        table.add(counts)
        total.update(counts)
        assert table.size == sum(len(word) for word in table.counts) <= 5000
    assert table.has_forgotten
    assert table.counts[" often"] == total[" often"]
    assert table.counts[" late"] == total[" late"]
    monkeypatch.setattr(words.WordTable.__init__, "__defaults__", (5000,))
    monkeypatch.setattr(vocabulary, "COUNTED_CHARS", 1000)
    text = [f"often rare{i} " for i in range(5000)]
    learned = vocabulary.train_bpe(text, vocabulary.Learning(300, 10**9))
    assert "bpe forgets the rarest words" in capsys.readouterr().out
    assert len(learned.encode("often").ids) == 1
