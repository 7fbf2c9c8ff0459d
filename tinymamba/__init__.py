"""TinyMamba, a hybrid small language model, as a package.

    from tinymamba import Config, StreamingServer, TinyMambaModel, load_model
    from tinymamba.quantize import quantize_model

Each script of the repository is a module here: tinymamba.testv2, tinymamba.data.prepare and so on.
A module is imported when one of its names is first used, so `import tinymamba` costs nothing.
"""

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

NAMES = {
    "cli": "UserError",
    "tokenizer": "SimpleTokenizer find_tokenizer",
    "checkpoint": "load_checkpoint save_checkpoint",
    "dataset": "StreamingTokenDataset",
    "testv2": "Config LowRankProjection MambaSSM ModelState RMSNorm RotaryEmbedding"
    " SwiGLU TinyMambaBlock TinyMambaModel TokenAdaptiveGating Trainer"
    " apply_rotary_pos_emb generate load_model save_folder selective_scan",
    "streaming_config": "StreamingConfig",
    "streaming": "StreamingInference StreamingServer",
    "peft": "AdapterConfig LoRALinear apply_lora_to_model apply_prefix_tuning_to_model"
    " apply_state_offset_to_model get_trainable_parameters load_adapter merge_adapter save_adapter"
    " set_adapter",
    "quantize": "quantize_model",
}
OF_EXTRAS = {  # not in `import *`: they need more packages
    "onnx_generate": "OnnxModel",
    "hf_integration": "TinyMambaConfig TinyMambaHFModel TinyMambaHFTokenizer",
}
MODULES = {*NAMES, *OF_EXTRAS}
MODULES |= {"archives", "attention", "benchmark", "breaker", "carried_state", "chat_eval"}
MODULES |= {"chat_rows", "chat_session", "chat_template", "context_parallel", "conversations"}
MODULES |= {"data", "data_order", "decode", "delta_rule", "distillation", "distributed"}
MODULES |= {"documents", "export_model", "four_bit", "fused", "initial_weights", "inputs"}
MODULES |= {"kernels", "live", "lock", "middleware", "muon", "namesake", "onnx_engine"}
MODULES |= {"openai_api", "openai_responses", "optimizer", "packing", "preferences"}
MODULES |= {"prefix_cache", "profiling", "progress", "quick_help", "runtime", "schedule", "serve"}
MODULES |= {"session_store", "shard_files", "sharded_checkpoint", "shared_sessions"}
MODULES |= {"structured", "token_file", "token_shards", "tool_calls", "vocabulary"}
MODULES |= {"web_site", "web_tokenizer"}
HOMES = {name: module for module, names in {**NAMES, **OF_EXTRAS}.items() for name in names.split()}

__all__ = ["__version__", *(name for names in NAMES.values() for name in names.split())]

if not Path(__file__).with_name("testv2.py").is_file():  # a checkout: scripts are one folder up
    from tinymamba import checkout

    checkout.install()


def __getattr__(name: str) -> Any:
    if name in HOMES:
        value = getattr(importlib.import_module(f".{HOMES[name]}", __name__), name)
        return globals().setdefault(name, value)
    if name in MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES, *MODULES})
