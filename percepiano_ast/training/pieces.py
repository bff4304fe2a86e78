"""A state in memory: this process's share of it on the way out, the whole of it on the way back.

Where several processes train, an array may be spread over all of them. Each process keeps its own pieces, under the
name of where a piece starts: ``at_0_128`` is the one whose first element is ``[0, 128]`` of the array.
"""

import math
import re
from typing import Any

import jax
import numpy as np

from percepiano_ast.config import InputError

_PIECE = re.compile(r"at(_\d{1,18})*")


def size_of(tree) -> int:
    """Bytes of all arrays, or of what they will be, in a tree."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def own_share(tree, into: dict[str, np.ndarray]):
    """A copy in numpy of what this process keeps: all of it where it is alone, else its pieces of every array.

    Args:
        into: the arrays of the copy before, by name, which are written over and added to: memory that a process touches
            for the first time costs several times as much as the copy.
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
        return {"_".join(["at", *(str(part.start or 0) for part in shard.index)]): shard.data for shard in own}
    return leaf if jax.process_index() == 0 else {}


def join(shares: list):
    """The whole of a tree from the shares of all processes, as dicts, lists and numpy arrays.

    Raises:
        InputError: pieces are missing, or do not fit together.
    """
    if len(shares) == 1:
        return shares[0]
    full: list[Any] = [share for share in shares if isinstance(share, np.ndarray) or share]  # who holds nothing of it says nothing
    if not full or isinstance(full[0], np.ndarray):
        return (full or shares)[0]
    if all(_is_cut(share) for share in full):
        return _assembled({name: piece for share in full for name, piece in share.items()})
    if isinstance(full[0], list) and len({type(share) for share in full}) == 1 == len({len(share) for share in full}):
        return [join(list(parts)) for parts in zip(*full)]
    if not all(isinstance(share, dict) and share.keys() == full[0].keys() for share in full):
        raise InputError("its files are of different states")
    return {name: join([share[name] for share in full]) for name in full[0]}


def _is_cut(share) -> bool:
    return isinstance(share, dict) and bool(share) and all(_PIECE.fullmatch(str(name)) for name in share)


def _assembled(pieces: dict[str, np.ndarray]) -> np.ndarray:
    """One array from its pieces."""
    starts = {name: tuple(int(start) for start in name.split("_")[1:]) for name in pieces}
    alike = {(len(starts[name]), piece.ndim, piece.dtype) for name, piece in pieces.items()}
    (first, *others) = alike
    if others or first[0] != first[1]:
        raise InputError("the pieces of an array do not fit together")
    ends = [[start + size for start, size in zip(starts[name], piece.shape)] for name, piece in pieces.items()]
    shape = tuple(max(sizes) for sizes in zip(*ends))
    # Before anything is allocated: a stranger's names may say anything.
    if sum(piece.size for piece in pieces.values()) != math.prod(shape):
        raise InputError("a piece of an array is missing")
    whole = np.zeros(shape, first[2])
    for name, piece in pieces.items():
        whole[tuple(slice(start, start + size) for start, size in zip(starts[name], piece.shape))] = piece
    return whole


def fit(tree, like):
    """The leaves of ``tree`` (dicts, lists, arrays) in the structure of ``like``, whose shapes and types they must have.

    Raises:
        InputError: a leaf is missing, is left over, or has another shape or type; nothing is cast or stretched.
    """
    found, wanted = _by_name(tree), _by_name(like)
    if odd := min(found.keys() ^ wanted.keys(), default=""):
        raise InputError(f"{odd} is not in it" if odd in wanted else f"{odd} is in it, which this run does not have")
    for name, leaf in wanted.items():
        one = found[name]
        if one.shape != leaf.shape or one.dtype != leaf.dtype:
            raise InputError(f"{name} is {one.dtype}{list(one.shape)} there, {leaf.dtype}{list(leaf.shape)} in this run")
    return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in wanted])


def _by_name(tree) -> dict[str, np.ndarray]:
    """Leaves by path: ``state.opt_state.1.0.count``; fields, keys and positions are named alike."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
