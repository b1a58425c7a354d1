"""Threads that do the shares of a call together, and sleep when there is nothing to do.

Those of OpenMP look for work for milliseconds before they sleep, and so does who waits for them. Where
another program wants a core, the system then takes one from a thread that is at work while others only look:
beside one busy program rounds took up to ten times as long. These look for about as long as a round pauses
between two passes, then sleep. Who shares a call out does not wait for threads that have not come: it does
their shares.

Importing this module starts no thread.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from threading import Lock, Thread
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .atomics import LINE, WORD, added, exchanged, place_at, seen
from .jit import Function, compiled, entry, external, type_of

__all__ = ["has_failed", "in_parallel", "let_others_run", "use_threads"]

_JOBS, _STOPS, _THREADS, _SLEEPING, _INSIDE, _NEXT, _DONE, _FAILED, _BUSY, _SHARE, _ARGUMENTS, _COUNT = (
    LINE * line for line in range(12)
)
"""Where in the table stand: jobs begun and ended; whether threads are to end; how many do shares, with the
one that shares out; how many sleep, and how many look into the job; the next share, shares done, and whether
one failed; whether somebody shares out; the job's function, its arguments and its shares."""

_LOOKS = 2000
"""How often a thread looks before it sleeps: a look is a pause of 10 to 40 nanoseconds. On two cores 1,000 to
16,000 did alike with nothing else to run, and the fewer the better beside another program."""
_NAP, _LONGEST_NAP = 20, 10_000
"""Microseconds."""

_SYMBOL = "speculative_eft_threads"
_FUTEX = {"x86_64": 202, "aarch64": 98}.get(os.uname().machine if sys.platform == "linux" else "")
"""Linux' system call to sleep until a number changes. Elsewhere threads without work look now and then, the
less often the longer they have none."""
_FUTEX_WAIT, _FUTEX_WAKE = 128, 129

_table = np.zeros(12 * LINE, np.int64)
llvm.add_symbol(_SYMBOL, _table.ctypes.data)
_workers: list[Thread] = []
_starting = Lock()


@intrinsic  # type: ignore[untyped-decorator]
def _place(typing_context: Any, index: Any) -> Any:
    """The address of a number in the table, which compiled code finds by a name: it is kept on disk."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # As a function, since those may be anywhere in memory.
        begin = builder.ptrtoint(external(builder, _SYMBOL, ir.VoidType()), WORD)
        return builder.add(begin, builder.shl(arguments[0], WORD(3)))

    return types.int64(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _pause(typing_context: Any) -> Any:
    """What tells a processor that a loop only looks."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        processor = llvm.get_process_triple().split("-")[0]
        if processor == "x86_64":
            builder.call(external(builder, "llvm.x86.sse2.pause", ir.VoidType()), [])
        elif processor in ("aarch64", "arm64"):
            number = ir.IntType(32)
            # Its instruction `yield`.
            builder.call(external(builder, "llvm.aarch64.hint", ir.VoidType(), number), [number(1)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _system_call(typing_context: Any, address: Any, operation: Any, number: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _FUTEX is not None:
            call = external(builder, "syscall", WORD, *[WORD] * 5)
            builder.call(call, [WORD(_FUTEX), *arguments, WORD(0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _nap(typing_context: Any, microseconds: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.IntType(32)
        microseconds = builder.trunc(arguments[0], number)
        if sys.platform == "win32":
            milliseconds = builder.add(builder.udiv(microseconds, number(1000)), number(1))
            builder.call(external(builder, "Sleep", ir.VoidType(), number), [milliseconds])
        else:
            builder.call(external(builder, "usleep", number, number), [microseconds])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _call_share(typing_context: Any, function: Any, arguments_at: Any, share: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [WORD, WORD])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@compiled("boolean()")
def has_failed() -> Any:
    """Whether a share of the call under way has failed, for which nobody need wait."""
    return seen(_place(_FAILED)) != 0


@compiled("int64(int64)")
def let_others_run(looks: int) -> int:
    """Wait a little, after so many looks; how many there are then.

    A core that sleeps takes over a thread that waits for another one.
    """
    if looks < _LOOKS:
        _pause()
    else:
        _nap(_NAP)
    return looks + 1


@compiled("void(int64, int64, int64)")
def _do_shares(function: int, arguments: int, count: int) -> None:
    share = added(_place(_NEXT), 1)
    while share < count:
        _call_share(function, arguments, share)
        added(_place(_DONE), 1)
        share = added(_place(_NEXT), 1)


@compiled("void(int64, int64, int64)")
def _share_out(function: int, arguments: int, count: int) -> None:
    """Have `function` called for each share of 0..count-1, by all threads.

    Raises MemoryError if one failed, for which there is no other reason.
    """
    if count < 2 or seen(_place(_THREADS)) < 2 or exchanged(_place(_BUSY), 1) != 0:
        for share in range(count):
            _call_share(function, arguments, share)
    else:
        exchanged(_place(_SHARE), function)
        exchanged(_place(_ARGUMENTS), arguments)
        exchanged(_place(_COUNT), count)
        exchanged(_place(_NEXT), 0)
        exchanged(_place(_DONE), 0)
        # Odd: it has begun.
        added(_place(_JOBS), 1)
        if seen(_place(_SLEEPING)) > 0:
            _system_call(_place(_JOBS), _FUTEX_WAKE, 1 << 30)
        _do_shares(function, arguments, count)
        looks = 0
        while seen(_place(_DONE)) < count:
            looks = let_others_run(looks)
        added(_place(_JOBS), 1)
        # Who looks into it still reads the arguments.
        while seen(_place(_INSIDE)) > 0:
            looks = let_others_run(looks)
        exchanged(_place(_BUSY), 0)
    if exchanged(_place(_FAILED), 0) != 0:
        raise MemoryError("there is not enough memory for a compiled pass")


@entry("void(int64)", nogil=True)
def _work(index: int) -> None:
    """Do shares with the thread that shares them out, as the `index`-th of the others."""
    known, looks = seen(_place(_JOBS)), 0
    while True:
        # In this order: who stops counts up after it has said so, and nobody sleeps on an older number.
        job = seen(_place(_JOBS))
        if seen(_place(_STOPS)) != 0:
            return
        if job == known or job % 2 == 0:
            looks += 1
            if looks < _LOOKS:
                _pause()
            elif _FUTEX is None:
                _nap(min(_NAP * (looks - _LOOKS + 1), _LONGEST_NAP))
            else:
                added(_place(_SLEEPING), 1)
                _system_call(_place(_JOBS), _FUTEX_WAIT, job)
                added(_place(_SLEEPING), -1)
            continue
        known = job
        if index >= seen(_place(_THREADS)) - 1:
            continue
        looks = 0
        added(_place(_INSIDE), 1)
        if seen(_place(_JOBS)) == job:
            _do_shares(seen(_place(_SHARE)), seen(_place(_ARGUMENTS)), seen(_place(_COUNT)))
        added(_place(_INSIDE), -1)


@entry("void(int64)")
def _stop(stops: int) -> None:
    exchanged(_place(_STOPS), stops)
    added(_place(_JOBS), 2)
    _system_call(_place(_JOBS), _FUTEX_WAKE, 1 << 30)


def _end_threads() -> None:
    if _workers:
        _stop(1)
        for worker in _workers:
            worker.join()


def _forget_threads() -> None:
    """In a forked process, in which no other thread goes on."""
    global _starting
    _starting = Lock()
    _workers.clear()
    _table[:] = 0


# Before the code that they run is gone.
atexit.register(_end_threads)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def use_threads() -> int:
    """Have calls shared out to as many threads as torch uses; how many those are."""
    threads = torch.get_num_threads()
    with _starting:
        while len(_workers) < threads - 1:
            worker = Thread(target=_work, args=(len(_workers),), name="speculative_eft", daemon=True)
            try:
                worker.start()
            except RuntimeError:
                # The system has no more threads: those that there are do all shares.
                break
            _workers.append(worker)
        _table[_THREADS] = threads
    return threads


def in_parallel(types_: str) -> Callable[[Function], Function]:
    """Compiles what does one share, given first, to a function that does all, given how many in its place."""
    kinds = type_of(types_).args

    def decorate(function: Function) -> Function:
        one = _only_one(compiled(types_)(function))

        def run(typing_context: Any, count: Any, *others: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                count, others = arguments[0], cgutils.unpack_tuple(builder, arguments[1])
                given = signature.args[1].types
                values = [
                    context.cast(builder, value, has, wanted)
                    for value, has, wanted in zip(others, given, kinds[1:], strict=True)
                ]
                packed = context.make_tuple(builder, types.Tuple(kinds[1:]), values)
                place = cgutils.alloca_once_value(builder, packed)
                share = _share_of(context, builder, one, kinds, place.type)
                _call_share_out(context, builder, share, place, count)
                return context.get_dummy_value()

            return types.void(types.int64, types.Tuple(others)), codegen

        shared: Function = intrinsic(run)
        return shared

    return decorate


def _only_one(function: Any) -> Any:
    """What `function` is compiled to, for the types that it was compiled for."""
    (one,) = function.overloads.values()
    return one


def _share_of(context: Any, builder: Any, one: Any, kinds: Any, arguments: Any) -> Any:
    """A function of the module under construction that calls `one` with the arguments at an address."""
    context.active_code_library.add_linking_library(one.library)
    kind = ir.FunctionType(ir.VoidType(), [WORD, WORD])
    share = ir.Function(builder.module, kind, builder.module.get_unique_name("share"))
    share.linkage = "internal"
    inner = ir.IRBuilder(share.append_basic_block("entry"))
    values = cgutils.unpack_tuple(inner, inner.load(inner.inttoptr(share.args[0], arguments)))
    callee = context.declare_function(builder.module, one.fndesc)
    status, _ = context.call_conv.call_function(inner, callee, types.void, kinds, [share.args[1], *values])
    with cgutils.if_unlikely(inner, status.is_error):
        begin = inner.ptrtoint(external(builder, _SYMBOL, ir.VoidType()), WORD)
        inner.store_atomic(WORD(1), place_at(inner, inner.add(begin, WORD(8 * _FAILED))), "seq_cst", 8)
    inner.ret_void()
    return share


def _call_share_out(context: Any, builder: Any, share: Any, place: Any, count: Any) -> None:
    own = _only_one(_share_out)
    context.active_code_library.add_linking_library(own.library)
    callee = context.declare_function(builder.module, own.fndesc)
    values = [builder.ptrtoint(share, WORD), builder.ptrtoint(place, WORD), count]
    status, _ = context.call_conv.call_function(builder, callee, types.void, [types.int64] * 3, values)
    with cgutils.if_unlikely(builder, status.is_error):
        context.call_conv.return_status_propagate(builder, status)
