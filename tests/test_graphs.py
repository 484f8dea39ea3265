"""Whole runs as CUDA graphs: without a GPU on a tape (tests/tape.py), and on one where there is one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tape import Tape
from torch import Tensor, nn

import difusores
from difusores import doctor, graphs, sampling
from difusores.cuda_graph import Graphed
from difusores.plan import Plan

SHAPE = (2, 4, 8, 8)
STEPS = 6
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")


class Network(nn.Module):
    """Small, of the time too, and as wide as it is asked to be."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4 * outputs, 3, padding=1)
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = torch.tanh(self.conv(x) + t.float() / 1000)
        return out


def noise(seed: int, shape: tuple[int, ...] = SHAPE, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def learned() -> Plan:
    return difusores.DDPMScheduler(variance_type="learned_range").plan(STEPS)


PLANS: dict[str, Callable[[], Plan]] = {
    "ddim": lambda: difusores.DDIMScheduler().plan(STEPS),
    "ddim eta": lambda: difusores.DDIMScheduler().plan(STEPS, eta=1.0),
    "ddpm": lambda: difusores.DDPMScheduler().plan(STEPS),
    "ddpm learned": learned,
    "dpm 2m": lambda: difusores.DPMSolverMultistepScheduler().plan(STEPS),
    "dpm sde": lambda: difusores.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++").plan(STEPS),
    "unipc": lambda: difusores.UniPCMultistepScheduler().plan(STEPS),
    "heun": lambda: difusores.HeunDiscreteScheduler().plan(STEPS),
    "euler ancestral": lambda: difusores.EulerAncestralDiscreteScheduler().plan(STEPS),
    "pndm": lambda: difusores.PNDMScheduler().plan(STEPS),
    "thresholding": lambda: difusores.DDPMScheduler(thresholding=True).plan(STEPS),
    "sa": lambda: difusores.SASolverScheduler().plan(STEPS),
}


def outputs_of(name: str) -> int:
    return 2 if name == "ddpm learned" else 1


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("weights", [None, (-1.5, 2.5)])
def test_a_replay_has_the_bits_of_the_loop(
    name: str, weights: tuple[float, ...] | None, captures: Callable[[], int]
) -> None:
    plan, model = PLANS[name](), Network(outputs_of(name))
    for seed in range(3):
        x = noise(seed) * plan.init_noise_sigma
        want, got = (
            plan.run(
                model, x, generator=torch.Generator().manual_seed(9 + seed), guidance=weights, graph=graph
            )
            for graph in (False, True)
        )
        assert torch.equal(got, want), (name, seed)
    assert captures() == 1


class Told(Network):
    """Every copy of the batch is another input, as conditions make it."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__(outputs)
        self.register_buffer("told", torch.tensor([0.3, 0.3, 1.0, 1.0]).view(4, 1, 1, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x * self.told, t)


@pytest.mark.parametrize("name", ["ddim", "ddpm learned", "thresholding", "heun"])
def test_a_replay_rescales_the_guided_output(name: str, captures: Callable[[], int]) -> None:
    """By weights of guidance that are in the device's memory, as ever; another share is another graph."""
    plan, model = PLANS[name](), Told(outputs_of(name))

    def run(seed: int, **options: Any) -> Tensor:
        x, weight = noise(seed) * plan.init_noise_sigma, 1.0 + seed / 5
        generator = torch.Generator().manual_seed(9 + seed)
        return plan.run(model, x, generator=generator, guidance=(1 - weight, weight), **options)

    def check(seed: int, graphs: int, **options: Any) -> None:
        want = run(seed, **options)
        assert torch.equal(run(seed, **options, graph=True), want) and captures() == graphs
        assert not torch.equal(want, run(seed, **(options | {"rescale": 0.0})))

    for seed in (1, 2, 3):
        check(seed, 1, conditional=-1, rescale=0.7)
    check(1, 2, conditional=-1, rescale=0.5)
    check(1, 3, conditional=0, rescale=0.5)
    with pytest.raises(ValueError, match="graph=True: rescale has to be a number"):
        run(1, rescale=lambda: 0.7, graph=True)


def test_noise_of_seeds_of_generators_of_images_and_of_none(captures: Callable[[], int]) -> None:
    plan, model = PLANS["ddpm"](), Network()
    for seed in (3, 4, 5):
        options: list[dict[str, Any]] = [{"noise": "philox", "seeds": [seed, 7]}, {}, {"generator": []}]
        for given in options:
            answers = []
            for graph in (False, True):
                torch.manual_seed(seed)
                if "generator" in given:
                    given["generator"] = [torch.Generator().manual_seed(seed + k) for k in range(2)]
                answers += [plan.run(model, noise(seed), **given, graph=graph), torch.rand(1)]
            assert torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[3])
    assert captures() == 2  # in-kernel noise is another one


def test_noise_of_a_brownian_path(captures: Callable[[], int]) -> None:
    plan, model = difusores.DPMSolverSDEScheduler().plan(STEPS), Network()
    for seed in (1, 2, 3):
        x = noise(seed) * plan.init_noise_sigma
        want, got = (
            plan.run(model, x, generator=torch.Generator().manual_seed(seed), graph=graph)
            for graph in (False, True)
        )
        assert torch.equal(got, want)
    assert captures() == 1


def test_guidance_weights_and_weights_in_place_need_no_new_graph(captures: Callable[[], int]) -> None:
    plan, model, x = PLANS["dpm 2m"](), Network(), noise(1)
    for weight in (1.5, 3.0, 7.5):
        with torch.no_grad():
            model.conv.weight.mul_(1.1)
        pair = (1 - weight, weight)
        assert torch.equal(plan.run(model, x, guidance=pair, graph=True), plan.run(model, x, guidance=pair))
    assert captures() == 1


def test_what_needs_a_new_graph(captures: Callable[[], int]) -> None:
    model, x = Network(), noise(1)
    plan = PLANS["ddim"]()
    count = 0

    def check(new: bool, plan: Plan = plan, x: Tensor = x, **options: Any) -> None:
        nonlocal count
        count += new
        for _ in range(2):
            assert torch.equal(plan.run(model, x, **options, graph=True), plan.run(model, x, **options))
        assert captures() == count

    check(True)
    check(False, plan=PLANS["ddim"]())  # an equal plan
    check(False, x=noise(2))
    check(True, x=noise(1, (2, 4, 16, 8)))
    check(True, x=noise(1, (1, 4, 8, 8)))
    check(True, x=x.contiguous(memory_format=torch.channels_last))
    check(True, guidance=(0.5, 0.5))
    check(True, plan=difusores.DDIMScheduler().plan(STEPS + 1))
    check(False)  # those before are kept
    model.conv.weight = nn.Parameter(model.conv.weight.detach() * 2)
    check(True)
    model.conv.weight.data = model.conv.weight.data / 4
    check(True)
    handle = model.conv.register_forward_hook(lambda module, args, out: 2 * out)
    check(True)
    handle.remove()
    with difusores.use_backend("cpu"):
        check(True)


def test_graphs_are_few_and_go_with_their_model(captures: Callable[[], int]) -> None:
    plan, model = PLANS["ddim"](), Network()
    kept = graphs.graphs_of(model)
    for height in range(4, 4 + graphs.KEPT + 3):
        plan.run(model, noise(1, (1, 4, height, 8)), graph=True)
    assert captures() == graphs.KEPT + 3 and len(kept.graphs) == graphs.KEPT
    plan.run(model, noise(1, (1, 4, 6, 8)), graph=True)  # gone, and the next one gone for it
    assert captures() == graphs.KEPT + 4
    for height, new in ((8, 0), (30, 1), (8, 0)):  # that of the least recent use goes
        before = captures()
        plan.run(model, noise(1, (1, 4, height, 8)), graph=True)
        assert captures() == before + new
    graphs.forget_graphs(model)
    assert not kept.graphs and not kept.recorders
    plan.run(model, noise(1), graph=True)
    assert len(kept.graphs) == 1
    reference = weakref.ref(kept)
    del model, kept
    gc.collect()
    assert reference() is None


def test_a_replay_calls_no_python_of_the_model(captures: Callable[[], int]) -> None:
    plan, model, x = PLANS["ddim"](), Network(), noise(1)
    plan.run(model, x, graph=True)
    assert model.calls == 2 * len(plan)  # the first run, and the capture
    plan.run(model, x, graph=True)
    assert model.calls == 2 * len(plan)


def test_with_a_callback_or_in_a_long_run_each_call_is_a_graph(
    captures: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, model, x = PLANS["ddpm"](), Network(), noise(1)

    def half(index: int, time: Tensor, sample: Tensor) -> Tensor | None:
        return sample / 2 if index == 3 else None

    def run(graph: bool, **options: Any) -> Tensor:
        return plan.run(model, x, generator=torch.Generator().manual_seed(5), graph=graph, **options)

    assert torch.equal(run(True, callback=half), run(False, callback=half))
    assert captures() == 1
    calls = model.calls
    monkeypatch.setattr(sampling, "LONGEST", len(plan) - 1)
    want = run(False)
    calls = model.calls
    assert torch.equal(run(True), want) and captures() == 1 and model.calls == calls


def test_results_do_not_change_afterwards(captures: Callable[[], int]) -> None:
    plan, model = PLANS["ddim"](), Network()
    results = [plan.run(model, noise(seed), graph=True) for seed in range(4)]
    assert len({t.data_ptr() for t in results}) == 4
    for seed, result in enumerate(results):
        assert torch.equal(result, plan.run(model, noise(seed)))


def test_closures_and_methods(captures: Callable[[], int]) -> None:
    plan, network, x, strength = PLANS["ddim"](), Network(), noise(1), torch.ones(1)

    def model(x: Tensor, t: Tensor) -> tuple[Tensor, int]:
        return strength * network(x, t), 0

    for value in (1.0, 0.5):  # a tensor that it knows, with another value in the same memory
        strength.fill_(value)
        assert torch.equal(plan.run(model, x, graph=True), plan.run(model, x))
    assert captures() == 1
    network.conv.weight = nn.Parameter(2 * network.conv.weight.detach())
    assert torch.equal(plan.run(model, x, graph=True), plan.run(model, x)) and captures() == 2
    for _ in range(2):
        assert torch.equal(plan.run(network.forward, x, graph=True), plan.run(network, x))
    assert captures() == 3


def test_a_run_within_a_capture_is_part_of_it(captures: Callable[[], int]) -> None:
    plan, network, x = PLANS["ddim"](), Network(), noise(1)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return plan.run(network, x, graph=True) / 2

    for seed in (1, 2, 3):
        x = noise(seed)
        want = plan.run(lambda x, t: plan.run(network, x) / 2, x)
        assert torch.equal(plan.run(model, x, graph=True), want)
    assert captures() == 2  # of the run within before the capture, and of all
    other = Network()
    difusores.enable_cuda_graph(other)
    for seed in (1, 2, 3):
        assert torch.equal(plan.run(other, noise(seed), graph=True), plan.run(other, noise(seed)))
    assert captures() == 4  # of a call before the capture, and of the run


def test_parameters_that_move_at_their_first_use(captures: Callable[[], int]) -> None:
    class Moves(Network):
        moved = False

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            if not self.moved:
                self.conv.weight.data = self.conv.weight.data.clone()
                self.moved = True
            return super().forward(x, t)

    plan, network = PLANS["ddim"](), Moves()
    for seed in (1, 2, 3):
        assert torch.equal(plan.run(network, noise(seed), graph=True), plan.run(network, noise(seed)))
    assert captures() == 1
    network.moved = False
    with torch.no_grad():
        for seed in (1, 2, 3):
            x, t = noise(seed), torch.tensor(seed)
            assert torch.equal(Graphed(network)(x, t), network(x, t))
    assert captures() == 2


def test_two_methods_of_an_object(captures: Callable[[], int]) -> None:
    class Two:
        def plus(self, x: Tensor, t: Tensor) -> Tensor:
            return x + 1

        def minus(self, x: Tensor, t: Tensor) -> Tensor:
            return x - 1

    plan, x, two = PLANS["ddim"](), noise(1), Two()
    for model in (two.plus, two.minus):
        for _ in range(2):
            assert torch.equal(plan.run(model, x, graph=True), plan.run(model, x))
    assert captures() == 2


def test_what_cannot_be_captured_is_said(captures: Callable[[], int]) -> None:
    plan, x = PLANS["ddim"](), noise(1)

    def reads(x: Tensor, t: Tensor) -> Tensor:
        return x * float(x.mean())

    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"cannot be captured.*_local_scalar_dense"):
            plan.run(reads, x, graph=True)
    with pytest.raises(ValueError, match="reference reads its row on the host, and has to"):
        plan.run(Network().double(), x.double(), graph=True)
    with difusores.use_backend("reference"), pytest.raises(ValueError, match="on the host"):
        plan.run(Network(), x, graph=True)


def test_on_a_cpu_it_is_refused() -> None:
    with pytest.raises(
        ValueError, match="graph=True: a CUDA graph needs tensors on a CUDA device, not on cpu"
    ):
        PLANS["ddim"]().run(Network(), noise(1), graph=True)
    with pytest.raises(ValueError, match="CUDA device"), torch.no_grad():
        Graphed(Network())(noise(1), torch.tensor(3))


def test_arguments_of_a_graphed_call(captures: Callable[[], int]) -> None:
    class Told(nn.Module):
        def forward(self, x: Tensor, *, more: dict[str, Any], factor: float = 1.0) -> dict[str, Any]:
            return {"sum": factor * (x + more["list"][0]), "both": (x, more["list"][1]), "factor": factor}

    model = Told()
    graphed = Graphed(model)
    with torch.no_grad():
        for k, factor in enumerate((1.0, 1.0, 1.0, 2.0, 2.0)):
            given = {"list": [noise(k), noise(k + 10)], "note": "text"}
            want, got = (call(noise(k + 20), more=given, factor=factor) for call in (model, graphed))
            assert torch.equal(got["sum"], want["sum"]) and got["factor"] == factor
            assert all(map(torch.equal, got["both"], want["both"]))
        assert captures() == 2
        with pytest.raises(TypeError, match="set among its arguments"):
            graphed(noise(1), more={"list": {1}})
    x = noise(1).requires_grad_()  # called as it is
    graphed(x, more={"list": [x, x]})["sum"].sum().backward()
    assert x.grad is not None and captures() == 2


def test_a_capture_has_a_token_of_its_own(captures: Callable[[], int]) -> None:
    seen: list[object | None] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(graphs.capturing())
        return x

    for height in (4, 8):
        PLANS["ddim"]().run(model, noise(1, (1, 4, height, 4)), graph=True)
    first, second = seen[STEPS], seen[3 * STEPS]
    assert seen[:STEPS] == [None] * STEPS and seen[STEPS : 2 * STEPS] == [first] * STEPS
    assert first is not None and second is not None and first is not second
    assert graphs.capturing() is None


def test_an_adapter_is_one_more_graph_and_fused_it_is_none(captures: Callable[[], int]) -> None:
    from difusores.models.lora import LowRank, make_adapters

    plan, model, x = PLANS["ddim"](), Network(), noise(1)

    def check(count: int) -> None:
        for _ in range(2):
            assert torch.equal(plan.run(model, x, graph=True), plan.run(model, x))
        assert captures() == count

    check(1)
    adapters = make_adapters(model)
    for name in ("a", "b"):
        down, up = torch.randn(2, 4, 3, 3) / 9, torch.randn(4, 2, 1, 1) / 9
        adapters.load(name, {"conv": LowRank(down, up, 1.0)})
    check(2)
    adapters.activate({"b": 0.5})
    check(3)
    adapters.fuse(1.0)
    check(3)  # the graph of the model without adapters, whose weights have other values
    adapters.unfuse()
    check(3)
    adapters.activate({"a": 1.0})
    adapters.fuse(0.7)
    check(3)


def test_the_doctor_tries_it(captures: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        assert doctor.examine()["graph_capture"] == "not exercised: no CUDA device was found"
    assert doctor.examine_graphs("cpu") == "exercised: a captured run has the bits of the loop"
    assert captures() == 1
    monkeypatch.setattr(Tape, "replay", lambda tape: None)
    assert doctor.examine_graphs("cpu") == "broken: a captured run has other bits than the loop"
    monkeypatch.setattr(graphs, "refusal", lambda device: "no luck")
    assert doctor.examine_graphs("cpu") == "broken: graph=True: no luck"
    assert "  graph capture" in doctor.describe(doctor.examine())


@CUDA
def test_the_doctor_finds_it_works() -> None:
    assert doctor.examine_graphs() == "exercised: a captured run has the bits of the loop"


@CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", PLANS)
def test_on_a_gpu_a_replay_has_the_bits_of_the_loop(name: str, dtype: torch.dtype) -> None:
    plan, model = PLANS[name](), Network(outputs_of(name)).to("cuda", dtype)
    for seed in range(3):
        x = (noise(seed, device="cuda") * plan.init_noise_sigma).to(dtype)
        for device in ("cuda", "cpu"):
            want, got = (
                plan.run(
                    model,
                    x,
                    generator=torch.Generator(device).manual_seed(seed),
                    guidance=(-1, 2),
                    graph=graph,
                )
                for graph in (False, True)
            )
            assert torch.equal(got, want), (name, seed, device)
        assert torch.cuda.default_generators[0].get_state().equal(torch.cuda.get_rng_state())
    assert len(graphs.graphs_of(model).graphs) == 1


@CUDA
def test_on_a_gpu_philox_the_global_generator_and_other_streams() -> None:
    plan, model = PLANS["ddpm"](), Network().cuda()
    for seed in (1, 2, 3):
        x = noise(seed, device="cuda")
        for options in ({"noise": "philox", "seeds": [seed, 5]}, {}):
            torch.manual_seed(seed)
            want = plan.run(model, x, **options)
            after = torch.rand(1, device="cuda")
            torch.manual_seed(seed)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                got = plan.run(model, x, **options, graph=True)
                assert torch.equal(got, want)
                assert torch.equal(torch.rand(1, device="cuda"), after)


@CUDA
def test_on_a_gpu_resolutions_guidance_weights_and_memory() -> None:
    plan, model = PLANS["dpm 2m"](), Network().cuda()
    for round_ in range(3):
        for height in (8, 16, 24):
            x = noise(round_, (2, 4, height, 8), "cuda")
            pair = (1.0 - height, float(height + round_))
            with torch.no_grad():
                model.conv.weight.mul_(0.9)
            got = plan.run(model, x, guidance=pair, graph=True)
            assert torch.equal(got, plan.run(model, x, guidance=pair))
            if round_ == 1:
                held = torch.cuda.memory_allocated()
    del got, x
    assert torch.cuda.memory_allocated() <= held
    assert len(graphs.graphs_of(model).graphs) == 3
    with pytest.raises(RuntimeError, match="cannot be captured"):
        plan.run(lambda x, t: x * float(x.mean()), noise(1, device="cuda"), graph=True)
    x = noise(7, device="cuda")  # a capture that failed leaves nothing broken
    assert torch.equal(plan.run(model, x, graph=True), plan.run(model, x))


@CUDA
def test_on_a_gpu_threads_share_a_model() -> None:
    from concurrent.futures import ThreadPoolExecutor

    plan, model = PLANS["ddpm"](), Network().cuda().eval()

    def work(seed: int) -> tuple[Tensor, Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            x = noise(seed, device="cuda")
            want, got = (
                plan.run(model, x, generator=torch.Generator("cuda").manual_seed(seed), graph=graph)
                for graph in (False, True)
            )
            torch.cuda.current_stream().synchronize()
            return want, got

    with ThreadPoolExecutor(4) as pool:
        for want, got in pool.map(work, range(12)):
            assert torch.equal(got, want)
