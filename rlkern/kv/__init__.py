"""A paged KV cache whose branches share what they have in common.

`TreeKVCache` owns the pages and the tree of branches; docs/kv.md tells the whole story.
"""

from rlkern.kv._errors import OutOfPages, StaleTokens
from rlkern.kv.cache import BlockTable, TreeExport, TreeKVCache, Work
from rlkern.kv.pack import TreePack, group_pack, tree_advantages, tree_pack

__all__ = [
    "BlockTable",
    "OutOfPages",
    "StaleTokens",
    "TreeExport",
    "TreeKVCache",
    "TreePack",
    "Work",
    "group_pack",
    "tree_advantages",
    "tree_pack",
]
