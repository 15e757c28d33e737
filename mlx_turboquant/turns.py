"""Layers of a chunk of a prompt, computed one after the other.

MLX evaluates what it can, and the dense tokens of a layer need nothing but its packed ones: left to
itself, it would compute those of many layers in advance, and hold them. Here a layer's attention
is submitted once that of the layer before has ended, while the GPU still has the rest of that
layer to do, so that it never waits for the host.
"""

import threading

import mlx.core as mx


class _Turns(threading.local):
    # The attention of the layer before, which is not submitted yet.
    attended: mx.array | None = None
    # What has to end before the next attention may begin.
    last: list[mx.array] | None = None


_turns = _Turns()


def take_turn(new: list[mx.array], is_first: bool) -> None:
    """Submit the ``new`` keys and values of a layer, and the attention that was announced.

    The attention of the last layer of a chunk is not needed for any cache: if the layer
    ``is_first`` of its model, what was announced is forgotten.
    """
    if is_first:
        end_turns()
    if _turns.last is not None:
        mx.eval(_turns.last)
    if _turns.attended is not None:
        mx.async_eval(_turns.attended)
        _turns.last, _turns.attended = [_turns.attended], None
    else:
        _turns.last = new  # this attention announces nothing: its end is seen in the next keys
    mx.async_eval(new)


def announce(output: mx.array) -> None:
    """Tell that ``output`` is the attention of the layer that took the last turn."""
    _turns.attended = output


def end_turns() -> None:
    """Hold nothing of the last chunk any more."""
    _turns.attended = _turns.last = None
