"""Mistakes that the tests of the emulated CUDA operators have to notice.

A mutation is a place in a file of csrc and the text that stands there instead. All of them are planted into one copy of
the sources, each behind a switch, so that one build serves for all; test_cuda_mutations.py turns on one at a time.

Not in the list: what no emulation of this kind can show. That is the order of memory accesses that the hardware does
not promise, a tag that stays in the last bit of a gradient (less than its rounding), and checks that only spare work.
Nor what it shows too seldom: a CTA that is two steps behind in `warpgroup`, whose steps are long.
"""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from host_cuda import emulated
from host_cuda.cases import DEVICES, Case, check

TREE = emulated.ROOT / "build" / "host_cuda_mutations"
ROUNDS = 12  # seeds of each case before a mutation counts as unnoticed
SECONDS = 120  # until a process is ended that neither finishes nor fails


@dataclass(frozen=True)
class Mutation:
    """``at`` is text that occurs once in the file, with the part in « » to be replaced by ``new``.

    That part is either whole statements, without declarations that others use, or an expression.
    """

    name: str
    file: str  # below csrc
    at: str
    new: str
    why: str  # it cannot go unnoticed
    cases: tuple[Case, ...]

    @property
    def old(self) -> str:
        return self.at[self.at.index("«") + 1 : self.at.index("»")]

    def span(self, text: str) -> tuple[int, int]:
        """Where the text to be replaced is."""
        plain = self.at.replace("«", "").replace("»", "")
        count = text.count(plain)
        if count != 1:
            raise LookupError(f"mutation '{self.name}': its text occurs {count} times in {self.file}:\n{plain}")
        first = text.index(plain) + self.at.index("«")
        return first, first + len(self.old)


# ---------------------------------------------------------------------------------------------------- cases

# Sizes: tails in units and columns, several CTAs, more than one column tile; two directions; h_0 beyond 1.
PERSISTENT = Case("persistent", "bf16", T=6, B=11, I=2, H=43, D=2, h_0_scale=5)
RESIDENT = Case("resident", "bf16", T=6, B=11, I=2, H=75, D=2, h_0_scale=5)
STEPWISE = Case("stepwise", "fp32", T=6, B=11, I=2, H=13, D=2)


def ragged(case: Case) -> Case:
    """With lengths, of which some lie outside of what there is."""
    return replace(case, lengths=(6, 0, 3, 5, 9, 1, 2, -1, 6, 4, 3))


def packed(case: Case) -> Case:
    return replace(case, batch_sizes=(11, 9, 8, 8, 3, 1))


def cut(case: Case) -> Case:
    return replace(case, resets=0.3)


def again(case: Case) -> Case:
    return replace(case, recompute=True)


def element(case: Case, name: str) -> Case:
    return replace(case, element=name, H=min(case.H, 30 if case.family == "resident" else 43))


def stale(case: Case) -> Case:
    """On memory that still holds the states of other launches."""
    return replace(case, poison=False)


# Two CTAs: that a wait never ends is certain after so many polls of every warp.
SMALL = replace(PERSISTENT, B=3, H=20, D=1, forward_shape=(2, 1, 1), backward_shape=(2, 1, 1))
# Teams of several column tiles.
TILES = replace(PERSISTENT, forward_shape=(1, 2, 1), backward_shape=(2, 2, 1))
WAVES = replace(PERSISTENT, B=27, D=1, forward_shape=(4, 1, 2), backward_shape=(4, 1, 2))
# Directions one after the other.
SMALL_DEVICE = replace(PERSISTENT, device=(4, DEVICES[0][1]), forward_shape=(2, 0, 0), backward_shape=(2, 0, 0))
DEEP = replace(STEPWISE, L=2, dropout=True)
STREAMED = replace(PERSISTENT, family="streamed", forward_shape=(1, 1), backward_shape=(2, 1))
# Whole octets; CTAs without units; a warp that has the cells of two octets; a ring of slots with fewer than there are
# rounds.
WARPGROUP = Case("warpgroup", "bf16", T=6, B=11, I=2, H=40, D=2, h_0_scale=5)
WARPGROUP_TF32 = replace(WARPGROUP, element="tf32", forward_shape=(2, 8), backward_shape=(2, 8))
RING = replace(WARPGROUP_TF32, T=3, H=264, D=1)
# One warpgroup waits for the last CTA alone, and may be a step ahead of the other.
HALVES = replace(WARPGROUP, element="tf32", H=136, D=1)
# Steps of a pass in several launches; layers that run at the same time, the last group of which is not whole.
RUNS = tuple(
    replace(case, T=13, D=2, forward_shape=(0, 0, 0, 0, 4), backward_shape=(0, 0, 0, 0, 4))
    for case in (PERSISTENT, RESIDENT)
)
LAYERS = tuple(
    replace(case, L=3, D=1, dropout=True, forward_shape=(0, 0, 0, 2, 4), backward_shape=(0, 0, 0, 2, 4))
    for case in RUNS
)
PROJECTED = replace(STEPWISE, P=5)
# Steps with more than the cell.
RESET_STATES = replace(cut(STEPWISE), reset_states=True)
MASKED = replace(STEPWISE, recurrent_dropout=True)
ZONED = replace(STEPWISE, zoneout=(0.3, 0.2))
RATES = replace(ZONED, zoneout_masks=False)
CELLS = replace(STEPWISE, L=2, cell_layers=2)
GROUPED = replace(STEPWISE, B=12, groups=3)
NORMAL = replace(STEPWISE, I=9, H=40, layer_norm=True)  # rows of two warps
PADDED = replace(ragged(NORMAL), nan_at=("x", 9))  # the first of a column that has no step

# The projection in the recurrent weights.
FOLDED = tuple(replace(case, P=7) for case in (PERSISTENT, RESIDENT, STREAMED))
FOLDED_RUNS = tuple(replace(case, P=7) for case in (*RUNS, *LAYERS))

_FUSED = (PERSISTENT, RESIDENT)
_STEPS = (STEPWISE, STREAMED)
_ALL = (PERSISTENT, RESIDENT, STEPWISE, STREAMED)
_MASKED = (MASKED, replace(MASKED, P=5))
_ZONED = (ZONED, RATES, replace(ZONED, P=5))


def _each(change: Callable[[Case], Case], cases: Iterable[Case]) -> tuple[Case, ...]:
    return tuple(change(case) for case in cases)


# ---------------------------------------------------------------------------------------------------- the list

MUTATIONS = [
    # Barriers.
    Mutation(
        "persistent forward without its barrier",
        "cuda/persistent_forward.cu",
        "  // the next step's\n    «block_barrier();»\n    if (at.has_cells) {",
        "",
        "sums are added before all warps have put theirs",
        (SMALL,),
    ),
    Mutation(
        "persistent backward without its barrier",
        "cuda/persistent_backward.cu",
        "«block_barrier();»\n    if (at.has_cells && n > run.begin) {",
        "",
        "sums are added before all warps have put theirs",
        (SMALL,),
    ),
    Mutation(
        "resident forward without the barrier of a step",
        "cuda/resident.cu",
        "«block_barrier();»\n    typename Cells::Gates a;",
        "",
        "a warp multiplies states that other warps have not made yet",
        (RESIDENT,),
    ),
    Mutation(
        "resident forward without the barrier after clearing",
        "cuda/resident.cu",
        "«block_barrier();»  // states are clear",
        "",
        "h_0 is cleared after a faster warp has put it there",
        (RESIDENT,),
    ),
    Mutation(
        "resident backward without its barrier",
        "cuda/resident.cu",
        "«block_barrier();»\n      states.set_step(n - 1);\n      typename Cells::Products product;",
        "",
        "a warp multiplies gradients that other warps have not made yet",
        (RESIDENT,),
    ),
    Mutation(
        "forward tile without its warp barrier",
        "cuda/resident.cu",
        "«warp_barrier();»\n          cells.begin(n, a);",
        "",
        "lanes read inputs that other lanes have not finished to copy",
        (replace(RESIDENT, H=72), RESIDENT),
    ),
    Mutation(
        "backward tile without its warp barrier",
        "cuda/resident.cu",
        "«warp_barrier();»\n    cells.begin(n);",
        "",
        "lanes read inputs that other lanes have not finished to copy",
        (replace(RESIDENT, H=72), RESIDENT),
    ),
    # Asynchronous copies.
    Mutation(
        "forward tile does not wait for copies",
        "cuda/persistent_forward.cu",
        "if (at.moves) «copy_async_wait<kForwardStages - 2>();»",
        "(void)0;",
        "inputs are under way when they are read",
        (replace(PERSISTENT, H=72),),
    ),
    Mutation(
        "forward tile waits for one copy too few",
        "cuda/persistent_forward.cu",
        "if (at.moves) «copy_async_wait<kForwardStages - 2>();»",
        "copy_async_wait<kForwardStages - 1>();",
        "inputs are under way when they are read",
        (replace(PERSISTENT, H=72),),
    ),
    Mutation(
        "backward tile does not wait for copies",
        "cuda/persistent_backward.cu",
        "if (at.moves) «copy_async_wait<kBackwardStages - 3>();»",
        "(void)0;",
        "inputs are under way when they are read",
        (replace(PERSISTENT, H=72),),
    ),
    Mutation(
        "backward tile waits for its own step's copies only",
        "cuda/persistent_backward.cu",
        "if (at.moves) «copy_async_wait<kBackwardStages - 3>();»",
        "copy_async_wait<kBackwardStages - 2>();",
        "the cell state of the next step is under way when it is read",
        (replace(PERSISTENT, H=72),),
    ),
    Mutation(
        "forward inputs in one stage",
        "cuda/forward_tile.cuh",
        "«n % kForwardStages * kCellsOfTile * kGates»",
        "0",
        "a later step's inputs take the place of those that are read",
        _FUSED,
    ),
    Mutation(
        "backward inputs in one stage",
        "cuda/backward_tile.cuh",
        "«n % kBackwardStages * kStageElements»",
        "0",
        "a later step's inputs take the place of those that are read",
        _FUSED,
    ),
    Mutation(
        "cell states in too few stages",
        "cuda/backward_tile.cuh",
        "«n % kBackwardStages * kCellsOfTile»",
        "n % 2 * kCellsOfTile",
        "a later step's cell state takes the place of the one that is read",
        _FUSED,
    ),
    Mutation(
        "forward copies the inputs of the wrong step",
        "cuda/persistent_forward.cu",
        "cells.copy_inputs(«n + kForwardStages»);",
        "n + kForwardStages + 1",
        "inputs are missing",
        (PERSISTENT,),
    ),
    # Alternating buffers.
    Mutation(
        "one set of forward sums",
        "cuda/persistent_forward.cu",
        "«(n & 1) * cell_tiles * kGateSums»",
        "0",
        "the next step's sums are put where a slow warp still reads",
        (element(PERSISTENT, "fp32"), element(TILES, "fp32")),
    ),
    Mutation(
        "one set of backward sums",
        "cuda/persistent_backward.cu",
        "«(n & 1) * cell_tiles * kUnitSums»",
        "0",
        "the next step's sums are put where a slow warp still reads",
        (element(PERSISTENT, "fp32"), element(TILES, "fp32")),
    ),
    Mutation(
        "one exchange buffer, forward",
        "cuda/persistent_forward.cu",
        "team_vectors_ + «(n & 1) * p_.team.tiles * tile_vectors_»",
        "0",
        "states are overwritten before all have read them",
        (SMALL,),
    ),
    Mutation(
        "one exchange buffer, backward",
        "cuda/persistent_backward.cu",
        "team_vectors_ + «(n & 1) * p_.team.tiles * tile_vectors_»",
        "0",
        "gradients are overwritten before all have read them",
        (SMALL,),
    ),
    Mutation(
        "one buffer of states, resident",
        "cuda/resident.cu",
        "buffers_ + «(n & 1) * blocks_ * kWarpThreads»;",
        "0",
        "states are overwritten before all have read them",
        (RESIDENT,),
    ),
    Mutation(
        "forward reads the other buffer",
        "cuda/persistent_forward.cu",
        "from_ = buffer(«n - 1») + vector_by_octet(warp_",
        "n",
        "it waits for a state that is yet to be made",
        (SMALL,),
    ),
    Mutation(
        "forward publishes into the other buffer",
        "cuda/persistent_forward.cu",
        "states.publish(«n», at.octet, at.tile, h[0]);",
        "n + 1",
        "readers wait for ever",
        (SMALL,),
    ),
    # Tags.
    Mutation(
        "tag of every step",
        "cuda/product.cuh",
        "return «(step >> 1) & 1»;",
        "step & 1",
        "a buffer's next states have the tag of those before",
        (PERSISTENT,),
    ),
    Mutation(
        "constant tag",
        "cuda/product.cuh",
        "return «(step >> 1) & 1»;",
        "false",
        "old states pass for new ones",
        (PERSISTENT,),
    ),
    Mutation(
        "nobody waits for states",
        "cuda/product.cuh",
        "if («warp_all(wrong == 0)») break;",
        "warp_all(true)",
        "products take what happens to be there",
        (PERSISTENT,),
    ),
    Mutation(
        "forward tags are not looked at",
        "cuda/persistent_forward.cu",
        "return «tag_errors_of(state) & W::kTag»;",
        "0u",
        "products take what happens to be there",
        (PERSISTENT,),
    ),
    Mutation(
        "one word's tag is not looked at",
        "cuda/product.cuh",
        "return «(v.x ^ tag) | (v.y ^ tag) | (v.z ^ tag) | (v.w ^ tag)»;",
        "(v.x ^ tag) | (v.y ^ tag) | (v.w ^ tag)",
        "words arrive one by one",
        (PERSISTENT,),
    ),
    Mutation(
        "backward tags are not looked at",
        "cuda/persistent_backward.cu",
        "return «(state.w ^ tag_) & 1»;",
        "0u",
        "products take what happens to be there",
        (PERSISTENT,),
    ),
    Mutation(
        "forward tag is not cleared",
        "cuda/persistent_forward.cu",
        "«state.y &= ~tags;»",
        "",
        "a set tag is part of the exponent",
        (PERSISTENT,),
    ),
    Mutation(
        "own tag bit is kept when h is published",
        "cuda/persistent_forward.cu",
        "«(value & ~W::kTag) | tag»);",
        "value | tag",
        "a NaN has the bit set and is waited for for ever",
        (replace(SMALL, nan_at=("x", 5)),),
    ),
    Mutation(
        "h_0 is taken for tagged data",
        "cuda/persistent_forward.cu",
        "return «initial_ >> tile & 1 ? 0 : W::kTag»;",
        "W::kTag",
        "no tag of an h_0 means anything",
        (SMALL,),
    ),
    Mutation(
        "h_0 is read from the exchange buffer",
        "cuda/persistent_forward.cu",
        "«if (begins || begins_run_) initial_ |= 1u << tile;»",
        "",
        "nobody has put it there",
        (PERSISTENT,),
    ),
    Mutation(
        "in reverse, all columns begin at once",
        "cuda/persistent_forward.cu",
        "if (n == begin_of_run || «(run.reverse && p.sequences.lengths != nullptr)») {",
        "false",
        "a shorter sequence's h_0 comes through the exchange buffer, which cuts it to numbers below 2",
        (ragged(PERSISTENT), packed(PERSISTENT)),
    ),
    Mutation(
        "a reset before the first step is ignored by the product",
        "cuda/persistent_forward.cu",
        "if (!begins || «order.restarts(p_.sequences, t, b, length)») zero_",
        "false",
        "h_0 is multiplied where the sequence is cut",
        (cut(PERSISTENT),),
    ),
    Mutation(
        "h_0 of another column tile",
        "cuda/persistent_forward.cu",
        "row_vector<E>(h_0, «column(tile)», p_.row_stride",
        "column(0)",
        "the second tile begins with the first one's states",
        (TILES,),
    ),
    # The exchange buffer's contents before the first step.
    Mutation(
        "exchange buffer is not filled",
        "cuda/stack.cpp",
        "check(«cudaMemsetAsync(buffer.data_ptr(), 0xff, bytes, stream)»,",
        "cudaSuccess",
        "states of an earlier launch pass for new ones",
        (stale(SMALL), stale(replace(SMALL, T=4)), stale(replace(SMALL, T=2))),
    ),
    Mutation(
        "exchange buffer is filled with zeros",
        "cuda/stack.cpp",
        "check(«cudaMemsetAsync(buffer.data_ptr(), 0xff, bytes, stream)»,",
        "cudaMemsetAsync(buffer.data_ptr(), 0, bytes, stream)",
        "zero is tagged as the first step's state",
        (SMALL,),
    ),
    # Packets.
    Mutation(
        "gradients are stored word by word",
        "cuda/persistent_backward.cu",
        "«store_relaxed_packet(exchange() + (to + vector), packet);»",
        "for (int i = 0; i < 4; ++i)"
        " store_relaxed(reinterpret_cast<uint32_t*>(exchange() + (to + vector)) + i, (&packet.x)[i]);",
        "the tag may arrive before the other words",
        (PERSISTENT,),
    ),
    Mutation(
        "gradients are loaded word by word",
        "cuda/persistent_backward.cu",
        "states[b] = «load_relaxed_packet»(first_block + b < blocks_",
        "load_relaxed",
        "a packet may arrive between two words",
        (PERSISTENT, replace(PERSISTENT, D=1)),
    ),
    Mutation(
        "the last gradients are not published",
        "cuda/persistent_backward.cu",
        "if («n < last_product») gradients.publish",
        "n + 1 < last_product",
        "the product that gives d_h_0 waits for ever",
        (SMALL,),
    ),
    # NaN.
    Mutation(
        "a NaN is not noticed",
        "cuda/persistent_forward.cu",
        "const uint32_t lanes = «warp_ballot((above_one_ & W::kTag) != 0)»;",
        "uint32_t(0)",
        "it travels as a number between 1 and 2",
        (replace(PERSISTENT, nan_at=("c_0", 4)),),
    ),
    Mutation(
        "a NaN in one of the words is not noticed",
        "cuda/persistent_forward.cu",
        "above_one(state.y) | «above_one(state.z)» | above_one(state.w)",
        "0",
        "a NaN in one unit of c_0 is in one word",
        (replace(PERSISTENT, nan_at=("c_0", 4)), replace(PERSISTENT, nan_at=("c_0", 5))),
    ),
    Mutation(
        "a NaN goes into another column",
        "cuda/persistent_forward.cu",
        "lanes >> «(8 * (lane_ % 4))»;",
        "8 * (3 - lane_ % 4)",
        "rows of the batch do not mix",
        (replace(PERSISTENT, nan_at=("x", 5)),),
    ),
    Mutation(
        "a NaN goes into the neighbouring column",
        "cuda/persistent_forward.cu",
        "if (of_columns & («i % 2 == 0» ? 0x0fu : 0xf0u))",
        "i % 2 == 1",
        "rows of the batch do not mix",
        (replace(PERSISTENT, nan_at=("x", 5)),),
    ),
    Mutation(
        "a NaN goes into the next column tile",
        "cuda/persistent_forward.cu",
        "«above_one_ = 0;»\n    if (lanes == 0) return;",
        "",
        "rows of the batch do not mix",
        (replace(TILES, nan_at=("x", 5)),),
    ),
    # Products.
    Mutation(
        "sums of a tile go into the next",
        "cuda/product.cuh",
        "«sums[set][m][k] = 0.f;»",
        "",
        "the second column tile's sums begin with the first one's",
        (TILES,),
    ),
    Mutation(
        "half of the sums are left out",
        "cuda/product.cuh",
        "«sums[0][m][k] += sums[1][m][k];»",
        "",
        "terms are missing",
        (TILES,),
    ),
    Mutation(
        "the sums of one warp are left out",
        "cuda/partial_sums.cuh",
        "«d_h[1] += part.y;»",
        "if (w != 1) d_h[1] += part.y;",
        "terms are missing",
        (PERSISTENT,),
    ),
    Mutation(
        "sums of the wrong gate",
        "cuda/partial_sums.cuh",
        "float4{i_f[1], «i_f[3]», g_o[1], g_o[3]}",
        "i_f[1]",
        "f is not i",
        (PERSISTENT,),
    ),
    Mutation(
        "full float32 by the large parts alone",
        "cuda/weights.cuh",
        "for (int parts = «2 * E::kParts - 2»; parts >= 0; --parts)",
        "0",
        "half of the bits are missing",
        (element(PERSISTENT, "fp32"), element(RESIDENT, "fp32")),
    ),
    Mutation(
        "full float32 without the small part of the weights",
        "cuda/weights.cuh",
        "for (int parts = «2 * E::kParts - 2»; parts >= 0; --parts)",
        "E::kParts - 1",
        "half of their bits are missing",
        (element(PERSISTENT, "fp32"), element(RESIDENT, "fp32")),
    ),
    # Layouts.
    Mutation(
        "h of 16 bits in the wrong place",
        "cuda/exchange.cuh",
        "put(octet / 4, lane / 4, «octet % 4», lane % 4, word);",
        "(octet + 1) % 4",
        "units are multiplied by other units' weights",
        (replace(PERSISTENT, H=32), replace(RESIDENT, H=32)),
    ),
    Mutation(
        "h of 32 bits in the wrong place",
        "cuda/exchange.cuh",
        "«unit % W::kPerBlock / W::kPerVector», unit % W::kPerVector,",
        "unit % W::kPerVector",
        "units are multiplied by other units' weights",
        (replace(PERSISTENT, element="tf32", H=32), replace(RESIDENT, element="tf32", H=32)),
    ),
    # Tails.
    Mutation(
        "lanes behind the last octet wait",
        "cuda/persistent_forward.cu",
        "blocks_ = «first < units ? ceil_div(units - first, stride) : 0»;",
        "ceil_div(units, stride)",
        "nobody writes there",
        (SMALL,),
    ),
    Mutation(
        "a block too many in backward",
        "cuda/persistent_backward.cu",
        "blocks_ = «warp < blocks ? ceil_div(blocks - warp, kTeamWarps) : 0»;",
        "ceil_div(blocks, kTeamWarps)",
        "nobody writes there",
        (SMALL,),
    ),
    Mutation(
        "a row behind the batch",
        "cuda/tile.cuh",
        "return unit(o) < p_.hidden && «column(e) < p_.sequences.batch»;",
        "column(e) <= p_.sequences.batch",
        "its states are written behind the tensor or over others",
        _FUSED,
    ),
    Mutation(
        "a unit behind the last",
        "cuda/tile.cuh",
        "return «unit(o) < p_.hidden» && column",
        "unit(o) <= p_.hidden",
        "its states are written over the next row",
        _FUSED,
    ),
    Mutation(
        "a unit behind the last is put out",
        "cuda/tile.cuh",
        "stored_ = t < tile.stored_length() && «lane_ % 4 * 2 < left_»;",
        "lane_ % 4 * 2 <= left_",
        "it is written over the other direction",
        (replace(PERSISTENT, H=42), replace(RESIDENT, H=74)),
    ),
    Mutation(
        "a unit behind the last gets a gradient",
        "cuda/tile.cuh",
        "if («unit + 1 < left_») to[1]",
        "unit < left_",
        "it is written over the next gate",
        _FUSED,
    ),
    Mutation(
        "inputs behind the last unit",
        "cuda/tile_copy.cuh",
        "«i < count» ? from[i]",
        "i <= count",
        "behind the last row there is nothing",
        _FUSED,
    ),
    Mutation(
        "weights behind the last unit",
        "cuda/weights.cuh",
        "if («unit >= hidden || k >= stride») return uint4{};",
        "k >= stride",
        "behind the last row there is nothing",
        _FUSED,
    ),
    Mutation(
        "the column behind the batch has steps",
        "cuda/sequences.cuh",
        "if («b >= s.batch») return 0;",
        "b > s.batch",
        "its outputs are written over the next step",
        _FUSED,
    ),
    Mutation(
        "states that no unit fills are not cleared",
        "cuda/resident.cu",
        "«states.clear();»",
        "",
        "zero weights times NaN",
        (RESIDENT,),
    ),
    Mutation(
        "rows that are not aligned count as aligned",
        "cuda/stack.cpp",
        "return «p.H % (16 / storage_bytes(element)) == 0» && begin_aligned",
        "true",
        "loads of 16 bytes need aligned addresses",
        _FUSED,
    ),
    Mutation(
        "tensors that are not aligned count as aligned",
        "cuda/stack.cpp",
        "reinterpret_cast<uintptr_t>(t->data_ptr()) % bytes_of(*t) == «0»",
        "reinterpret_cast<uintptr_t>(t->data_ptr()) % bytes_of(*t)",
        "loads of 16 bytes need aligned addresses",
        (replace(PERSISTENT, H=72, offset=1), replace(RESIDENT, H=72, offset=1)),
    ),
    Mutation(
        "rows of weights are not padded",
        "cuda/stack.cpp",
        "if («row_stride() == p.H && aligned({&t})») return t;",
        "true",
        "kernels take rows of a multiple of 8",
        _FUSED,
    ),
    # Sequences: lengths, packing, order.
    Mutation(
        "states go on behind the end",
        "cuda/forward_tile.cuh",
        "const bool has_step = «t < length_[e]»;",
        "true",
        "final states are those of the sequence's last step",
        _each(ragged, _FUSED),
    ),
    Mutation(
        "outputs go on behind the end",
        "cuda/tile.cuh",
        "stored_ = «t < tile.stored_length()» &&",
        "true",
        "packed rows of other columns are overwritten; columns behind the batch have no rows",
        _each(packed, _FUSED),
    ),
    Mutation(
        "gradients come from behind the end",
        "cuda/backward_tile.cuh",
        "if («active_[e]») d_h_[o][e] = restarted_[e]",
        "true",
        "d_h_n is lost at the steps that the column does not have",
        _each(ragged, _FUSED),
    ),
    Mutation(
        "d_c changes behind the end",
        "cuda/backward_tile.cuh",
        "if («active_[e]») d_c_[o][e] = restarts_[e]",
        "true",
        "d_c_n is lost at the steps that the column does not have",
        _each(ragged, _FUSED),
    ),
    Mutation(
        "gradients are stored behind the end",
        "cuda/tile.cuh",
        "exists_[e] = «t < tile.length_[e]» &&",
        "true",
        "packed rows of other columns are overwritten",
        _each(packed, (element(PERSISTENT, "tf32"), element(RESIDENT, "tf32"))),
    ),
    Mutation(
        "lengths beyond the steps",
        "cuda/sequences.cuh",
        "return «length < 0 ? 0 : length > s.steps ? s.steps : static_cast<int>(length)»;",
        "static_cast<int>(length)",
        "in reverse, the sequence never begins",
        _each(ragged, _ALL),
    ),
    Mutation(
        "rows of packed sequences as if padded",
        "cuda/sequences.cuh",
        "return («s.offsets != nullptr ? s.offsets[t] : static_cast<int64_t>(t) * s.batch») + b;",
        "static_cast<int64_t>(t) * s.batch",
        "later steps have fewer rows",
        _each(packed, (STEPWISE, STREAMED)),
    ),
    Mutation(
        "rows of packed sequences as if padded, in 32 bits",
        "cuda/sequences.cuh",
        "first = «s.offsets != nullptr» ? static_cast<uint32_t>(s.offsets[t])",
        "false",
        "later steps have fewer rows",
        _each(packed, _FUSED),
    ),
    Mutation(
        "reverse is forward",
        "cuda/sequences.cuh",
        "return «reverse ? steps - 1 - n : n»;",
        "n",
        "the second direction runs backwards in time",
        _ALL,
    ),
    Mutation(
        "reverse begins at step 0",
        "cuda/sequences.cuh",
        "return t == («reverse ? length - 1 : 0»); }\n  // Whether it is the last",
        "0",
        "c_0 is that of the first step computed",
        _ALL,
    ),
    Mutation(
        "packed columns are a step too long",
        "cuda/stack.cpp",
        "while («a.offsets[t] - a.offsets[t - 1] <= b») --t;",
        "a.offsets[t] - a.offsets[t - 1] < b",
        "there is no row for it",
        _each(packed, _ALL),
    ),
    Mutation(
        "the second of two directions at once is the first",
        "cuda/product.cuh",
        "run = «team / p.groups»;",
        "(team - 1) / p.groups",
        "a direction is not computed",
        (PERSISTENT,),
    ),
    Mutation(
        "two directions at once go the same way",
        "cuda/backward.cpp",
        "BackwardRun run = {};\n  run.reverse = «direction == 1»;",
        "false",
        "the second direction runs backwards in time",
        (PERSISTENT,),
    ),
    Mutation(
        "the second direction alone goes forward",
        "cuda/forward.cpp",
        "ForwardRun run = {};\n  run.reverse = «direction == 1»;",
        "false",
        "the second direction runs backwards in time",
        (SMALL_DEVICE,),
    ),
    Mutation(
        "waves overlap",
        "cuda/stack.h",
        "params.first_column = «wave * plan.groups * plan.team.tiles * kColumns»;",
        "wave * plan.team.tiles * kColumns",
        "the last columns are not computed",
        (WAVES,),
    ),
    # Runs: parts of a pass, and layers at the same time.
    Mutation(
        "h of a run begins with h_0",
        "cuda/sequences.cuh",
        "return «run.begin > 0» ? run.carried_h : run.h_0;",
        "false",
        "the states of earlier steps are lost",
        LAYERS,
    ),
    Mutation(
        "sequences that begin late read what a run hands on",
        "cuda/persistent_forward.cu",
        "const void* const h_0 = «begins_run_» ? initial_h(run_)",
        "true",
        "another CTA may have handed on its states already",
        (replace(ragged(RUNS[0]), H=30, forward_shape=(1, 0, 0, 0, 4)),),
    ),
    Mutation(
        "c of a run begins with c_0",
        "cuda/forward_tile.cuh",
        ": «run_.begin > 0» ? run_.carried_c",
        "false",
        "the states of earlier steps are lost",
        LAYERS,
    ),
    Mutation(
        "only the last run hands on its states",
        "cuda/forward_tile.cuh",
        "const bool last_run = «run_.end == p_.sequences.steps»;",
        "run_.end != p_.sequences.steps",
        "the runs before it do",
        LAYERS,
    ),
    Mutation(
        "inputs of another run",
        "cuda/stack.h",
        "«rows.first» * t.stride(0) * t.element_size());",
        "0",
        "gates_x begins with the run's first row",
        RUNS,
    ),
    Mutation(
        "a run goes on to the last step",
        "cuda/persistent_forward.cu",
        "n < «run.end»; ++n) {",
        "p.sequences.steps",
        "the next layer's steps are not ready",
        LAYERS[:1],
    ),
    Mutation(
        "d_h of a run begins with d_h_n",
        "cuda/backward_tile.cuh",
        "d_h_[o][e] = «run_.begin > 0» ?",
        "false",
        "the gradients of later steps are lost",
        LAYERS,
    ),
    Mutation(
        "d_c of a run begins with d_c_n",
        "cuda/backward_tile.cuh",
        "d_c_[o][e] = «run_.begin > 0» ?",
        "false",
        "the gradients of later steps are lost",
        LAYERS,
    ),
    Mutation(
        "a run's last product is left out",
        "cuda/persistent_backward.cu",
        "run.d_h_0 == nullptr && «run.end == p.sequences.steps» ?",
        "true",
        "the next run begins with it",
        (replace(LAYERS[0], needs=(True, False)),),
    ),
    Mutation(
        "a resident run's last product is left out",
        "cuda/resident.cu",
        "run.d_h_0 == nullptr && «run.end == p.sequences.steps» ?",
        "true",
        "the next run begins with it",
        (replace(LAYERS[1], needs=(True, False)),),
    ),
    Mutation(
        "cell states end with the run",
        "cuda/backward_tile.cuh",
        "const bool exists = «n <= run_.end» && n < p_.sequences.steps && time(n) < Base::copied_length();",
        "n < run_.end",
        "the last step reads the cell state before it",
        LAYERS,
    ),
    Mutation(
        "a layer does not wait for the one below",
        "cuda/forward.cpp",
        "const int begin = «(front - i) * steps», end = std::min(begin + steps, s.sequences.steps);\n"
        "        const RowRange rows = s.rows_of_steps(d == 1",
        "(front - i) * steps + (i > 0 && front - i + 1 < runs_of_layer) * steps",
        "what it reads is being computed",
        LAYERS,
    ),
    Mutation(
        "a layer gets its gradient from another layer's weights",
        "cuda/backward.cpp",
        "multiply(s.element, d_y, rows.of(above.d_gates[0]), s.weights(«above.index», 0).w_ih);",
        "above.index - 1",
        "it comes through W_ih of the layer above",
        (replace(LAYERS[0], L=4, forward_shape=(0, 0, 0, 4, 4), backward_shape=(0, 0, 0, 4, 4)),),
    ),
    Mutation(
        "gradients do not go through the dropout between layers",
        "cuda/backward.cpp",
        "«if (s.dropout_mask.defined()) d_y.mul_(rows.of(s.dropout_mask[layers[i].index]));»",
        "",
        "dropped outputs have no gradient",
        LAYERS,
    ),
    # Warps that store what others have computed.
    Mutation(
        "results of one step at a time, forward",
        "cuda/results.cuh",
        "return memory_[«(n & 1) * step_vectors_» + vector * kWarpThreads];",
        "0",
        "the next step's are put where they are still read",
        (element(PERSISTENT, "fp32"), PERSISTENT),
    ),
    Mutation(
        "forward results of the last step are not stored",
        "cuda/persistent_forward.cu",
        "if (at.moves) store_results(«run.end - 1»);",
        "run.begin",
        "nobody else does",
        (PERSISTENT,),
    ),
    Mutation(
        "results are read before they are there",
        "cuda/persistent_forward.cu",
        "if (at.helped && n > run.begin) store_results(«n - 1»);",
        "n",
        "the barrier of the next step lies between",
        (PERSISTENT,),
    ),
    Mutation(
        "backward results of the last step are not stored",
        "cuda/persistent_backward.cu",
        "if (at.moves) store_results(«run.end - 1»);",
        "run.begin",
        "nobody else does, if no product follows",
        (replace(PERSISTENT, needs=(True, False)),),
    ),
    Mutation(
        "a length of another column",
        "cuda/tile.cuh",
        "return «i % 2 == 0» ? even : odd;",
        "i % 2 == 1",
        "columns end at different steps",
        _each(ragged, _FUSED),
    ),
    Mutation(
        "blocks that nobody has wait",
        "cuda/persistent_forward.cu",
        "has_block(first_block + b) ? from(tile, first_block + b) : «absent_state()»);",
        "from(tile, first_block + b)",
        "nobody writes there",
        (SMALL,),
    ),
    # Resets.
    Mutation(
        "a reset keeps c",
        "cuda/forward_tile.cuh",
        "«if (restart_[e]) c_[o][e] = 0.f;»",
        "",
        "states are zero behind a cut",
        _each(cut, _FUSED),
    ),
    Mutation(
        "a reset keeps h",
        "cuda/forward_tile.cuh",
        "h[o][e] = «restart_[e] ? 0.f : h_[o][e]»;",
        "h_[o][e]",
        "states are zero behind a cut",
        _each(cut, _FUSED),
    ),
    Mutation(
        "resets one step late",
        "cuda/forward_tile.cuh",
        "restart_[e] = n + 1 < run_.end && «restarts(n + 1, e)»;",
        "restarts(n, e)",
        "states are zero before the marked step",
        _each(cut, _FUSED),
    ),
    Mutation(
        "resets of the reverse direction at the wrong step",
        "cuda/sequences.cuh",
        "const int cut = «reverse ? t + 1 : t»;",
        "t",
        "the cut lies between the marked step and the one before it in time",
        _each(cut, _ALL),
    ),
    Mutation(
        "d_h goes through a reset",
        "cuda/backward_tile.cuh",
        "d_h_[o][e] = «restarted_[e] ? 0.f : product[o][e]»;",
        "product[o][e]",
        "nothing flows through a cut",
        _each(cut, _FUSED),
    ),
    Mutation(
        "d_c goes through a reset",
        "cuda/backward_tile.cuh",
        "d_c_[o][e] = «restarts_[e] ? 0.f : d_c»;",
        "d_c",
        "nothing flows through a cut",
        _each(cut, _FUSED),
    ),
    Mutation(
        "the forget gate's gradient sees c from before a reset",
        "cuda/backward_tile.cuh",
        "«if (restarts_[e]) c_before = 0.f;»",
        "",
        "c was zero",
        _each(cut, _FUSED),
    ),
    # Cells.
    Mutation(
        "b_hh is left out",
        "cuda/forward_tile.cuh",
        "+ «E::load(static_cast<const Storage*>(run_.b_hh)[at])»;",
        "0.f",
        "it is added to b_ih",
        _FUSED,
    ),
    Mutation(
        "the first step's c_{t-1} is not c_0",
        "cuda/backward_tile.cuh",
        "«if (first) c_before = state(run_.c_0, o, e);»",
        "",
        "there is no step before it",
        _FUSED,
    ),
    Mutation(
        "c_{t-1} is c_t",
        "cuda/backward_tile.cuh",
        "cells(o, «n + 1»)[cell];",
        "n",
        "the forget gate's gradient is another",
        _FUSED,
    ),
    Mutation(
        "d_y is left out",
        "cuda/backward_tile.cuh",
        "«if (run_.d_y != nullptr) d_h += E::load(gates[kGates * kCellsOfTile + cell]);»",
        "",
        "it is part of the gradient of h",
        _FUSED,
    ),
    Mutation(
        "d_c_n is left out",
        "cuda/backward_tile.cuh",
        "carried(run_.carried_d_c, o, e) : «state(run_.d_c_n, o, e)»;",
        "0.f",
        "it is where the gradient of c begins",
        _FUSED,
    ),
    Mutation(
        "persistent d_h_0 without the last product",
        "cuda/persistent_backward.cu",
        "const int last_product = «run.d_h_0 == nullptr» &&",
        "true",
        "it is W_hh^T times the first step's gradients",
        (PERSISTENT,),
    ),
    Mutation(
        "resident d_h_0 without the last product",
        "cuda/resident.cu",
        "const int last_product = «run.d_h_0 == nullptr» &&",
        "true",
        "it is W_hh^T times the first step's gradients",
        (RESIDENT,),
    ),
    # The stepwise family.
    Mutation(
        "step by step: h_n is not stored",
        "cuda/step_cells.cuh",
        "«if (last) store<E>(p.run.h_n, x.in_rows_of(p.outputs), h);»",
        "",
        "it stays h_0",
        _STEPS,
    ),
    Mutation(
        "step by step: a reset keeps h",
        "cuda/step_cells.cuh",
        "if («!last && order.restarts(p.sequences, time_of(p, p.n + 1), x.b, length)»)",
        "false",
        "states are zero behind a cut",
        _each(cut, _STEPS),
    ),
    Mutation(
        "step by step: d_c goes through a reset",
        "cuda/step_cells.cuh",
        "«if (restarts_) clear(d_c_);»",
        "",
        "nothing flows through a cut",
        _each(cut, _STEPS),
    ),
    Mutation(
        "step by step: gradients come from behind the end",
        "cuda/step_cells.cuh",
        "if («before >= length») {",
        "p.n == 0",
        "the product of a step that a column does not have is not its gradient",
        (*_each(ragged, _STEPS), packed(STEPWISE)),
    ),
    Mutation(
        "stepwise: an element behind the last",
        "cuda/stepwise.cu",
        "const Place x = own_place<V>(p.hidden);\n  if («x.i >= p.hidden») return;\n  ForwardCells",
        "x.i > p.hidden",
        "threads behind the last element write into the next row",
        (STEPWISE,),
    ),
    Mutation(
        "stepwise: the parts of a row overlap",
        "cuda/elementwise.cuh",
        "«(block_index() - row * blocks_of_row) * block_threads()» + thread_index()) * V};",
        "(block_index() - row * blocks_of_row) * kWarpThreads",
        "elements at the end of a long row are not computed",
        (replace(STEPWISE, H=300, T=2, D=1), replace(STEPWISE, H=1200, T=2, D=1, B=3)),
    ),
    Mutation(
        "stepwise: several elements at a time where rows do not allow it",
        "cuda/stack.cpp",
        "return «p.H % elements == 0 && p.P % elements == 0» &&\n         begin_aligned",
        "true",
        "rows begin at addresses that such loads do not take",
        (STEPWISE, PROJECTED),
    ),
    Mutation(
        "who begins does not wait for others",
        "cuda/persistent_forward.cu",
        "if (initial_ >> tile & 1) «states_.wait(tile);»",
        "",
        "where all columns of a tile begin, a CTA overwrites what others still read",
        (replace(SMALL, T=7, B=8, H=32, D=2, lengths=(2,) * 8), replace(SMALL, T=7, B=8, H=32, D=2, lengths=(5,) * 8)),
    ),
    # Projections in the recurrent weights.
    Mutation(
        "folded: h_0 is not read",
        "cuda/projection.cu",
        "for (int v = 0; v < V; ++v) «sum[v] += product[v];»\n  store<E>(p.gates_x",
        "",
        "the first step multiplies it",
        FOLDED,
    ),
    Mutation(
        "folded: a first step that begins anew reads h_0",
        "cuda/projection.cu",
        "t >= p.end || «order.restarts(p.sequences, t, x.b, length)») return;",
        "false",
        "the sequence is cut before it",
        _each(cut, FOLDED),
    ),
    Mutation(
        "folded: columns begin together",
        "cuda/projection.cu",
        "t = p.reverse ? «length - 1» : 0;",
        "p.sequences.steps - 1",
        "in reverse, they begin at their own ends",
        (*_each(ragged, FOLDED), *_each(packed, FOLDED)),
    ),
    Mutation(
        "folded: h_0 in each run",
        "cuda/projection.cu",
        "length == 0 || «t < p.begin || t >= p.end» ||",
        "false",
        "a run has the gates of its own steps",
        FOLDED_RUNS,
    ),
    Mutation(
        "folded: columns without steps have no h_n",
        "cuda/projection.cu",
        "if («length == 0»)\n    load<E>(p.h_0",
        "false",
        "it is h_0",
        _each(ragged, FOLDED),
    ),
    Mutation(
        "folded: columns end together",
        "cuda/projection.cu",
        "row_of(p.sequences, p.reverse ? 0 : «length - 1», x.b) * p.y_stride",
        "p.sequences.steps - 1",
        "they end at their own ends",
        _each(ragged, FOLDED),
    ),
    Mutation(
        "folded: no d_h_n",
        "cuda/projection.cu",
        "for (int v = 0; v < V; ++v) «d_h[v] += d_h_n[v];»",
        "",
        "the last output is h_n, too",
        FOLDED,
    ),
    Mutation(
        "folded: d_h_n at each step",
        "cuda/projection.cu",
        "if («Order{p.reverse}.last(x.t, x.length)») {",
        "true",
        "the last output alone is h_n",
        FOLDED,
    ),
    Mutation(
        "folded: gradients pass a cut",
        "cuda/projection.cu",
        "if («!order.restarts(s, next, x.b, x.length)») {",
        "true",
        "behind it, nobody read what was put out before",
        _each(cut, FOLDED),
    ),
    Mutation(
        "folded: the gradient of W_hr without what comes from the next steps",
        "cuda/projection.cu",
        "for (int v = 0; v < V; ++v) «d_h[v] += product[v];»",
        "",
        "they read what was put out",
        FOLDED,
    ),
    Mutation(
        "folded: d_h_0 of a step that begins anew",
        "cuda/projection.cu",
        "if («order.restarts(s, x.t, x.b, x.length)»)\n      clear(product);",
        "false",
        "it has not read h_0",
        _each(cut, FOLDED),
    ),
    Mutation(
        "folded: columns without steps have no d_h_0",
        "cuda/projection.cu",
        "load_or_clear<E>(«p.d_h_n», initial, d_h);",
        "nullptr",
        "h_0 is h_n",
        _each(ragged, FOLDED),
    ),
    Mutation(
        "folded: hidden states of another gate",
        "cuda/projection.cu",
        "(x.row * kGates + «3») * p.hidden",
        "2",
        "the output gate lets them through",
        FOLDED,
    ),
    Mutation(
        "folded: outputs are not projected",
        "cuda/forward.cpp",
        "«multiply(s.element, y, steps.y, s.weights(layer.index, direction).w_hr.t());»",
        "",
        "they are what W_hr makes of hidden states",
        FOLDED,
    ),
    Mutation(
        "folded: rows of padding are as memory was",
        "cuda/forward.cpp",
        "if (s.padded()) «y.masked_fill_(steps.rows.of(s.padding()), 0);»",
        "",
        "they are zero",
        _each(ragged, FOLDED),
    ),
    Mutation(
        "folded: d_hidden of other steps",
        "cuda/gradients.cpp",
        "times = s.times_of_steps(«!reverse», begin, end);\n  GivenGradientsParams",
        "true",
        "in reverse, a backward pass goes forward in time",
        FOLDED_RUNS,
    ),
    # Steps with more than the cell.
    Mutation(
        "states behind a cut are zero",
        "cuda/step_cells.cuh",
        "load_or_clear<E>(«reset», at, state);",
        "nullptr",
        "they are the given ones",
        (RESET_STATES,),
    ),
    Mutation(
        "the state behind a cut before the first step is zero",
        "cuda/stepwise.cu",
        "load_or_clear<E>(«p.extras.reset_h», at, state);",
        "nullptr",
        "it is the given one",
        (replace(RESET_STATES, resets=0.9),),
    ),
    Mutation(
        "what a step read as h behind a cut is zero",
        "cuda/stepwise.cu",
        "load_or_clear<E>(«p.reset_h», at, h);",
        "nullptr",
        "it is the given state",
        (RESET_STATES,),
    ),
    Mutation(
        "the forget gate's gradient sees zero behind a cut",
        "cuda/step_cells.cuh",
        "restart<E, kExtras>(«p_.extras.reset_c», at, c_before_);",
        "nullptr",
        "c was the given state",
        (RESET_STATES,),
    ),
    Mutation(
        "every step has a part in the gradient of reset states, h",
        "cuda/step_cells.cuh",
        "if («restarts» && p.d_reset_h != nullptr)",
        "true",
        "those that do not restart have none",
        (RESET_STATES,),
    ),
    Mutation(
        "every step has a part in the gradient of reset states, c",
        "cuda/step_cells.cuh",
        "if («restarts_» && p_.d_reset_c != nullptr)",
        "true",
        "those that do not restart have none",
        (RESET_STATES,),
    ),
    Mutation(
        "the first step has no part in the gradient of reset states",
        "cuda/backward.cpp",
        "if («layer.d_h_0.defined() || layer.d_reset_h.defined()»)",
        "layer.d_h_0.defined()",
        "it may restart",
        (replace(RESET_STATES, D=1, resets=0.9, needs=(True, False, True)),),
    ),
    Mutation(
        "gradients of reset states are added to anything",
        "cuda/backward.cpp",
        "«s.empty_compute({p.layers * p.directions, p.B, features}).zero_()»",
        "s.empty_compute({p.layers * p.directions, p.B, features})",
        "they are sums",
        (RESET_STATES,),
    ),
    Mutation(
        "h_0 is not masked",
        "cuda/stepwise.cu",
        "«multiply_by<E>(p.extras.recurrent_mask, at, state);»",
        "",
        "the first product reads it with factors",
        (MASKED,),
    ),
    Mutation(
        "h is not masked",
        "cuda/step_cells.cuh",
        "«multiply_by<E>(p.extras.recurrent_mask, x.in_rows_of(p.outputs), h);»",
        "",
        "the product reads it with factors",
        _MASKED,
    ),
    Mutation(
        "the gradient of h is not masked",
        "cuda/step_cells.cuh",
        "«multiply_by<E>(p.extras.recurrent_mask, at, d_h);»",
        "",
        "the product read h with factors",
        _MASKED,
    ),
    Mutation(
        "what a step read as h is not masked",
        "cuda/stepwise.cu",
        "«multiply_by<E>(p.recurrent_mask, at, h);»",
        "",
        "the product read it with factors",
        (MASKED,),
    ),
    Mutation(
        "the gradient of W_hh takes rows of y that were masked",
        "cuda/gradients.cpp",
        "«!s.recurrent_mask.defined()»",
        "true",
        "the product read them with factors",
        (MASKED,),
    ),
    Mutation(
        "zoneout keeps h_0 only if there is any",
        "cuda/stepwise.cu",
        "«store_state<E>(p.kept_h, at, state);»",
        "",
        "nobody else puts it there",
        (ZONED,),
    ),
    Mutation(
        "zoneout keeps h_0 for ever",
        "cuda/step_cells.cuh",
        "«store_state<E>(p.kept_h, at, h);»",
        "",
        "it keeps the state of the step before",
        (ZONED,),
    ),
    Mutation(
        "zoneout keeps h from before a cut",
        "cuda/step_cells.cuh",
        "if («Order{p.run.reverse}.restarts(p.sequences, t, x.b, length_of(p.sequences, x.b))»)",
        "false",
        "it keeps the state behind the cut",
        (cut(ZONED), replace(RESET_STATES, zoneout=(0.3, 0))),
    ),
    Mutation(
        "zoneout of another step's rows",
        "cuda/step_cells.cuh",
        "zone_out(p.extras.zoneout_h, «row_of(p.sequences, t, x.b) * p.outputs + x.i», before, h);",
        "x.in_rows_of(p.outputs)",
        "each step has elements of its own",
        (ZONED,),
    ),
    Mutation(
        "zoneout adds what it keeps",
        "cuda/step_cells.cuh",
        "now[v] = kept * before[v] + «(1 - kept) * now[v]»;",
        "now[v]",
        "the parts make one",
        (ZONED, RATES),
    ),
    Mutation(
        "zoneout forgets c",
        "cuda/step_cells.cuh",
        "«zone_out(p_.extras.zoneout_c, at_row, c_before, c_);»",
        "",
        "it keeps c too",
        (ZONED,),
    ),
    Mutation(
        "h comes from what zoneout made of c",
        "cuda/step_cells.cuh",
        "cell_output<typename E::Math>(a[3][v], «c[v]»);",
        "c_[v]",
        "it comes from what the cell made",
        (ZONED,),
    ),
    Mutation(
        "the gradient of kept h is lost",
        "cuda/step_cells.cuh",
        "for (int v = 0; v < V; ++v) d_h[v] += «kept[v]»;",
        "0",
        "it goes past the cell",
        _ZONED,
    ),
    Mutation(
        "the cell gets the gradient of kept h",
        "cuda/step_cells.cuh",
        "«d_h[v] -= kept[v];»",
        "",
        "it made nothing of it",
        _ZONED,
    ),
    Mutation(
        "the gradient of kept c is lost",
        "cuda/step_cells.cuh",
        "d_c_[v] += «kept_d_c_[v]»;",
        "0",
        "it goes past the cell",
        _ZONED,
    ),
    Mutation(
        "the cell gets the gradient of kept c",
        "cuda/step_cells.cuh",
        "«d_c_[v] -= kept_d_c_[v];»",
        "",
        "it made nothing of it",
        _ZONED,
    ),
    Mutation(
        "the gradient of h goes through what zoneout made of c",
        "cuda/step_cells.cuh",
        "«c_[v] = g[1][v] * c_before_[v] + g[0][v] * g[2][v];»",
        "",
        "h came from what the cell made",
        _ZONED,
    ),
    Mutation(
        "cell states are not stored",
        "cuda/forward.cpp",
        "if (of_layer >= 0) «cell_states[0].narrow(0, of_layer, p.directions).copy_(layer.cells);»",
        "",
        "the caller gets them",
        (CELLS,),
    ),
    Mutation(
        "cell states of the wrong layer",
        "cuda/forward.cpp",
        "of_layer = «layer.index * p.directions - states + returned»;",
        "(p.layers - 1 - layer.index) * p.directions",
        "they are in the order of layers",
        (CELLS,),
    ),
    Mutation(
        "gradients of cell states for the wrong layer",
        "cuda/backward.cpp",
        "first_returned = «(l - p.layers + cell_layers) * p.directions»;",
        "(p.layers - 1 - l) * p.directions",
        "they are in the order of layers",
        (CELLS,),
    ),
    Mutation(
        "gradients of cell states are lost",
        "cuda/step_cells.cuh",
        "d_c_[v] += «d_cells[v]»;",
        "0",
        "they are part of that of c",
        (CELLS,),
    ),
    Mutation(
        "cell states of no step are left as they were",
        "cuda/forward.cpp",
        "if (returned > 0 && s.padded()) «cell_states[0].masked_fill_(s.padding(), 0);»",
        "",
        "they are zero",
        (ragged(CELLS),),
    ),
    # Gates computed again, and gradients in groups.
    Mutation(
        "cell states are saved with gates only",
        "cuda/forward_tile.cuh",
        "if («run_.cells» == nullptr) continue;",
        "run_.gates",
        "the backward pass reads them",
        _each(again, _FUSED),
    ),
    Mutation(
        "step by step: cell states are saved with gates only",
        "cuda/step_cells.cuh",
        "if («p_.run.cells» != nullptr) store_state",
        "p_.run.gates",
        "the backward pass reads them",
        _each(again, _STEPS),
    ),
    Mutation(
        "gates again without b_hh",
        "cuda/stepwise.cu",
        "for (const void* bias : {p.b_ih, «p.b_hh»}) {",
        "p.b_ih",
        "it is added to b_ih",
        _each(again, _ALL),
    ),
    Mutation(
        "gates again without h",
        "cuda/gradients.cpp",
        "multiply(s.element, products, layer.read_h[d], w.w_hh.t(), «true»);",
        "false",
        "they are those of x and h",
        _each(again, _ALL),
    ),
    Mutation(
        "gates again of the other direction",
        "cuda/gradients.cpp",
        "layer.read_h[d] = read_h(s, layer, «d»);",
        "0",
        "each reads its own h",
        _each(again, _ALL),
    ),
    Mutation(
        "gates again without dropout",
        "cuda/gradients.cpp",
        "const Tensor input = «s.input_of_layer(layer.index, layer.below, {0, p.N})»;\n  for (int64_t d",
        "layer.below",
        "the layer read dropped outputs",
        (again(DEEP), again(LAYERS[0])),
    ),
    Mutation(
        "groups of the wrong rows",
        "cuda/stack.cpp",
        "return «t.view({p.T, groups, rows, features}).transpose(0, 1)».reshape",
        "t.view({groups, p.T, rows, features})",
        "a group has its rows of each step",
        (GROUPED,),
    ),
    Mutation(
        "the gradient of W_hh in one group",
        "cuda/gradients.cpp",
        "&& «s.groups == 1») {",
        "true",
        "each group has its own",
        (GROUPED,),
    ),
    # Normalised gates.
    Mutation(
        "products with x are not normalised",
        "cuda/forward.cpp",
        "«s.normalize(steps.gates_x, pointer(layer.rstd, state));»",
        "",
        "gates are made of norms",
        (NORMAL,),
    ),
    Mutation(
        "each kind of product has the other's gain",
        "cuda/layer_norm.cu",
        "«load_one<E>(weights.gain_hh, at)» * norm_hh[gate]",
        "load_one<E>(weights.gain_ih, at)",
        "it has its own",
        (NORMAL,),
    ),
    Mutation(
        "a sum over a row of its first warp",
        "cuda/layer_norm.cu",
        "for (int warp = 0; warp < «warps»; ++warp)",
        "1",
        "a row has two",
        (NORMAL,),
    ),
    Mutation(
        "sums over a row without their barrier",
        "cuda/layer_norm.cu",
        "«block_barrier();»\n    clear(values);",
        "",
        "a warp reads what others are yet to write",
        (NORMAL,),
    ),
    Mutation(
        "all sums over a row in one place",
        "cuda/layer_norm.cu",
        "«place_ += warps * Count;»",
        "",
        "a warp writes what others are yet to read",
        (NORMAL,),
    ),
    Mutation(
        "squares about zero",
        "cuda/layer_norm.cu",
        "const T deviation = «element(i) - mean»;",
        "element(i)",
        "a variance is about the mean",
        (NORMAL,),
    ),
    Mutation(
        "norms without epsilon",
        "cuda/layer_norm.cu",
        "/ T(width) + «T(kNormEpsilon)»",
        "T(0)",
        "a row of zeros has none other",
        (cut(NORMAL),),
    ),
    Mutation(
        "h comes from c itself",
        "cuda/layer_norm.cu",
        "load_one<E>(p.norm.gain_c, unit) * «norm_c.of(c[unit])»",
        "c[unit]",
        "it comes from its norm",
        (NORMAL,),
    ),
    Mutation(
        "h comes from the norm of what zoneout made of c",
        "cuda/layer_norm.cu",
        "c[unit] = «made[0]»;",
        "load_one<Full<T>>(p.c, static_cast<int64_t>(b) * H + unit)",
        "it comes from what the cell made",
        (replace(NORMAL, zoneout=(0, 0.2)),),
    ),
    Mutation(
        "the gradient of c sees the norm of what zoneout made of it",
        "cuda/layer_norm.cu",
        "c[unit] = «cells.c()[0]»;",
        "load_one<Full<T>>(p.run.cells, row_of(p.sequences, t, b) * H + unit)",
        "h came from what the cell made",
        (replace(NORMAL, zoneout=(0, 0.2)),),
    ),
    Mutation(
        "gradients through norms without their mean",
        "cuda/layer_norm.cu",
        "return («d - mean» - norm * mean_of_products) * rstd;",
        "d",
        "each element is in the mean",
        (NORMAL,),
    ),
    Mutation(
        "gradients through norms without their variance",
        "cuda/layer_norm.cu",
        "«norm * mean_of_products») * rstd",
        "T(0)",
        "each element is in the variance",
        (NORMAL,),
    ),
    Mutation(
        "the gradient of the norm of c without its gain",
        "cuda/layer_norm.cu",
        "d[unit] = «gain * d_m»;",
        "d_m",
        "tanh is taken of gain times norm",
        (NORMAL,),
    ),
    Mutation(
        "the gradient of the gain of c with the gain in it",
        "cuda/layer_norm.cu",
        "store_one<E>(p.d_norm_c, row * H + unit, «d_m»);",
        "gain * d_m",
        "that of a factor is the other one's",
        (NORMAL,),
    ),
    Mutation(
        "gradients of gates are divided before all are there",
        "cuda/layer_norm.cu",
        "«block_barrier();»  // from here on",
        "",
        "other threads have made some of them",
        (NORMAL,),
    ),
    Mutation(
        "a column without the step goes back through norms",
        "cuda/layer_norm.cu",
        "if («t >= length_of(s, b)») return;",
        "false",
        "what lies there is no gradient",
        (PADDED,),
    ),
    Mutation(
        "gains of padding",
        "cuda/gradients.cpp",
        "return s.sum_of_rows(«s.padded()» ? s.without_padding",
        "false",
        "norms of no step are anything, NaN too",
        (PADDED,),
    ),
    Mutation(
        "W_hh gets gradients of pre-activations",
        "cuda/backward.h",
        "return «d_products_hh[direction].defined()» ? d_products_hh",
        "false",
        "its products were normalised",
        (NORMAL,),
    ),
    Mutation(
        "norms of h are scaled as those of x",
        "cuda/forward.cpp",
        "params.rstd_hh = pointer(layer.rstd, «p.layers * p.directions + state»);",
        "state",
        "each row has its own scale",
        (NORMAL,),
    ),
    Mutation(
        "norms again: of h as those of x",
        "cuda/gradients.cpp",
        "s.normalize(layer.norm_hh[d], «layer.rstd_hh[d]».data_ptr());",
        "layer.rstd_ih[d]",
        "each row has its own scale",
        (again(NORMAL),),
    ),
    # The streamed family.
    Mutation(
        "streamed forward without its barrier",
        "cuda/streamed.cu",
        "of_tile[i % Octets * 2 + 1]);\n    }\n    «block_barrier();»",
        "",
        "sums are added before all warps have put theirs",
        (STREAMED,),
    ),
    Mutation(
        "streamed backward without its barrier",
        "cuda/streamed.cu",
        "i % Octets % 2);\n    «block_barrier();»",
        "",
        "sums are added before all warps have put theirs",
        (STREAMED,),
    ),
    Mutation(
        "streamed: a warp leaves out every second block",
        "cuda/streamed.cu",
        "for (int first = warp; first < blocks; first += «kAtOnce * kTeamWarps»)",
        "2 * kAtOnce * kTeamWarps",
        "the product is over all of K",
        (replace(STREAMED, H=300, T=2), replace(STREAMED, H=80, forward_shape=(), backward_shape=())),
    ),
    Mutation(
        "streamed: columns behind the batch",
        "cuda/streamed.cu",
        "return i < Octets * Tiles && x.i < hidden_ && «x.b < batch_»;",
        "true",
        "there is no such row",
        (STREAMED,),
    ),
    Mutation(
        "streamed: units behind the last",
        "cuda/streamed.cu",
        "return i < Octets * Tiles && «x.i < hidden_» &&",
        "true",
        "they are the next row's",
        (STREAMED,),
    ),
    Mutation(
        "streamed: a column that has not begun loses its h",
        "cuda/streamed.cu",
        "«static_cast<Storage*>(p.h)[h] = static_cast<const Storage*>(p.h_before)[h];»",
        "",
        "in reverse, a shorter sequence begins later",
        (ragged(STREAMED),),
    ),
    Mutation(
        "streamed: second tiles of a warp are left out",
        "cuda/streamed.cu",
        "for (int i = warp; i < CellTiles; i += «kTeamWarps»)",
        "CellTiles",
        "a warp may have the cells of two",
        (replace(STREAMED, B=64, T=2, forward_shape=(2, 8), backward_shape=(4, 8)),),
    ),
    Mutation(
        "streamed: states come from the buffer that is written",
        "cuda/forward.cpp",
        "params.h_before = h[«n % 2»].data_ptr();",
        "(n + 1) % 2",
        "other CTAs still read it",
        (STREAMED,),
    ),
    Mutation(
        "streamed: gradients come from the buffer that is written",
        "cuda/backward.cpp",
        "params.gradients_before = gradients[«(n + 1) % 2»].data_ptr();",
        "n % 2",
        "other CTAs still read it",
        (STREAMED,),
    ),
    Mutation(
        "streamed: no launch for d_h_0",
        "cuda/backward.cpp",
        "launches = «layer.d_c_0.defined()» ? steps + 1 : steps;",
        "false",
        "it is the product of the last step",
        (STREAMED,),
    ),
    Mutation(
        "streamed: d_h of the other octet",
        "cuda/streamed.cu",
        "sums[i / Octets][«i % Octets / 2»], i % Octets % 2);",
        "0",
        "a CTA of four octets has two MMA tiles of them",
        (replace(STREAMED, backward_shape=(4, 4)),),
    ),
    Mutation(
        "what a step read as h, in reverse",
        "cuda/stepwise.cu",
        "load<E>(p.y, row_of(s, «p.reverse ? t + 1 : t - 1», b)",
        "t - 1",
        "it is the output of the step after it in time",
        (cut(STEPWISE), ragged(STEPWISE)),
    ),
    # The driver.
    Mutation(
        "the biases' gradients are one tensor",
        "cuda/gradients.cpp",
        "«needed(2) ? d_bias.clone() : d_bias»;",
        "d_bias",
        "who changes one in place changes the other",
        (STEPWISE,),
    ),
    Mutation(
        "gradients do not go through the dropout",
        "cuda/backward.cpp",
        "d_y_of_layer = «s.input_of_layer(lowest.index, d_input, {0, p.N})»;",
        "d_input",
        "dropped outputs have no gradient",
        (DEEP,),
    ),
    Mutation(
        "outputs of no step are left as they were",
        "cuda/forward.cpp",
        "«if (s.padded()) out.zero_();»",
        "",
        "they are zero",
        (ragged(STEPWISE),),
    ),
    Mutation(
        "gradients of no step are left as they were",
        "cuda/backward.cpp",
        "«if (t->defined()) t->zero_();»",
        "",
        "the products over all steps take them in",
        (ragged(PERSISTENT),),
    ),
    Mutation(
        "padding reaches the gradient of W_ih",
        "cuda/gradients.cpp",
        "«if (s.padded() && layer.index == 0) input = s.without_padding(input);»",
        "",
        "0 * NaN",
        (replace(ragged(STEPWISE), nan_at=("x", 2)),),
    ),
    Mutation(
        "the gradient of W_hh takes h_0 for the wrong step",
        "cuda/gradients.cpp",
        "d_gates.narrow(0, «reverse ? others : 0», p.B).t(),",
        "0",
        "in reverse, the last step in time reads it",
        (PERSISTENT,),
    ),
    Mutation(
        "the gradient of W_hh takes y of the wrong steps",
        "cuda/gradients.cpp",
        "y.narrow(0, «reverse ? p.B : 0», others)",
        "0",
        "in reverse, a step reads the output of the step after it in time",
        (PERSISTENT,),
    ),
    Mutation(
        "d_x has the second direction only",
        "cuda/backward.cpp",
        "lowest.d_gates[d], s.weights(lowest.index, d).w_ih, «d > 0»);",
        "false",
        "it is the sum of both",
        (PERSISTENT,),
    ),
    Mutation(
        "W_hr is applied to the rows of another step",
        "cuda/gradients.cpp",
        "s.gradient(«layer.d_outputs[d]», layer.hidden_states[d]);",
        "layer.d_outputs[d].roll(1, 0)",
        "a step's gradient belongs to its own hidden state",
        (PROJECTED,),
    ),
    # Products of warpgroups.
    Mutation(
        "warpgroup forward without its barrier",
        "cuda/warpgroup_forward.cu",
        "  // the next step's\n    «block_barrier();»\n    if (has_cells) {",
        "",
        "sums are added before both warpgroups have put theirs",
        (WARPGROUP,),
    ),
    Mutation(
        "warpgroup sums of every step in one place",
        "cuda/warpgroup_forward.cu",
        "sums_memory + «(n & 1)» * Sums::kVectors",
        "0",
        "sums are overwritten that another warp still adds",
        (HALVES,),
    ),
    Mutation(
        "warpgroup forward in one buffer",
        "cuda/warpgroup_forward.cu",
        "(2 * team + «(n & 1)») * Tiles * tile_vectors",
        "0",
        "states are overwritten that others still load",
        (WARPGROUP,),
    ),
    Mutation(
        "warpgroup forward waits for the wrong tag",
        "cuda/warpgroup_forward.cu",
        "states.set(buffer(n), «tag_of(n)»);",
        "tag_of(n + 2)",
        "a tag alternates every second step",
        (WARPGROUP,),
    ),
    Mutation(
        "factors without a fence",
        "cuda/warpgroup.cuh",
        "arrive(round, slot);\n    «fence_factors();»",
        "",
        "products do not see what ordinary stores have written",
        (WARPGROUP,),
    ),
    Mutation(
        "factors without a barrier",
        "cuda/warpgroup.cuh",
        "«warpgroup_barrier(warpgroup);»\n    products_begin();",
        "",
        "other warps have not stored their factors yet",
        (WARPGROUP,),
    ),
    Mutation(
        "products of a ring are not waited for",
        "cuda/warpgroup.cuh",
        "if («Slots < Rounds && round > 0») products_wait();",
        "false",
        "factors are overwritten that a product still reads",
        (RING,),
    ),
    Mutation(
        "warpgroup forward does not wait for products",
        "cuda/warpgroup_forward.cu",
        "cells.begin(n, a);\n    «products_wait();»",
        "",
        "sums are put away before they are there",
        (WARPGROUP,),
    ),
    Mutation(
        "warpgroup products begin without saying so",
        "cuda/warpgroup.cuh",
        "warpgroup_barrier(warpgroup);\n    «products_begin();»",
        "",
        "registers of products have been written",
        (WARPGROUP,),
    ),
    Mutation(
        "a NaN of h stays a number",
        "cuda/warpgroup_forward.cu",
        "return value | «((value + (0x3fffu - E::kOne)) & TagOfH::kBits)»;",
        "0",
        "the unit whose tag it shares hands on a number below 2",
        (replace(WARPGROUP, D=1, nan_at=("c_0", 6)),),
    ),
    Mutation(
        "a cut does not reach h of a warpgroup",
        "cuda/warpgroup_forward.cu",
        "if (first && Base::exists(round, i) && «!order.restarts(p_.sequences, t, b, length)»)",
        "true",
        "a sequence can be cut before its first step",
        (cut(WARPGROUP), cut(ragged(WARPGROUP))),
    ),
    Mutation(
        "a run of warpgroups begins with h_0",
        "cuda/warpgroup_forward.cu",
        "begins_run ? «initial_h(run_)» : run_.h_0",
        "run_.h_0",
        "later runs begin with what the run before has made",
        (replace(WARPGROUP, T=13, forward_shape=(0, 0, 0, 0, 4)),),
    ),
    Mutation(
        "copies of inputs overtake those who read",
        "cuda/warpgroup_forward.cu",
        "if («kOwnOctets > 1») warp_barrier();",
        "false",
        "other lanes have not read the stage yet",
        (WARPGROUP_TF32,),
    ),
    Mutation(
        "CTAs without units take no sums",
        "cuda/warpgroup_backward.cu",
        "if («own_tile < Tiles») {",
        "has_cells",
        "they run ahead and overwrite sums that others wait for",
        (WARPGROUP,),
    ),
    Mutation(
        "warpgroup backward without its barrier",
        "cuda/warpgroup_backward.cu",
        "d_gates[o]);\n    }\n    «block_barrier();»",
        "",
        "factors are overwritten that a product still reads",
        (WARPGROUP, replace(WARPGROUP, B=60, backward_shape=(2, 8))),
    ),
    Mutation(
        "a part of K has the weights of another",
        "cuda/warpgroup_backward.cu",
        "part = «part_of_k * kWarpgroups + at.warpgroup», first_block",
        "part_of_k * kWarpgroups",
        "each warpgroup has its own part",
        (WARPGROUP,),
    ),
    Mutation(
        "sums of units in one buffer",
        "cuda/warpgroup_backward.cu",
        "(2 * team + «(n & 1)») * ctas * Tiles",
        "0",
        "sums are overwritten that another CTA still waits for",
        (WARPGROUP,),
    ),
    Mutation(
        "inputs of the last step but one are taken for granted",
        "cuda/warpgroup_backward.cu",
        "«copy_async_wait<kBackwardStages - 3>();»  // this step's and the next step's\n      warp_barrier();",
        "copy_async_wait<kBackwardStages - 2>();",
        "the cell state of the next step may be on its way",
        (WARPGROUP,),
    ),
    Mutation(
        "gradients with a bit of their tag",
        "cuda/warpgroup_backward.cu",
        "publish_gradients<E>(opaque(buffer(n) + own_tile * tile_vectors), first_octet + o, at.lane, «tag_of(n)»",
        "tag_of(n + 2)",
        "a tag alternates every second step",
        (WARPGROUP,),
    ),
]


# ---------------------------------------------------------------------------------------------------- planting


def planted(file: str, text: str, mutations: Sequence[Mutation]) -> str:
    """``text`` with all mutations of the file, each behind a switch with its number in ``mutations``."""
    by_span: dict[tuple[int, int], list[int]] = {}
    for number, mutation in enumerate(mutations):
        if mutation.file == file:
            by_span.setdefault(mutation.span(text), []).append(number)
    if not by_span:
        return text
    end = len(text)
    for (first, last), numbers in sorted(by_span.items(), reverse=True):
        if last > end:
            raise ValueError(f"mutations overlap in {file}: {text[first:last]}")
        end = first
        switched = old = text[first:last]
        for number in numbers:
            new = mutations[number].new
            if old.endswith(";"):
                switched = f"if (mutated({number})) {{ {new} }} else {{ {switched} }}"
            else:
                switched = f"(mutated({number}) ? ({new}) : ({switched}))"
        text = text[:first] + switched + text[last:]
    return f'#include "mutation_switch.h"\n{text}'


def build(mutations: Sequence[Mutation] = MUTATIONS) -> Path:
    """Build the library that has all mutations."""
    built = emulated.ROOT / "build" / "host_cuda"
    if not (TREE / "build").exists() and built.exists():
        with emulated.alone_in(built):
            shutil.copytree(built, TREE / "build" / "host_cuda")  # what has no mutation needs no other build
    wanted = set()
    for source in (*(emulated.ROOT / "csrc").rglob("*"), *(emulated.ROOT / "tests/host_cuda").iterdir()):
        if source.suffix not in (".cpp", ".cu", ".cuh", ".h"):
            continue
        name = source.relative_to(emulated.ROOT)
        text = source.read_text()
        changed = planted(name.as_posix().removeprefix("csrc/"), text, mutations)
        copy = TREE / name
        wanted.add(copy)
        if copy.exists() and copy.read_text() == changed:
            continue  # and stays as old as it is
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(changed)
        if changed == text:
            shutil.copystat(source, copy)
    for folder in ("csrc", "tests"):
        for path in (TREE / folder).rglob("*"):
            if path.is_file() and path not in wanted:
                path.unlink()
    return emulated.build(TREE)


# ---------------------------------------------------------------------------------------------------- running


def first_failure(cases: Sequence[Case], rounds: int) -> str:
    """What goes wrong first in the cases under different seeds, or an empty string."""
    for seed in range(rounds):
        for case in cases:
            try:
                check(replace(case, seed=seed, data_seed=seed))
            except Exception as error:  # whatever it is, it is noticed
                return str(error).partition("): ")[2] or str(error)
    return ""


def _run(library: Path, number: int, cases: Sequence[Case], rounds: int, result: Connection) -> None:
    torch.set_num_threads(1)
    emulated.load(library).emulated_mutate(number)
    result.send(first_failure(cases, rounds))


def run(library: Path, number: int, cases: Sequence[Case], rounds: int = ROUNDS) -> str:
    """:func:`first_failure` with one mutation, in a process of its own: it may damage memory or never end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "fastlstm"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(library, number, cases, rounds, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(SECONDS):
            return f"no end after {SECONDS} seconds"
        return receiver.recv()
    except EOFError:
        process.join()
        return f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
