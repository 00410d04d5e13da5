"""Chunks of a batch, on a CPU computed by several threads."""

import multiprocessing
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sae_lens_flex.ops import chunks, products, selection
from sae_lens_flex.ops.chunks import for_each_chunk
from sae_lens_flex.ops.codes import Code
from sae_lens_flex.ops.losses import decoder_loss
from sae_lens_flex.ops.products import gather
from sae_lens_flex.ops.requests import DecoderLoss, Levels, Wanted
from sae_lens_flex.ops.selection import Encoder, select

B, K, F, D = 61, 5, 40, 24
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _three_threads_and_small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(products, "CPU_CHUNK_ELEMENTS", 3 * K * D)
    monkeypatch.setattr(selection, "CPU_CHUNK_BYTES", 7 * F * 4)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(n_threads)


def loss_and_gradients(levels: Levels) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(B, D, generator=generator)
    w_enc = torch.randn(D, F, generator=generator)
    encoder = Encoder(w_enc, torch.randn(F, generator=generator), None)
    code = select(target, encoder, K, use_triton=False)
    dtype = torch.float32
    request = DecoderLoss(
        code=code,
        weight=w_enc.T.contiguous(),
        bias=torch.randn(D, generator=generator),
        target=target,
        levels=levels,
        scale=1 / B,
        wanted=Wanted(True, dtype, dtype, dtype, dtype),
    )
    decoded = gather(code, request.weight, use_triton=False)
    results = decoder_loss(request, use_triton=False)
    assert results.width_errors is None
    return [code.latents, code.values, decoded, *(each for each in results if each is not None)]


def assert_same(results: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(results) == len(expected) == 9
    for result, expected_result in zip(results, expected, strict=True):
        assert torch.equal(result, expected_result)


def in_new_thread(function: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=60)


@pytest.mark.parametrize("levels", ["every", "last", torch.rand(K)], ids=["every", "last", "own"])
def test_results_do_not_depend_on_the_number_of_threads(levels) -> None:
    results = loss_and_gradients(levels)
    torch.set_num_threads(1)
    assert_same(results, loss_and_gradients(levels))


def test_every_thread_works_alone_and_adds_in_the_order_of_the_batch() -> None:
    order, threads, n_threads = [], set(), set()

    def compute(chunk: slice) -> Callable[[], None]:
        threads.add(threading.get_ident())
        n_threads.add(torch.get_num_threads())
        assert not torch.is_grad_enabled()
        time.sleep(0.005 * random.random())
        return lambda: order.append(chunk)

    for_each_chunk(compute, 50, 3, CPU)
    assert order == [slice(start, start + 3) for start in range(0, 50, 3)]
    assert 1 < len(threads) <= 3
    assert threading.get_ident() in threads
    assert n_threads == {1}
    assert torch.get_num_threads() == 3
    assert in_new_thread(torch.get_num_threads) == 3


def test_a_slow_chunk_holds_up_no_other_until_many_are_ahead() -> None:
    most_ahead = 3 * chunks.AHEAD  # the slow one counts
    order, n_computed = [], []
    are_ahead = threading.Event()

    def compute(chunk: slice) -> Callable[[], None]:
        if chunk.start == 0:
            assert are_ahead.wait(60)
            time.sleep(0.05)  # in which the others would go on if nothing stopped them
            assert not order
            n_computed.append(len(computed))
        computed.append(chunk)
        if len(computed) == most_ahead - 1:
            are_ahead.set()
        return lambda: order.append(chunk.start)

    computed: list[slice] = []
    for_each_chunk(compute, 100, 1, CPU)
    assert n_computed == [most_ahead - 1]
    assert order == list(range(100))


def test_threads_are_kept() -> None:
    for _ in range(100):  # A thread that has just become free may be missed.
        for_each_chunk(lambda chunk: None, 9, 3, CPU)
    threads = [each for each in threading.enumerate() if each.name.startswith("sae_lens_flex")]
    assert len(threads) <= 2


def test_the_caller_does_alone_what_no_thread_is_free_for(monkeypatch) -> None:
    expected = loss_and_gradients("every")
    end = threading.Event()
    with ThreadPoolExecutor(1) as busy:
        was_ended = busy.submit(end.wait, 60)
        monkeypatch.setattr(chunks, "_helpers", lambda n: busy)
        results = loss_and_gradients("every")
        end.set()
        assert was_ended.result(), "the caller waited for a thread that was busy"
        assert_same(results, expected)


@pytest.mark.parametrize("where", ["compute", "add"])
def test_an_error_in_a_chunk_is_raised_and_ends_the_others(where) -> None:
    computed = []

    def fail() -> None:
        raise ValueError("chunk 4")

    def compute(chunk: slice) -> Callable[[], None] | None:
        computed.append(chunk)
        if chunk.start == 4:
            if where == "add":
                return fail
            fail()
        return None

    with pytest.raises(ValueError, match="chunk 4"):
        for_each_chunk(compute, 1000, 1, CPU)
    assert len(computed) < 20
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_of_the_caller_hold(mode) -> None:
    expected = loss_and_gradients("every")
    with mode():
        assert_same(loss_and_gradients("every"), expected)


@pytest.mark.parametrize("n_samples", [3, 30])
def test_autograd_and_autocast_are_off_in_every_chunk(n_samples) -> None:
    weight = torch.ones(3, 3, requires_grad=True)
    products = []
    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for_each_chunk(lambda chunk: products.append(weight @ weight), n_samples, 3, CPU)
    assert len(products) == n_samples // 3
    assert not any(product.requires_grad for product in products)
    assert {product.dtype for product in products} == {torch.float32}


def test_autocast_of_the_caller_changes_nothing() -> None:
    expected = loss_and_gradients("every")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(loss_and_gradients("every"), expected)


def test_several_threads_may_call() -> None:
    expected = loss_and_gradients("every")
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(loss_and_gradients, ["every"] * 8, timeout=60):
            assert_same(results, expected)


def _run(queue: "multiprocessing.Queue[float]") -> None:
    queue.put(float(loss_and_gradients("every")[3]))


def test_a_forked_process_computes_too() -> None:
    expected = float(loss_and_gradients("every")[3])
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[float] = context.Queue()
    process = context.Process(target=_run, args=(queue,))
    process.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        process.kill()
        process.join()


def test_one_chunk_takes_no_thread(monkeypatch) -> None:
    monkeypatch.setattr(chunks, "_helpers", lambda n: pytest.fail("took a thread"))
    code = Code(torch.zeros(2, K, dtype=torch.int64), torch.ones(2, K))
    assert torch.equal(
        gather(code, torch.ones(F, D), use_triton=False), torch.full((2, D), K * 1.0)
    )
