"""TinyMamba: a hybrid small language model, its data and its trainer.

In every block a selective state-space branch, sliding-window attention and a SwiGLU MLP read the
same normalized input side by side, and a learned gate mixes them for each token.

    python testv2.py --preset demo                    # minutes on a 2-core CPU
    python testv2.py                                  # 153M parameters, for a GPU
    python testv2.py --resume                         # continue from the checkpoint
    python testv2.py --resume auto                    # continue if there is one, else begin
    python testv2.py --init_from FILE                 # a new run, from trained weights
    python testv2.py --init_from FILE --train_data_path chat/train.bin    # on conversations
    python testv2.py --train_data_path a.bin b.bin --train_data_weights 0.7 0.3
    python testv2.py --carry_state true               # rows read on, with their state
    torchrun --nproc_per_node=2 testv2.py             # several GPUs or processes
    python -m torch.distributed.launch --nproc_per_node=2 testv2.py
    python testv2.py --profile                        # where does the time of a step go?
    python testv2.py --help                           # every field of Config is a flag

Dimension letters in the comments on shapes:
    b batch      l length        d d_model             e inner width, expand_factor * d
    h SSM heads  p SSM head width (e = h * p)          n d_state     k d_conv
    a attention heads            f attention head width (d = a * f)  w window_size
    r pairs of SSM state channels that rotate
    v vocabulary                 q chunk_size          c chunks (l / q)
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar, NamedTuple

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from tinymamba.attention import attend_to_window, to_blocks
from tinymamba.carried_state import CarriedStates, row_settings
from tinymamba.checkpoint import (
    BackgroundWriter,
    Unfilled,
    digest,
    find_saved,
    is_sharded,
    keep_best,
    load_checkpoint,
    mark_file,
    move_aside,
    read_all_tensors,
    read_tensors,
    require_run_name,
    require_writable,
    run_files,
    run_lock,
    save_checkpoint,  # noqa: F401 one of the names to import from here
    sibling,
    weight_files,
    write_json,
    write_tensors,
)
from tinymamba.cli import (
    DTYPES,
    CliParser,
    UserError,
    add_flags,
    check_fields,
    given_fields,
    require,
    run_cli,
    say,
    show,
)
from tinymamba.context_parallel import Pieces, PiecesBefore, check_pieces, join_pieces
from tinymamba.conversations import open_training_data, start_answer
from tinymamba.data_order import ShardedBatches
from tinymamba.dataset import StreamingTokenDataset
from tinymamba.decode import PLAIN_MODULES, step, why_general
from tinymamba.delta_rule import key_features, run_delta_rule
from tinymamba.distillation import Lesson, lesson_loss, open_lessons
from tinymamba.distributed import (
    all_reduce,
    arrange_processes,
    full_tensor,
    is_same,
    join_process_group,
    make_sharded,
    shard_like,
)
from tinymamba.fused import add_scaled, rms_norm, rotate, silu_product, weighted_sum
from tinymamba.initial_weights import init_weights
from tinymamba.kernels import (
    ChunkedLoss,
    ChunkedScan,
    ResidualConv,
    bounded_decay,
    count_blocks,
    count_codes,
    depthwise,
    fill_model,
    in_chunks,
    is_in_graph,
    is_writing_graph,
    lazy_state,
    loss_and_gradients,
    quantize_like,
    running_phase,
    scan_in_one_tile,
    settle_ties,
    sparsemax,
    stored_tensors,
    with_tail,
)
from tinymamba.optimizer import judge_step, load_optimizer, make_optimizer
from tinymamba.packing import erase_states, find_documents, keep_last, padding_last, take_tokens
from tinymamba.profiling import profile_steps
from tinymamba.progress import check_gradient, describe_start, report_step, report_validation
from tinymamba.runtime import (
    Logger,
    Signals,
    from_launcher,
    gate_statistics,
    make_loader,
    open_log_folder,
    pick_amp_dtype,
    pick_device,
    return_memory,
    reuse_memory,
    take_batches,
    why_no_compile,
)
from tinymamba.schedule import learning_rate, warmup_length
from tinymamba.sharded_checkpoint import ShardedWriter, fill_parameters, read_saved, unchanged
from tinymamba.token_file import TokenFile, read_sidecar  # noqa: F401
from tinymamba.token_shards import read_facts
from tinymamba.tokenizer import (  # noqa: F401
    RunTokenizer,
    SimpleTokenizer,
    find_tokenizer,
    note_tokenizer,
    read_folder_tokenizer,
    write_tokenizer,
)
from tinymamba.vocabulary import data_vocabulary, inherited_weights

# ------------------------------------------------------------------------------------ config


@dataclass
class Config:
    """All settings. Edit a default here, pass it as a flag, or `Config(d_model=256)`."""

    # Model
    d_model: int = 768  # model width d
    n_layer: int = 12  # blocks
    vocab_size: int = 50304  # ids are 0 .. vocab_size-1
    dropout: float = 0.1  # dropout rate on the embedding and on every block's update
    state_noise: float = 0.15  # deviation of noise on the SSM's steps and angles, in training
    bias: bool = True  # biases in the linear projections
    tie_embeddings: bool = True  # one matrix for embedding and output layer
    deepnet: bool = True  # DeepNet scaling of residual updates and of the initial weights
    low_rank: int = 0  # rank of the branches' projections; 0 is full rank

    # Architecture
    activation: str = "silu"  # activation of the MLP
    d_state: int = 16  # SSM state size n per channel
    d_conv: int = 4  # width k of the causal convolutions
    bc_conv: bool = True  # a convolution of the SSM's B and C, besides that of the block's input
    rotating: float = 0.25  # share of the pairs of SSM state channels that rotate
    min_decay: float = 0.05  # a token that would fade the SSM's state by less leaves it as it is
    k_conv: bool = True  # a convolution of the attention's keys
    qv_conv: bool = True  # with k_conv, the same of its queries and values
    memory: bool = True  # attention has a state as well, for what its window does not see
    memory_every: int = 4  # of so many blocks, one has that memory: of four the second
    memory_products: int = 4  # products of channels that make its keys so many times as wide
    expand_factor: int = 2  # inner width of SSM and MLP, as a multiple of d_model
    ssm_head_dim: int = 64  # channels p that share one SSM decay
    scan: str = "chunked"  # the parallel scan, or its slow reference
    chunk_size: int = 32  # tokens per chunk of the parallel scan
    window_size: int = 64  # a token attends to itself and the window_size-1 tokens before it
    num_heads: int = 6  # attention heads
    rope_theta: float = 10000.0  # base of the RoPE frequencies
    gate: str = "softmax"  # how the three branch weights of a token are computed
    gate_top_k: int = 2  # branches kept per token by gate=top_k
    document_mask: bool = False  # after eos, reset conv, SSM and attention
    eos_id: int = -1  # the id that ends a document; -1 takes it from the data's .json

    # Training
    block_size: int = 512  # training length in tokens; the model itself has no limit
    batch_size: int = 8  # sequences per micro-batch and process
    gradient_accumulation_steps: int = 4  # micro-batches per optimizer step
    carry_state: bool = False  # each row of a batch reads on from step to step, with its state
    num_epochs: int = 1  # passes over the training data, unless max_steps says otherwise
    max_steps: int = 0  # optimizer steps; 0 trains for num_epochs
    optimizer: str = "muon"  # optimizer for weight matrices; all other parameters use AdamW
    lr: float = 6e-4  # peak learning rate
    schedule: str = "cosine"  # how the learning rate decays at the end of the run
    decay_steps: int = 0  # steps of that decay; 0: all after warm-up, for wsd the last tenth
    min_lr_ratio: float = 0.1  # last learning rate, as a fraction of the peak
    warmup_steps: int = 1000  # steps of warm-up; cosine and linear: at most a tenth of the run
    grad_clip: float = 1.0  # largest gradient norm; 0 turns clipping off
    weight_decay: float = 0.01  # weight decay, of projection matrices only
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    max_bad_steps: int = 10  # steps in a row without a finite gradient before the run ends
    skip_spikes: float = 0.0  # skip steps whose gradient norm is so many deviations high; 0 is off
    teacher: str = ""  # model to learn from as well, or an X.teacher.bin: see docs/training.md
    distill_alpha: float = 0.5  # share of the teacher in the loss
    temperature: float = 2.0  # at which student and teacher are compared
    seed: int = 1337  # initial weights, data order, dropout, samples

    # Hardware
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
    use_compile: bool = True  # use torch.compile if a compiler is present
    use_flash_attn: bool = True  # PyTorch's fused attention; false uses plain products and softmax
    amp_dtype: torch.dtype = torch.bfloat16  # autocast dtype, if the hardware has it
    empty_cache_freq: int = 0  # steps between clearings of the CUDA cache; 0 is never
    num_workers: int = 0  # processes that read data ahead
    parallel: str = "ddp"  # several processes: ddp, or fsdp or hsdp, which share one model
    shard_group: int = 0  # with hsdp, processes that share one model; 0: those of one machine
    context_parallel: int = 1  # processes that share each text, a piece for each
    checkpoint_activations: bool = False  # recompute blocks in the backward pass: saves memory
    rank_timeout: int = 60  # seconds without a heartbeat before a process is declared dead

    # Data
    train_data_path: str | list[str] = "./data/text/train.bin"  # .bin files, or folders of shards
    train_data_weights: list[float] | None = None  # weights of several sources; None: by size
    val_data_path: str | list[str] = "./data/text/val.bin"  # .bin of tokens to validate on
    data_dtype: str = "auto"  # dtype of the ids in the .bin; auto: as its .json says, else int32
    accept_changed_data: bool = False  # resume with other training data or weights of sources

    # Checkpoints
    checkpoint_path: str = "tinymamba_model_latest.pt"  # newest state; the best is in ..._best.pt
    checkpoint_interval: int = 1000  # steps between saves; 0 saves at the end only
    save_top_k: int = 1  # how many of the best checkpoints to keep, by validation loss
    async_save: bool = False  # write checkpoints in the background, from a copy in memory
    resume: bool | str = False  # continue from checkpoint_path; auto: if it exists, else begin
    resume_from: str = ""  # continue from this checkpoint instead; saves go to checkpoint_path
    init_from: str = ""  # begin with the weights of this checkpoint or folder

    # Validation and samples
    enable_validation: bool = True  # measure the loss on val_data_path
    validation_interval: int = 2000  # steps between validations
    validation_steps: int = 50  # batches per process in one validation; 0 takes all data
    use_early_stopping: bool = False  # stop when the validation loss no longer improves
    early_stopping_patience: int = 5  # validations without improvement to wait for
    early_stopping_min_delta: float = 0.0  # nats that count as improvement
    generate_samples: bool = True  # print samples of text while training
    generation_interval: int = 1000  # steps between samples
    generation_length: int = 200  # tokens in a sample
    generation_temperature: float = 0.8  # 0 takes the likeliest token every time
    generation_prompt: str = ""  # what a sample continues, or answers; empty: a new document

    # Logging
    log_interval: int = 20  # steps between console lines
    log_dir: str = "./logs"  # TensorBoard logs, loss curve and profile, one folder per run
    use_wandb: bool = False  # log to Weights & Biases as well
    wandb_project: str = "tinymamba"  # W&B project
    wandb_run_name: str = ""  # name of the W&B run and log folder; empty takes the start time

    CHOICES: ClassVar = {
        "activation": ("silu", "gelu", "relu"), "gate": ("softmax", "top_k", "sparsemax"),
        "scan": ("chunked", "sequential"), "optimizer": ("muon", "adamw"),
        "schedule": ("cosine", "linear", "wsd", "constant"), "resume": (False, True, "auto"),
        "parallel": ("ddp", "fsdp", "hsdp"), "data_dtype": ("auto", "int32", "uint16"),
        "amp_dtype": tuple(DTYPES.values()),
    }  # fmt: skip
    AT_LEAST_ONE: ClassVar = """d_model n_layer vocab_size d_state d_conv expand_factor ssm_head_dim
        chunk_size memory_every window_size num_heads rope_theta block_size batch_size
        gradient_accumulation_steps num_epochs max_bad_steps early_stopping_patience
        generation_length log_interval validation_interval generation_interval rank_timeout
        context_parallel"""
    AT_LEAST_ZERO: ClassVar = """low_rank memory_products max_steps lr warmup_steps grad_clip
        weight_decay decay_steps empty_cache_freq num_workers checkpoint_interval save_top_k
        skip_spikes validation_steps early_stopping_min_delta generation_temperature
        shard_group"""
    LIMITS: ClassVar = {
        **dict.fromkeys(AT_LEAST_ONE.split(), (1, math.inf)),
        **dict.fromkeys(AT_LEAST_ZERO.split(), (0, math.inf)),
        **dict.fromkeys(("dropout", "beta1", "beta2"), (0, 0.9999)),
        **dict.fromkeys(("min_lr_ratio", "min_decay", "state_noise", "distill_alpha"), (0, 1)),
        "rotating": (0.001, 1), "temperature": (0.01, math.inf), "gate_top_k": (1, 3),
        "eos_id": (-1, math.inf), "seed": (0, 2**63 - 1),
    }  # fmt: skip

    def validate(self) -> Config:
        """Reject ill-typed and impossible values with a UserError; return self."""
        check_fields(self)
        d, e = self.d_model, self.expand_factor * self.d_model
        heads = [n for n in range(1, d + 1) if d % (2 * n) == 0]
        problem = f"{self.num_heads} heads do not divide d_model={d} into equal, even widths"
        remedy = f"use one of {heads}" if heads else "make d_model even"
        require(self.num_heads in heads, "num_heads", problem, remedy)
        problem = f"{self.ssm_head_dim} does not divide expand_factor*d_model = {e}"
        remedy = f"use one of {[p for p in range(1, e + 1) if e % p == 0]}"
        require(e % self.ssm_head_dim == 0, "ssm_head_dim", problem, remedy)
        problem = f"{self.d_state} cannot be split into pairs"
        require(self.d_state % 2 == 0, "d_state", problem, "make it even")
        problem = f"rank {self.low_rank} saves no weights at d_model={d}"
        require(self.low_rank < d, "low_rank", problem, f"it must be from 0 to {d - 1}")
        problem = f"{self.eos_id} is not in the vocabulary"
        remedy = f"it must be from -1 to {self.vocab_size - 1}"
        require(self.eos_id < self.vocab_size, "eos_id", problem, remedy)
        check_pieces(self)
        return self

    def to_dict(self) -> dict:
        """Plain values only, for checkpoints and JSON."""
        return {**asdict(self), "amp_dtype": show(self.amp_dtype)}

    @staticmethod
    def from_dict(values: dict) -> Config:
        """The opposite of `to_dict`; a missing field has its value in BEFORE, else its default."""
        values = {**BEFORE, **values}
        known, remedy = {f.name for f in fields(Config)}, "update TinyMamba, or remove the field"
        for name in values:
            require(name in known, name, "is not a field of Config", remedy)
        dtype = DTYPES.get(show(values.get("amp_dtype", Config.amp_dtype)))
        return Config(**{**values, "amp_dtype": dtype}).validate()


# Fields that determine what weights and states mean: fixed once they are trained.
SHAPE_FIELDS = [
    "d_model", "n_layer", "vocab_size", "bias", "tie_embeddings", "low_rank", "activation",
    "d_state", "d_conv", "bc_conv", "rotating", "min_decay", "k_conv", "qv_conv", "memory",
    "memory_every", "memory_products", "expand_factor", "ssm_head_dim", "window_size", "num_heads",
    "rope_theta", "gate", "gate_top_k", "document_mask",
]  # fmt: skip
# Values of fields that did not exist yet when a model was written.
BEFORE = {"bc_conv": False, "rotating": 1.0, "k_conv": False, "qv_conv": False, "memory": False,
          "memory_every": 1, "memory_products": 0, "min_decay": 0.0,
          "state_noise": 0.0}  # fmt: skip
# Fields in the config.json of a model folder.
FOLDER_FIELDS = [*SHAPE_FIELDS, "eos_id", "block_size", "deepnet", "scan", "chunk_size", "dropout",
                 "state_noise"]  # fmt: skip
# Fields that a resumed run cannot change.
RUN_FIELDS = [*SHAPE_FIELDS, "optimizer", "block_size", "seed", "warmup_steps", "carry_state"]

# -------------------------------------------------------------------------------- primitives


def upcast(x: Tensor) -> Tensor:
    """To float32, or unchanged if `x` is float64: the dtype of decays and states."""
    return x if x.dtype == torch.float64 else x.float()


def to_autocast(x: Tensor) -> Tensor:
    """Cast once to autocast's dtype, so that the branches need not."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich, arXiv 1910.07467, eq. 4)."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> the same shape."""
        return rms_norm(x, self.weight, self.eps)


class RotaryEmbedding(nn.Module):
    """Angles of RoPE (Su et al., arXiv 2104.09864, eq. 15).

    `forward(positions)` takes integers (...) and returns cos and sin, float32 (..., f/2). Angles
    are computed in float64, so that position 10,000,000 is as exact as position 10.
    """

    def __init__(self, head_dim: int, theta: float = 10000.0):
        super().__init__()
        problem = f"{head_dim} cannot be split into the pairs that RoPE rotates"
        require(head_dim >= 2 and head_dim % 2 == 0, "head_dim", problem, "make it even")
        self.head_dim, self.theta = head_dim, theta

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The cos and sin at `positions`."""
        device = positions.device
        wide = "cpu" if device.type == "mps" else device  # MPS has no float64
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=wide)
        rates = self.theta ** (-pairs / self.head_dim)
        angles = positions.to(wide).double()[..., None] * rates
        return angles.cos().float().to(device), angles.sin().float().to(device)


def apply_rotary_pos_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + f/2) of x (..., l, f) by the angles of cos and sin (..., l, f/2)."""
    if cos.shape != sin.shape or (cos.shape[-2], 2 * cos.shape[-1]) != x.shape[-2:]:
        got = f"{tuple(cos.shape)} and {tuple(sin.shape)}"
        want = f"cos and sin of shape ({x.shape[-2]}, {x.shape[-1] // 2})"
        raise ValueError(f"RoPE: x of shape {tuple(x.shape)} needs {want}, got {got}")
    return rotate(x, cos.to(x.dtype), sin.to(x.dtype))


class Float32Linear(nn.Linear):
    """A linear map in float32, also under autocast and with weights of another dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out), float32."""
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else upcast(self.bias)
            return F.linear(upcast(x), upcast(self.weight), bias)


class LowRankProjection(nn.Module):
    """A linear map through `rank` channels: rank * (d_in + d_out) weights, not d_in * d_out."""

    def __init__(self, d_in: int, d_out: int, rank: int, bias: bool = True):
        super().__init__()
        self.down = nn.Linear(d_in, rank, bias=False)
        self.up = nn.Linear(rank, d_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out)."""
        return self.up(self.down(x))


def projection(d_in: int, parts: list[int], config: Config) -> nn.Module:
    """One linear map of a branch to several outputs, of `parts` channels each.

    Its rank is config.low_rank. The optimizer treats the rows of each part as a separate matrix.
    """
    d_out, rank, bias = sum(parts), config.low_rank, config.bias
    low: Any = LowRankProjection(d_in, d_out, rank, bias) if rank else None
    linear = low or nn.Linear(d_in, d_out, bias)
    last_layer(linear).parts = parts
    return linear


def last_layer(projection: Any) -> Any:
    """The linear layer that gives a projection's outputs."""
    return projection.up if isinstance(projection, LowRankProjection) else projection


# ------------------------------------------------------------------------------------ scan

MIN_DT = 1e-3  # with min_decay=0, a dt below this counts as 0


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor | None = None,
    resets: Tensor | None = None,
    method: str = "chunked",
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence of Mamba-2 (Dao & Gu, arXiv 2405.21060, eq. 2 with scalar A).

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t

    x (b, l, h, p), dt (b, l, h) >= 0, A (h,) < 0, B and C (b, l, n), D (h,), state (b, h, p, n)
    before the first token (zeros if None), resets (b, l) of bool: tokens before which the state is
    erased. Returns y (b, l, h, p) and the state after the last token. y and the matrix products
    have the dtype of x; decays and states are float32, or float64 if x is.
    """
    if method not in Config.CHOICES["scan"]:
        raise ValueError(f"method {method!r} is not one of {Config.CHOICES['scan']}")
    with torch.autocast(x.device.type, enabled=False):
        dt, A, D = (t.to(upcast(x[:0]).dtype) for t in (dt, A, D))
        if state is None:
            state = dt.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])
        state = state.to(dt.dtype)
        if x.shape[1] == 0:
            return x, state
        log_decay = bounded_decay(dt * A, resets)
        if method == "sequential" or x.shape[1] == 1:
            return scan_sequential(x, dt, log_decay, B, C, D, state)
        B, C = B.to(x.dtype), C.to(x.dtype)
        scan = scan_in_one_tile if is_writing_graph() else ChunkedScan.apply
        y, state = scan(x, dt, log_decay, B, C, D, state.mT, chunk_size)
        return y, state.mT


def scan_sequential(
    x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token: the reference, and the single step of decoding."""
    outputs, wide = [], [t.to(dt.dtype) for t in (x, B, C)]
    for t in range(x.shape[1]):
        x_t, B_t, C_t = (w[:, t] for w in wide)  # (b, h, p), (b, n), (b, n)
        written = (dt[:, t, :, None] * x_t)[..., None] * B_t[:, None, None]  # (b, h, p, n)
        state = log_decay[:, t, :, None, None].exp() * state + written
        outputs.append((state * C_t[:, None, None]).sum(-1) + D[:, None] * x_t)  # (b, h, p)
    return torch.stack(outputs, dim=1).to(x.dtype), state


# ------------------------------------------------------------------------------------ branches
#
# A slot is None in a plain model. peft.py fills it with a module that maps the named input to a
# term added to the branch's output. There are MambaSSM.offset, LocalAttention.prefix and
# TinyMambaModel.start, which maps zero states to learned initial ones.


class LayerState(NamedTuple):
    """The state of one block, of constant size."""

    conv: Tensor  # (b, k-1, d + 2n + 3d) last inputs of the convolutions: of u; B, C; q, k, v
    ssm: Tensor  # (b, h, p, n) float32
    phase: Tensor  # (b, r) float32, rotation of r pairs of channels in half turns, modulo 2
    keys: Tensor  # (b, a, w-1, f) after RoPE
    values: Tensor  # (b, a, w-1, f)
    memory: Any = None  # (b, a, f, m) float32, values by keys; None in a block without a memory


class SequenceContext(NamedTuple):
    """Context shared by all blocks in one call: RoPE, mask, document starts, lengths.

    Indices count from the first token of the call, so a document that began in an earlier call has
    a negative start. None stands for the plain case: one document that starts at 0, no padding.
    """

    cos: Tensor  # RoPE: (l, f/2), or (b, 1, l, f/2) if rows are at different positions
    sin: Tensor  # the same
    mask: Any  # of attention, see LocalAttention.mask
    starts: Any = None  # (b, l) or None: index at which each token's document begins
    lengths: Tensor | None = None  # (b,) tokens of each row, which padding follows
    packed: bool = False  # documents may begin inside the call, at `starts`
    attend: Callable | None = None  # replaces LocalAttention's, which is its first argument
    stateless: bool = False  # the states after the call are not needed
    before: PiecesBefore | None = None  # what other processes have of the text before the call

    def real(self, index: Tensor) -> Tensor | None:
        """Which tokens are no padding, of bool (b, l); None if all."""
        return None if self.lengths is None else index < self.lengths[:, None]

    def resets(self, index: Tensor) -> Tensor | None:
        """Tokens after the first that begin a document, of bool (b, l); None if there are none."""
        first = 0 if self.before is None else -self.before.offset(len(index))  # of the whole text
        return (self.starts == index) & (index > first) if self.packed else None


class ShortConv(nn.Module):
    """u plus a causal depthwise convolution of u over k tokens.

    The residual form is that of Canon layers (Allen-Zhu, arXiv 2512.17351).
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.channels, self.width = channels, width
        self.weight = nn.Parameter(torch.empty(channels, width))

    def forward(
        self, u: Tensor, context: SequenceContext, tail: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """u (b, l, d), tail (b, k-1, d) of the inputs before it -> the same shapes.

        The new tail is None if states are not needed.
        """
        past, length, weight = self.width - 1, u.shape[1], self.weight.to(u.dtype)
        if context.before is not None:
            tail = context.before.last_inputs(u, past)
        if context.stateless and not context.packed and not is_writing_graph():
            return ResidualConv.apply(u, tail, weight), None
        history = with_tail(u, tail, past)  # (b, k-1+l, d)
        new_tail = keep_last(history, past, context.lengths)
        if length == 1 and not context.packed:
            return u + (history * weight.T).sum(1, keepdim=True), new_tail
        if context.packed:
            age = torch.arange(length, device=u.device) - context.starts  # (b, l)
            known = [(age >= past - k)[..., None] for k in range(past + 1)]  # (b, l, 1) each
            taps = (history[:, k : k + length] * weight[:, k] for k in range(past + 1))
            return u + sum(tap * same for tap, same in zip(taps, known, strict=True)), new_tail
        if is_writing_graph():
            return u + depthwise(history, weight), new_tail
        return ResidualConv.apply(u, tail, weight), new_tail


class MambaSSM(nn.Module):
    """Selective state-space branch: Mamba-2 (arXiv 2405.21060, section 7) with a rotating state.

    Every token rotates pairs of state channels (i, i + n/2) by angles that are a function of its
    content, so that a state can count (Mamba-3, arXiv 2603.15569). As with RoPE, rotating B and C
    by the sum of all angles so far is the same as rotating the state. An angle is exactly 0 or
    exactly pi over wide ranges of its input, so no error builds up over a long text. Only a quarter
    of the pairs rotates: on text, almost every token turns the pairs that can turn, and what was
    written to them is lost.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.d_inner = config.expand_factor * config.d_model
        self.n_heads = self.d_inner // config.ssm_head_dim
        pairs = config.d_state // 2
        self.n_rotating = max(1, math.ceil(config.rotating * pairs - 1e-9))  # r
        self.sizes = [self.d_inner] * 2 + [config.d_state] * 2 + [self.n_heads]
        self.in_proj = projection(config.d_model, self.sizes, config)  # z, x, B, C, dt
        self.angle_proj = Float32Linear(config.d_model, self.n_rotating, config.bias)
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.out_proj = projection(self.d_inner, [config.d_model], config)
        self.conv: Any = ShortConv(2 * config.d_state, config.d_conv) if config.bc_conv else None
        self.offset: nn.Module | None = None  # slot: C before rotation (b, l, n) -> (b, l, h, p)

    def forward(
        self, u: Tensor, context: SequenceContext, past: LayerState | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """u (b, l, d) -> the output (b, l, d), new SSM state, phase, and tail of B and C."""
        c, tail = self.config, None
        z, x, B, C, dt = self.in_proj(u).split(self.sizes, dim=-1)
        if self.conv is not None:
            tail = None if past is None else past.conv[..., c.d_model :][..., : 2 * c.d_state]
            BC, tail = self.conv(upcast(torch.cat((B, C), dim=-1)), context, tail)
            B, C = BC.chunk(2, dim=-1)  # (b, l, n)
        x = x.unflatten(-1, (self.n_heads, c.ssm_head_dim))  # (b, l, h, p)
        dt = self.step_sizes(dt)  # (b, l, h)
        # The rotation by each token, in half turns from -1 to 1; float32, as rounding would add up.
        half_turns = F.hardtanh(F.softshrink(self.noisy(self.angle_proj(u)), 0.5))  # (b, l, r)
        index = torch.arange(u.shape[1], device=u.device)
        if (real := context.real(index)) is not None:
            dt, half_turns = dt * real[..., None], half_turns * real[..., None]
        state, phase = (None, None) if past is None else (past.ssm, past.phase)
        run: Callable = selective_scan
        if (before := context.before) is not None:
            phase, run = before.phase(half_turns), functools.partial(before.scan, selective_scan)
        phase = running_phase(half_turns, phase)
        plain_C = C
        B, C = rotate_channels(B, phase), rotate_channels(C, phase)  # (b, l, n)
        A = -upcast(self.A_log).exp()
        resets, scan = context.resets(index), (c.scan, c.chunk_size)
        y, state = run(x, dt, A, B, C, self.D, state, resets, *scan)
        y = y if self.offset is None else y + self.offset(plain_C.to(u.dtype))
        return self.out_proj(y.flatten(2) * F.silu(z)), state, phase[:, -1], tail

    def step_sizes(self, raw: Tensor) -> Tensor:
        """The dt of a projection (b, l, h): softplus less min_decay / -A, but not below 0.

        Softplus alone is never 0, and small leaks add up. The gradient passes where dt is 0 as well
        (straight-through: Bengio et al., arXiv 1308.3432), so that a head can begin to write.
        """
        raw, least = upcast(raw) + upcast(self.dt_bias), self.config.min_decay
        if not least:
            return F.threshold(F.softplus(raw), MIN_DT, 0.0)
        dt = F.softplus(self.noisy(raw)) - least * (-upcast(self.A_log)).exp().detach()
        return dt + (dt.clamp(min=0) - dt).detach()

    def noisy(self, x: Tensor) -> Tensor:
        """x, with noise in training: only what is far from the borders of 0 and 1 stays exact."""
        noise = self.config.state_noise if self.training else 0.0
        return x + noise * torch.randn_like(x) if noise else x


def rotate_channels(x: Tensor, phase: Tensor) -> Tensor:
    """Rotate pairs (i, i + n/2) of x (b, l, n) by phase (b, l, r) half turns, for i < r."""
    cos, sin = (math.pi * phase).cos(), (math.pi * phase).sin()
    rest = x.shape[-1] // 2 - phase.shape[-1]
    return apply_rotary_pos_emb(x, F.pad(cos, (0, rest), value=1.0), F.pad(sin, (0, rest)))


class Memory(nn.Module):
    """A state for each head of attention: what the window does not see any more.

    The value of every token is written under its key, and takes the place of what that key held
    before: the gated delta rule (Yang et al., arXiv 2412.06464, eq. 10). Keys, queries and values
    are those of attention before RoPE, so what a head learns from near tokens serves far ones. A
    key of the memory is `memory_products` times as wide, so that it is distinct from more others.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config, heads, width = config, config.num_heads, config.d_model // config.num_heads
        self.products = config.memory_products
        self.state_shape = (heads, width, width * max(1, self.products))  # (a, f, m)
        self.token_proj = Float32Linear(config.d_model, 3 * heads)  # how to write, keep and read
        self.A_log = nn.Parameter(torch.empty(heads))

    def forward(
        self, u: Tensor, qkv: list[Tensor], context: SequenceContext, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """u (b, l, d), qkv (b, a, l, f) each, state (b, a, f, m) -> values read, new state."""
        q, k, v = qkv
        rows, heads, length, _ = v.shape
        write, fade, read = self.token_proj(u).chunk(3, dim=-1)  # (b, l, a) each
        beta, log_decay = write.sigmoid(), -F.softplus(fade) * upcast(self.A_log).exp()
        index = torch.arange(length, device=u.device)
        if (real := context.real(index)) is not None:
            beta, log_decay = beta * real[..., None], log_decay * real[..., None]
        log_decay = bounded_decay(log_decay, context.resets(index))
        state = beta.new_zeros(rows, *self.state_shape) if state is None else state
        q, k = (key_features(t, self.products, v.dtype) for t in (q, k))  # (b, a, l, m)
        stepwise = self.config.scan == "sequential" or (isinstance(length, int) and length == 1)
        size = 2 * self.config.chunk_size  # a state is larger than the SSM's: fewer chunks
        parts = (v, beta.mT, log_decay.mT, k, q, upcast(state))
        v, beta, log_decay, k, q, state = (t.flatten(0, 1) for t in parts)  # (b*a, ...)
        run = run_delta_rule if context.before is None else context.before.delta_rule
        y, state = run(v, beta, log_decay, k, q, state, size, stepwise)
        y, state = (t.unflatten(0, (rows, heads)) for t in (y, state))
        return (y * read.mT.sigmoid()[..., None]).to(v.dtype), state


class LocalAttention(nn.Module):
    """Causal attention to the last w tokens, in blocks: O(l w) time and memory.

    Keys are cached after RoPE at their position in the text. Queries and keys are normalized
    (Henry et al., arXiv 2010.04245). Before that, all three have a convolution (Canon-B: Allen-Zhu,
    arXiv 2512.17351). That of keys begins as a shift: a query then finds the tokens that came after
    earlier tokens like its own (an induction head: Olsson et al., arXiv 2209.11895; shifted keys:
    Xu et al., arXiv 2411.19574).
    """

    def __init__(self, config: Config):
        super().__init__()
        self.window, self.n_heads = config.window_size, config.num_heads
        self.use_flash_attn = config.use_flash_attn
        self.head_dim = config.d_model // config.num_heads
        self.qkv = projection(config.d_model, [config.d_model] * 3, config)
        channels = config.d_model * (3 if config.qv_conv else 1)
        self.conv: Any = ShortConv(channels, config.d_conv) if config.k_conv else None
        self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)
        self.out_proj = projection(config.d_model, [config.d_model], config)
        self.memory: Memory | None = None  # slot, see `memory_every`
        self.prefix: nn.Module | None = None  # slot: queries before RoPE -> (b, a, l, f)

    def forward(
        self, u: Tensor, context: SequenceContext, past: LayerState | None
    ) -> tuple[Tensor, Tensor, Tensor, Any, Any]:
        """u (b, l, d) -> output (b, l, d), last keys and values (b, a, w-1, f), tail, memory."""
        (q, k, v), tail = self.project(u, context, past)  # (b, l, d) each
        q, k, v = (t.unflatten(-1, (self.n_heads, self.head_dim)) for t in (q, k, v))
        q, k, v = (t.transpose(1, 2) for t in (self.q_norm(q), self.k_norm(k), v))  # (b, a, l, f)
        plain = [q, k, v]
        q, k = (apply_rotary_pos_emb(t, context.cos, context.sin) for t in (q, k))
        cached = (None, None) if past is None else (past.keys, past.values)
        if context.before is not None:
            cached = context.before.last_keys(k, v, self.window - 1)
        keys = self.with_cached(cached[0], k)  # (b, a, w+l, f)
        values = self.with_cached(cached[1], v)
        attend = self.attend_plain if self.is_plain(q.shape[2], q.device) else self.attend_fused
        if context.attend is None:
            y = attend(q, keys, values, context.mask)
        else:
            y = context.attend(attend, q, keys, values, context)
        y = y if self.prefix is None else y + self.prefix(plain[0])
        state = None if past is None else past.memory
        if self.memory is not None:
            found, state = self.memory(u, plain, context, state)
            y = y + found
        kept = (
            keep_last(t[:, :, 1:].transpose(1, 2), self.window - 1, context.lengths)
            for t in (keys, values)
        )
        keys, values = (t.transpose(1, 2) for t in kept)
        return self.out_proj(y.transpose(1, 2).flatten(2)), keys, values, tail, state

    def project(
        self, u: Tensor, context: SequenceContext, past: LayerState | None
    ) -> tuple[Any, Tensor | None]:
        """u (b, l, d) -> queries, keys and values (b, l, d), and the tail of the convolution."""
        qkv, conv = self.qkv(u), self.conv
        if conv is None:
            return qkv.chunk(3, dim=-1), None
        tail = None if past is None else past.conv[..., -conv.channels :]
        if conv.channels == qkv.shape[-1]:
            qkv, tail = conv(qkv, context, tail)
            return qkv.chunk(3, dim=-1), tail
        q, k, v = qkv.chunk(3, dim=-1)
        k, tail = conv(k, context, tail)
        return (q, k, v), tail

    def with_cached(self, cached: Tensor | None, new: Tensor) -> Tensor:
        """The w cached keys or values (the first is padding), then the new ones."""
        if cached is None:
            return F.pad(new, (0, 0, self.window, 0))
        return torch.cat((torch.zeros_like(new[:, :, :1]), cached.to(new.dtype), new), dim=2)

    def is_plain(self, length: int, device: torch.device) -> bool:
        """Whether to use plain products: faster on a CPU, but not if a window holds the tokens."""
        plain = not self.use_flash_attn or (is_writing_graph() and not isinstance(length, int))
        return plain or (device.type == "cpu" and length > self.window)

    def mask(
        self, length: int, starts: Any, device: Any, new: bool = False, packed: bool = True
    ) -> Any:
        """The attention mask of one call, the same in every layer; bool.

        Plain: True at hidden keys, (b or 1, 1, blocks, w, w), only for the blocks that hide any.
        Fused: True at visible keys, (b or 1, blocks, 1, block, w+block); None if all that is
        before a token is visible: in a `new` text of one document that fits in the window.
        """
        window, plain = self.window, self.is_plain(length, device)
        if new and starts is None and not plain and length <= window:
            return None
        block = window if plain else min(length, window)
        blocks = count_blocks(length, window) if plain else -(-length // block)
        first = block * torch.arange(blocks, device=device)[:, None, None]
        token = first + torch.arange(block, device=device)[:, None]  # (blocks, block, 1)
        begin = torch.zeros_like(token)[None]
        if starts is not None:
            begin = F.pad(starts, (0, blocks * block - length)).view(-1, blocks, block, 1)
        if plain:
            key = first + torch.arange(window, device=device)
            hidden = (torch.where(key <= token, key, key - window) < begin)[:, None]
            return hidden if packed and starts is not None else hidden[:, :, :1]
        key = first - window + torch.arange(window + block, device=device)
        visible = (key <= token) & (key > token - window) & (key >= begin)
        return visible[:, :, None]

    def attend_fused(self, q: Tensor, keys: Tensor, values: Tensor, mask: Any) -> Tensor:
        """q (b, a, l, f), keys and values (b, a, w+l, f) -> (b, a, l, f), by PyTorch's kernels.

        Blocks of queries become rows of the batch: the kernels take four dimensions, and with more
        PyTorch computes in float32 and stores all scores.
        """
        (batch, _, length), window = q.shape[:3], self.window
        if mask is None:
            keys, values = keys[:, :, window:], values[:, :, window:]
            return F.scaled_dot_product_attention(q, keys, values, is_causal=True)
        blocks, block = mask.shape[1], mask.shape[3]
        pad = (0, 0, 0, blocks * block - length)
        q = F.pad(q, pad).unflatten(2, (blocks, block)).transpose(1, 2)  # (b, blocks, a, block, f)
        if blocks == 1:
            keys, values = keys[:, None], values[:, None]
        else:
            pairs = (F.pad(t, pad).unflatten(2, (blocks + 1, window)) for t in (keys, values))
            pairs = (t.transpose(1, 2) for t in pairs)  # (b, blocks+1, a, w, f)
            keys, values = (torch.cat((t[:, :-1], t[:, 1:]), dim=3) for t in pairs)
        mask = mask.expand(batch, -1, -1, -1, -1)
        q, keys, values, mask = (t.flatten(0, 1) for t in (q, keys, values, mask))
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return y.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]

    def attend_plain(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """The same as `attend_fused`, in matrix products of w x w; see tinymamba/attention.py."""
        (batch, heads, length), window = q.shape[:3], self.window
        q, keys, values = (
            to_blocks(t, count_blocks(length, window) + extra, window)  # (blocks, b*a, w, f)
            for t, extra in ((q * self.head_dim**-0.5, 0), (keys, 1), (values, 1))
        )
        y = attend_to_window(q, keys, values, mask[:, 0].transpose(0, 1))  # (blocks, b*a, w, f)
        return y.transpose(0, 1).flatten(1, 2).unflatten(0, (batch, heads))[:, :, :length]


class SwiGLU(nn.Module):
    """Gated MLP: down(act(gate) * up) (Shazeer, arXiv 2002.05202, eq. 6)."""

    def __init__(self, config: Config):
        super().__init__()
        hidden = config.expand_factor * config.d_model
        self.activation = getattr(F, config.activation)
        self.in_proj = projection(config.d_model, [hidden] * 2, config)
        self.out_proj = projection(hidden, [config.d_model], config)

    def forward(self, u: Tensor) -> Tensor:
        """u (b, l, d) -> the same shape."""
        both = self.in_proj(u)  # (b, l, 2e)
        if self.activation is F.silu:
            return self.out_proj(silu_product(both))
        gate, up = both.chunk(2, dim=-1)  # (b, l, e) each
        return self.out_proj(self.activation(gate) * up)


class TokenAdaptiveGating(nn.Module):
    """Three branch weights for every token: non-negative, of sum one, float32."""

    BRANCHES = ("ssm", "attention", "mlp")

    def __init__(self, config: Config):
        super().__init__()
        self.form, self.top_k = config.gate, config.gate_top_k
        self.controller = nn.Linear(config.d_model, len(self.BRANCHES))

    def forward(self, u: Tensor) -> Tensor:
        """u (b, l, d) -> (b, l, 3)."""
        logits = upcast(self.controller(u))
        if self.form == "sparsemax":
            return sparsemax(logits)
        if self.form == "top_k":
            kept = logits.topk(self.top_k, dim=-1)
            logits = torch.full_like(logits, -math.inf).scatter(-1, kept.indices, kept.values)
        return logits.softmax(-1)


# ------------------------------------------------------------------------------- block and model


class TinyMambaBlock(nn.Module):
    """x + residual_scale * (g0 SSM(u) + g1 Attention(u) + g2 MLP(u)), u = ShortConv(RMSNorm(x))."""

    def __init__(self, config: Config):
        super().__init__()
        self.norm = RMSNorm(config.d_model)
        self.conv = ShortConv(config.d_model, config.d_conv)
        self.gate = TokenAdaptiveGating(config)
        self.ssm = MambaSSM(config)
        self.attention = LocalAttention(config)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)
        self.residual_scale = nn.Parameter(torch.ones(config.d_model))

    def forward(
        self, x: Tensor, context: SequenceContext, past: LayerState | None
    ) -> tuple[Tensor, LayerState | None, Tensor]:
        """x (b, l, d) -> new x, new LayerState (None if stateless), gate weights (b, l, 3)."""
        tail = None if past is None else past.conv[..., : x.shape[-1]]
        u, tail = self.conv(to_autocast(self.norm(x)), context, tail)
        gates = self.gate(u)
        ssm, ssm_state, phase, bc_tail = self.ssm(u, context, past)
        attention, keys, values, k_tail, memory = self.attention(u, context, past)
        mix = weighted_sum(gates.to(u.dtype), [ssm, attention, self.run_mlp(u, gates[..., 2])])
        x = add_scaled(x, self.residual_scale, self.dropout(mix))
        if context.stateless:
            return x, None, gates
        tails = [t for t in (tail, bc_tail, k_tail) if t is not None]
        layer = LayerState(torch.cat(tails, dim=-1), ssm_state, phase, keys, values, memory)
        return x, layer, gates

    def run_mlp(self, u: Tensor, weight: Tensor) -> Tensor:
        """The MLP; on a CPU only for tokens to which a sparse gate gives it weight.

        A GPU would wait to learn how many these are, and a graph has a fixed number.
        """
        if self.gate.form == "softmax" or is_in_graph() or u.device.type != "cpu":
            return self.mlp(u)
        chosen = weight > 0  # (b, l)
        rows = self.mlp(u[chosen])
        return torch.zeros_like(u, dtype=rows.dtype).masked_scatter(chosen[..., None], rows)


class TinyMambaModel(nn.Module):
    """The language model: `forward` for training, `advance` for text that arrives in parts."""

    BLOCK = TinyMambaBlock
    LOSS_CHUNK = 512  # tokens whose logits are in memory at a time
    loss_and_gradients = staticmethod(loss_and_gradients)  # compile_blocks replaces it

    def __init__(self, config: Config, filled: bool = True):
        """With `filled` false the weights have no values yet: they are about to be loaded."""
        super().__init__()
        self.config = config.validate()
        problem = "is unknown, but document_mask needs the id that ends a document"
        remedy = "set it in the config"
        require(config.eos_id >= 0 or not config.document_mask, "eos_id", problem, remedy)
        with Unfilled():
            self.add_modules(config)
        if filled:
            init_weights(self)

    def add_modules(self, config: Config) -> None:
        """Embedding, blocks, last norm and output layer."""
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks: Any = nn.ModuleList(self.BLOCK(config) for _ in range(config.n_layer))
        first = min((config.memory_every - 1) // 2, config.n_layer - 1)
        for block in self.blocks[first :: config.memory_every] if config.memory else []:
            block.attention.memory = Memory(config)
        self.rotary = RotaryEmbedding(config.d_model // config.num_heads, config.rope_theta)
        self.norm = RMSNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.start: nn.Module | None = None  # slot: list of zero LayerState -> the initial ones
        self.quantization: Any = None  # a dict set by quantize.py, and kept in config.json
        self.tokenizer: dict | None = None  # a record, see tinymamba/tokenizer.py
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_gates: bool = False,
        ends: Tensor | None = None,
        teacher: Lesson | None = None,
        before: PiecesBefore | None = None,
        state: ModelState | None = None,
    ) -> Any:
        """ids (b, l) of int64 -> logits (b, l, v); with targets (b, l), their mean loss in nats.

        attention_mask (b, l) is 0 at padding, which has no effect on the other tokens.
        `return_gates` adds the branch weights, (n_layer, b, l, 3). ends (b, l) of bool are tokens
        after which all begins anew, as between packed conversations; they replace document_mask.
        With a `teacher` the loss is also that of its lesson. `before`: ids are a piece of texts
        that other processes read as well. After a `state` the text goes on, and the new state comes
        second.
        """
        documents: Any = {"ends": ends, "marked": ends is not None, "before": before}
        hidden, after, gates = self.run(ids, state, attention_mask, **documents)
        if teacher is not None:
            out = lesson_loss(self.head, to_autocast(hidden), targets, teacher, self.LOSS_CHUNK)
        else:
            out = self.head(hidden) if targets is None else self.cross_entropy(hidden, targets)
        out = (out, gates) if return_gates else out
        return out if state is None else (out, after)

    def compile_blocks(self, on: bool = True) -> None:
        """Compile what a training step runs: one graph serves all blocks, another the loss.

        Blocks, and not the model, so that compilation takes as long for 2 blocks as for 200, and
        DDP and FSDP can send a block's gradients while the next block computes its own. A new
        shape is compiled anew; inside `torch.compiler.set_stance("force_eager")` nothing is.
        `on=False` undoes it.
        """
        for module, name in ((self, "loss_and_gradients"), *((b, "forward") for b in self.blocks)):
            module.__dict__.pop(name, None)
        if not on:
            return
        torch._dynamo.config.optimize_ddp = False  # else DDP cuts the graph of a large block
        settings: Any = {"dynamic": False, "fullgraph": True}
        self.__dict__["loss_and_gradients"] = torch.compile(loss_and_gradients, **settings)
        forward = torch.compile(type(self.blocks[0]).forward, **settings)
        for block in self.blocks:  # forward, and not the block: its hooks stay outside of the graph
            block.__dict__["forward"] = MethodType(forward, block)  # which deepcopy binds anew

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats over targets (b, l), without those of -100."""
        return self(ids, targets)

    def advance(
        self,
        ids: Tensor,
        state: ModelState,
        attention_mask: Tensor | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, ModelState]:
        """Read any number of further tokens: ids (b, l) -> logits (b, l, v) and the new state.

        `state` itself does not change. `last_only` returns logits (b, 1, v) of the last column.
        """
        if ids.shape[0] != state.position.shape[0]:
            raise ValueError(f"ids has {ids.shape[0]} rows, the state {state.position.shape[0]}")
        if ids.shape[1] == 0:
            return self.head(self.embedding(ids)), state.clone()
        hidden, new_state, _ = self.run(ids, state, attention_mask)
        return self.head(hidden[:, -1:] if last_only else hidden), new_state

    def run(
        self,
        ids: Tensor,
        state: ModelState | None = None,
        attention_mask: Tensor | None = None,
        embedded: Tensor | None = None,
        ends: Tensor | None = None,
        attend: Callable | None = None,
        marked: bool = False,
        before: PiecesBefore | None = None,
    ) -> tuple[Tensor, Any, Tensor]:
        """Embedding to last norm: hidden (b, l, d), new state (None if none was given), gates.

        embedded (b, l, d) replaces the embeddings of ids (b, l). ends (b, l) of bool are tokens
        after which a document begins, besides the eos tokens of document_mask, or with `marked`
        instead of these. See SequenceContext for `attend` and `before`.
        """
        others = (attention_mask, embedded, ends, attend)
        if state is not None and not why_general(self, ids, state, others):
            return step(self, ids, state)
        back, lengths = None, None
        if ids.shape[1] == 0 or (attention_mask is not None and attention_mask.shape != ids.shape):
            shape = tuple(ids.shape)
            raise ValueError(f"ids {shape} need a token, and attention_mask the same shape")
        x = self.embedding(ids) if embedded is None else embedded
        found, given = None if marked else self.find_ends(ids), ends is not None
        if found is not None:
            ends = found if ends is None else found | ends
        if attention_mask is not None:  # move padding to the end, where causality hides it
            order, back, lengths = padding_last(attention_mask)
            x = take_tokens(x, order)
            ends = None if ends is None else ends.gather(1, order)
        past = state
        if self.start is not None and state is None:
            past = self.init_state(ids.shape[0], ids.device)
        if before is not None and (past is not None or lengths is not None):
            raise ValueError("a piece of a text has neither a state nor a mask of padding")
        starts, document = find_documents(ids, ends, past, lengths, before)
        context = self.make_context(ids, past, starts, lengths, ends is not None, before)
        context = context._replace(attend=attend, stateless=state is None)
        x, layers, gates = self.dropout(x), [], []
        for i, block in enumerate(self.blocks):
            call: Callable = block
            if self.config.checkpoint_activations and self.training:
                call = functools.partial(recompute_in_backward, block, use_reentrant=False)
            x, layer, weights = call(x, context, None if past is None else past.layers[i])
            layers.append(layer)
            gates.append(weights)
        x = self.norm(x)
        if back is not None:
            x, *gates = (take_tokens(t, back) for t in (x, *gates))
        if state is not None:
            state = state.after(layers, document, ids.shape[1] if lengths is None else lengths)
            state = state.forget_inputs() if given else state  # document_mask: ShortConv does it
        return x, state, torch.stack(gates)

    def find_ends(self, ids: Tensor) -> Tensor | None:
        """Which of ids (b, l) end a document; None without document_mask."""
        return ids == self.config.eos_id if self.config.document_mask else None

    def make_context(
        self,
        ids: Tensor,
        state: ModelState | None,
        starts: Tensor | None,
        lengths: Tensor | None,
        packed: bool = False,
        before: PiecesBefore | None = None,
    ) -> SequenceContext:
        """What all blocks share while they read ids (b, l)."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        if before is not None:
            positions = positions + before.offset(ids.shape[1])
        if state is not None:
            positions = positions + state.position[:, None, None]  # (b, 1, l)
        new, attention = state is None, self.blocks[0].attention
        mask = attention.mask(ids.shape[1], starts, ids.device, new, packed)
        cos, sin = self.rotary(positions)
        return SequenceContext(cos, sin, mask, starts, lengths, packed, before=before)

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean loss; the logits of LOSS_CHUNK tokens are in memory at a time (4x that on a GPU)."""
        hidden, targets = to_autocast(hidden).flatten(0, 1), targets.flatten()
        chunk = self.LOSS_CHUNK * (1 if hidden.device.type == "cpu" else 4)
        count = (targets != -100).sum().clamp(min=1)
        if torch.is_grad_enabled() and type(self.head) is nn.Linear and self.head.bias is None:
            step = self.loss_and_gradients
            return ChunkedLoss.apply(hidden, self.head.weight, targets, step, chunk) / count

        def sum_losses(h: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(upcast(self.head(h)), t, reduction="sum")

        parts = in_chunks(sum_losses, chunk, hidden, targets)
        return sum(parts, torch.zeros((), device=hidden.device)) / count

    def init_state(self, batch: int, device: torch.device | None = None) -> ModelState:
        """The state before any token, for `batch` rows, by default on the embedding's device."""
        c, ssm, weight = self.config, self.blocks[0].ssm, self.embedding.weight
        device = device or weight.device

        def zeros(*shape: int, dtype: torch.dtype = weight.dtype) -> Tensor:
            return torch.zeros(batch, *shape, dtype=dtype, device=device)

        keys = (c.num_heads, c.window_size - 1, c.d_model // c.num_heads)
        state = (ssm.n_heads, c.ssm_head_dim, c.d_state)
        layers = []
        for block in self.blocks:
            h, phase = upcast(zeros(*state)), upcast(zeros(ssm.n_rotating))
            convs = (block.conv, block.ssm.conv, block.attention.conv)
            tail = zeros(c.d_conv - 1, sum(conv.channels for conv in convs if conv is not None))
            memory = block.attention.memory
            memory = memory if memory is None else upcast(zeros(*memory.state_shape))
            layers.append(LayerState(tail, h, phase, zeros(*keys), zeros(*keys), memory))
        layers = layers if self.start is None else self.start(layers)
        return ModelState(layers, zeros(dtype=torch.int64), zeros(dtype=torch.int64))

    def count_parameters(self) -> dict[str, int]:
        """Parameters of each component; a tied head counts as embedding."""
        parts = "embedding conv ssm attention mlp gate norm residual_scale head"
        counts = dict.fromkeys(parts.split(), 0)
        sizes = {name: p.numel() for name, p in self.named_parameters()} | count_codes(self)
        if self.config.tie_embeddings:
            sizes.pop("head.codes", None)
        for name, size in sizes.items():
            part = name.split(".")[2 if name.startswith("blocks.") else 0]
            counts[part] = counts.get(part, 0) + size
        return {**counts, "total": sum(counts.values())}

    def fingerprint(self) -> str:
        """SHA-256 of the architecture and of every weight."""
        settle_ties(self)
        shape = {name: getattr(self.config, name) for name in SHAPE_FIELDS}
        shape = {name: v for name, v in shape.items() if BEFORE.get(name) != v}
        if self.quantization:
            shape["quantization"] = self.quantization
        return digest({"config": shape, "weights": lazy_state(self)})


PLAIN_MODULES |= {  # what tinymamba/decode.py knows
    TinyMambaBlock, MambaSSM, LocalAttention, Memory, SwiGLU, TokenAdaptiveGating, ShortConv,
    RMSNorm, Float32Linear, nn.Linear, nn.Embedding, nn.Dropout, nn.ModuleList,
}  # fmt: skip


# ------------------------------------------------------------------------------------ state


def map_layers(f: Callable[..., Tensor], *layers: LayerState) -> LayerState:
    """Apply `f` to the tensors that layers have under the same name; None stays None."""
    fields = zip(*layers, strict=True)
    return LayerState(*(None if parts[0] is None else f(*parts) for parts in fields))


@dataclass
class ModelState:
    """All that the model remembers of a batch of texts, of a size that is constant."""

    layers: list[LayerState]
    position: Tensor  # (b,) int64: tokens read so far
    document_start: Tensor  # (b,) int64: position at which the next token's document begins

    def map(self, f: Callable[[Tensor], Tensor]) -> ModelState:
        """Apply `f` to every tensor."""
        layers = [map_layers(f, layer) for layer in self.layers]
        return ModelState(layers, f(self.position), f(self.document_start))

    def clone(self) -> ModelState:
        """A copy that shares no memory."""
        return self.map(torch.clone)

    def select(self, rows: Any) -> ModelState:
        """The states of some rows, in the given order: a list, a slice or a tensor of indices."""
        return self.map(lambda t: t[rows].clone())

    def to(self, device: str | torch.device) -> ModelState:
        """The state on another device."""
        return self.map(lambda t: t.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        named = {
            f"layers.{i}.{name}": t
            for i, layer in enumerate(self.layers)
            for name, t in layer._asdict().items()
            if t is not None
        }
        return {**named, "position": self.position, "document_start": self.document_start}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors().values())

    def after(self, layers: list[LayerState], document: Tensor, count: Any) -> ModelState:
        """The state `count` tokens later; the next document begins at index `document` (b,)."""
        position, start = self.position + count, self.position + document
        ended = (start == position) & (position > 0)  # (b,) the last token was eos
        layers = erase_states(layers, ended)
        layers = [
            map_layers(lambda n, o: n.to(o.dtype), new, old)
            for new, old in zip(layers, self.layers, strict=True)
        ]
        return ModelState(layers, position, start)

    def begin_document(self, rows: Tensor) -> ModelState:
        """Erase the past in the rows (b,) of bool: a document begins there."""
        layers = erase_states(self.layers, rows)
        start = torch.where(rows, self.position, self.document_start)
        return ModelState(layers, self.position, start).forget_inputs()

    def forget_inputs(self) -> ModelState:
        """Erase inputs of the convolutions from before each row's document."""
        age = torch.arange(self.layers[0].conv.shape[1], 0, -1, device=self.position.device)
        foreign = age > (self.position - self.document_start)[:, None]  # (b, k-1)
        layers = [
            layer._replace(conv=layer.conv.masked_fill(foreign[..., None], 0.0))
            for layer in self.layers
        ]
        return ModelState(layers, self.position, self.document_start)

    @staticmethod
    def join(states: list[ModelState]) -> ModelState:
        """The rows of several states as one state."""
        layers = [
            map_layers(lambda *rows: torch.cat(rows), *parts)
            for parts in zip(*(state.layers for state in states), strict=True)
        ]
        position = torch.cat([state.position for state in states])
        return ModelState(layers, position, torch.cat([s.document_start for s in states]))

    def save(self, path: str | Path, model: TinyMambaModel) -> None:
        """Write a safetensors file with the fingerprint of the model."""
        write_tensors(path, self.tensors(), {"model": model.fingerprint()})

    @staticmethod
    def load(path: str | Path, model: TinyMambaModel) -> ModelState:
        """Read a state of this very model; anything else is a UserError."""
        like = model.init_state(1).tensors()
        tensors, _ = read_tensors(path, like, {"model": model.fingerprint()})
        return model.init_state(len(tensors["position"])).fill(tensors)

    def fill(self, tensors: dict[str, Tensor]) -> ModelState:
        """Copy the values of all tensors, by name."""
        for name, t in self.tensors().items():
            t.copy_(tensors[name])
        return self


# -------------------------------------------------------------------------------- checkpoints

FOLDER_FORMAT = 3  # 2 is read as well: it had no fields of BEFORE; 3 may lack the newer ones


def require_same(names: list[str], old: dict, new: dict) -> None:
    """Reject settings that do not fit a checkpoint's tensors or its position in the data."""
    changed = [name for name in names if old[name] != new[name]]
    asked, had = (", ".join(str(values[name]) for name in changed) for values in (new, old))
    problem = f"{asked} asked for, but the checkpoint has {had}"
    require(not changed, ", ".join(changed), problem, "leave the flags out, or start a new run")


def require_same_run(old: dict, new: dict) -> None:
    """Reject settings that a resumed run cannot change."""
    before = {**Config().to_dict(), **BEFORE}
    require_same(RUN_FIELDS, before | old, before | new)
    field = "train_data_weights"
    problem, remedy = f"were {old[field]}", "leave them out, or pass --accept_changed_data"
    require(new["accept_changed_data"] or old[field] == new[field], field, problem, remedy)


def resumed_config(saved: dict, named: dict) -> Config:
    """The settings of a checkpoint, overridden by those that the user has named."""
    for_one_start = {"accept_changed_data": False, "resume_from": ""}
    settings = {**saved["config"], **for_one_start, **named, "resume": True, "init_from": ""}
    require_same_run(saved["config"], settings)
    return Config.from_dict(settings)


def begun_config(config: Config, named: dict) -> Config:
    """The settings of a run that begins with the weights of init_from, which give its shape.

    The vocabulary grows with that of the data.
    """
    base = load_model(config.init_from, mapped=True).config
    shape = {name: getattr(base, name) for name in SHAPE_FIELDS}
    shape["vocab_size"] = max(base.vocab_size, data_vocabulary(config.train_data_path))
    return replace(config, **{n: value for n, value in shape.items() if n not in named})


def load_model(
    path: str | Path, device: str | torch.device = "cpu", mapped: bool = False
) -> TinyMambaModel:
    """The model of a checkpoint, or of a folder that `save_folder` wrote, in eval mode.

    The weights of a `mapped` one stay in the file, in its dtypes: to copy from, and no more. Those
    in a folder of shards are on the meta device, but for embedding and head.
    """
    if Path(path).is_dir() and not is_sharded(path):
        return load_folder(Path(path), mapped).to(device).eval()
    state = load_checkpoint(path, mapped, skip=("optimizer", "carried_state"))
    problem = "holds an adapter only, not a model"
    remedy = "pass the base's checkpoint, and the adapter's folder as --adapter"
    require("adapter" not in state, str(path), problem, remedy)
    model = TinyMambaModel(Config.from_dict(state["config"]), filled=False)
    remedy = "use the version that wrote it"
    fill_model(model, state["model"], str(path), "config", remedy, assign=mapped)
    model.tokenizer = state.get("tokenizer")
    return (model if mapped else model.to(device)).eval()


def save_folder(folder: Path, model: TinyMambaModel) -> None:
    """Write model.safetensors, with a checksum, config.json and the tokenizer's files."""
    write_tensors(folder / "model.safetensors", stored_tensors(model), {"format": "pt"})
    write_json(folder / "config.json", describe_model(model))
    write_tokenizer(model.tokenizer, folder)


def describe_model(model: TinyMambaModel) -> dict:
    """The content of config.json."""
    settle_ties(model)
    config = {name: getattr(model.config, name) for name in FOLDER_FIELDS}
    config |= {"quantization": model.quantization} if model.quantization else {}
    config |= note_tokenizer(model.tokenizer)
    return {"model_type": "tinymamba", "format_version": FOLDER_FORMAT, **config}


def load_folder(folder: Path, mapped: bool = False) -> TinyMambaModel:
    """The model of such a folder; a missing, damaged or foreign file is a UserError.

    Folders that `transformers` wrote have "model." before every name, and no checksum.
    """
    path, remedy = folder / "config.json", "export the model again"
    try:
        config = {**BEFORE, **json.loads(path.read_bytes())}
        formats = (2, FOLDER_FORMAT)
        known = config["model_type"] == "tinymamba" and config["format_version"] in formats
        require(known, str(path), f"is not a TinyMamba model of format {FOLDER_FORMAT}", remedy)
        tied, both = config["tie_embeddings"], "tie_embeddings and tie_word_embeddings"
        same = config.get("tie_word_embeddings", tied) == tied  # the name in `transformers`
        require(same, str(path), f"{both} differ", "make them equal")
        model = TinyMambaModel(
            Config.from_dict({n: config[n] for n in FOLDER_FIELDS}), filled=False
        )
        if config.get("quantization") is not None:
            quantize_like(model, config["quantization"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as e:
        raise UserError(str(path), f"cannot be read ({e})", remedy) from None
    path, unsigned = folder / "model.safetensors", ("model.", "score.")
    files = [read_all_tensors(file, remedy, unsigned)[0] for file in weight_files(path)]
    tensors = {name.removeprefix("model."): t for file in files for name, t in file.items()}
    fill_model(model, tensors, str(path), "config.json", remedy, assign=mapped)
    del tensors
    return_memory()
    model.tokenizer = read_folder_tokenizer(folder, config)
    return model


# ------------------------------------------------------------------------------------ sampling


@torch.no_grad()
def generate(
    model: TinyMambaModel,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    eos_id: int | list[int] | None = None,
    until: Callable[[], object] = lambda: False,
) -> Tensor:
    """Continue ids (b, l), l >= 1, by up to max_new_tokens: (b, l + new). Temperature 0 is greedy.

    It ends early when every row has reached eos_id, or one of several, or when `until()` is true;
    finished rows are filled with the first. Put the model in eval mode first, or dropout stays on.
    """
    state = model.init_state(ids.shape[0])
    last = torch.tensor([] if eos_id is None else eos_id, device=ids.device).flatten()
    unread, ended = ids, torch.zeros_like(ids[:, :1], dtype=torch.bool)
    for _ in range(max_new_tokens):
        logits, state = model.advance(unread, state, last_only=True)
        unread = logits[:, -1].argmax(-1, keepdim=True)  # (b, 1)
        if temperature > 0:
            weights = (upcast(logits[:, -1]).cpu() / temperature).softmax(-1)
            unread = torch.multinomial(weights, 1, generator=generator).to(ids.device)
        if len(last):
            unread = unread.masked_fill(ended, last[0])
            ended = ended | torch.isin(unread, last)
        ids = torch.cat((ids, unread), dim=1)
        if ended.all() or until():
            break
    return ids


# ------------------------------------------------------------------------------------ training


class Trainer:
    """One training run, from the first batch to the last checkpoint."""

    open_source: Any = staticmethod(open_training_data)

    def __init__(self, config: Config, tokenizer: Any = None, saved: dict | None = None):
        """`tokenizer`: any object with encode and decode. `saved`: a checkpoint to resume."""
        self.config = config = replace(config).validate()
        self.rank, self.world = from_launcher("RANK", 0), from_launcher("WORLD_SIZE", 1)
        self.main = self.rank == 0
        self.signals = Signals()
        self.stopped_by = 0  # the signal that all processes agreed to stop for
        self.ready: list = []  # micro-batches of the next step
        self.unread: UserError | None = None  # why this process could not read them
        self.failed_reads = 0.0  # how many processes could not read theirs
        self.sent = [0.0] * (len(Signals.STOPPING) + 1)  # to how many processes each was sent
        self.writer = BackgroundWriter(config.async_save)
        self.device = pick_device(config.device, from_launcher("LOCAL_RANK", 0))
        reuse_memory()
        self.amp = pick_amp_dtype(config.amp_dtype, self.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.watchdog = None
        self.processes = arrange_processes(config, self.world)
        self.fsdp = bool(self.processes)
        if self.world > 1:
            self.watchdog = join_process_group(self.device, config.rank_timeout)
        try:
            self.before = join_pieces(config.context_parallel, self.world)
            self.readers = self.world // config.context_parallel  # each reads its own samples
            self.open_data(tokenizer)
            self.set_up(saved)
        except Exception as e:
            if self.watchdog:
                self.watchdog.close(e)  # so that the others know why
            raise

    def set_up(self, saved: dict | None) -> None:
        """Make model, optimizer and logs: new ones, or those of a checkpoint."""
        c = self.config
        torch.manual_seed(c.seed)
        self.resumed, self.branches = saved is not None, False
        self.model: Any = self.build().to(self.device)
        if self.fsdp:
            self.writer = ShardedWriter(c.async_save)
        self.optimizer = make_optimizer(self.model, c)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == torch.float16)
        self.step = self.samples = self.tokens = 0
        self.first_epoch = self.first_sample = 0  # where the present data began
        self.progress: dict[str, Any] = {
            "history": {"train": [], "val": []},  # [step, loss in nats]
            "best": [],  # [validation loss, file name] of the save_top_k best, best first
            "lowest": math.inf, "bad_validations": 0, "bad_steps": 0, "skipped": 0,
            "norm": [0.0, 0.0, 0],  # mean and variance of the gradient norm, and their steps
            "unfinished": False,  # a signal ended the run before this step's validation was done
            "folder": c.wandb_run_name or time.strftime("%Y%m%d-%H%M%S"),
        }  # fmt: skip
        self.carried = CarriedStates(self.model, self.train_data, c) if c.carry_state else None
        if saved is not None:
            self.restore(read_saved(saved, c, self.weights(), self.optimizer))
        self.reported = self.step, self.tokens  # at the last line about steps
        self.count_steps()
        self.signals.saved_step = self.step
        require_run_name(c.checkpoint_path)
        if self.main:
            require_writable(Path(c.checkpoint_path).parent, "checkpoint_path")
        self.open_log()
        if c.document_mask and self.train_data.has_inside(c.eos_id):
            c.document_mask = False  # of the model, too: in training `ends` take its place
            self.log.say("document_mask is off in the model: conversations go on after eos_id")
        self.forward = self.wrap(c.use_compile)

    def count_steps(self) -> None:
        """Set the number of all steps and of those of warm-up."""
        c = self.config
        problem, remedy = "the processes do not see the same file", "put it where all of them do"
        require(is_same(self.step, self.device), "checkpoint_path", problem, remedy)
        left = c.num_epochs * len(self.train_data) - (self.samples - self.first_sample)
        self.total_steps = c.max_steps or self.step + max(0, left // self.samples_per_step)
        problem = f"one step takes {self.samples_per_step} samples, the data has {left}"
        require(self.total_steps, "batch_size", problem, "lower it, or set --max_steps")
        problem = f"{self.total_steps} is below step {self.step}, which the run has reached"
        require(self.step <= self.total_steps, "max_steps", problem, "raise it, or leave it out")
        self.warmup = self.progress.setdefault("warmup", warmup_length(self.total_steps, c))

    def open_log(self) -> None:
        """Open the logs: in a new folder and as a new run of W&B, unless this run is resumed."""
        c, p = self.config, self.progress
        if self.main:
            own = self.resumed and not self.branches
            p["folder"] = open_log_folder(Path(c.log_dir), p["folder"], own)
        self.folder = Path(c.log_dir) / p["folder"]
        names = {"project": c.wandb_project, "name": c.wandb_run_name or None}
        again = {"id": p["wandb_id"], "resume": "allow"} if "wandb_id" in p else {}
        wandb = {**names, **again, "config": c.to_dict()} if c.use_wandb else None
        self.log = Logger(self.folder, self.main, self.step, wandb)
        if self.log.wandb:
            p["wandb_id"] = self.log.wandb.id

    def build(self) -> TinyMambaModel:
        """The model to train: new, or with the weights of init_from.

        That of a resumed run has no values yet: `restore` fills it.
        """
        make = functools.partial(TinyMambaModel, self.config, filled=False)
        model = make_sharded(make, self.device, self.processes) if self.fsdp else make()
        if self.config.init_from:
            with unchanged(self.config.init_from):
                fill_parameters(model, self.inherit_weights(), self.config.init_from)
        elif not self.resumed:
            init_weights(model)
        model.tokenizer = self.run_tokenizer.record
        return model

    def inherit_weights(self) -> dict[str, Tensor]:
        """The weights of init_from by name, in the file itself where they need not grow.

        Those of a folder of shards are on the meta device, but for embedding and head.
        """
        source, remedy = self.config.init_from, "begin with the model that it was made from"
        base = load_model(source, mapped=True)
        require(not base.quantization, source, "is quantized", remedy)
        size = max(self.config.vocab_size, base.config.vocab_size)
        same = {**base.config.to_dict(), "vocab_size": size}
        require_same(SHAPE_FIELDS, same, self.config.to_dict())
        return inherited_weights(base, self.run_tokenizer, size, source)

    def weights(self) -> dict[str, Tensor]:
        """The tensors of the model that a checkpoint holds."""
        return self.model.state_dict()

    def open_data(self, tokenizer: Any) -> None:
        """Open the data and find the tokenizer."""
        c = self.config
        sources = [c.train_data_path, *([c.val_data_path] if c.enable_validation else [])]
        self.run_tokenizer = RunTokenizer(tokenizer, sources, c.vocab_size)
        kind: Any = {"vocab_size": c.vocab_size, "data_dtype": c.data_dtype, "seed": c.seed}
        self.samples_per_step = c.batch_size * c.gradient_accumulation_steps * self.readers
        order = {"shuffle": True} | row_settings(c, self.samples_per_step) | kind
        self.train_data = self.open_source(
            c.train_data_path, c.block_size, c.train_data_weights, **order
        )
        self.fingerprint = self.train_data.fingerprint()
        self.val_data: Any = None
        self.val_loader: Any = None
        self.bytes_per_token: float | None = None
        if c.enable_validation:
            self.val_data = self.open_source(c.val_data_path, c.block_size, **kind)
            problem, remedy = "are conversations, or else the training data", "prepare both alike"
            same = self.val_data.masked == self.train_data.masked
            require(same, "val_data_path", problem, remedy)
            facts = [read_facts(f.path) for f in self.val_data.files]
            whole = not self.val_data.masked  # else those bytes are not what the loss is about
            if whole and all(f.get("tokens") and f.get("bytes") for f in facts):
                tokens = sum(f["tokens"] for f in facts)
                self.bytes_per_token = sum(f["bytes"] for f in facts) / tokens
        if c.eos_id < 0:
            eos = getattr(self.tokenizer, "eos_token_id", None)
            eos = self.run_tokenizer.facts.get("eos_id", eos)
            c.eos_id = -1 if eos is None else eos
            c.validate()
        self.teacher: Any = None
        if c.teacher:
            source = self.train_data, self.run_tokenizer
            self.teacher = open_lessons(c, load_model, *source, self.device)
        self.tokens_per_step = self.samples_per_step * c.block_size

    @property
    def tokenizer(self) -> Any:
        """What encodes prompts and decodes samples, or None."""
        return self.run_tokenizer.opened

    def wrap(self, compiled: bool) -> Any:
        """The model as the training step calls it: compiled, and data-parallel with DDP."""
        reason = why_no_compile(self.device) if compiled else None
        if compiled and self.before:
            reason = "blocks exchange messages with other processes (context_parallel)"
        self.compiled = compiled and not reason
        if reason:
            self.log.say(f"torch.compile is off: {reason}")
        self.model.compile_blocks(self.compiled)
        if self.world == 1 or self.fsdp:
            return self.model
        ids = [self.device.index] if self.device.type == "cuda" else None
        ddp = nn.parallel.DistributedDataParallel
        new = "forward_sync_buffers" in inspect.signature(ddp).parameters  # since PyTorch 2.13
        name = "forward_sync_buffers" if new else "broadcast_buffers"
        return ddp(self.model, device_ids=ids, **{name: False})

    def autocast(self) -> torch.autocast:
        """Autocast to the dtype of the run."""
        return torch.autocast(self.device.type, self.amp, enabled=self.amp != torch.float32)

    def loader(self, data: StreamingTokenDataset, first: int, last: int) -> Any:
        """A loader of this rank's batches of the samples first .. last-1."""
        c, pinned = self.config, self.device.type == "cuda"
        reader, piece = divmod(self.rank, c.context_parallel)
        plan = ShardedBatches(first, last, c.batch_size, reader, self.readers)
        pieces = Pieces(data, piece, c.context_parallel) if self.before else data
        return make_loader(pieces, plan, c.num_workers, pinned)

    def batches(self, loader: Any) -> Iterator:
        """All batches of a loader, on the device."""
        for batch in take_batches(loader):
            yield tuple(part.to(self.device, non_blocking=True) for part in batch)

    def train_step(self, batches: Iterator) -> tuple[float, float]:
        """Update once, from `gradient_accumulation_steps` batches: (mean loss, gradient norm).

        The host waits for the device only in `exchange`; before, it reads the next batches.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        micro_batches, failure = self.take_batches(batches), None
        errors = torch._dynamo.exc
        try:
            loss = self.accumulate(micro_batches)
        except (errors.TorchDynamoException, errors.FailOnRecompileLimitHit) as e:
            failure = str(e).partition("\n")[0]
        if failure is not None:  # not in `except`, where the failed forward pass is still alive
            self.log.say(f"torch.compile failed, continuing without it: {failure}")
            self.optimizer.zero_grad()
            self.forward = self.wrap(compiled=False)
            loss = self.accumulate(micro_batches)
        self.scaler.unscale_(self.optimizer)
        limit = self.config.grad_clip or math.inf
        norm = full_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        self.read(batches)
        mean_loss, mean_norm = self.exchange(loss, norm)
        if good := self.is_good(mean_loss, mean_norm):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        self.samples += self.samples_per_step
        self.tokens += self.tokens_per_step
        if self.carried:
            self.carried.advance(self.next_sample(), good)
        return mean_loss, mean_norm

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(step, self.total_steps, self.config, self.warmup)

    def take_batches(self, batches: Iterator) -> list:
        """The micro-batches of this step; if a process could not read its own, all save and end."""
        if not self.ready and not self.failed_reads:  # the first step of this run
            self.read(batches)
            self.failed_reads = all_reduce([float(self.unread is not None)], self.device)[0]
        if self.failed_reads:
            self.save()
            problem, remedy = "another process could not read its data", "see its message"
            raise self.unread or UserError("train_data_path", problem, f"{remedy}, and resume")
        return self.ready

    def read(self, batches: Iterator) -> None:
        """Read the micro-batches of the next step: none after the last one."""
        try:
            self.ready = list(islice(batches, self.config.gradient_accumulation_steps))
        except UserError as e:
            self.ready, self.unread = [], e

    def exchange(self, loss: Any, norm: Any) -> tuple[float, float]:
        """The means of loss and gradient norm over all processes, and with them their news."""
        mine = [float(self.unread is not None), *self.signals.take()]
        loss, norm, self.failed_reads, *self.sent = all_reduce([loss, norm, *mine], self.device)
        return loss / self.world, norm / self.world

    def is_good(self, loss: float, norm: float) -> bool:
        """Whether a step may change the weights: loss and gradient are finite, and not a spike."""
        good, line = judge_step(self.progress, loss, norm, self.config.skip_spikes)
        if line:
            self.log.say(f"step {self.step + 1}: {line}; the weights do not change")
        return good

    def accumulate(self, micro_batches: list) -> Tensor:
        """Accumulate gradients, all-reduced once; return this process's part of the mean loss."""
        c, last = self.config, len(micro_batches) - 1
        # Dropout is a function of (seed, step, rank): a resumed run needs no generator state.
        torch.manual_seed(((c.seed * 1_000_003 + self.step) * 65_537 + self.rank) % (1 << 63))
        total, self.last_ids = torch.zeros((), device=self.device), micro_batches[-1][0]
        shares = self.shares(micro_batches)
        for i, (batch, (above, below)) in enumerate(zip(micro_batches, shares, strict=True)):
            with self.synchronized(i == last):
                with self.autocast():
                    loss = self.micro_loss(batch, i) * above / below
                self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def micro_loss(self, batch: Any, i: int = 0) -> Tensor:
        """The mean loss of micro-batch i of a step."""
        if self.carried:
            return self.carried.loss(self.forward, batch, i)
        if self.teacher is None:
            return self.call(self.forward, batch)
        batch, lesson = self.teacher.split(batch)
        return self.call(self.forward, batch, teacher=lesson)

    def call(self, model: Any, batch: Any, **settings: Any) -> Any:
        """The model on a batch: ids and targets, of conversations also where they end."""
        ids, targets, *ends = batch
        ends = ends[0] if ends else None
        return model(ids, targets, ends=ends, before=self.before, **settings)

    def count(self, batch: Any) -> Any:
        """How many losses the mean of a micro-batch is over; a tensor if batches may differ."""
        return (batch[1] != -100).sum() if self.train_data.masked else batch[1].numel()

    def shares(self, micro_batches: list) -> list[tuple]:
        """The share of each micro-batch in the mean loss of a step, as a fraction (above, below).

        Gradients and losses are averaged over the processes later, hence `world`.
        """
        counts = [self.count(batch) for batch in micro_batches]
        if not isinstance(counts[0], Tensor):
            return [(1, len(counts))] * len(counts)
        total = torch.stack(counts).sum()
        if self.world > 1:
            dist.all_reduce(total)
        return [(count * self.world, total.clamp(min=1)) for count in counts]

    def synchronized(self, last: bool) -> Any:
        """All-reduce gradients only on the last micro-batch.

        Sharded ones are reduced to shards on each: to keep whole ones would take a model's memory.
        """
        if self.fsdp:
            self.model.set_requires_all_reduce(last)
        skip = self.world > 1 and not self.fsdp and not last
        return self.forward.no_sync() if skip else contextlib.nullcontext()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model in eval mode, not compiled: its inputs have many lengths here."""
        self.model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
        self.model.train()

    def validate(self) -> float | None:
        """Mean loss in nats on the first `validation_steps` batches of the validation data.

        Bits per byte use the bytes per token of the whole file. None if a signal ended it early.
        """
        c, last = self.config, len(self.val_data)
        values: dict[str, float] = {}
        if c.validation_steps:
            last = min(last, c.validation_steps * c.batch_size * self.readers)
        if self.val_loader is None:
            self.val_loader = self.loader(self.val_data, 0, last)
        batches = self.batches(self.val_loader)
        total, count = torch.zeros((), device=self.device), 0  # type: Any, Any
        with self.evaluating():
            for _ in range(math.ceil(last / (c.batch_size * self.readers))):
                if self.check_signals():
                    return None
                batch: Any = next(batches, None)
                if batch is None:  # the others have one more: take part in FSDP's communication
                    self.model(torch.zeros(1, 1, dtype=torch.int64, device=self.device))
                    continue
                with self.autocast():
                    loss, gates = self.call(self.model, batch, return_gates=True)
                tokens = self.count(batch)
                total, count = total + loss * tokens, count + tokens
                values = values or gate_statistics(gates, TokenAdaptiveGating.BRANCHES)
        nats, counted = all_reduce([total, count], self.device)
        return report_validation(self, nats / counted, values)

    def record_validation(self, loss: float) -> bool:
        """Keep the checkpoint if it is among the best; return whether to stop early."""
        c, p = self.config, self.progress
        if loss < p["lowest"] - c.early_stopping_min_delta:
            p["lowest"], p["bad_validations"] = loss, 0
        else:
            p["bad_validations"] += 1
        keep_best(self, loss)
        if not c.use_early_stopping or p["bad_validations"] < c.early_stopping_patience:
            return False
        self.log.say(f"early stopping: {p['bad_validations']} validations without improvement")
        return True

    def sample(self) -> None:
        """Print a continuation of generation_prompt, or a new document; an answer in a chat."""
        c = self.config
        if not self.main and not self.fsdp:
            return
        if self.tokenizer is None:
            self.log.say("no sample: there is no tokenizer.json or vocab.txt beside the data")
            return
        try:
            ids, ends = self.prompt()
        except UserError as e:
            self.log.say(f"no sample: {e}")
            return
        if max(ids, default=0) >= c.vocab_size:
            self.log.say("no sample: generation_prompt has ids outside of vocab_size")
            return
        prompt = torch.tensor([ids or [max(c.eos_id, 0)]], device=self.device)
        generator = torch.Generator().manual_seed(c.seed)
        with self.evaluating(), self.autocast():
            settings = (c.generation_length, c.generation_temperature, generator, ends)
            out = generate(
                self.model, prompt, *settings, until=lambda: self.signals.stop and not self.fsdp
            )
        text = self.tokenizer.decode(out[0].tolist())
        self.log.say(f"sample at step {self.step}:\n{text}\n")
        self.log.record_text("sample", text, self.step)

    def prompt(self) -> tuple[list[int], list[int] | None]:
        """The ids that a sample continues, and those that end it."""
        said, data = self.config.generation_prompt, self.train_data
        if data.masked:
            data = data if self.val_data is None else self.val_data
            return start_answer(self.tokenizer, said, data)
        return list(self.tokenizer.encode(said)) if said else [], None

    def state(self, val_loss: float | None = None) -> dict:
        """The whole run as tensors and plain values, for `save_checkpoint`."""
        history = self.progress["history"]["val"]
        return {
            "model": dict(self.weights()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"step": self.step, "total_steps": self.total_steps},
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch(),
            "global_step": self.step,
            "tokens_seen": self.tokens,
            "val_loss": history[-1][1] if val_loss is None and history else val_loss,
            "config": self.config.to_dict(),
            "tokenizer": self.run_tokenizer.record,
            "data": {
                "samples": self.samples,
                "first_epoch": self.first_epoch,
                "first_sample": self.first_sample,
                **self.fingerprint,
            },
            "rng": {"seed": self.config.seed, "step": self.step},  # see accumulate
            "progress": self.progress,
            **({"carried_state": self.carried.gather()} if self.carried else {}),
        }

    def save(self) -> None:
        """Write the newest state; the one before it is kept as ..._previous.pt."""
        path = self.config.checkpoint_path
        self.signals.wait_for(f"step {self.step} is being saved", self.step)
        self.write(path, self.state(), sibling(path, "previous"))
        self.signals.saved_step = self.step
        done = "writing" if self.config.async_save else "saved"
        self.log.say(f"{done} {path} at step {self.step}")

    def write(self, path: str | Path, state: dict, previous: Path | None = None) -> None:
        """Save one file, or a folder of a sharded run; in the background with async_save."""
        if self.main or self.writer.everywhere:
            self.writer.write(path, state, previous)

    def restore(self, saved: dict) -> None:
        """Continue the run of a checkpoint; another shape or other data is a UserError."""
        require_same_run(saved["config"], self.config.to_dict())
        source = self.config.resume_from or self.config.checkpoint_path
        self.run_tokenizer.inherit(saved.get("tokenizer"), source)
        self.model.tokenizer = self.run_tokenizer.record
        shards = {
            name: shard_like(saved["model"][name].to(self.device), value)
            for name, value in self.weights().items()
        }
        self.model.load_state_dict(shards, strict=False)
        load_optimizer(self.optimizer, saved["optimizer"], self.config)
        self.scaler.load_state_dict(saved["scaler"])
        self.step, self.tokens = saved["global_step"], saved["tokens_seen"]
        if self.carried:
            self.carried.restore(saved, self.config, source)
        self.restore_position(saved["data"], saved["epoch"])
        old, begun = Config.from_dict(saved["config"]), self.progress
        self.progress = saved["progress"]
        total = saved["scheduler"]["total_steps"]
        warmup = self.progress.setdefault("warmup", warmup_length(total, old))
        steps = self.step - 1, self.step
        self.planned = total, *(learning_rate(step, total, old, warmup) for step in steps)
        c = self.config
        renamed = Path(old.checkpoint_path).name != Path(c.checkpoint_path).name
        self.branches = bool(renamed or c.resume_from or old.log_dir != c.log_dir)
        if renamed or c.resume_from:
            self.progress["best"] = []  # those files are another run's
        if self.branches:
            self.progress["folder"] = begun["folder"]
            self.progress.pop("wandb_id", None)

    def restore_position(self, data: dict, epoch: int) -> None:
        """Continue at a position in the data; if they have changed, a new epoch of them begins."""
        self.samples, path = data["samples"], self.config.resume_from or self.config.checkpoint_path
        self.first_epoch = data.get("first_epoch", 0)
        self.first_sample = data.get("first_sample", 0)
        for name, value in self.fingerprint.items():
            if data[name] == value:
                continue
            problem = f"the data's {name} was {data[name]} and is {value}"
            remedy = "start a new run, or pass --accept_changed_data"
            require(self.config.accept_changed_data, path, problem, remedy)
            self.first_epoch, self.first_sample = epoch + 1, self.samples

    def epoch(self) -> int:
        """The number of the current pass over the data, from 0."""
        return self.next_sample() // len(self.train_data)

    def next_sample(self) -> int:
        """The number of the next sample in the order of the data, over all epochs."""
        return self.first_epoch * len(self.train_data) + self.samples - self.first_sample

    def train_batches(self, steps: int) -> Iterator:
        """This rank's batches of the next `steps` steps."""
        first = self.next_sample()
        last = first + steps * self.samples_per_step
        return self.batches(self.loader(self.train_data, first, last))

    def announce(self) -> None:
        """Say what is trained, where, and for how long."""
        for line in describe_start(self):
            self.log.say(line)

    def run(self) -> int:
        """Train to the end; the exit code is 0, or 128 and the signal that stopped it.

        That lets the current step finish (several processes: also the next) and saves; SIGUSR1
        and SIGUSR2 save and continue.
        """
        error = None
        with self.signals:  # until the end: a launcher may send SIGTERM while the cause is found
            try:
                self.train()
            except Exception as e:  # raised again, after the other processes are told
                error = e
                if self.watchdog and (isinstance(e, dist.DistError) or "gloo" in str(e)):
                    self.watchdog.raise_cause(e)
                raise
            finally:
                self.close(error)
        return self.exit_code(error)

    def exit_code(self, error: Exception | None) -> int:
        """The exit code of a run that ended with that error."""
        if error:
            return 2 if isinstance(error, UserError) else 1
        return 128 + self.stopped_by if self.stopped_by else 0

    def train(self) -> None:
        """Move an earlier run's files aside, run all steps, save, and plot the loss."""
        path = self.config.checkpoint_path
        with run_lock(path):
            self.announce()
            if flag := self.way_to_continue():
                self.log.say(f"nothing is left to do; to train on, raise {flag}")
                return
            if self.main and (not self.resumed or self.config.resume_from):
                for file in run_files(path):
                    move_aside(file, say=self.log.say)
            if self.main:
                mark_file(path, "begins").unlink(missing_ok=True)
            self.loop()
            self.save()
            self.writer.finish()
        if self.progress["history"]["train"]:
            self.log.plot(self.progress["history"])

    def way_to_continue(self) -> str | None:
        """What to pass so that a resumed run that had ended trains on; None if it has not ended."""
        c, p = self.config, self.progress
        if c.use_early_stopping and p["bad_validations"] >= c.early_stopping_patience:
            return "--early_stopping_patience"
        ended = self.step == self.total_steps and not p["unfinished"]
        return "--max_steps" if ended else None

    def loop(self) -> None:
        """Run the remaining steps, with validation, samples and saves between them."""
        c, first = self.config, self.step
        batches = self.train_batches(self.total_steps - self.step)
        since, seconds = self.step, 0.0
        self.log.start_bar(self.total_steps, self.step)
        done = self.step >= self.total_steps
        if self.progress["unfinished"]:
            done = self.between_steps() or done
        while not done:
            begin = time.perf_counter()
            self.signals.wait_for(f"step {self.step + 1} is being finished", self.step)
            loss, norm = self.train_step(batches)
            spent = time.perf_counter() - begin
            seconds += spent
            self.log.draw("update")
            check_gradient(self, loss, norm)
            if self.step % c.log_interval == 0 or self.step == self.total_steps:
                self.report(loss, norm, seconds / (self.step - since))
                since, seconds = self.step, 0.0
            if self.compiled and self.step == first + 1:
                self.log.say(f"the first step took {spent:.0f} s, compilation included")
                since, seconds = self.step, 0.0
            done = self.between_steps()

    def between_steps(self) -> bool:
        """Validation, samples, saves and signals, when they are due; True ends the run."""
        c, end, stop = self.config, self.step == self.total_steps, False
        due = end or self.step % c.validation_interval == 0
        self.progress["unfinished"] = validates = due and self.val_data is not None
        stopped = self.obey(self.sent)
        saves = c.checkpoint_interval and self.step % c.checkpoint_interval == 0 and not end
        if validates:
            if (loss := self.validate()) is None:
                return True
            self.progress["unfinished"] = False
            stop = self.record_validation(loss)
        elif self.step % c.validation_interval == 0:  # without validation data
            with self.evaluating(), self.autocast():
                gates = self.model(self.last_ids[:1], return_gates=True, before=self.before)[1]
            self.log.record(gate_statistics(gates, TokenAdaptiveGating.BRANCHES), self.step)
        samples = c.generate_samples and (end or stop or self.step % c.generation_interval == 0)
        if samples:
            self.sample()
        if saves:
            self.save()
        if c.empty_cache_freq and self.step % c.empty_cache_freq == 0:
            torch.cuda.empty_cache()  # does nothing without CUDA
        if self.world == 1 or validates or samples or saves:  # else the next step brings the news
            stopped = self.check_signals() or stopped
        return stopped or end or stop

    def check_signals(self) -> bool:
        """Ask all processes for their signals now; see `obey`."""
        return self.obey(all_reduce(self.signals.take(), self.device))

    def obey(self, sent: list[float]) -> bool:
        """Save if a signal asked any process for it; return whether one asked any to stop."""
        for number, processes in zip(Signals.STOPPING, sent, strict=False):
            self.stopped_by = number if processes else self.stopped_by
        if sent[-1]:
            self.save()
        return self.stopped_by != 0

    def report(self, loss: float, norm: float, seconds_per_step: float) -> None:
        """One line on the console, and the same numbers to the logs."""
        report_step(self, loss, norm, seconds_per_step)

    def profile(self) -> int:
        """Time five steps, see profile_steps; saves nothing."""
        batches = self.train_batches(5)
        trace = self.folder / "profile_trace.json" if self.main else None
        profile_steps(self, batches, trace)
        self.close()
        return 0

    def close(self, error: Exception | None = None) -> None:
        """Flush logs and leave the process group."""
        self.writer.close()
        self.signals.wait_for("the logs are being closed", self.step)
        self.log.close(self.exit_code(error))
        if self.watchdog:
            self.watchdog.close(error)
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------ main


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "d_model": 192, "n_layer": 4, "num_heads": 3, "vocab_size": 4096, "dropout": 0.0,
        "window_size": 128, "block_size": 256, "batch_size": 8, "gradient_accumulation_steps": 1,
        "lr": 8e-3, "max_steps": 1000, "warmup_steps": 100, "validation_interval": 200,
        "validation_steps": 20, "generation_interval": 500, "generation_temperature": 0.7,
        "generation_prompt": "import os\n\nclass", "checkpoint_interval": 500, "use_compile": False,
    },
    "small": {
        "d_model": 384, "n_layer": 8, "vocab_size": 4096, "window_size": 256, "num_epochs": 4,
        "lr": 4e-3, "warmup_steps": 100, "validation_interval": 200, "generation_interval": 200,
    },
    "base": {},
}  # fmt: skip


def parse_command_line(argv: list[str] | None = None) -> tuple[Config, dict, bool]:
    """Parse the flags: a preset's Config with the flags applied, the fields given, --profile.

    A Config that resumes is not validated: most of its fields are still to come from a checkpoint.
    """
    usage = "python testv2.py [--preset PRESET] [--FIELD VALUE ...]"
    description = str(__doc__).split("Dimension")[0] + "Defaults are in [brackets]."
    parser = CliParser(usage=usage, description=description)
    presets = "demo: 3.2M parameters, minutes on a CPU; small: 21M; base: the defaults, 153M"
    parser.add_argument("--preset", choices=PRESETS, default="base", help=presets)
    profile = "time a few steps with torch.profiler, write a trace, and exit"
    parser.add_argument("--profile", action="store_true", help=profile)
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    add_flags(parser, Config)
    args = parser.parse_args(argv)
    named = given_fields(Config, args)
    config = Config(**{**PRESETS[args.preset], **named})
    begins = not (config.resume or config.init_from or config.resume_from)
    return config.validate() if begins else config, named, args.profile


def prepare_default_data(config: Config, named: dict) -> None:
    """Prepare the built-in corpus if the user named no data and the default is missing."""
    path = Path(str(Config.train_data_path))
    chosen = "train_data_path" in named or config.train_data_path != Config.train_data_path
    if chosen or path.exists():
        return
    alone, remedy = from_launcher("WORLD_SIZE", 1) == 1, "run python data/prepare.py, then launch"
    require(alone, str(path), "no such file", remedy)
    say(f"{path} is missing: preparing the built-in corpus")
    script = [str(Path(__file__).parent / "data" / "prepare.py")]
    if __package__:
        script = ["-m", f"{__package__}.data.prepare"]
    done = subprocess.run([sys.executable, *script, "--output_dir", path.parent], check=False)
    if done.returncode:
        sys.exit(done.returncode)  # it has printed why


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    config, named, profile = parse_command_line(argv)
    path = config.checkpoint_path
    require_run_name(path)
    with contextlib.nullcontext() if profile else run_lock(path):
        saved, source = find_saved(config)
        if saved is not None:
            problem, remedy = "holds no run to resume here", "resume an adapter with peft.py"
            require("adapter" not in saved, source or path, problem, remedy)
            own = {"checkpoint_path": path, "resume_from": source}
            config = resumed_config(saved, {**named, **own})
        elif config.init_from:
            config = begun_config(config, named)
        config.validate()
        large, first = config.d_model >= 768, from_launcher("RANK", 0) == 0
        if large and first and pick_device(config.device).type == "cpu":
            say("hint: this is a large model for a CPU; try --preset demo")
        prepare_default_data(config, named)
        trainer = Trainer(config, saved=saved)
        return trainer.profile() if profile else trainer.run()


if __name__ == "__main__":
    run_cli(main)
