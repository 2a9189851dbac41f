"""The result of a preflight as text."""

import sys

from dn_detr_jax.preflight.cost import Cost, Roofline
from dn_detr_jax.preflight.hlo import total_bytes
from dn_detr_jax.preflight.preflight import Preflight, run_preflight, versions
from dn_detr_jax.preflight.suggestions import Outcome, Proposal, suggest
from dn_detr_jax.preflight.whole_run import WholeRun

GIB = 2**30


def table(result: Preflight) -> str:
    """Formats a result as a table."""
    height, width = result.canvas
    rows = [
        ("devices", _devices(result)),
        (
            "step",
            f"{result.config.train.batch_size} images of {height} x {width}, "
            f"{result.batch_per_device} per device, {result.config.model.dtype}",
        ),
        ("parameters", f"{result.num_parameters:,}"),
        *_memory_rows(result),
    ]
    if result.cost:
        rows += _cost_rows(result.cost)
    if result.cost and result.chip:
        rows += _roofline_rows(result, result.cost.roofline(result.chip))
    rows.append(("compiled", f"in {result.seconds:.0f} s by {_compiler()}"))
    return _lines(rows)


def run_table(run: WholeRun) -> str:
    """Formats the cost of a whole training as a table, with a line for each canvas."""
    first, plan = run.canvases[0], run.plan
    rows = [
        ("devices", _devices(first)),
        (
            "training",
            f"{plan.total:,} steps of {first.config.train.batch_size} images, {plan.per_epoch:,} "
            f"an epoch; {first.batch_per_device} per device, {first.config.model.dtype}",
        ),
        ("parameters", f"{first.num_parameters:,}"),
    ]
    if first.usable is not None:
        rows.append(("usable memory", f"{memory_text(first.usable)} per device"))
    for result, steps in zip(run.canvases, run.steps, strict=True):
        height, width = result.canvas
        parts = [f"{steps / sum(run.steps):6.1%} of the steps"]
        parts.append("memory unknown" if result.needed is None else memory_text(result.needed))
        if not result.fits:
            parts.append("DOES NOT FIT")
        elif result.cost and result.chip:
            bound = result.cost.roofline(result.chip)
            parts.append(f"least time {quantity(bound.seconds, 's')}, bound by {bound.bound}")
        rows.append((f"  {height} x {width}", ", ".join(parts)))
    if (seconds := run.step_seconds) is not None:
        rows += [
            ("least time per step", f"{quantity(seconds, 's')}, mean of an epoch"),
            ("at most", f"{run.images_per_second:,.0f} images per second on all devices"),
            ("at least", f"{run.hours:.1f} hours for the training"),
            ("", "bounds from peak figures, not measured; without evaluation and the matching"),
        ]
    total = sum(result.seconds for result in run.canvases)
    rows.append(("compiled", f"in {total:.0f} s by {_compiler()}"))
    return _lines(rows)


def _devices(result: Preflight) -> str:
    device = result.mesh.devices.flat[0].device_kind
    return f"{result.mesh.size} x {result.chip.name if result.chip else device}"


def _compiler() -> str:
    return ", ".join(f"{name} {version}" for name, version in versions().items())


def _lines(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<20}{value}" for name, value in rows)


def _memory_rows(result: Preflight) -> list[tuple[str, str]]:
    needed = "unknown" if result.needed is None else memory_text(result.needed)
    if result.usable is not None:
        needed += f" of {memory_text(result.usable)} that a program may use"
    rows = [("memory per device", needed if result.fits else f"{needed}: DOES NOT FIT")]
    cost = result.cost
    if cost is None:
        return [*rows, ("  state, gradients", f"{memory_text(result.fixed)}, for any batch size")]
    rows += [
        ("  state and batch", memory_text(cost.arguments)),
        ("  temporaries", memory_text(cost.temporaries)),
        ("  outputs", memory_text(cost.outputs)),
        ("  program", memory_text(cost.code)),
    ]
    if cost.rematerialized:
        text = f"the compiler computes {cost.rematerialized} instructions twice to save memory"
        rows.append(("", text))
    return rows


def _cost_rows(cost: Cost) -> list[tuple[str, str]]:
    rows = [
        ("operations", f"{quantity(cost.flops, 'FLOP')} per device"),
        ("memory traffic", f"{quantity(cost.main_memory, 'B')} per device"),
        *(
            (f"  {quantity(each.bytes, 'B')}", short_name(each.where) or "added by the compiler")
            for each in cost.traffic
        ),
    ]
    if cost.bytes_accessed:
        text = f"{quantity(cost.bytes_accessed, 'B')}, within the chip too"
        rows.append(("accessed in all", text))
    rounds = ["?" if n is None else str(n) for n in cost.loops if n != 1]
    if rounds:
        text = f"operations and accesses too low: one round is counted of {', '.join(rounds)}"
        rows.append(("", text))
    rows.append(("sent to devices", f"{quantity(cost.bytes_sent, 'B')} per device"))
    for kind in sorted({c.kind for c in cost.collectives}):
        same = [c for c in cost.collectives if c.kind == kind]
        dtypes = "/".join(sorted({shape.split("[")[0] for c in same for shape in c.shapes}))
        count, size = sum(c.count for c in same), quantity(total_bytes(same), "B")
        rows.append((f"  {kind}", f"{count} x, of {size} in all, {dtypes}"))
    if any(cost.host):
        there, back = (quantity(size, "B") for size in cost.host)
        rows.append(("sent to the host", f"{there}, and {back} back, per device"))
    return rows


def _roofline_rows(result: Preflight, bound: Roofline) -> list[tuple[str, str]]:
    rate = result.config.train.batch_size / bound.seconds
    return [
        ("least time per step", f"{quantity(bound.seconds, 's')}, bound by {bound.bound}"),
        *((f"  {name}", quantity(getattr(bound, name), "s")) for name in bound._fields),
        (
            "at most",
            f"{rate:,.0f} images per second on all devices; without the matching on the host",
        ),
    ]


def short_name(where: str) -> str:
    """Shortens jax's name of an operation: the pass, and its last parts.

    Examples:
      >>> short_name("jit(packed)/transpose(jvp(Detector))/encoder/layer0/dot_general")
      'backward: encoder/layer0/dot_general'
      >>> short_name("jit(packed)/jvp(Detector)/backbone/stem_conv/conv_general_dilated")
      'forward: backbone/stem_conv/conv_general_dilated'
      >>> short_name("jit(packed)/cond/branch_0_fun/reduce_sum")
      'cond/branch_0_fun/reduce_sum'
    """
    for mark, name in (("transpose(jvp(Detector))/", "backward"), ("jvp(Detector)/", "forward")):
        if mark in where:
            return f"{name}: {where.split(mark, 1)[1]}"
    return where.split("/", 1)[-1]


def memory_text(size: float) -> str:
    """Formats bytes of memory.

    Examples:
      >>> memory_text(15.75 * 2**30), memory_text(3 * 2**20)
      ('15.75 GiB', '3.00 MiB')
    """
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def quantity(value: float, unit: str) -> str:
    """Formats a number with three digits and a prefix.

    Examples:
      >>> quantity(1.2749e12, "FLOP"), quantity(0.00644, "s"), quantity(999.6, "B")
      ('1.27 TFLOP', '6.44 ms', '1 kB')
    """
    rounded, prefixes = float(f"{value:.3g}"), " kMGTPE"
    if 0 < abs(rounded) < 1:
        prefixes, rounded = "num ", rounded * 1e9
    power = 0
    while abs(rounded) >= 999.9 and power + 1 < len(prefixes):
        rounded, power = rounded / 1000, power + 1
    return f"{rounded:.3g} {prefixes[power].strip()}{unit}"


def print_suggestions(result: Preflight) -> list[Outcome]:
    """Compiles proposals that might make the step fit, prints and returns their outcomes."""

    def attempt(proposal: Proposal) -> Outcome:
        print(f"trying {proposal.text()} ...", file=sys.stderr, flush=True)
        config = proposal.applied(result.config, result.mesh)
        tried = run_preflight(config, result.topology, None, result.canvas)
        return Outcome(proposal, tried.needed, tried.fits)

    tried = []
    outcomes = suggest(
        result.config,
        result.batch_per_device,
        result.needed,
        result.fixed,
        result.usable,
        attempt,
    )
    for outcome in outcomes:
        tried.append(outcome)
        needed = "" if outcome.needed is None else f", {outcome.needed / GIB:.2f} GiB"
        verdict = "fits" if outcome.fits else "does not fit"
        print(f"{verdict}{needed}: {outcome.proposal.text()}", flush=True)
    if not any(outcome.fits for outcome in tried):
        print("nothing tried fits: smaller data.canvases, a smaller model, or a larger chip")
    elif (smaller := tried[-1].proposal.batch_per_device) < result.batch_per_device:
        parts = next(
            n
            for n in range(2, result.batch_per_device + 1)
            if result.batch_per_device % n == 0 and result.batch_per_device // n <= smaller
        )
        text = Proposal(tried[-1].proposal.options, result.batch_per_device).text()
        print(f"not compiled: {text} --config.train.accumulate_steps={parts}, the batch in parts")
    return tried
