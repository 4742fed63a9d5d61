"""Steps that are replayed compute what they compute when they are run, from the inputs of the day."""

from __future__ import annotations

import pytest
import torch

from jettison.runtime.recorded_step import MOST_RECORDINGS, RecordedSteps

CPU = torch.device("cpu")


class Recorder:
    """Stands for a CUDA graph: replaying computes again, from the buffers, into the outputs that were handed out."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, compute):
        self.recorded += 1
        # A graph that is recorded has computed nothing.
        outputs = [torch.full_like(each, torch.nan if each.is_floating_point() else -1) for each in compute()]

        def replay():
            self.replayed += 1
            for output, new in zip(outputs, compute(), strict=True):
                output.copy_(new)

        return outputs, replay


def double(inputs):
    return [2 * inputs["x"]]


def run(steps, key, number, size=1):
    (out,) = steps.run(key, {"x": torch.full((size,), float(number))}, double)
    return out.tolist()


def test_the_second_step_is_recorded_and_the_third_replayed():
    recorder = Recorder()
    steps = RecordedSteps(CPU, recorder)
    counts = []
    for number in range(4):
        assert run(steps, "a", number) == [2.0 * number]
        counts.append((recorder.recorded, recorder.replayed))
    assert counts == [(0, 0), (1, 1), (1, 2), (1, 3)]


def test_other_places_and_sizes_have_recordings_of_their_own():
    recorder = Recorder()
    steps = RecordedSteps(CPU, recorder)
    for _ in range(3):
        assert run(steps, "a", 1) == [2.0]
        assert run(steps, "b", 2) == [4.0]
        assert run(steps, "b", 3, size=2) == [6.0, 6.0]
    assert (recorder.recorded, recorder.replayed) == (3, 6)


def test_the_oldest_recordings_are_given_up():
    recorder = Recorder()
    steps = RecordedSteps(CPU, recorder)
    for key in [*range(MOST_RECORDINGS + 1), 0]:
        for number in (1, 2):
            assert run(steps, key, number) == [2.0 * number]
    assert recorder.recorded == MOST_RECORDINGS + 2


def test_what_cannot_be_recorded_runs_as_it_is():
    def refuse(compute):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    steps = RecordedSteps(CPU, refuse)
    for number in range(4):
        assert run(steps, "a", number) == [2.0 * number]
    assert steps.refusal == "operation not permitted when stream is capturing"


def test_mistakes_of_the_step_are_not_taken_for_refusals():
    steps = RecordedSteps(CPU, Recorder())
    with pytest.raises(KeyError):
        steps.run("a", {}, double)
