"""Tasks that tell architectures apart: recall, copying over a long distance, counting.

    python benchmarks/synthetic.py mqar --d_model 64 --length 512 --pairs 64
    python benchmarks/synthetic.py induction --read 256 4096 65536 1048576
    python benchmarks/synthetic.py parity --seeds 0 1 2
    python benchmarks/synthetic.py parity --model llama        # or mamba2, of equal size

mqar: multi-query associative recall (Zoology, arXiv 2312.04927, appendix E.1): pairs of key and
value, then keys again far apart, amid zeros; each key must call up its value. A quarter each of the
training tokens are in texts of the full length and of a half, a quarter and an eighth of it.
induction: one marker somewhere, a token after it, the marker again at the very end: say the token
(Mamba, arXiv 2312.00752, section 4.1.2). Trained on 32 to 256 tokens, read on up to a million.
parity: of all bits so far (Mamba-3, arXiv 2603.15569, section 4.3). Trained on up to 40 bits, read
on 256: decays between 0 and 1 cannot count, a state that turns can.

Every run appends its row to --output, whatever comes of it.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from testv2 import Config, TinyMambaModel, make_optimizer  # noqa: E402
from tinymamba.cli import CliParser, require, run_cli  # noqa: E402

VOCABULARY = {"mqar": 8192, "induction": 16, "parity": 3}
STEPS = {"mqar": 3000, "induction": 3000, "parity": 3000}
BATCH = {"mqar": 64, "induction": 32, "parity": 128}
IGNORE = -100
AT_ONCE, PIECE = 4096, 16384  # tokens read in one pass at most; else by the state, in pieces


def mqar(batch: int, length: int, pairs: int, vocab: int, random) -> tuple:
    """ids and targets (batch, length): the second half of the vocabulary are values."""
    half, space = vocab // 2, (length - 2 * pairs) // 2
    keys = 1 + torch.rand(batch, half - 1, generator=random).argsort(1)[:, :pairs]
    values = half + torch.rand(batch, half, generator=random).argsort(1)[:, :pairs]
    ids = torch.zeros(batch, length + 1, dtype=torch.int64)
    ids[:, : 2 * pairs] = torch.stack((keys, values), dim=2).flatten(1)
    gaps = torch.arange(1, space + 1) ** (0.01 - 1.0)  # most keys come again soon, some late
    at = 2 * pairs + 2 * torch.multinomial(gaps.expand(batch, -1), pairs, generator=random)
    ids.scatter_(1, at, keys)
    targets = torch.full_like(ids, IGNORE).scatter_(1, at, values)
    return ids[:, :length], targets[:, :length]


def induction(batch: int, length: int, vocab: int, random) -> tuple:
    """ids and targets (batch, length): the marker is id 0, the only target is at the end."""
    ids = torch.randint(1, vocab, (batch, length), generator=random)
    at = torch.randint(length - 2, (batch, 1), generator=random)
    ids.scatter_(1, at, 0)
    ids[:, -1] = 0
    targets = torch.full_like(ids, IGNORE)
    targets[:, -1:] = ids.gather(1, at + 1)
    return ids, targets


def parity(batch: int, length: int, random) -> tuple:
    """ids and targets (batch, 1 + length): id 2 begins, then bits; are the ones so far odd?"""
    bits = torch.randint(2, (batch, length), generator=random)
    ids = F.pad(bits, (1, 0), value=2)
    return ids, F.pad(bits.cumsum(1) % 2, (1, 0), value=IGNORE)


def draw(task: str, args, random, length: int | None = None, batch: int | None = None) -> tuple:
    """A batch of the task, for training unless a length says otherwise."""
    batch = batch or args.batch_size
    easier = int(torch.randint(4, (), generator=random))  # easy ones among the hard ones
    if task == "mqar":
        easier = 0 if length else easier
        pairs = max(1, args.pairs >> easier)
        return mqar(batch << easier, args.length >> easier, pairs, args.vocab_size, random)
    if task == "induction":
        return induction(batch, length or 256 >> easier, args.vocab_size, random)
    return parity(batch, length or int(torch.randint(3, 41, (), generator=random)), random)


def build(args) -> torch.nn.Module:
    """The model of the task, or a peer from transformers of the same width and depth."""
    D, n, heads = args.d_model, args.n_layer, max(1, args.d_model // 32)
    if args.model == "tinymamba":
        return TinyMambaModel(
            Config(
                d_model=D,
                n_layer=n,
                num_heads=heads,
                vocab_size=args.vocab_size,
                dropout=0.0,
                d_state=args.d_state,
                window_size=args.window_size,
                bias=False,
                ssm_head_dim=32,
            )
        )
    from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM

    common = {
        "vocab_size": args.vocab_size,
        "hidden_size": D,
        "use_cache": False,
        "tie_word_embeddings": True,
    }
    if args.model == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                **common,
                num_hidden_layers=2 * n,
                num_attention_heads=heads,
                intermediate_size=3 * D,
            )
        )
    return Mamba2ForCausalLM(
        Mamba2Config(
            **common,
            num_hidden_layers=2 * n,
            num_heads=2 * D // 32,
            head_dim=32,
            n_groups=1,
            state_size=args.d_state,
            chunk_size=64,
        )
    )


def answers(model, ids, targets, bf16: bool) -> tuple:
    """Logits and targets of the places that ask for an answer."""
    asked = targets != IGNORE
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        if isinstance(model, TinyMambaModel):
            logits = model.head(model.run(ids)[0][asked])
        else:
            logits = model.lm_head(model.base_model(input_ids=ids).last_hidden_state[asked])
    return logits.float(), targets[asked]


@torch.no_grad()
def accuracy(model, task: str, args, length: int) -> float:
    """Share of right answers on fresh samples of `length` tokens, long ones in pieces."""
    random = torch.Generator().manual_seed(10**6 + length)
    model.eval()
    if length <= AT_ONCE:
        texts = draw(task, args, random, length, args.test_samples)
        logits, targets = answers(model, *texts, args.bf16)
        return (logits.argmax(-1) == targets).float().mean().item()
    require(
        isinstance(model, TinyMambaModel),
        "read",
        f"{length} tokens at once are too many for {args.model}",
        f"read at most {AT_ONCE}",
    )
    ids, targets = draw(task, args, random, length, min(args.test_samples, 16))
    state = model.init_state(len(ids))
    for piece in ids.split(PIECE, dim=1):
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits, state = model.advance(piece, state, last_only=True)
    return (logits[:, -1].argmax(-1) == targets[:, -1]).float().mean().item()


def train(task: str, args, seed: int) -> dict:
    """One run: its row."""
    torch.manual_seed(seed)
    model, random = build(args), torch.Generator().manual_seed(seed)
    config = Config(lr=args.lr, weight_decay=0.0, optimizer=args.optimizer)
    optimizer, start = make_optimizer(model, config), time.perf_counter()
    for step in range(args.steps):
        rate = min(1.0, (step + 1) / 100, 1.25 * (1 - step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        model.train()
        logits, targets = answers(model, *draw(task, args, random), args.bf16)
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % args.log_interval == 0:
            right = (logits.argmax(-1) == targets).float().mean().item()
            print(
                f"seed {seed}  step {step + 1}  loss {loss.item():.4f}  right {right:.3f}  "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
    read = {length: round(accuracy(model, task, args, length), 4) for length in args.read}
    return {
        **vars(args),
        "seed": seed,
        "loss": loss.item(),
        "accuracy": read,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - start),
    }


def parse(argv=None):
    parser = CliParser(description=__doc__)
    parser.add_argument("task", choices=STEPS)
    parser.add_argument("--model", choices=("tinymamba", "llama", "mamba2"), default="tinymamba")
    for name, default, text in (
        ("d_model", 64, "width"),
        ("n_layer", 2, "blocks; peers get two layers for each"),
        ("d_state", 64, "SSM state size"),
        ("window_size", 32, "attention window in tokens"),
        ("length", 256, "tokens of an mqar text"),
        ("pairs", 16, "pairs of an mqar text"),
        ("vocab_size", 0, "0 takes the task's: 8192, 16, 3"),
        ("steps", 0, "0 takes the task's"),
        ("batch_size", 0, "texts in a step; 0 takes the task's"),
        ("test_samples", 256, "texts to read in the end"),
        ("log_interval", 200, "steps"),
        ("threads", 0, "of the CPU; 0 takes all"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} [{default}]")
    parser.add_argument("--read", type=int, nargs="+", help="lengths to read in the end")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate [4e-3]")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--output", default="synthetic.jsonl", help="of rows [synthetic.jsonl]")
    args = parser.parse_args(argv)
    args.vocab_size = args.vocab_size or VOCABULARY[args.task]
    args.steps = args.steps or STEPS[args.task]
    args.batch_size = args.batch_size or BATCH[args.task]
    args.read = (
        args.read
        or {"mqar": [args.length], "induction": [256, 4096], "parity": [40, 256]}[args.task]
    )
    require(
        args.length >= 4 * args.pairs,
        "length",
        f"{args.length} tokens do not hold {args.pairs} pairs twice",
        f"it must be at least {4 * args.pairs}",
    )
    return args


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    for seed in args.seeds:
        row = train(args.task, args, seed)
        with open(args.output, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{args.task}  {args.model}  seed {seed}  accuracy by length {row['accuracy']}")


if __name__ == "__main__":
    run_cli(main)
