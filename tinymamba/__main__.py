"""The command `tinymamba`, or `python -m tinymamba`: one subcommand for each script.

    tinymamba --help
    tinymamba train --preset demo

Only the script that is run is imported.
"""

import difflib
import gc
import importlib.util
import sys
import types
import typing

COMMANDS = {  # name: its script in the repository, what it does
    "prepare": ("data/prepare.py", "turn text into tokens and a tokenizer"),
    "train": ("testv2.py", "train a model, or continue a run"),
    "generate": ("streaming.py", "continue a text, or chat"),
    "serve": ("serve.py", "serve over HTTP like OpenAI's API, with a page to try it"),
    "export": ("export_model.py", "write safetensors, TorchScript, ONNX, torch.export or a site"),
    "finetune": ("peft.py", "train LoRA, a prefix or every weight on other data"),
    "quantize": ("quantize.py", "store the weights in 8 or 4 bits"),
    "benchmark": ("benchmark.py", "measure speed, memory and perplexity against other models"),
    "convert": ("hf_integration.py convert", "write a folder for Hugging Face's transformers"),
    "push": ("hf_integration.py push", "upload such a folder to the Hugging Face Hub"),
}
USAGE = """usage: tinymamba COMMAND [--FLAG VALUE ...]

A small language model: state space, attention and MLP side by side in every block.

commands:
{commands}

tinymamba COMMAND --help lists its flags, tinymamba --version prints the version."""


def reject(field: str, problem: str, remedy: str) -> typing.NoReturn:
    """Print one line in three parts, as a UserError does, and exit with code 2."""
    print(f"error: {field}: {problem}; {remedy}", file=sys.stderr)
    sys.exit(2)


def module_of(script: str) -> str:
    """The module of the package that a script is."""
    return "tinymamba." + script.removesuffix(".py").replace("/", ".")


def load(script: str) -> types.ModuleType:
    """Import the module of a script; if a package is missing, exit with its pip line."""
    try:
        return importlib.import_module(module_of(script))
    except ModuleNotFoundError as e:
        package = (e.name or script).partition(".")[0]
        reject(package, "is not installed", f"pip install {package}")


def main() -> None:
    """Run the command that sys.argv names, and exit with its code."""
    name, *words = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        listed = "\n".join(f"  {name:11}{text}" for name, (_, text) in COMMANDS.items())
        print(USAGE.format(commands=listed))
        sys.exit(0)
    if name == "--version":
        from tinymamba import __version__

        print(f"tinymamba {__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "tinymamba --help lists all"
        reject(name or "COMMAND", "unknown command" if name else "is missing", hint)
    script, *first = COMMANDS[name][0].split()
    sys.argv = ["tinymamba" if first else f"tinymamba {name}", *first, *words]  # shown by --help
    cli = load("cli.py")
    cli.begin(script, importlib.util.find_spec(module_of(script)))

    def run() -> int | None:
        gc.disable()  # as in `begin`, until all is imported
        start = load(script).main
        cli.resume_collection()
        return start([*first, *words])

    cli.run_cli(run)


if __name__ == "__main__":
    main()
