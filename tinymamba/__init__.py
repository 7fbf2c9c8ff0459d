"""TinyMamba, a hybrid small language model, as an installed package.

    from tinymamba import Config, StreamingServer, TinyMambaModel, load_model
    from tinymamba.quantize import quantize_model

Each script of the repository is a module here: tinymamba.testv2, tinymamba.data.prepare and so on.
A module is imported when something of it is first asked for, so that `import tinymamba` is free.
"""

import importlib

__version__ = "0.1.0"

NAMES = {
    "testv2": "Config LowRankProjection MambaSSM ModelState RMSNorm RotaryEmbedding SimpleTokenizer"
    " StreamingTokenDataset SwiGLU TinyMambaBlock TinyMambaModel TokenAdaptiveGating Trainer"
    " UserError apply_rotary_pos_emb find_tokenizer generate load_checkpoint load_model"
    " save_checkpoint save_folder selective_scan",
    "streaming": "StreamingConfig StreamingInference StreamingServer",
    "peft": "AdapterConfig LoRALinear apply_lora_to_model apply_prefix_tuning_to_model"
    " apply_state_offset_to_model get_trainable_parameters load_adapter merge_adapter save_adapter"
    " set_adapter",
    "quantize": "quantize_model",
}
OF_EXTRAS = {  # what `import *` leaves out, as it needs more packages
    "onnx_generate": "OnnxModel",
    "hf_integration": "TinyMambaConfig TinyMambaHFModel TinyMambaHFTokenizer",
}
MODULES = {*NAMES, *OF_EXTRAS, "benchmark", "data", "export_model", "serve", "ssm_kernels"}
HOMES = {name: module for module, names in {**NAMES, **OF_EXTRAS}.items() for name in names.split()}

__all__ = ["__version__", *(name for names in NAMES.values() for name in names.split())]


def __getattr__(name: str):
    if name in HOMES:
        value = getattr(importlib.import_module(f".{HOMES[name]}", __name__), name)
        return globals().setdefault(name, value)
    if name in MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES, *MODULES})
