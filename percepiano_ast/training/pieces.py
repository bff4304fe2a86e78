"""The state in memory: split into this process's share for saving, joined from all shares on
loading.

With several processes, an array may be sharded over all of them. Each process saves its own pieces,
named by the position where a piece starts: the first element of ``at_0_128`` is element ``[0,
128]`` of the array.
"""

import math
import re
from typing import Any

import jax
import numpy as np

from percepiano_ast.errors import InputError

_PIECE = re.compile(r"at(_\d{1,18})*")


def size_of(tree) -> int:
    """Bytes of all arrays, or their shape descriptions, in a tree."""
    return sum(
        math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )


def own_share(tree, into: dict[str, np.ndarray]):
    """A numpy copy of this process's share: with one process the complete tree, else its pieces of
    every array.

    Args:
        into: the arrays of the previous copy, by name, which are overwritten and extended. Reusing
            memory is several times faster than allocating it.
    """
    if jax.process_count() > 1:
        tree = jax.tree.map(_pieces, tree)
    named, structure = jax.tree_util.tree_flatten_with_path(jax.device_get(tree))
    copies = []
    for path, leaf in named:
        name, leaf = jax.tree_util.keystr(path), np.asarray(leaf)
        copy = into.get(name)
        if copy is None or copy.shape != leaf.shape or copy.dtype != leaf.dtype:
            copy = into[name] = np.empty_like(leaf)
        np.copyto(copy, leaf)
        copies.append(copy)
    return jax.tree.unflatten(structure, copies)


def _pieces(leaf):
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        own = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
        return {
            "_".join(["at", *(str(part.start or 0) for part in shard.index)]): shard.data
            for shard in own
        }
    return leaf if jax.process_index() == 0 else {}


def join(shares: list):
    """Join the shares of all processes into a complete tree of dicts, lists and numpy arrays.

    Raises:
        InputError: pieces are missing, or do not fit together.
    """
    if len(shares) == 1:
        return shares[0]
    # drops empty shares
    full: list[Any] = [share for share in shares if isinstance(share, np.ndarray) or share]
    if not full or isinstance(full[0], np.ndarray):
        return (full or shares)[0]
    if all(_is_cut(share) for share in full):
        return _assembled({name: piece for share in full for name, piece in share.items()})
    if isinstance(full[0], list) and len({type(share) for share in full}) == 1 == len(
        {len(share) for share in full}
    ):
        return [join(list(parts)) for parts in zip(*full)]
    if not all(isinstance(share, dict) and share.keys() == full[0].keys() for share in full):
        raise InputError("its files belong to different states")
    return {name: join([share[name] for share in full]) for name in full[0]}


def _is_cut(share) -> bool:
    return (
        isinstance(share, dict)
        and bool(share)
        and all(_PIECE.fullmatch(str(name)) for name in share)
    )


def _assembled(pieces: dict[str, np.ndarray]) -> np.ndarray:
    """One array from its pieces."""
    starts = {name: tuple(int(start) for start in name.split("_")[1:]) for name in pieces}
    alike = {(len(starts[name]), piece.ndim, piece.dtype) for name, piece in pieces.items()}
    first, *others = alike
    if others or first[0] != first[1]:
        raise InputError("the pieces of an array do not fit together")
    ends = [
        [start + size for start, size in zip(starts[name], piece.shape)]
        for name, piece in pieces.items()
    ]
    shape = tuple(max(sizes) for sizes in zip(*ends))
    # Checked before anything is allocated, because names may be untrusted.
    if sum(piece.size for piece in pieces.values()) != math.prod(shape):
        raise InputError("a piece of an array is missing")
    whole = np.zeros(shape, first[2])
    for name, piece in pieces.items():
        whole[
            tuple(slice(start, start + size) for start, size in zip(starts[name], piece.shape))
        ] = piece
    return whole


def fit(tree, like):
    """The leaves of ``tree`` (dicts, lists, arrays) in the structure of ``like``, with the same
    shapes and types.

    Raises:
        InputError: a leaf is missing or superfluous, or has another shape or type; nothing is cast
            or broadcast.
    """
    found, wanted = _by_name(tree), _by_name(like)
    if odd := min(found.keys() ^ wanted.keys(), default=""):
        raise InputError(
            f"{odd} is missing from it" if odd in wanted else f"{odd} is in it, but not in this run"
        )
    for name, leaf in wanted.items():
        one = found[name]
        if one.shape != leaf.shape or one.dtype != leaf.dtype:
            raise InputError(
                f"{name} is {one.dtype}{list(one.shape)} in it, but {leaf.dtype}{list(leaf.shape)}"
                " in this run"
            )
    return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in wanted])


def _by_name(tree) -> dict[str, np.ndarray]:
    """Leaves by path, such as ``state.opt_state.1.0.count``, with fields, keys and positions
    written the same way."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
