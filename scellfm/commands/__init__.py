"""What each command of `scellfm` does, and which options it has."""
from scellfm import _lazy

COMMANDS = {"demo": "geneformer", "tokenize": "geneformer", "embed": "shared", "finetune": "geneformer", "perturb": "geneformer",
            "map": "scgpt", "integrate": "scgpt"}

__getattr__, __dir__, __all__ = _lazy(__name__, {
    **COMMANDS, **{f"{command}_options": module for command, module in COMMANDS.items()},
})
