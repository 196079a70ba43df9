"""Threads that call verbs at random while others run the model: each verb is whole, and every forward of one state."""

from __future__ import annotations

import collections
import ctypes
import itertools
import random
import threading
import time
import traceback

import pytest
import torch

import slora_diffusers as sl
from slora_diffusers.core.calls import ONE_VERB, WAITING
from tests.adapters import add_random_adapter, output_of
from tests.tiny.models import TINY

DIT = TINY["DiTTransformer2DModel"]
NAMES = "abc"


class Interrupt(BaseException):
    """What another thread is sent, as Ctrl-C is sent to the first one."""


@pytest.fixture(scope="module")
def states():
    """{adapter: state dict}."""
    found = {}
    for i, name in enumerate(NAMES):
        model = DIT.build()
        add_random_adapter(model, name, seed=i + 1, inputs=("hidden_states", "feed_forward")[: 1 + i % 2])
        found[name] = sl.serial_lora_state_dict(model)
    return found


@pytest.fixture(scope="module")
def outputs(states):
    """{active adapters: output}."""
    found = {}
    for n in range(len(NAMES) + 1):
        for active in itertools.combinations(NAMES, n):
            model = DIT.build()
            for name in active:
                sl.load_serial_lora(model, states[name], name)
            found[active] = output_of(model, DIT)
    return found


class Threads:
    """Three threads with verbs and one with forwards, on one model."""

    def __init__(self, states, outputs, seed):
        self.model, self.states, self.outputs, self.seed = DIT.build(), states, outputs, seed
        self.done, self.wrong, self.stop = collections.Counter(), [], threading.Event()

    def verbs(self):
        """{name: a verb on one adapter, with a generator of random numbers}."""
        model, states = self.model, self.states

        def merge(name, rng):
            sl.merge_serial_lora(model, ["a", "b"], None, new := f"m{rng.random()}".replace(".", ""))
            sl.delete_serial_lora(model, new)

        def save(name, rng):
            state = sl.serial_lora_state_dict(model, name)
            assert all(torch.equal(state[key], states[name][key]) for key in states[name])

        def off(name, rng):
            with sl.disable_serial_lora(model):
                assert torch.allclose(output_of(model, DIT), self.outputs[()], atol=1e-4)

        return {
            "load": lambda name, rng: sl.load_serial_lora(model, states[name], name),
            "swap": lambda name, rng: sl.load_serial_lora(model, states[name], name, hotswap=True),
            "set": lambda name, rng: sl.set_serial_lora(model, [n for n in NAMES if rng.random() < 0.5]),
            "delete": lambda name, rng: sl.delete_serial_lora(model, name),
            "fuse": lambda name, rng: sl.fuse_serial_lora(model),
            "unfuse": lambda name, rng: sl.unfuse_serial_lora(model),
            "status": lambda name, rng: sl.serial_lora_status(model),
            "merge": merge,
            "save": save,
            "off": off,
        }

    def change(self, number):
        rng, verbs = random.Random(f"{self.seed} {number}"), self.verbs()
        while not self.stop.is_set():
            name, what = rng.choice(NAMES), rng.choice(list(verbs))
            self.noting(what, lambda name=name, what=what: verbs[what](name, rng))

    def run(self):
        def forward():
            output = output_of(self.model, DIT)
            if not any(torch.allclose(output, wanted, atol=1e-3) for wanted in self.outputs.values()):
                raise AssertionError("a forward is of no state")

        while not self.stop.is_set():
            self.noting("forward", forward)

    def noting(self, what, call):
        try:
            call()
            self.done[what] += 1
        except sl.SerialLoraError as error:  # another thread has made it impossible; what follows is never refused
            self.done["refused"] += 1
            if (
                what in ("off", "forward", "status")
                and "has no Serial LoRA" not in str(error)
                and "fused" not in str(error)
            ):
                self.wrong.append(str(error))
        except Exception:
            self.wrong.append(f"{what}: {traceback.format_exc()[-900:]}")

    def go(self, seconds, interrupts=0.0):
        """Let them work, and send interrupts from time to time."""

        def guarded(work, *args):
            while not self.stop.is_set():
                try:
                    work(*args)
                except Interrupt:
                    self.done["interrupt"] += 1

        works = [(self.change, 0), (self.change, 1), (self.change, 2), (self.run,)]
        threads = [threading.Thread(target=guarded, args=work, daemon=True) for work in works]
        for thread in threads:
            thread.start()
        rng, end = random.Random(self.seed), time.monotonic() + seconds
        while time.monotonic() < end or (sum(self.done.values()) < 40 and time.monotonic() < end + 60):
            time.sleep(0.01 + rng.random() * 0.05)
            if rng.random() < interrupts:
                ident = ctypes.c_ulong(rng.choice(threads).ident)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(Interrupt))
        self.stop.set()
        for thread in threads:
            thread.join(90)

    def check(self):
        """All is as one of the states is, and nothing is left of the threads."""
        assert not self.wrong, self.wrong[:3]
        assert ONE_VERB.acquire(timeout=60)
        ONE_VERB.release()
        assert not WAITING
        status = sl.serial_lora_status(self.model)
        if status.fused:
            sl.unfuse_serial_lora(self.model)
        active = tuple(sorted(name for name in status.active if name in NAMES))
        if set(status.active) <= set(NAMES):
            assert torch.allclose(output_of(self.model, DIT), self.outputs[active], atol=1e-3)
        sl.unload_serial_lora(self.model)
        assert torch.equal(output_of(self.model, DIT), self.outputs[()])


def test_verbs_at_random_are_done_or_refused_and_forwards_are_of_one_state(states, outputs):
    threads = Threads(states, outputs, 1)
    threads.go(4)
    threads.check()
    assert sum(threads.done.values()) >= 40


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it came outside of all we do
@pytest.mark.parametrize("seed", range(5))
def test_threads_that_are_interrupted_leave_one_state(states, outputs, seed):
    for name in sl.__all__:  # an interrupt inside an import leaves Python's own lock
        getattr(sl, name)
    threads = Threads(states, outputs, seed)
    threads.go(15, interrupts=0.5)
    threads.check()
    assert threads.done["interrupt"] > 4
