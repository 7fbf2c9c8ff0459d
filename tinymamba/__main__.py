"""The command line of the installed package: a script of the repository for each command."""

import difflib
import importlib
import sys
import typing

COMMANDS = {  # name: what it is called in the repository, what it does
    "prepare": ("data/prepare.py", "turn text into tokens and a tokenizer"),
    "train": ("testv2.py", "train a model, or go on with a run"),
    "generate": ("streaming.py", "continue a text, or talk turn after turn"),
    "serve": ("serve.py", "answer over HTTP as OpenAI's API does, with a page to try it"),
    "export": ("export_model.py", "write safetensors, TorchScript, ONNX or torch.export"),
    "finetune": ("peft.py", "train LoRA, a prefix or every weight on other data"),
    "quantize": ("quantize.py", "make layers of 8 or 4 bits"),
    "benchmark": ("benchmark.py", "measure speed, memory and perplexity against other models"),
    "convert": ("hf_integration.py convert", "make a folder for Hugging Face's transformers"),
    "push": ("hf_integration.py push", "put such a folder on the Hugging Face Hub"),
}


def usage() -> str:
    lines = [f"  {name:11}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: tinymamba COMMAND [--FLAG VALUE ...]",
            "",
            "A small language model of a selective state space, attention and an MLP side by side.",
            "",
            "commands:",
            *lines,
            "",
            "tinymamba COMMAND --help lists its flags, tinymamba --version tells the version.",
        ]
    )


def refuse(field: str, problem: str, remedy: str) -> typing.NoReturn:
    print(f"error: {field}: {problem}; {remedy}", file=sys.stderr)
    sys.exit(2)


def load(script: str):
    """The module of a script; a package that it lacks is named."""
    module = script.removesuffix(".py").replace("/", ".")
    try:
        return importlib.import_module(f".{module}", __package__)
    except ModuleNotFoundError as e:
        name = e.name or module
        refuse(name, "is not installed", f"pip install {name.partition('.')[0]}")


def main() -> typing.NoReturn:
    name, *words = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(usage())
        sys.exit(0)
    if name == "--version":
        from . import __version__

        print(f"tinymamba {__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "tinymamba --help lists them"
        refuse(name or "COMMAND", "unknown command" if name else "is missing", hint)
    script, *first = COMMANDS[name][0].split()
    sys.argv = ["tinymamba" if first else f"tinymamba {name}", *first, *words]  # shown by --help
    load("cli.py").run_cli(lambda: load(script).main([*first, *words]))


if __name__ == "__main__":
    main()
