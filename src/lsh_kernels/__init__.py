"""LSH attention (Reformer) in fused Triton kernels, with a torch backend for every device.

Names load on first use: importing the package needs neither Triton nor a GPU.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lsh_kernels import diagnostics, reference, stages
    from lsh_kernels.config import LSHConfig
    from lsh_kernels.cross_entropy import chunked_cross_entropy
    from lsh_kernels.feedforward import ChunkedFeedForward
    from lsh_kernels.functional import (
        bucket_sort,
        combine_rounds,
        local_attention,
        lsh_attention,
        lsh_hash,
        random_rotations,
    )
    from lsh_kernels.models import ReformerConfig, ReformerLM
    from lsh_kernels.modules import LocalSelfAttention, LSHSelfAttention
    from lsh_kernels.multihead import LSHMultiheadAttention, replace_multihead_attention
    from lsh_kernels.reversible import ReversibleBlock, ReversibleSequence

__version__ = "0.1.0"

__all__ = [
    "ChunkedFeedForward",
    "LSHConfig",
    "LSHMultiheadAttention",
    "LSHSelfAttention",
    "LocalSelfAttention",
    "ReformerConfig",
    "ReformerLM",
    "ReversibleBlock",
    "ReversibleSequence",
    "bucket_sort",
    "chunked_cross_entropy",
    "combine_rounds",
    "diagnostics",
    "local_attention",
    "lsh_attention",
    "lsh_hash",
    "random_rotations",
    "reference",
    "replace_multihead_attention",
    "stages",
]

_MODULE_OF = {
    "ChunkedFeedForward": "feedforward",
    "LSHConfig": "config",
    "LSHMultiheadAttention": "multihead",
    "LSHSelfAttention": "modules",
    "LocalSelfAttention": "modules",
    "ReformerConfig": "models",
    "ReformerLM": "models",
    "ReversibleBlock": "reversible",
    "ReversibleSequence": "reversible",
    "chunked_cross_entropy": "cross_entropy",
    "replace_multihead_attention": "multihead",
}


def __getattr__(name):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("diagnostics", "reference", "stages"):
        return import_module(f"{__name__}.{name}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF.get(name, 'functional')}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(globals().keys() | set(__all__))
