"""The compiled programs of a run: the training step and the detection, one for each canvas.

There is one more, the norm of the last update for the log. A program is compiled when it is first
needed, so that a training starts with the first canvas. On CPUs threads compile the others ahead,
from the second step on. Accelerators time candidate kernels while compiling, and nothing else may
run on them then: there the run waits for each new program.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from dn_detr_jax.data.loader import eval_plan
from dn_detr_jax.distributed.consistency import barrier
from dn_detr_jax.evaluation.detect import jit_match
from dn_detr_jax.matching import load_solver
from dn_detr_jax.models.registry import abstract_params
from dn_detr_jax.sharding import replicated, with_sharding
from dn_detr_jax.training.compile_cache import compile_and_log
from dn_detr_jax.training.compile_options import accepted_options
from dn_detr_jax.training.setup import Setup
from dn_detr_jax.training.state import TrainState
from dn_detr_jax.training.step import abstract_batch

PyTree = Any
Canvas = tuple[int, int]
_Task = tuple[str, Canvas | None]  # "train" or "eval" and a canvas, or "norm"
_NORM: _Task = ("norm", None)


class Programs:
    """Compiles each program of a run once, and hands it out.

    All processes ask for the same programs in the same order: after each they wait for each other,
    because devices wait for at most 30 seconds at a collective (Gloo).

    Attributes:
      state: shapes and shardings of the train state; None: there is only an evaluation.
    """

    def __init__(
        self,
        setup: Setup,
        step_function: Callable | None = None,
        state: TrainState | None = None,
        update_norm: Callable | None = None,
    ):
        """Compiles nothing yet.

        Args:
          setup: of the run.
          step_function: from `jit_train_step`, for a training.
          state: shapes and shardings of the train state, for a training.
          update_norm: from `make_update_norm`, for a training.
        """
        self._setup, self.state = setup, state
        params = with_sharding(abstract_params(setup.model), replicated(setup.mesh))
        # By purpose: a jitted function, and its first argument.
        self._functions: dict[str, Any] = {"train": step_function, "eval": setup.detect}
        self._arguments: dict[str, PyTree] = {"train": state, "eval": params}
        if state is not None and update_norm is not None:
            self._functions["norm"] = jax.jit(lambda parts: update_norm(*parts))
            self._arguments["norm"] = (state.params, state.opt_state)
        self._options = accepted_options(setup.config, setup.mesh.local_devices[0])
        self._eval_tasks: list[_Task] = []
        if setup.validation is not None:
            plan = eval_plan(setup.validation, setup.config)
            self._eval_tasks = [("eval", plan.canvases[c]) for c in np.unique(plan.canvas)]
        self._match = jit_match(setup.mesh)
        self._on_cpu = setup.mesh.devices.flat[0].platform == "cpu"
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1 if self._on_cpu else 1, "compile")
        self._lock = threading.Lock()
        self._compiling: dict[_Task, Future] = {}
        self._agreed: set[_Task] = set()  # all processes have them
        self._ahead: list[_Task] = []
        self._closed = False

    def compile_ahead(self, canvases: Sequence[Canvas]) -> None:
        """Starts to compile for a training on CPUs; else does nothing. It can be called again.

        The step is traced before this returns: only one thread can trace at a time. It is compiled
        in the background.

        Args:
          canvases: of the training, in the order of their first use. The first one is compiled
            now, alone; the others and the evaluation's by `compile_others`.
        """
        if self._on_cpu:
            first, *others = [("train", canvas) for canvas in canvases]
            self._ahead = [*others, *self._eval_tasks]
            self._started(first, traced=True)
            self._pool.submit(load_solver)  # the first step needs it, too

    def compile_others(self) -> None:
        """Starts to compile what `compile_ahead` has left; further calls do nothing.

        Tracing programs keeps the interpreter busy, which the matching of a step needs too: a step
        meanwhile takes seconds.
        """
        if self._ahead:
            self._started(_NORM).add_done_callback(self._start_ahead)

    def _start_ahead(self, done: Future) -> None:
        ahead, self._ahead = self._ahead, []
        for task in ahead if not done.cancelled() else ():
            self._started(task)

    def is_ready(self, canvas: Canvas) -> bool:
        """Whether `train_step` of a canvas returns at once."""
        return ("train", canvas) in self._agreed

    def train_step(self, canvas: Canvas) -> Callable:
        """Returns the compiled training step of a canvas; waits for it the first time."""
        return self._ready([("train", canvas)])[0]

    def update_norm(self, state: TrainState) -> jax.Array:
        """Returns the global norm of the update that led to a state, a scalar."""
        return self._ready([_NORM])[0]((state.params, state.opt_state))

    def detect(self, params: PyTree, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Detects objects in a batch of the validation split, or of its canvases.

        The first call waits for the programs of all canvases of the validation images.

        Returns:
          The detections of `eval_step`, with `assignment` int32 [B, L, M], the query matched to
          each object in each decoder layer, -1 for padding, in place of the costs.
        """
        programs = dict(zip(self._eval_tasks, self._ready(self._eval_tasks), strict=True))
        height, width = batch["image"].shape[1:3]
        found = programs["eval", (height, width)](params, batch)
        return found | {"assignment": self._match(found.pop("cost"), batch["valid"])}

    def finish(self, canvases: Sequence[Canvas]) -> None:
        """Waits until the training steps of some canvases and the detection are compiled."""
        self._ready([("train", canvas) for canvas in canvases])
        self._ready(self._eval_tasks)

    def close(self) -> None:
        """Starts no further program; those that are being compiled end in the background, unlogged.

        A line about them would come after the last words of the command.
        """
        self._ahead, self._closed = [], True
        with self._lock:
            cancelled = [task for task, future in self._compiling.items() if future.cancel()]
            for task in cancelled:
                del self._compiling[task]

    def _started(self, task: _Task, traced: bool = False) -> Future:
        """Returns a program that is being compiled; `traced`: it is traced before."""
        with self._lock:
            if task not in self._compiling:
                lowered = self._lower(task) if traced else None
                self._compiling[task] = self._pool.submit(self._compile, task, lowered)
            return self._compiling[task]

    def _ready(self, tasks: Sequence[_Task]) -> list[Callable]:
        """Returns programs once all processes have them."""
        futures = [self._started(task) for task in tasks]
        programs = [future.result() for future in futures]
        if not self._agreed.issuperset(tasks):
            self._agreed.update(tasks)
            barrier(f"compiled {tasks}")
        return programs

    def _lower(self, task: _Task) -> jax.stages.Lowered:
        purpose, canvas = task
        arguments = [self._arguments[purpose]]
        if canvas is not None:
            arguments.append(abstract_batch(self._setup.config, purpose, self._setup.mesh, canvas))
        return self._functions[purpose].lower(*arguments)

    def _compile(self, task: _Task, lowered: jax.stages.Lowered | None) -> Callable:
        purpose, canvas = task
        name = purpose if canvas is None else "{} for {} x {}".format(purpose, *canvas)
        lowered = lowered or self._lower(task)
        return compile_and_log(lowered, name, self._options, wanted=lambda: not self._closed)
