"""Run by the tests in a process of its own: import the modules named in argv[2:], then print what they did.

Prints one JSON object: files (module -> file), skipped (module -> package of an extra that is not installed), changed
(attributes of other packages, and settings of the process, that are not what they were before). Any attempt to open a
connection raises.
"""

import importlib
import importlib.util
import json
import logging
import os
import socket
import sys

# Packages of extras that need not be installed; a module may stand on one of them.
OPTIONAL = ("lm_eval", "deepspeed")

# Other people's objects that a careless package patches.
WATCHED = (
    "torch",
    "torch.Tensor",
    "torch.nn.functional",
    "torch.nn.Module",
    "torch.nn.Linear",
    "torch.nn.Embedding",
    "torch.optim.Optimizer",
    "torch.utils.checkpoint",
    "transformers.PreTrainedModel",
    "transformers.PreTrainedConfig",
    "transformers.PreTrainedTokenizerBase",
    "transformers.Trainer",
    "transformers.TrainingArguments",
    "transformers.AutoModel",
    "transformers.AutoConfig",
    "transformers.AutoTokenizer",
    "transformers.modeling_utils",
    "transformers.trainer",
    "transformers.masking_utils",
    "peft",
    "peft.PeftModel",
    "peft.tuners.lora.Linear",
    "accelerate.Accelerator",
    "datasets.Dataset",
    "json",
    "logging.Logger",
    "random",
)


def refuse(*_args, **_kwargs):
    raise OSError("importing must not open a connection")


def resolve(dotted: str):
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(dotted)


def settings() -> dict[str, str]:
    import torch

    return {
        "torch default dtype": str(torch.get_default_dtype()),
        "torch grad mode": str(torch.is_grad_enabled()),
        "torch deterministic": str(torch.are_deterministic_algorithms_enabled()),
        "torch threads": str(torch.get_num_threads()),
        "torch random state": str(torch.get_rng_state().sum()),
        "root log handlers": str(logging.getLogger().handlers),
        "root log level": str(logging.getLogger().level),
        "environment": json.dumps(dict(os.environ), sort_keys=True),
        "excepthook": str(sys.excepthook),
    }


def main(where: str, modules: list[str]) -> None:
    sys.path.insert(0, where)
    # In the order that real code uses; each may set environment variables of its own when first imported.
    for name in ("torch", "transformers", "peft", "accelerate", "datasets", "torchmetrics", "matplotlib", "rich"):
        importlib.import_module(name)
    if importlib.util.find_spec("lm_eval") is not None:
        importlib.import_module("lm_eval")
    watched = {dotted: resolve(dotted) for dotted in WATCHED}
    before = {dotted: dict(vars(thing)) for dotted, thing in watched.items()}
    settings_before = settings()
    socket.socket.connect = refuse
    socket.socket.connect_ex = refuse
    socket.getaddrinfo = refuse
    files, skipped = {}, {}
    for name in modules:
        try:
            files[name] = importlib.import_module(name).__file__
        except ModuleNotFoundError as error:
            missing = (error.name or "").split(".")[0]
            if missing not in OPTIONAL or importlib.util.find_spec(missing) is not None:
                raise
            skipped[name] = missing
    changed = [
        f"{dotted}.{attribute}"
        for dotted, thing in watched.items()
        for attribute, value in before[dotted].items()
        # Caches that packages fill themselves (lazy imports, abc registries) only ever add names.
        if vars(thing).get(attribute, value) is not value
    ]
    settings_after = settings()
    changed += [name for name in settings_before if settings_before[name] != settings_after[name]]
    json.dump({"files": files, "skipped": skipped, "changed": changed}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
